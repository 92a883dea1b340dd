"""Tasks of the chapter "A fully connected network": right answers, and the wrong ones that are known."""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dianlib import mlp, training
from dianlib.checks.kinds import (
    DETACHED,
    answer_probes,
    known_answer,
    randn,
    specimen_probes,
    verdict_faults,
    without_gradient,
)
from dianlib.checks.running import Batches, Loss, Momentum, Net, Outcome, Parameters, Probe
from dianlib.checks.task import Fault, Task

LAYER = "mlp: What does one layer compute?"
BEND = "mlp: Why is a network without a bend one layer?"
SOFTMAX = "mlp: Softmax: scores become probabilities"
ENTROPY = "mlp: Cross-entropy: the price of a surprise"
GRADIENT = "mlp: The gradient, by hand and by autograd"
STEP = "mlp: One step downhill: gradient descent"
LOOP = "mlp: The training loop, line by line"
MODULE = "mlp: A network as a module"
NUMBERS = "mlp: Three numbers that name their bug"
WRONG = "mlp: Tempting, but wrong"
CASE = "mlp: The case, solved"


# ----- linear -----------------------------------------------------------------------------------------------


def _linear_probes(generator: torch.Generator) -> list[Probe]:
    def probe(name: str, n: int, n_in: int, n_out: int, core: bool = False) -> Probe:
        def draw(*shape: int) -> Tensor:
            return (randn(generator, *shape) * 4).round() / 2

        args = {"x": draw(n, n_in), "weight": draw(n_out, n_in), "bias": draw(n_out) + 0.25}
        return Probe(name, args, gradients=("x", "weight", "bias"), core=core)

    return [
        probe("two samples, from three numbers to two", 2, 3, 2, core=True),
        probe("seven samples, from five numbers to four", 7, 5, 4, core=True),
        probe("a square layer with as many samples as outputs", 4, 4, 4),
        probe("a single sample", 1, 6, 3),
    ]


def _linear_twin(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    matrix: str = "transposed",
    added: str = "bias",
    cut: bool = False,
) -> Tensor:
    result = x @ weight.T if matrix == "transposed" else x @ weight
    if added == "bias":
        result = result + bias
    elif added == "minus bias":
        result = result - bias
    elif added == "bias for each sample":
        result = result + bias.unsqueeze(1)
    elif added == "first bias":
        result = result + bias[0]
    elif added == "sum of the biases":
        result = result + bias.sum()
    elif added == "mean of the biases":
        result = result + bias.mean()
    return result.detach() if cut else result


def _linear_by_einsum(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.einsum("bi,oi->bo", x, weight) + bias


def _linear_by_loops(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    rows = [[(sample * row).sum() + b for row, b in zip(weight, bias, strict=True)] for sample in x]
    return torch.stack([torch.stack(row) for row in rows])


def _linear_by_addmm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.addmm(bias, x, weight.transpose(0, 1))


LINEAR = Task(
    id="mlp.linear",
    signature="linear(x, weight, bias)",
    points=1,
    reference=mlp.linear,
    probes=_linear_probes,
    twin=_linear_twin,
    forbidden=frozenset({"linear", "bilinear", "conv1d", "scaled_dot_product_attention"}),
    variants=[_linear_by_einsum, _linear_by_loops, _linear_by_addmm],
    hints=(
        "x has shape (B, n_in) and weight has shape (n_out, n_in). Which of the two must be turned for a matrix product?",
        "Output j of a sample is the dot product of the sample with row j of the weight, plus bias j.",
        "return x times the transpose of weight, plus bias (it is added to every row)",
    ),
    mistakes=[
        Fault(
            "linear-weight-not-transposed",
            "You compute x @ weight. It runs only when the layer is square, and then it uses the columns of the weight.",
            "Each row of the weight belongs to one output: compute x @ weight.T.",
            LAYER,
            settings=[{"matrix": "as it is"}],
        ),
        Fault(
            "linear-bias-missing",
            "The bias is not added.",
            "Add bias to the product; it has one number for each output.",
            LAYER,
            settings=[{"added": "nothing"}],
        ),
        Fault(
            "linear-bias-wrong",
            "The bias is added in the wrong way: subtracted, spread over the samples, or only its first number.",
            "Add the vector bias to every row: output j of every sample gets bias j.",
            LAYER,
            settings=[
                {"added": "minus bias"},
                {"added": "bias for each sample"},
                {"added": "first bias"},
                {"added": "sum of the biases"},
                {"added": "mean of the biases"},
            ],
        ),
        Fault("backward-detached", *DETACHED, WRONG, settings=[{"cut": True}], sign=without_gradient),
    ],
)


# ----- relu ---------------------------------------------------------------------------------------------------


def _relu_probes(generator: torch.Generator) -> list[Probe]:
    def probe(name: str, x: Tensor, core: bool = False, gradient: bool = True) -> Probe:
        return Probe(name, {"x": x}, gradients=("x",) if gradient else (), core=core)

    small = (randn(generator, 5) * 8).round() / 4
    small[small == 0] = -0.25
    small[:2] = torch.tensor([-1.5, 2.5])
    large = randn(generator, 4, 6) * 20
    large[0, :2] = torch.tensor([-30.0, 30.0])
    return [
        probe("five numbers", small, core=True),
        probe("a batch of large numbers", large, core=True),
        # At 0 every slope between 0 and 1 is right, so no gradient is asked for.
        probe("zeros among the numbers", torch.tensor([[0.0, -0.0, 3.0], [-2.0, 0.0, 0.5]]), gradient=False),
        probe("three dimensions", randn(generator, 2, 3, 4)),
    ]


_RELU_FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "identity": lambda x: x * 1.0,
    "leaky 0.01": lambda x: torch.where(x > 0, x, 0.01 * x),
    "leaky 0.2": lambda x: torch.where(x > 0, x, 0.2 * x),
    "leaky 0.1": lambda x: torch.where(x > 0, x, 0.1 * x),
    "abs": torch.abs,
    "capped at 6": lambda x: x.clamp(0, 6),
    "capped at 1": lambda x: x.clamp(0, 1),
    "mirrored": lambda x: torch.where(x < 0, x, 0.0 * x),
    "step": lambda x: (x > 0).to(x.dtype) + 0.0 * x,
    "softplus": lambda x: nn.functional.softplus(x),
    "gelu": lambda x: nn.functional.gelu(x),
    "elu": lambda x: nn.functional.elu(x),
    "silu": lambda x: nn.functional.silu(x),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def _relu_twin(x: Tensor, *, form: str = "relu", cut: bool = False) -> Tensor:
    result = _RELU_FORMS[form](x)
    return result.detach() if cut else result


def _relu_in_place(x: Tensor) -> Tensor:
    x[x < 0] = 0
    return x


def _relu_by_clamp(x: Tensor) -> Tensor:
    return x.clamp(min=0)


def _relu_by_maximum(x: Tensor) -> Tensor:
    return torch.maximum(x, torch.tensor(0.0))


def _relu_by_where(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.zeros_like(x))


def _relu_by_absolute_value(x: Tensor) -> Tensor:
    return (x + x.abs()) / 2


def _relu_on_a_copy(x: Tensor) -> Tensor:
    result = x.clone()
    result[result < 0] = 0
    return result


RELU = Task(
    id="mlp.relu",
    signature="relu(x)",
    points=1,
    reference=mlp.relu,
    probes=_relu_probes,
    twin=_relu_twin,
    accepts=[lambda x: x.clamp(min=0.0), lambda x: torch.maximum(x, torch.zeros_like(x))],
    forbidden=frozenset(
        {"relu", "leaky_relu", "relu6", "hardtanh", "threshold", "prelu", "rrelu", "elu", "celu", "selu"}
    ),
    variants=[_relu_by_clamp, _relu_by_maximum, _relu_by_where, _relu_by_absolute_value, _relu_on_a_copy],
    hints=(
        "What should come out for -3, for 0 and for 3?",
        "Positive numbers stay as they are, all others become 0. The shape does not change and the gradient is 1 or 0.",
        "return the larger of x and 0, element by element",
    ),
    mistakes=[
        Fault(
            "net-no-activation",
            "This returns its input: a network with it stays linear, however deep.",
            "Replace negative numbers by 0.",
            BEND,
            settings=[{"form": "identity"}],
        ),
        Fault(
            "relu-leaky",
            "Negative numbers become small negative numbers instead of 0 (a leaky ReLU).",
            "Return exactly 0 for negative numbers.",
            BEND,
            settings=[{"form": "leaky 0.01"}, {"form": "leaky 0.1"}, {"form": "leaky 0.2"}],
        ),
        Fault(
            "relu-absolute-value",
            "Negative numbers change their sign: this is the absolute value.",
            "Return 0 for negative numbers.",
            BEND,
            settings=[{"form": "abs"}],
        ),
        Fault(
            "relu-capped",
            "Large numbers are cut off: two large scores can no longer be told apart.",
            "Leave positive numbers as they are.",
            BEND,
            settings=[{"form": "capped at 6"}, {"form": "capped at 1"}],
        ),
        Fault(
            "relu-mirrored",
            "You keep the negative numbers and remove the positive ones.",
            "Keep x where x > 0.",
            BEND,
            settings=[{"form": "mirrored"}],
        ),
        Fault(
            "relu-step",
            "You return 1 for positive numbers (a step), so their size is lost.",
            "Return x itself where it is positive, for example x * (x > 0).",
            BEND,
            settings=[{"form": "step"}, {"form": "step", "cut": True}],
        ),
        Fault(
            "relu-other-activation",
            "This is another activation function (softplus, GELU, ELU, SiLU, sigmoid or tanh).",
            "ReLU is max(x, 0), element by element.",
            BEND,
            settings=[{"form": form} for form in ("softplus", "gelu", "elu", "silu", "sigmoid", "tanh")],
        ),
        Fault(
            "relu-in-place",
            "You write the zeros into x itself. The caller's tensor is changed, and torch refuses it when x needs a gradient.",
            "Make a new tensor, for example with torch.where or x * (x > 0).",
            BEND,
            implementations=[_relu_in_place],
            sign=lambda probe, got, wanted: "x" in got.changed,
        ),
        Fault("backward-detached", *DETACHED, WRONG, settings=[{"cut": True}], sign=without_gradient),
    ],
)


# ----- softmax --------------------------------------------------------------------------------------------------


def _softmax_probes(generator: torch.Generator) -> list[Probe]:
    def probe(name: str, logits: Tensor, core: bool = False, gradient: bool = True) -> Probe:
        return Probe(name, {"logits": logits}, gradients=("logits",) if gradient else (), core=core)

    small = (randn(generator, 2, 3) * 4).round() / 2
    small[:, 0] += torch.tensor([0.0, 3.0])  # the rows differ, also by a shift
    return [
        probe("two rows of three scores", small, core=True),
        probe(
            "six rows of five scores", randn(generator, 6, 5) * 2 + torch.arange(6.0).unsqueeze(1), core=True
        ),
        probe("as many rows as columns", randn(generator, 4, 4)),
        # Above 709 exp overflows in float64, too. So far from 0 float32 is coarse, so no gradient is asked for.
        probe("scores around 1,000", randn(generator, 3, 4) + 1000, gradient=False),
        probe(
            "scores from -400 to 400", randn(generator, 3, 5) + torch.linspace(-400, 400, 5), gradient=False
        ),
        probe("one row around 0 and one around 300", randn(generator, 2, 4) + torch.tensor([[0.0], [300.0]])),
        probe(
            "one row around 0 and one around -300", randn(generator, 2, 4) - torch.tensor([[0.0], [300.0]])
        ),
    ]


def _softmax_twin(
    logits: Tensor,
    *,
    axis: str = "row",
    shift: str = "row maximum",
    base: str = "e",
    times: int = 1,
    output: str = "probabilities",
    cut: bool = False,
) -> Tensor:
    result = logits
    for _ in range(times):
        if shift == "row maximum":
            result = result - result.max(-1, keepdim=True).values
        elif shift == "largest of all":
            result = result - result.max()
        elif shift == "row minimum":
            result = result - result.min(-1, keepdim=True).values
        elif shift == "row mean":
            result = result - result.mean(-1, keepdim=True)
        elif shift == "none, in float64":
            result = result.double()
        exponentials = (
            2**result if base == "2" else torch.sigmoid(result) if base == "sigmoid" else result.exp()
        )
        sums = {
            "row": exponentials.sum(-1, keepdim=True),
            "column": exponentials.sum(0),
            "all": exponentials.sum(),
        }
        result = exponentials / sums[axis]
    if output == "logarithm":
        result = result.log()
    return result.detach() if cut else result


def _wrong_row_sum(got: Outcome, wanted: Outcome, right_sum: float) -> tuple[int, float] | None:
    """Find the first row of the result that does not have the right sum."""
    result = got.values.get("result")
    right = wanted.values.get("result")
    if not isinstance(result, Tensor) or not isinstance(right, Tensor):
        return None
    if not result.is_floating_point() or result.shape != right.shape:
        return None
    sums = result.double().sum(-1)
    off = ((sums - right_sum).abs() > 1e-3) & sums.isfinite()
    row = int(off.int().argmax())
    return (row, float(sums[row])) if bool(off[row]) else None


def _row_sums(probe: Probe, got: Outcome, wanted: Outcome) -> str:
    found = _wrong_row_sum(got, wanted, 1.0)
    return f"Row {found[0]} of the result sums to {found[1]:.4g}, not to 1." if found else ""


def _softmax_by_log_sum_exp(logits: Tensor) -> Tensor:
    return (logits - torch.logsumexp(logits, dim=-1, keepdim=True)).exp()


def _softmax_by_rows(logits: Tensor) -> Tensor:
    rows = []
    for row in logits:
        exponentials = torch.exp(row - torch.max(row))
        rows.append(exponentials / torch.sum(exponentials))
    return torch.stack(rows)


def _softmax_with_detached_shift(logits: Tensor) -> Tensor:
    exponentials = (logits - logits.detach().amax(1, keepdim=True)).exp()
    return exponentials / exponentials.sum(1, keepdim=True)


def _softmax_in_float64(logits: Tensor) -> Tensor:
    e = (logits.double() - logits.double().max(dim=1)[0].reshape(-1, 1)).exp()
    return e / e.sum(dim=1).reshape(-1, 1)


SOFTMAX_TASK = Task(
    id="mlp.softmax",
    signature="softmax(logits)",
    points=2,
    reference=mlp.softmax,
    probes=_softmax_probes,
    twin=_softmax_twin,
    forbidden=frozenset({"softmax", "log_softmax", "softmin", "scaled_dot_product_attention"}),
    properties=[_row_sums],
    variants=[_softmax_by_log_sum_exp, _softmax_by_rows, _softmax_with_detached_shift, _softmax_in_float64],
    hints=(
        "Add 1,000 to all scores of a row. Should the probabilities change? What does exp(1000) give in float32?",
        "Each row sums to 1, and softmax(z) = softmax(z - max z) row by row.",
        "shifted = logits minus the maximum of each row (keep the dimension)\ne = exp(shifted)\n"
        "return e divided by the sum of each row",
    ),
    mistakes=[
        Fault(
            "softmax-no-max-shift",
            "exp overflows for scores above 88 in float32: infinity divided by infinity is NaN.",
            "Subtract the maximum of each row first; the result does not change.",
            SOFTMAX,
            settings=[{"shift": "none"}, {"shift": "none, in float64"}],
        ),
        Fault(
            "softmax-wrong-shift",
            "You subtract the minimum or the mean of each row; exp still overflows when a row is wide.",
            "Subtract the maximum: then the largest exponent is 0.",
            SOFTMAX,
            settings=[{"shift": "row minimum"}, {"shift": "row mean"}],
        ),
        Fault(
            "softmax-global-max-shift",
            "You subtract the largest score of the whole batch. A row far below it becomes 0 / 0.",
            "Subtract the maximum of each row: max(dim=-1, keepdim=True).",
            SOFTMAX,
            settings=[{"shift": "largest of all"}],
        ),
        Fault(
            "softmax-wrong-axis",
            "The wrong numbers sum to 1: the columns, or the whole batch, instead of each row.",
            "Sum over the last axis, dim=-1: one distribution for each sample.",
            SOFTMAX,
            settings=[{"axis": "column"}, {"axis": "all"}],
        ),
        Fault(
            "softmax-returns-logarithms",
            "The result holds logarithms of probabilities.",
            "Return the probabilities themselves; each row sums to 1.",
            SOFTMAX,
            settings=[{"output": "logarithm"}],
        ),
        Fault(
            "loss-double-softmax",
            "Softmax is applied twice: the probabilities are squeezed together.",
            "Apply it once.",
            NUMBERS,
            settings=[{"times": 2}],
        ),
        Fault(
            "softmax-wrong-base",
            "The exponential is not e^z: another base or a sigmoid stands in its place.",
            "Use torch.exp.",
            SOFTMAX,
            settings=[{"base": "2"}, {"base": "sigmoid"}],
        ),
        Fault("backward-detached", *DETACHED, WRONG, settings=[{"cut": True}], sign=without_gradient),
    ],
)


# ----- cross_entropy ----------------------------------------------------------------------------------------------


def _entropy_probes(generator: torch.Generator, gradients: bool = True) -> list[Probe]:
    def probe(
        name: str, logits: Tensor, targets: list[int], core: bool = False, gradient: bool = True
    ) -> Probe:
        args = {"logits": logits, "targets": torch.tensor(targets)}
        return Probe(name, args, gradients=("logits",) if gradient and gradients else (), core=core)

    small = (randn(generator, 2, 3) * 4).round() / 2
    small[0, 0] += 1
    large = randn(generator, 8, 5) * 3
    large[0, 0] = 9.0  # above the ceiling of a ReLU6
    targets = torch.randint(5, (8,), generator=generator).tolist()
    far = randn(generator, 3, 4)
    far[torch.arange(3), torch.tensor([1, 2, 3])] += 800
    return [
        probe("two samples, three classes", small, [2, 0], core=True),
        probe("eight samples, five classes", large, targets, core=True),
        probe("as many samples as classes", randn(generator, 4, 4) * 2, [1, 3, 0, 3]),
        # The surprise is about 800 here: softmax gives 0, in float64 too, and the log of 0 is minus infinity.
        probe("confident and wrong", far, [0, 0, 0], gradient=False),
        probe("scores around 1,000", randn(generator, 3, 4) + 1000, [3, 1, 1], gradient=False),
    ]


def _entropy_twin(
    logits: Tensor,
    targets: Tensor,
    *,
    shift: str = "row maximum",
    softmaxes: int = 1,
    axis: int = -1,
    inside: float = 0.0,
    scores: str = "as they are",
    reduction: str = "mean",
    sign: float = 1.0,
    log_base: float = math.e,
    cut: bool = False,
) -> Tensor:
    scores_used = logits.clamp(0, 6) if scores == "cut to 0 .. 6" else logits
    for _ in range(softmaxes - 1):
        scores_used = mlp.softmax(scores_used)
    if axis == 0:
        logarithms = scores_used - scores_used.max(0).values
        logarithms = logarithms - logarithms.exp().sum(0).log()
    elif inside:
        logarithms = (mlp.softmax(scores_used) + inside).log()
    elif shift == "none":
        exponentials = scores_used.exp()
        logarithms = (exponentials / exponentials.sum(-1, keepdim=True)).log()
    elif shift == "softmax, then log":
        logarithms = mlp.softmax(scores_used).log()
    elif shift == "none, log of the sum":
        logarithms = scores_used - scores_used.exp().sum(-1, keepdim=True).log()
    elif shift == "none, in float64":
        logarithms = scores_used - scores_used.double().exp().sum(-1, keepdim=True).log()
    else:
        shifted = scores_used - scores_used.max(-1, keepdim=True).values
        logarithms = shifted - shifted.exp().sum(-1, keepdim=True).log()
    losses = -sign * logarithms[torch.arange(len(targets)), targets] / math.log(log_base)
    n, n_classes = logits.shape
    total = losses.sum()
    result = {
        "mean": total / n,
        "sum": total,
        "mean over classes too": total / (n * n_classes),
        "none": losses,
    }[reduction]
    return result.detach() if cut else result


def _one_hot(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.one_hot(targets, logits.shape[-1]).to(logits.dtype)


def _squared_error(reduce: str) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        squares = (mlp.softmax(logits) - _one_hot(logits, targets)) ** 2
        return squares.mean() if reduce == "mean" else squares.sum(-1).mean()

    return loss


def _linear_in_logits(form: str) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        picked = (logits * _one_hot(logits, targets)).sum(-1)
        return {
            "minus": -picked.mean(),
            "absolute": picked.abs().mean(),
            "mean": -picked.sum() / logits.numel(),
        }[form]

    return loss


def _capped_by_epsilon(probe: Probe, got: Outcome, wanted: Outcome) -> bool:
    """A loss that stops at -log(epsilon) where it should be about 800, and is otherwise right there."""
    value = got.values.get("result")
    if probe.name != "confident and wrong" or not isinstance(value, Tensor) or value.dim() != 0:
        return False
    power = float(value) / math.log(10)
    return (3.5 < power < 45.5 and abs(power - round(power)) < 1e-3) or abs(
        float(value) + math.log(1.1754944e-38)
    ) < 0.01


def _wrong_formula(does: str, todo: str, **forms: Any) -> Fault:
    return Fault("ce-wrong-formula", does, todo, ENTROPY, **forms)


def _entropy_by_log_sum_exp(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits.logsumexp(-1) - logits[torch.arange(len(targets)), targets]).mean()


def _entropy_by_loop(logits: Tensor, targets: Tensor) -> Tensor:
    total = torch.zeros(())
    for row, target in zip(logits, targets, strict=True):
        shifted = row - row.max()
        total = total - (shifted[target] - shifted.exp().sum().log())
    return total / len(targets)


def _entropy_by_one_hot(logits: Tensor, targets: Tensor) -> Tensor:
    shifted = logits - logits.max(dim=1, keepdim=True)[0]
    logarithms = shifted - torch.log(torch.exp(shifted).sum(1, keepdim=True))
    return -(torch.eye(logits.shape[1])[targets] * logarithms).sum() / logits.shape[0]


def _entropy_after_log_softmax(logits: Tensor, targets: Tensor) -> Tensor:
    # log softmax of log softmax changes nothing
    for _ in range(2):
        logits = logits - torch.logsumexp(logits, -1, keepdim=True)
    return -logits.gather(1, targets[:, None]).mean()


CROSS_ENTROPY = Task(
    id="mlp.cross_entropy",
    signature="cross_entropy(logits, targets)",
    points=3,
    reference=mlp.cross_entropy,
    probes=_entropy_probes,
    twin=_entropy_twin,
    forbidden=frozenset(
        {"cross_entropy", "nll_loss", "log_softmax", "softmax", "cross_entropy_loss", "kl_div"}
    ),
    variants=[_entropy_by_log_sum_exp, _entropy_by_loop, _entropy_by_one_hot, _entropy_after_log_softmax],
    hints=(
        "The network gives the true class probability 0.5. What is the loss of that sample? And with probability 1?",
        "The loss of a sample is -log of the probability of its true class. The result is the mean over the B samples, "
        "and log softmax(z) = z - max z - log(sum of exp(z - max z)) never takes the log of 0.",
        "shifted = logits minus the maximum of each row\nlogs = shifted minus log of the row sums of exp(shifted)\n"
        "take from each row the entry of its target\nreturn minus their mean",
    ),
    mistakes=[
        _wrong_formula(
            "This is the squared distance between probabilities and one-hot targets, not the cross-entropy.",
            "Take minus the logarithm of the probability of the true class.",
            implementations=[_squared_error("mean"), _squared_error("sum")],
        ),
        _wrong_formula(
            "The raw scores of the true classes are averaged, without a logarithm of softmax: the loss has no lower end.",
            "Turn scores into logarithms of probabilities first (log softmax).",
            implementations=[_linear_in_logits(form) for form in ("minus", "absolute", "mean")],
        ),
        _wrong_formula(
            "Your loss is exactly 1/C of the right one: you averaged over the classes as well as over the samples.",
            "Divide by the number of samples B only.",
            settings=[{"reduction": "mean over classes too"}],
        ),
        _wrong_formula(
            "Your loss is exactly B times the right one: it is a sum over the samples.",
            "Divide the sum by the number of samples B.",
            settings=[{"reduction": "sum"}],
        ),
        _wrong_formula(
            "A small number inside the logarithm caps the loss: a confident wrong answer costs no more than -log(epsilon).",
            "Use log softmax in one step, which needs no epsilon: z - max z - log(sum of exp(z - max z)).",
            settings=[{"inside": 10.0**-power} for power in (5, 6, 7, 8, 9, 10, 12, 15)],
            sign=_capped_by_epsilon,
        ),
        _wrong_formula(
            "The scores are cut to 0 .. 6 before the loss: scores outside cannot be told apart.",
            "Use the logits as they are.",
            settings=[{"scores": "cut to 0 .. 6"}],
        ),
        Fault(
            "loss-double-softmax",
            "Softmax is applied twice. For C classes the loss cannot fall below -log(e / (e + C - 1)), which is 1.4612 for ten.",
            "Pass logits on; apply softmax, or log softmax, once.",
            NUMBERS,
            settings=[{"softmaxes": 2}],
        ),
        Fault(
            "softmax-no-max-shift",
            "exp overflows for scores above 88, or the log of a probability that rounds to 0 gives infinity.",
            "Use log softmax in one step: z - max z - log(sum of exp(z - max z)).",
            SOFTMAX,
            settings=[
                {"shift": "none"},
                {"shift": "softmax, then log"},
                {"shift": "none, log of the sum"},
                {"shift": "none, in float64"},
            ],
        ),
        Fault(
            "softmax-wrong-axis",
            "The softmax runs over the samples (dim 0) instead of over the classes.",
            "Use the last axis: every sample has its own distribution.",
            SOFTMAX,
            settings=[{"axis": 0}],
        ),
        Fault(
            "ce-sign",
            "The sign is wrong: the loss is negative, and training would make it worse.",
            "Take minus the logarithm.",
            ENTROPY,
            settings=[{"sign": -1.0}],
        ),
        Fault(
            "ce-log-base",
            "The logarithm has another base than e (2 or 10).",
            "Use the natural logarithm, torch.log.",
            ENTROPY,
            settings=[{"log_base": 2.0}, {"log_base": 10.0}],
        ),
        Fault(
            "ce-not-reduced",
            "You return one loss for each sample.",
            "Return their mean, one number.",
            ENTROPY,
            settings=[{"reduction": "none"}],
        ),
        Fault("backward-detached", *DETACHED, WRONG, settings=[{"cut": True}], sign=without_gradient),
    ],
)


# ----- cross_entropy_gradient ------------------------------------------------------------------------------------------


def _entropy_gradient_twin(
    logits: Tensor,
    targets: Tensor,
    *,
    reduction: str = "mean",
    sign: float = 1.0,
    probabilities: str = "softmax",
    target: str = "one-hot",
    product: str = "none",
) -> Tensor:
    p = {
        "softmax": lambda: mlp.softmax(logits),
        "no shift": lambda: logits.exp() / logits.exp().sum(-1, keepdim=True),
        "no shift, in float64": lambda: logits.double().exp() / logits.double().exp().sum(-1, keepdim=True),
        "over samples": lambda: mlp.softmax(logits.T).T,
        "twice": lambda: mlp.softmax(mlp.softmax(logits)),
        "logits": lambda: logits,
    }[probabilities]()
    onehot = _one_hot(logits, targets)
    if target == "missing":
        gradient = p
    elif target == "true class only":
        gradient = (p - 1) * onehot
    else:
        gradient = p - onehot
    if product == "slope of softmax":
        gradient = gradient * p * (1 - p)
    elif product == "squared error":
        gradient = 2 * (gradient * p - p * (gradient * p).sum(-1, keepdim=True))
    n, n_classes = logits.shape
    divisor = {"mean": n, "sum": 1, "mean over classes too": n * n_classes, "classes": n_classes}[reduction]
    return sign * gradient / divisor


def _gradient_row_sums(probe: Probe, got: Outcome, wanted: Outcome) -> str:
    found = _wrong_row_sum(got, wanted, 0.0)
    return f"Row {found[0]} of the gradient sums to {found[1]:.4g}; each row must sum to 0." if found else ""


def _gradient_by_one_hot(logits: Tensor, targets: Tensor) -> Tensor:
    e = torch.exp(logits - logits.max(1, keepdim=True).values)
    return (e / e.sum(1, keepdim=True) - torch.eye(logits.shape[1])[targets]) / logits.shape[0]


def _gradient_by_loops(logits: Tensor, targets: Tensor) -> Tensor:
    gradient = torch.empty_like(logits)
    for i, row in enumerate(logits):
        e = (row - row.max()).exp()
        for c in range(len(row)):
            gradient[i, c] = (e[c] / e.sum() - float(c == targets[i])) / len(logits)
    return gradient


GRADIENT_TASK = Task(
    id="mlp.cross_entropy_gradient",
    signature="cross_entropy_gradient(logits, targets)",
    points=3,
    reference=mlp.cross_entropy_gradient,
    probes=lambda generator: _entropy_probes(generator, gradients=False),
    twin=_entropy_gradient_twin,
    forbidden=frozenset({"backward", "grad", "softmax", "log_softmax", "cross_entropy", "nll_loss"}),
    properties=[_gradient_row_sums],
    variants=[_gradient_by_one_hot, _gradient_by_loops],
    hints=(
        "If the score of the true class grows a little, does the loss rise or fall? And for another class?",
        "For one sample the gradient is softmax(z) minus the one-hot target: each row sums to 0. The mean adds a factor 1 / B.",
        "p = softmax(logits)\nsubtract 1 from each row at its target\nreturn p / B",
    ),
    mistakes=[
        Fault(
            "ce-gradient-not-averaged",
            "This is the gradient of the sum: it is B times too large, so the step size depends on the batch size.",
            "Divide by the number of samples B, because the loss is a mean.",
            GRADIENT,
            settings=[{"reduction": "sum"}],
        ),
        Fault(
            "ce-gradient-wrong-divisor",
            "You divide by the number of classes (alone, or as well as by B).",
            "Divide by the number of samples B only.",
            GRADIENT,
            settings=[{"reduction": "mean over classes too"}, {"reduction": "classes"}],
        ),
        Fault(
            "ce-gradient-sign",
            "The sign is turned: this is one-hot minus softmax, and a step along minus this gradient makes the loss larger.",
            "Use softmax minus one-hot.",
            GRADIENT,
            settings=[{"sign": -1.0}],
        ),
        Fault(
            "ce-gradient-no-softmax",
            "The logits themselves stand where the probabilities belong.",
            "Apply softmax to the logits first.",
            GRADIENT,
            settings=[{"probabilities": "logits"}],
        ),
        Fault(
            "ce-gradient-target-missing",
            "The one-hot target is missing, or only the entry of the true class is filled.",
            "Subtract 1 at the true class and keep the probabilities of all other classes.",
            GRADIENT,
            settings=[{"target": "missing"}, {"target": "true class only"}],
        ),
        Fault(
            "softmax-no-max-shift",
            "exp overflows for scores above 88: infinity divided by infinity is NaN.",
            "Subtract the maximum of each row before exp.",
            SOFTMAX,
            settings=[{"probabilities": "no shift"}, {"probabilities": "no shift, in float64"}],
        ),
        Fault(
            "softmax-wrong-axis",
            "The softmax runs over the samples instead of over the classes.",
            "Normalise each row.",
            SOFTMAX,
            settings=[{"probabilities": "over samples"}],
        ),
        Fault(
            "loss-double-softmax",
            "Softmax is applied twice.",
            "Apply it once to the logits.",
            NUMBERS,
            settings=[{"probabilities": "twice"}],
        ),
        Fault(
            "ce-gradient-of-squared-error",
            "The slope of the softmax is multiplied in again; with cross-entropy it cancels.",
            "For cross-entropy the gradient with respect to the logits is softmax minus one-hot, nothing else.",
            GRADIENT,
            settings=[{"product": "slope of softmax"}, {"product": "squared error"}],
        ),
    ],
)


# ----- sgd_step ---------------------------------------------------------------------------------------------------


def _step_probes(generator: torch.Generator) -> list[Probe]:
    def probe(
        name: str, shapes: list[tuple[int, ...]], lr: float, without: int = -1, core: bool = False
    ) -> Probe:
        values = tuple((randn(generator, *shape) * 4).round() / 2 for shape in shapes)
        gradients = tuple(
            None if number == without else (randn(generator, *shape) * 4).round() + 0.5
            for number, shape in enumerate(shapes)
        )
        return Probe(name, {"parameters": Parameters(values, gradients), "lr": lr}, core=core)

    return [
        probe("one vector, step 0.1", [(3,)], 0.1, core=True),
        probe("a layer and its bias, step 0.01", [(4, 3), (4,)], 0.01, core=True),
        probe("the second of three tensors has no gradient", [(2, 2), (3,), (2,)], 0.5, without=1),
    ]


def _step_twin(
    parameters: Iterable[Tensor],
    lr: float,
    *,
    sign: float = -1.0,
    rate: str = "lr",
    effect: str = "in place",
    missing: str = "skipped",
    gradient: str = "as it is",
) -> None:
    parameters = list(parameters)
    for number, parameter in enumerate(parameters):
        if parameter.grad is None:
            if missing == "error":
                raise TypeError("unsupported operand type(s) for *: 'float' and 'NoneType'")
            if missing == "stop":
                return
            continue
        step = parameter.grad
        if gradient == "sign":
            step = step.sign()
        elif gradient == "length 1":
            step = step / step.norm()
        factor = {"lr": lr, "forgotten": 1.0, "divided": 1 / lr, "over the tensors": lr / len(parameters)}[
            rate
        ]
        if effect == "in place" or (effect == "first tensor only" and number == 0):
            with torch.no_grad():
                parameter += sign * factor * step
        elif effect == "replaced":
            with torch.no_grad():
                parameter.copy_(sign * factor * step)


def _step_in_graph(parameters: Iterable[Tensor], lr: float) -> None:
    for parameter in parameters:
        if parameter.grad is not None:
            parameter -= lr * parameter.grad


def _step_by_data(parameters: Iterable[Tensor], lr: float) -> None:
    for p in parameters:
        if p.grad is None:
            continue
        p.data = p.data - lr * p.grad.data


def _step_by_subtraction(parameters: Iterable[Tensor], lr: float) -> None:
    with torch.no_grad():
        for p in list(parameters):
            if p.grad is not None:
                p.sub_(p.grad, alpha=lr)


def _step_that_also_zeroes(parameters: Iterable[Tensor], lr: float) -> None:
    with torch.no_grad():
        for p in parameters:
            if p.grad is not None:
                p.copy_(p - lr * p.grad)
                p.grad.zero_()


SGD_STEP = Task(
    id="mlp.sgd_step",
    signature="sgd_step(parameters, lr)",
    points=2,
    reference=mlp.sgd_step,
    probes=_step_probes,
    twin=_step_twin,
    forbidden=frozenset({"step", "sgd"}),
    variants=[_step_by_data, _step_by_subtraction, _step_that_also_zeroes],
    hints=(
        "The gradient points uphill. Which way do you go, and how far?",
        "Every parameter changes in place by -lr times its gradient. A parameter without a gradient stays. "
        "The change is no part of the computation that is differentiated.",
        "without gradient tracking, for each parameter with a gradient:\n    parameter -= lr * parameter.grad   # in place",
    ),
    mistakes=[
        Fault(
            "sgd-uphill",
            "You add the gradient, so the loss grows.",
            "Subtract lr times the gradient.",
            STEP,
            settings=[{"sign": 1.0}],
        ),
        Fault(
            "sgd-not-in-place",
            "No parameter changes. `p = p - lr * p.grad`, for example, makes a new tensor and gives it the name p, "
            "while the network keeps the old one; and a generator of parameters is empty after one loop over it.",
            "Change the tensor itself: p -= lr * p.grad, inside torch.no_grad().",
            STEP,
            settings=[{"effect": "none"}],
        ),
        Fault(
            "sgd-in-graph",
            "The change is made while autograd is watching, and torch refuses to change a trainable leaf in place.",
            "Put the step inside `with torch.no_grad():`.",
            STEP,
            implementations=[_step_in_graph],
            sign=lambda probe, got, wanted: got.error == "RuntimeError" and "leaf Variable" in got.error_text,
        ),
        Fault(
            "sgd-lr-ignored",
            "The step size is not lr: it is left out, divided by, or shared among the tensors.",
            "Multiply each gradient with lr.",
            STEP,
            settings=[{"rate": "forgotten"}, {"rate": "divided"}, {"rate": "over the tensors"}],
        ),
        Fault(
            "sgd-none-grad",
            "A parameter without a gradient (grad is None) stops the step.",
            "Skip such a parameter and go on with the next.",
            STEP,
            settings=[{"missing": "error"}, {"missing": "stop"}],
        ),
        Fault(
            "sgd-first-tensor-only",
            "Only the first tensor changes.",
            "Go through all parameters; no return inside the loop.",
            STEP,
            settings=[{"effect": "first tensor only"}],
        ),
        Fault(
            "sgd-replaced",
            "The parameter is replaced by the step itself; its old value is lost.",
            "Subtract from the old value.",
            STEP,
            settings=[{"effect": "replaced"}],
        ),
        Fault(
            "sgd-gradient-rescaled",
            "Only the direction of the gradient is used (its sign, or length 1).",
            "Use the gradient as it is.",
            STEP,
            settings=[{"gradient": "sign"}, {"gradient": "length 1"}],
        ),
    ],
)


# ----- MLP ----------------------------------------------------------------------------------------------------------


def _network_probes(generator: torch.Generator) -> list[Probe]:
    def probe(name: str, sizes: list[int], n: int, core: bool = False) -> Probe:
        state: list[Tensor] = []
        for n_in, n_out in pairwise(sizes):
            weight = randn(generator, n_out, n_in)
            # A symmetric square matrix is the same for x @ W and x @ W.T, so that both ways of storing it are right.
            state += [(weight + weight.T) / 2 if n_in == n_out else weight, randn(generator, n_out)]
        x = (randn(generator, n, sizes[0]) * 4).round() / 2
        return Probe(
            name, {"x": x}, build=(sizes,), state=tuple(state), gradients=("parameters",), calls=2, core=core
        )

    return [
        probe("one hidden layer", [3, 5, 4], 2, core=True),
        probe("two hidden layers", [6, 8, 7, 4], 9, core=True),
        probe("three hidden layers of one size", [4, 6, 6, 6, 3], 5),
        probe("no hidden layer", [5, 3], 4),
    ]


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "none": lambda x: x,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "leaky": lambda x: torch.where(x > 0, x, 0.01 * x),
    "gelu": nn.functional.gelu,
}


class _FaultyMLP(nn.Module):
    def __init__(
        self,
        sizes: Sequence[int],
        *,
        activation: str = "relu",
        bends: str = "between",
        output: str = "logits",
        storage: str = "ModuleList",
        bias: bool = True,
        cut: bool = False,
    ) -> None:
        super().__init__()
        self.sizes, self.storage, self.activation, self.output, self.cut = (
            sizes,
            storage,
            activation,
            output,
            cut,
        )
        layers = [nn.Linear(n_in, n_out, bias=bias) for n_in, n_out in pairwise(sizes)]
        if storage == "shared":
            first_of_shape: dict[torch.Size, nn.Linear] = {}
            layers = [first_of_shape.setdefault(layer.weight.shape, layer) for layer in layers]
        self.bent = {
            "between": range(len(layers) - 1),
            "everywhere": range(len(layers)),
            "after the first only": range(min(1, len(layers) - 1)),
            "before the last only": range(max(0, len(layers) - 2), len(layers) - 1),
        }[bends]
        if storage != "made in forward":
            self.layers: Any = layers if storage == "list" else nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        made = self.storage == "made in forward"
        layers = [nn.Linear(a, b) for a, b in pairwise(self.sizes)] if made else list(self.layers)
        for index, layer in enumerate(layers):
            x = layer(x.detach() if self.cut else x)
            if index in self.bent:
                x = _ACTIVATIONS[self.activation](x)
        if self.output == "log softmax":
            return x.log_softmax(-1)
        return {"logits": lambda: x, "softmax": lambda: x.softmax(-1), "sigmoid": lambda: x.sigmoid()}[
            self.output
        ]()


def _lost_layers(probe: Probe, got: Outcome, wanted: Outcome) -> bool:
    first, second = got.values.get("result"), got.values.get("result of the second call")
    unstable = isinstance(first, Tensor) and isinstance(second, Tensor) and not torch.equal(first, second)
    count = got.values.get("number of parameters")
    return count == 0 or (unstable and count != wanted.values.get("number of parameters"))


def _superposition(probe: Probe, got: Outcome, wanted: Outcome) -> str:
    count, right = got.values.get("number of parameters"), wanted.values.get("number of parameters")
    if count != right:
        return f"parameters() finds {count} numbers; this network has {right}."
    if got.random:
        return "Two calls with the same input give different results. Is there a Dropout in forward?"
    return ""


class _SequentialNetwork(torch.nn.Module):
    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        layers: list[torch.nn.Module] = []
        for i in range(len(sizes) - 1):
            layers.append(torch.nn.Linear(sizes[i], sizes[i + 1]))
            layers.append(torch.nn.ReLU())
        self.net = torch.nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Any:
        return self.net(x)


class _NetworkOfParameters(torch.nn.Module):
    # weights stored as (n_in, n_out), for x @ W
    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        pairs = [(sizes[i], sizes[i + 1]) for i in range(len(sizes) - 1)]
        self.weights = torch.nn.ParameterList(torch.randn(a, b) / a**0.5 for a, b in pairs)
        self.biases = torch.nn.ParameterList(torch.zeros(b) for _, b in pairs)

    def forward(self, x: Tensor) -> Tensor:
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = x @ weight + bias
            if i < len(self.weights) - 1:
                x = x.clamp(min=0)
        return x


class _NetworkWithLogSoftmax(torch.nn.Module):
    # logarithms of probabilities are logits, too
    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.names = [f"layer{i}" for i in range(len(sizes) - 1)]
        for i, name in enumerate(self.names):
            setattr(self, name, torch.nn.Linear(sizes[i], sizes[i + 1]))

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names[:-1]:
            x = torch.nn.functional.relu(getattr(self, name)(x))
        logits: Tensor = getattr(self, self.names[-1])(x)
        return torch.log_softmax(logits, dim=-1)


MLP_TASK = Task(
    id="mlp.MLP",
    signature="MLP(sizes)",
    points=4,
    reference=mlp.MLP,
    probes=_network_probes,
    twin=_FaultyMLP,
    # Logarithms of probabilities are logits too: softmax and the loss give the same for them.
    accepts=[lambda sizes: _FaultyMLP(sizes, output="log softmax")],
    forbidden=frozenset({"MLP"}),
    properties=[_superposition],
    variants=[_SequentialNetwork, _NetworkOfParameters, _NetworkWithLogSoftmax],
    hints=(
        "How many layers has MLP([784, 128, 256, 10]), and after which of them comes a ReLU?",
        "One Linear for each neighbouring pair of sizes, ReLU between them, none after the last. parameters() finds all of them.",
        "in __init__: layers = nn.ModuleList of nn.Linear(a, b) for each neighbouring pair (a, b) of sizes\n"
        "in forward: for all but the last layer: x = relu(layer(x))\nreturn last layer(x)",
    ),
    mistakes=[
        Fault(
            "net-no-activation",
            "There is no ReLU: all layers together are one linear map, f(x + y) = f(x) + f(y) - f(0).",
            "Apply ReLU to the output of every layer but the last.",
            BEND,
            settings=[{"activation": "none"}],
        ),
        Fault(
            "net-activation-missing-somewhere",
            "Only one of the hidden layers is followed by a ReLU; two layers without one between them are a single linear map.",
            "Apply ReLU after every layer but the last.",
            BEND,
            settings=[{"bends": "after the first only"}, {"bends": "before the last only"}],
        ),
        Fault(
            "net-relu-on-logits",
            "A ReLU follows the last layer, too: negative scores become 0 and lose their gradient.",
            "Return the last layer's output as it is.",
            MODULE,
            settings=[{"bends": "everywhere"}],
        ),
        Fault(
            "net-other-activation",
            "Another activation than ReLU stands between the layers.",
            "Use ReLU, max(x, 0).",
            BEND,
            settings=[{"activation": name} for name in ("sigmoid", "tanh", "leaky", "gelu")],
        ),
        Fault(
            "loss-double-softmax",
            "The network returns probabilities. The cross-entropy applies softmax again, and the loss stays above 1.46 for ten classes.",
            "Return logits, the last layer's output.",
            NUMBERS,
            settings=[{"output": "softmax"}, {"output": "sigmoid"}],
        ),
        Fault(
            "module-created-or-lost-in-forward",
            "parameters() does not find your layers: they sit in a plain Python list, or they are made anew in every forward call.",
            "Create the layers in __init__ and keep them in an nn.ModuleList (or nn.Sequential).",
            MODULE,
            settings=[{"storage": "list"}, {"storage": "made in forward"}],
            sign=_lost_layers,
        ),
        Fault(
            "layers-shared-by-mistake",
            "Layers of the same shape are one and the same object: they share their weights.",
            "Create a new nn.Linear for each pair of sizes.",
            MODULE,
            settings=[{"storage": "shared"}],
        ),
        Fault(
            "net-bias-missing",
            "The layers have no bias.",
            "Use nn.Linear with its bias, or add one yourself.",
            LAYER,
            settings=[{"bias": False}],
        ),
        Fault(
            "backward-detached",
            "The numbers are right, but no gradient reaches the first layers: the hidden values leave autograd on the way.",
            "Avoid torch.no_grad(), .detach(), .data, .numpy() and torch.tensor(...) inside forward.",
            WRONG,
            settings=[{"cut": True}],
            sign=without_gradient,
        ),
    ],
)


# ----- train_epoch ------------------------------------------------------------------------------------------------------


def _epoch_probes(generator: torch.Generator) -> list[Probe]:
    def probe(
        name: str, sizes: list[int], n: int, size: int, loss: str, dropout: float = 0.0, core: bool = False
    ) -> Probe:
        weights = tuple(randn(generator, n_out, n_in) / 2 for n_in, n_out in pairwise(sizes))
        model = Net(weights, tuple(randn(generator, len(weight)) for weight in weights), dropout)
        x = randn(generator, n, sizes[0])
        y = torch.randint(sizes[-1], (n,), generator=generator)
        targets = y if loss == "cross_entropy" else randn(generator, n, sizes[-1])
        # Later samples are harder: a wrongly weighted mean of the losses shows.
        x = x * torch.linspace(0.5, 2.5, n).unsqueeze(1)
        batches = Batches(tuple((x[i : i + size], targets[i : i + size]) for i in range(0, n, size)))
        args = {"model": model, "batches": batches, "optimizer": Momentum(0.05), "loss_fn": Loss(loss)}
        return Probe(name, args, calls=2, core=core)

    return [
        probe("ten samples in batches of four, two epochs", [3, 5, 3], 10, 4, "cross_entropy", core=True),
        probe(
            "a network with dropout that comes in evaluation mode", [4, 12, 3], 14, 6, "cross_entropy", 0.5
        ),
        probe("another loss function", [3, 6, 2], 9, 4, "mse_loss"),
        probe("a single batch", [3, 4, 3], 5, 5, "cross_entropy"),
    ]


def _epoch_twin(
    model: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    *,
    order: str = "zero, backward, step",
    returned: str = "mean over samples",
    mode: str = "train",
    used: str = "all",
    outputs: str = "logits",
    stepping: str = "given optimizer",
    loss_from: str = "loss_fn",
) -> float:
    model.train(mode == "train")
    group = optimizer.param_groups[0]
    if stepping == "new optimizer":
        optimizer = torch.optim.SGD(model.parameters(), lr=group["lr"], momentum=group["momentum"])
    elif stepping == "plain gradient":
        optimizer = torch.optim.SGD(model.parameters(), lr=group["lr"])
    losses: list[float] = []
    sizes: list[int] = []
    if order == "zero once before":
        optimizer.zero_grad()
    for inputs, targets in batches:
        logits = model(inputs)
        logits = logits.softmax(-1) if outputs == "softmax" else logits
        classes = targets.dim() == 1 or loss_from == "cross-entropy"
        own = nn.functional.cross_entropy if classes else nn.functional.l1_loss
        loss = own(logits, targets) if loss_from != "loss_fn" else loss_fn(logits, targets)
        if order == "zero, backward, step":
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        elif order in ("backward, step", "zero once before", "zero once after"):
            loss.backward()
            optimizer.step()
        elif order == "backward, zero, step":
            loss.backward()
            optimizer.zero_grad(set_to_none=False)
            optimizer.step()
        elif order == "step, zero, backward":
            optimizer.step()
            optimizer.zero_grad()
            loss.backward()
        elif order == "zero, backward":
            optimizer.zero_grad()
            loss.backward()
        losses.append(float(loss))
        sizes.append(len(inputs))
        if used == "first batch only":
            break
    if order == "zero once after":
        optimizer.zero_grad()
    total = sum(loss * size for loss, size in zip(losses, sizes, strict=True))
    return {
        "mean over samples": total / sum(sizes),
        "mean over batches": sum(losses) / len(losses),
        "last batch": losses[-1],
        "sum over batches": sum(losses),
        "sum over samples": total,
        "sum of means over samples": sum(losses) / sum(sizes),
        "sum over samples by batches": total / len(losses),
    }[returned]


def _epoch_zeroing_after_the_step(model: Any, batches: Any, optimizer: Any, loss_fn: Any) -> float:
    model.train()
    model.zero_grad()
    total, count = 0.0, 0
    for x, y in batches:
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        total += loss.item() * x.size(0)
        count += x.size(0)
    return total / count


def _epoch_returning_a_tensor(model: Any, batches: Any, optimizer: Any, loss_fn: Any) -> Tensor:
    model.train(True)
    losses = []
    for x, y in batches:
        outputs = model(x)
        for parameter in model.parameters():
            parameter.grad = None
        loss = loss_fn(outputs, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().expand(len(y)))
    return torch.cat(losses).mean()


TRAIN_EPOCH = Task(
    id="mlp.train_epoch",
    often_together=[
        frozenset({"train-missing-zero-grad", "metrics-len-loader-divisor"}),
        frozenset({"train-in-evaluation-mode", "metrics-len-loader-divisor"}),
    ],
    signature="train_epoch(model, batches, optimizer, loss_fn)",
    points=4,
    reference=training.train_epoch,
    probes=_epoch_probes,
    twin=_epoch_twin,
    forbidden=frozenset({"train_epoch", "fit"}),
    variants=[_epoch_zeroing_after_the_step, _epoch_returning_a_tensor],
    hints=(
        "What does parameter.grad hold after two calls of backward() without anything between them?",
        "For each batch: old gradients away, forward, loss, backward, step. The result weights each batch's loss with its size. "
        "The model is in training mode.",
        "model.train(); total = 0; count = 0\nfor inputs, targets in batches:\n    optimizer.zero_grad()\n"
        "    loss = loss_fn(model(inputs), targets)\n    loss.backward()\n    optimizer.step()\n"
        "    total += loss * number of inputs; count += number of inputs\nreturn total / count as a float",
    ),
    mistakes=[
        Fault(
            "train-missing-zero-grad",
            "The gradients are never set to zero: every step uses the sum of all gradients so far.",
            "Call optimizer.zero_grad() once for each step, before backward() or after step().",
            LOOP,
            settings=[
                {"order": "backward, step"},
                {"order": "zero once before"},
                {"order": "zero once after"},
            ],
        ),
        Fault(
            "train-step-before-backward",
            "The weights change between a forward pass and its backward(): step() comes too early.",
            "For each batch in turn: forward, loss, backward(), then step().",
            LOOP,
            settings=[{"order": "step, zero, backward"}],
            sign=lambda probe, got, wanted: "modified by an inplace operation" in got.error_text,
        ),
        Fault(
            "train-no-step",
            "The weights never change: step() is missing, or zero_grad() stands between backward() and step() and "
            "throws the fresh gradient away.",
            "Let optimizer.step() follow backward() directly.",
            LOOP,
            settings=[{"order": "zero, backward"}, {"order": "backward, zero, step"}, {"order": "nothing"}],
        ),
        Fault(
            "metrics-len-loader-divisor",
            "The returned loss is the mean of the batches' losses: the short last batch counts as much as a full one.",
            "Add up loss * batch size and divide by the number of samples.",
            LOOP,
            settings=[{"returned": "mean over batches"}],
        ),
        Fault(
            "metrics-last-batch-only",
            "The returned loss is the one of the last batch.",
            "Add up over all batches, starting before the loop.",
            LOOP,
            settings=[{"returned": "last batch"}],
        ),
        Fault(
            "train-loss-not-a-mean",
            "The returned loss is a sum, or a sum of means divided by the wrong count.",
            "Add up loss * batch size, then divide by the number of samples once.",
            LOOP,
            settings=[
                {"returned": "sum over batches"},
                {"returned": "sum over samples"},
                {"returned": "sum of means over samples"},
                {"returned": "sum over samples by batches"},
            ],
        ),
        Fault(
            "train-in-evaluation-mode",
            "The model stays in evaluation mode, so dropout does nothing while you train.",
            "Call model.train() at the beginning.",
            LOOP,
            settings=[{"mode": "eval"}],
        ),
        Fault(
            "train-first-batch-only",
            "The loop ends after the first batch: a return or break stands inside it.",
            "Return after the loop.",
            LOOP,
            settings=[{"used": "first batch only"}],
        ),
        Fault(
            "loss-double-softmax",
            "Softmax is applied to the model's output before the loss, which applies it again.",
            "Give the logits to loss_fn.",
            NUMBERS,
            settings=[{"outputs": "softmax"}],
        ),
        Fault(
            "optimizer-recreated-each-epoch",
            "A new optimizer is made in each call, so momentum starts at zero again (or there is none).",
            "Use the optimizer that you are given; it remembers its state between epochs.",
            LOOP,
            settings=[{"stepping": "new optimizer"}, {"stepping": "plain gradient"}],
        ),
        Fault(
            "train-loss-fn-ignored",
            "Another loss than loss_fn is used.",
            "Compute the loss with the function that you are given.",
            LOOP,
            settings=[{"loss_from": "own"}, {"loss_from": "cross-entropy"}],
        ),
    ],
)


# ----- grade this: implementations of softmax as source text ----------------------------------------------------------------


def _right_shifted(logits: Tensor) -> Tensor:
    e = torch.exp(logits - logits.max(dim=-1, keepdim=True).values)
    return e / e.sum(dim=-1, keepdim=True)


def _right_by_rows(logits: Tensor) -> Tensor:
    rows = []
    for row in logits:
        e = (row - row.max()).exp()
        rows.append(e / e.sum())
    return torch.stack(rows)


def _right_by_log_sum_exp(logits: Tensor) -> Tensor:
    return (logits - torch.logsumexp(logits, dim=-1, keepdim=True)).exp()


def _wrong_no_shift(logits: Tensor) -> Tensor:
    e = logits.exp()
    return e / e.sum(dim=-1, keepdim=True)


def _wrong_axis(logits: Tensor) -> Tensor:
    e = (logits - logits.max()).exp()
    return e / e.sum(dim=0)


def _wrong_over_all(logits: Tensor) -> Tensor:
    e = (logits - logits.max()).exp()
    return e / e.sum()


def _wrong_twice(logits: Tensor) -> Tensor:
    for _ in range(2):
        e = (logits - logits.max(dim=-1, keepdim=True).values).exp()
        logits = e / e.sum(dim=-1, keepdim=True)
    return logits


def _wrong_one_shift_for_all(logits: Tensor) -> Tensor:
    e = (logits - logits.max()).exp()
    return e / e.sum(dim=-1, keepdim=True)


def _wrong_sigmoid(logits: Tensor) -> Tensor:
    p = torch.sigmoid(logits - logits.max(dim=-1, keepdim=True).values)
    return p / p.sum(dim=-1, keepdim=True)


def _wrong_clamped(logits: Tensor) -> Tensor:
    e = logits.clamp(max=80).exp()
    return e / e.sum(dim=-1, keepdim=True)


def _wrong_epsilon(logits: Tensor) -> Tensor:
    e = (logits - logits.max(dim=-1, keepdim=True).values).exp()
    return e / (e.sum(dim=-1, keepdim=True) + 0.01)


RIGHT_SPECIMENS = (_right_shifted, _right_by_rows, _right_by_log_sum_exp)
WRONG_SPECIMENS = (
    _wrong_no_shift,
    _wrong_axis,
    _wrong_over_all,
    _wrong_twice,
    _wrong_one_shift_for_all,
    _wrong_sigmoid,
    _wrong_clamped,
    _wrong_epsilon,
)


def _specimen_probes(generator: torch.Generator) -> list[Probe]:
    return specimen_probes("softmax", RIGHT_SPECIMENS, WRONG_SPECIMENS, generator)


def _examples() -> list[Tensor]:
    small = torch.tensor([[1.0, 2.0, 3.0], [0.0, 5.0, 0.0]])
    return [small, small + 1000, small + torch.tensor([[0.0], [500.0]])]


def _examine(softmax: Any) -> bool:
    """Accept an implementation of softmax when it is right on small, large and unequal rows."""
    return all(torch.allclose(softmax(z), mlp.softmax(z), atol=1e-5) for z in _examples())


def _examine_small_only(softmax: Any) -> bool:
    return torch.allclose(softmax(_examples()[0]), mlp.softmax(_examples()[0]), atol=1e-5)


def _examine_one_row(softmax: Any) -> bool:
    z = _examples()[0][:1]
    return torch.allclose(softmax(z), mlp.softmax(z), atol=1e-5)


def _examine_row_sums(softmax: Any) -> bool:
    sums = softmax(_examples()[0]).sum(-1)
    return torch.allclose(sums, torch.ones_like(sums), atol=1e-5)


def _examine_with_assert(softmax: Any) -> None:
    z = torch.tensor([[0.0, 0.0], [0.0, 1.0986123]])
    wanted = torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    for shift in (0.0, 1000.0, torch.tensor([[0.0], [-600.0]])):
        assert torch.allclose(softmax(z + shift), wanted, atol=1e-3)


GRADE_THIS = Task(
    id="mlp.grade_this",
    signature="examine(softmax)",
    points=3,
    reference=_examine,
    probes=_specimen_probes,
    variants=[_examine_with_assert],
    hints=(
        "Which inputs would show that the wrong axis is used, and which would show that exp overflows?",
        "Use at least two unequal rows, scores around 1,000, and two rows that lie far apart. Compare with numbers you know.",
        "z = [[1, 2, 3], [0, 5, 0]], and what softmax must give for it, from a pocket calculator\n"
        "for z, z + 1000 and z with 500 added to one row only: if the result is not close to it: return False\nreturn True",
    ),
    mistakes=[
        Fault(
            "test-only-small-scores",
            "Your examples have small scores only, so overflow goes unseen.",
            "Add 1,000 to all scores, and 500 to one row only; the right answer stays the same.",
            SOFTMAX,
            implementations=[_examine_small_only],
        ),
        Fault(
            "test-on-one-row",
            "With a single row, sums over the row and over the whole batch are the same.",
            "Use at least two different rows.",
            SOFTMAX,
            implementations=[_examine_one_row],
        ),
        Fault(
            "test-of-row-sums-only",
            "Rows that sum to 1 are necessary, but many wrong functions have them.",
            "Compare with values that you worked out.",
            SOFTMAX,
            implementations=[_examine_row_sums],
        ),
        *verdict_faults(SOFTMAX),
    ],
)


# ----- read logs -----------------------------------------------------------------------------------------------------------


_LOGS = {
    "constant answer": 0.1135,
    "nan on mnist": 0.0980,
    "floor for 100 classes": math.log(1 + 99 / math.e),
    "first loss": math.log(10),
    "steps": 93_800,
    "parameters": 136_074,
}


READ_LOGS = Task(
    id="mlp.read_logs",
    signature="answers: a dictionary",
    points=3,
    reference=_LOGS.get,
    accepts=[{**_LOGS, "first loss": 2.303}.get],  # rounded to three decimals
    probes=answer_probes(
        {
            "constant answer": "the accuracy on MNIST of a network that always says 1",
            "nan on mnist": "the accuracy on MNIST of a network whose outputs are all NaN",
            "floor for 100 classes": "the lowest loss when softmax is applied twice, for 100 classes",
            "first loss": "the loss of a network that gives each of ten classes the same probability",
            "steps": "the number of optimizer steps in 100 epochs of 60,000 images in batches of 64",
            "parameters": "the number of parameters of 784-128-256-10",
        }
    ),
    is_value=True,
    hints=(
        "Each number of a log can be predicted before the run. Which counts do you need for each question?",
        "argmax over a row of NaN gives 0. Twice softmax gives at best the row (e, 1, ..., 1) divided by its sum. "
        "The last batch of an epoch may be short, and it is a step as well.",
        "always 1: 1,135 of 10,000; all NaN: the share of digit 0\nfloor: -log(e / (e + C - 1)); first loss: -log(1/10)\n"
        "steps: 100 x (60,000 / 64, rounded up)\nparameters: for each layer n_in x n_out + n_out",
    ),
    mistakes=[
        known_answer(
            _LOGS,
            "constant answer",
            0.1,
            fault_id="log-classes-believed-equal",
            does="You took the ten digits to be equally frequent.",
            todo="Use the counts: 1,135 of the 10,000 test images are a 1.",
            reread=NUMBERS,
        ),
        known_answer(
            _LOGS,
            "nan on mnist",
            0.1,
            fault_id="nan-argmax-class-0",
            does="10.0 % is right for a balanced test set. MNIST is not balanced.",
            todo="argmax of NaN is class 0, and 980 of the 10,000 test images are a 0.",
            reread=NUMBERS,
        ),
        known_answer(
            _LOGS,
            "floor for 100 classes",
            math.log(1 + 9 / math.e),
            fault_id="loss-double-softmax",
            does="1.4612 is the floor for ten classes.",
            todo="Put C = 100 into -log(e / (e + C - 1)).",
            reread=NUMBERS,
        ),
        known_answer(
            _LOGS,
            "floor for 100 classes",
            math.log(1 + 100 / math.e),
            fault_id="log-floor-class-counted-twice",
            does="You divide by e + 100: the true class is counted twice, once with e and once with 1.",
            todo="Only the 99 other classes have e^0 = 1: divide by e + 99.",
            reread=NUMBERS,
        ),
        known_answer(
            _LOGS,
            "first loss",
            math.log2(10),
            fault_id="ce-log-base",
            does="This is the logarithm to base 2.",
            todo="Cross-entropy uses the natural logarithm.",
            reread=ENTROPY,
        ),
        known_answer(
            _LOGS,
            "steps",
            93_700,
            fault_id="log-last-batch-forgotten",
            does="You left out the last batch of 32 images in each epoch.",
            todo="Round 60,000 / 64 up: the short batch is a step, too.",
            reread=LOOP,
        ),
        known_answer(
            _LOGS,
            "steps",
            93_750,
            fault_id="log-last-batch-forgotten",
            does="You counted the last batch of each epoch, 32 images, as half a step.",
            todo="Round 60,000 / 64 up: the short batch is a whole step.",
            reread=LOOP,
        ),
        known_answer(
            _LOGS,
            "parameters",
            135_680,
            fault_id="log-biases-forgotten",
            does="You counted the weights and forgot the biases.",
            todo="Add n_out for each layer.",
            reread=LAYER,
        ),
    ],
)

TASKS = [
    LINEAR,
    RELU,
    SOFTMAX_TASK,
    CROSS_ENTROPY,
    GRADIENT_TASK,
    MLP_TASK,
    SGD_STEP,
    TRAIN_EPOCH,
    GRADE_THIS,
    READ_LOGS,
]
