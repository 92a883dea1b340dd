"""Tasks of the chapter "A recurrent network": right answers, and the wrong ones that are known."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dianlib import rnn
from dianlib.checks.kinds import (
    answer_probes,
    known_answer,
    randn,
    specimen_probes,
    verdict_faults,
    without_gradient,
)
from dianlib.checks.running import Outcome, Parameters, Probe, Recurrent
from dianlib.checks.task import Fault, Task

STEPS = "rnn: What is time in an image?"
CELL = "rnn: What does one cell compute?"
UNROLL = "rnn: How is a cell unrolled?"
BPTT = "rnn: Back through time, by hand"
DISTANCE = "rnn: How far back does a gradient reach?"
ROTATION = "rnn: Why start with a rotation?"
CLIP = "rnn: Clipping: how long may a step be?"
MODULE = "rnn: The network as a module"
ORDER = "rnn: What is order worth?"
FALSE = "rnn: Is it recurrent at all?"
WRONG = "rnn: Tempting, but wrong"
CASE = "rnn: The case, solved"

# torch's own recurrent layers and the operations below them.
LAYERS = frozenset({"rnn", "rnn_base", "rnn_cell", "rnn_cell_base", "rnn_tanh", "rnn_relu", "rnn_tanh_cell"})

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "none": lambda a: a * 1.0,
}


def _halves(generator: torch.Generator, *shape: int) -> Tensor:
    """Draw numbers that are easy to follow by hand: multiples of 0.5."""
    return (randn(generator, *shape) * 2).round() / 2


def _weights(generator: torch.Generator, n_in: int, n_hidden: int) -> dict[str, Tensor]:
    """Draw the four tensors of a cell; no bias is 0, and no state is driven to the flat ends of tanh."""
    return {
        "weight_ih": randn(generator, n_hidden, n_in) / math.sqrt(n_in),
        "weight_hh": randn(generator, n_hidden, n_hidden) / math.sqrt(n_hidden),
        "bias_ih": 0.25 + randn(generator, n_hidden) / 4,
        "bias_hh": -0.5 + randn(generator, n_hidden) / 4,
    }


def _wrong_activation(setting: str) -> list[Fault]:
    """Make the faults of a cell that bends otherwise, or not at all; ``setting`` is the twin's keyword."""
    return [
        Fault(
            "rnn-relu-explodes",
            "The cell uses ReLU: nothing bounds the state, so it can grow from step to step.",
            "Use tanh, which keeps every number of the state between -1 and 1.",
            CASE,
            settings=[{setting: "relu"}],
        ),
        Fault(
            "rnn-no-activation",
            "There is no tanh: the new state is a linear map of the input and the old state.",
            "Apply tanh to the whole sum.",
            CELL,
            settings=[{setting: "none"}],
        ),
        Fault(
            "rnn-other-activation",
            "The cell uses a sigmoid.",
            "Use tanh.",
            CELL,
            settings=[{setting: "sigmoid"}],
        ),
    ]


# ----- rnn_cell ---------------------------------------------------------------------------------------------


def _cell_probes(generator: torch.Generator) -> list[Probe]:
    def probe(name: str, n: int, n_in: int, n_hidden: int, core: bool = False) -> Probe:
        args = {"x": _halves(generator, n, n_in), "h": randn(generator, n, n_hidden).tanh()}
        args |= _weights(generator, n_in, n_hidden)
        return Probe(name, args, gradients=tuple(args), core=core)

    return [
        probe("two samples, two inputs, a state of three numbers", 2, 2, 3, core=True),
        probe("five samples, six inputs, a state of four numbers", 5, 6, 4, core=True),
        probe("as many samples as inputs and as state numbers", 3, 3, 3),
        probe("a single sample", 1, 4, 2),
    ]


def _cell_twin(
    x: Tensor,
    h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    *,
    old_state: str = "weighted",
    matrix: str = "transposed",
    biases: str = "both",
    bend: str = "tanh",
    place: str = "whole sum",
    cut: str = "",
) -> Tensor:
    h = h.detach() if cut == "state" else h
    from_input = x @ (weight_ih if matrix == "both as they are" else weight_ih.T)
    from_state = h @ (weight_hh.T if matrix == "transposed" else weight_hh)
    if old_state == "added":
        from_state = h
    elif old_state == "ignored":
        from_state = torch.zeros_like(h)
    if biases in ("both", "input's", "input's twice"):
        from_input = from_input + bias_ih * (2 if biases == "input's twice" else 1)
    if biases in ("both", "state's"):
        from_state = from_state + bias_hh
    activation = _ACTIVATIONS[bend]
    if place == "input only":
        result = activation(from_input) + from_state
    elif place == "each part":
        result = activation(from_input) + activation(from_state)
    elif place == "twice":
        result = activation(activation(from_input + from_state))
    else:
        result = activation(from_input + from_state)
    return result.detach() if cut == "all" else result


def _cell_of_linears(
    x: Tensor, h: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor
) -> Any:
    linear = torch.nn.functional.linear
    return linear(x, weight_ih, bias_ih).add(linear(h, weight_hh, bias_hh)).tanh()


def _cell_of_joined_matrices(
    x: Tensor, h: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor
) -> Any:
    joined = torch.cat([x, h], dim=1) @ torch.cat([weight_ih, weight_hh], dim=1).T
    return torch.tanh(joined + bias_ih + bias_hh)


def _cell_by_loops(
    x: Tensor, h: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor
) -> Any:
    rows = []
    for b in range(len(x)):
        row = []
        for j in range(len(bias_ih)):
            a = bias_ih[j] + bias_hh[j]
            for i in range(x.shape[1]):
                a = a + weight_ih[j, i] * x[b, i]
            for i in range(h.shape[1]):
                a = a + weight_hh[j, i] * h[b, i]
            row.append(1 - 2 / ((2 * a).exp() + 1))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def _cell_by_einsum(
    x: Tensor, h: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor
) -> Any:
    total = torch.einsum("bi,hi->bh", x.double(), weight_ih.double())
    total = total + torch.einsum("bk,hk->bh", h.double(), weight_hh.double())
    return torch.tanh(total + bias_ih + bias_hh)


CELL_TASK = Task(
    id="rnn.rnn_cell",
    signature="rnn_cell(x, h, weight_ih, weight_hh, bias_ih, bias_hh)",
    points=2,
    reference=rnn.rnn_cell,
    probes=_cell_probes,
    twin=_cell_twin,
    forbidden=LAYERS,
    variants=[_cell_of_linears, _cell_of_joined_matrices, _cell_by_loops, _cell_by_einsum],
    hints=(
        "The new state is made of two things. Which two, and which matrix belongs to each?",
        "Input and old state each pass through a linear layer of their own; the two results are added, and tanh bends the sum.",
        "return tanh of (x times weight_ih transposed + bias_ih + h times weight_hh transposed + bias_hh)",
    ),
    mistakes=[
        Fault(
            "rnn-no-recurrent-weight",
            "The old state is added as it is: weight_hh is never used, and the state cannot be turned or weighed.",
            "Multiply the old state with weight_hh first: h @ weight_hh.T.",
            FALSE,
            settings=[{"old_state": "added"}],
        ),
        Fault(
            "rnn-state-ignored",
            "The old state has no influence on the new one, so nothing is remembered.",
            "Add h @ weight_hh.T to the sum.",
            CELL,
            settings=[{"old_state": "ignored"}],
        ),
        Fault(
            "rnn-weight-not-transposed",
            "A matrix is used without its transpose. weight_hh is square, so it runs and uses columns in place of rows.",
            "Each row of a weight belongs to one number of the new state: x @ weight_ih.T and h @ weight_hh.T.",
            CELL,
            settings=[{"matrix": "weight_hh as it is"}, {"matrix": "both as they are"}],
        ),
        Fault(
            "rnn-bias-missing",
            "Not both biases are added, each once.",
            "Add bias_ih and bias_hh.",
            CELL,
            settings=[
                {"biases": "input's"},
                {"biases": "state's"},
                {"biases": "none"},
                {"biases": "input's twice"},
            ],
        ),
        *_wrong_activation("bend"),
        Fault(
            "rnn-tanh-misplaced",
            "The bend does not act once on the whole sum: tanh is applied to the parts before they are added, or twice.",
            "Add everything first, then apply tanh once.",
            CELL,
            settings=[{"place": "input only"}, {"place": "each part"}, {"place": "twice"}],
        ),
        Fault(
            "backward-detached",
            "The numbers are right, but a gradient is missing: something on the way has left autograd.",
            "Avoid .detach(), .data, .item(), .numpy() and torch.tensor(...) inside the cell.",
            BPTT,
            settings=[{"cut": "state"}, {"cut": "all"}],
            sign=without_gradient,
        ),
    ],
)


# ----- unroll -----------------------------------------------------------------------------------------------


def _unroll_probes(generator: torch.Generator) -> list[Probe]:
    def probe(name: str, n: int, steps: int, n_in: int, n_hidden: int, core: bool = False) -> Probe:
        args = {
            "xs": _halves(generator, n, steps, n_in),
            "h0": randn(generator, n, n_hidden).tanh(),
            **_weights(generator, n_in, n_hidden),
        }
        return Probe(name, args, gradients=tuple(args), core=core)

    return [
        probe("two sequences of three steps", 2, 3, 2, 2, core=True),
        probe("three sequences of five steps", 3, 5, 4, 6, core=True),
        probe("as many sequences as steps", 4, 4, 3, 2),
        probe("a single step", 3, 1, 2, 4),
        probe("a single sequence", 1, 6, 3, 3),
    ]


def _unroll_twin(
    xs: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    *,
    start: str = "h0",
    order: str = "forwards",
    handed_on: str = "in time",
    old_state: str = "weighted",
    layout: str = "stacked",
    kept: str = "all",
    bend: str = "tanh",
    cut: str = "",
) -> Tensor:
    n, n_steps, _ = xs.shape
    h = torch.zeros_like(h0) if start == "zeros" else h0
    activation = _ACTIVATIONS[bend]

    def cell(x: Tensor, h: Tensor) -> Tensor:
        from_state = {"weighted": h @ weight_hh.T, "added": h}[old_state]
        return activation(x @ weight_ih.T + bias_ih + from_state + bias_hh)

    steps = list(xs.reshape(n_steps, n, -1) if layout == "input viewed" else xs.unbind(1))
    if order != "forwards":
        steps.reverse()
    states = []
    first = h
    if handed_on == "from sample to sample":
        rows = []
        state = h[:1]
        for b in range(n):
            row = []
            for x in steps:
                state = cell(x[b : b + 1], state)
                row.append(state[0])
            rows.append(torch.stack(row))
        states = list(torch.stack(rows).unbind(1))
    else:
        for x in steps:
            if cut == "between steps":
                h = h.detach()
            h = cell(x, first if handed_on == "never" else h)
            states.append(h)
    if order == "backwards, turned":
        states.reverse()
    if kept == "before each step":
        states = [first, *states[:-1]]
    elif kept == "with the first":
        states = [first, *states]
    elif kept == "without the first step":
        states = states[1:]
    if kept == "last only":
        result = states[-1]
    elif not states:
        raise RuntimeError("stack expects a non-empty TensorList")
    elif layout == "time first":
        result = torch.stack(states, dim=0)
    elif layout == "output viewed":
        result = torch.stack(states, dim=0).reshape(n, len(states), -1)
    elif layout == "joined":
        result = torch.cat(states, dim=1)
    else:
        result = torch.stack(states, dim=1)
    return result.detach() if cut == "all" else result


def _unroll_by_index(
    xs: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
) -> Any:
    h, states = h0, []
    for t in range(xs.shape[1]):
        h = torch.tanh(xs[:, t] @ weight_ih.T + bias_ih + h @ weight_hh.T + bias_hh)
        states.append(h.unsqueeze(1))
    return torch.cat(states, dim=1)


def _unroll_time_first_inside(
    xs: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
) -> Any:
    h, states = h0, []
    for x in xs.transpose(0, 1):
        h = (x.matmul(weight_ih.t()) + h.matmul(weight_hh.t()) + bias_ih + bias_hh).tanh()
        states.append(h)
    return torch.stack(states).permute(1, 0, 2)


def _unroll_filling_a_tensor(
    xs: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
) -> Any:
    states = torch.zeros(xs.shape[0], xs.shape[1], h0.shape[1])
    h = h0
    for t in range(xs.shape[1]):
        h = torch.tanh(torch.nn.functional.linear(xs[:, t], weight_ih, bias_ih) + h @ weight_hh.T + bias_hh)
        states[:, t] = h
    return states


def _unroll_with_inputs_first(
    xs: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
) -> Any:
    inputs = torch.einsum("btf,hf->bth", xs, weight_ih) + bias_ih + bias_hh
    states = [h0]
    for x in inputs.unbind(1):
        states.append(torch.tanh(x + states[-1] @ weight_hh.T))
    return torch.stack(states[1:], 1)


UNROLL_TASK = Task(
    id="rnn.unroll",
    signature="unroll(xs, h0, weight_ih, weight_hh, bias_ih, bias_hh)",
    points=3,
    reference=rnn.unroll,
    probes=_unroll_probes,
    twin=_unroll_twin,
    forbidden=LAYERS,
    variants=[
        _unroll_by_index,
        _unroll_time_first_inside,
        _unroll_filling_a_tensor,
        _unroll_with_inputs_first,
    ],
    hints=(
        "Which axis of xs is time, and what goes from one round of the loop to the next?",
        "Step t uses xs[:, t] and the state after step t-1. Every sample has its own row of the state, which starts at h0.",
        "h = h0\nfor each step t: h = cell of xs[:, t] and h; keep h in a list\n"
        "return the list stacked along axis 1",
    ),
    mistakes=[
        Fault(
            "rnn-h0-ignored",
            "The first state is taken to be 0, whatever h0 says.",
            "Start the loop with h = h0.",
            UNROLL,
            settings=[{"start": "zeros"}],
        ),
        Fault(
            "rnn-time-reversed",
            "The steps are taken from the last to the first.",
            "Begin with xs[:, 0].",
            UNROLL,
            settings=[{"order": "backwards"}, {"order": "backwards, turned"}],
        ),
        Fault(
            "rnn-state-not-handed-on",
            "Every step starts from h0 again: the state of one step never reaches the next.",
            "Write the new state into the variable that the next round reads.",
            UNROLL,
            settings=[{"handed_on": "never"}],
        ),
        Fault(
            "rnn-state-across-samples",
            "The state is handed from one sample to the next, so the answer for sample 2 depends on sample 1.",
            "Time runs inside a sample: each row of the state belongs to one sample and starts at its row of h0.",
            FALSE,
            settings=[{"handed_on": "from sample to sample"}],
        ),
        Fault(
            "rnn-no-recurrent-weight",
            "The old state is added as it is: weight_hh is never used.",
            "Multiply the old state with weight_hh first.",
            FALSE,
            settings=[{"old_state": "added"}],
        ),
        Fault(
            "rnn-view-instead-of-transpose",
            "A view or reshape cuts the memory anew, and the numbers of different samples are mixed; it does not swap axes.",
            "Use transpose(0, 1) to bring time to the front, or take xs[:, t] and stack along axis 1.",
            WRONG,
            settings=[{"layout": "input viewed"}, {"layout": "output viewed"}],
        ),
        Fault(
            "rnn-states-time-first",
            "The states are stacked along the wrong axis.",
            "Return (B, T, H): torch.stack(states, dim=1).",
            UNROLL,
            settings=[{"layout": "time first"}, {"layout": "joined"}],
        ),
        Fault(
            "rnn-wrong-states-kept",
            "These are not the T states after each step: h0 is among them, one is missing, or only the last is there.",
            "Append the new state to the list in each round, after the step.",
            UNROLL,
            settings=[
                {"kept": "last only"},
                {"kept": "before each step"},
                {"kept": "with the first"},
                {"kept": "without the first step"},
            ],
        ),
        *_wrong_activation("bend"),
        Fault(
            "rnn-state-detached",
            "The states are right, but gradients stop: the state is detached between the steps, or at the end.",
            "Hand the state on as it is; a gradient has to come back through all steps.",
            BPTT,
            settings=[{"cut": "between steps"}, {"cut": "all"}],
            sign=without_gradient,
        ),
    ],
)


# ----- bptt_gradient ----------------------------------------------------------------------------------------


def _bptt_probes(generator: torch.Generator) -> list[Probe]:
    def probe(name: str, n: int, steps: int, n_in: int, n_hidden: int, core: bool = False) -> Probe:
        args = {
            "xs": _halves(generator, n, steps, n_in),
            "h0": randn(generator, n, n_hidden).tanh(),
            **_weights(generator, n_in, n_hidden),
            "grad_last": _halves(generator, n, n_hidden) + 0.25,
        }
        return Probe(name, args, core=core)

    return [
        probe("two sequences of three steps", 2, 3, 2, 3, core=True),
        probe("four sequences of six steps", 4, 6, 3, 5, core=True),
        probe("one step only", 3, 1, 3, 2),
        probe("as many inputs as state numbers", 3, 4, 3, 3),
    ]


def _bptt_twin(
    xs: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    grad_last: Tensor,
    *,
    slope: str = "1 - new state squared",
    back: str = "weight_hh",
    steps: str = "all",
    met: str = "old state",
    over_samples: str = "sum",
    over_steps: str = "sum",
    loss: str = "last state",
    bias: str = "one",
) -> tuple[Tensor, ...]:
    n, n_steps, _ = xs.shape
    states, sums = [h0], []
    for x in xs.unbind(1):
        sums.append(x @ weight_ih.T + bias_ih + states[-1] @ weight_hh.T + bias_hh)
        states.append(torch.tanh(sums[-1]))
    grads = [torch.zeros_like(weight_ih), torch.zeros_like(weight_hh), torch.zeros_like(bias_hh)]
    grad_h = grad_last
    for t in reversed(range(n_steps)):
        new, old = states[t + 1], states[t]
        grad_a = (
            grad_h
            * {
                "1 - new state squared": 1 - new**2,
                "missing": torch.ones_like(new),
                "1 - sum squared": 1 - sums[t] ** 2,
                "1 - old state squared": 1 - old**2,
                "1 - new state": 1 - new,
                "sigmoid's": new * (1 - new),
            }[slope]
        )
        found = [
            grad_a.T @ xs[:, t],
            grad_a.T @ {"old state": old, "new state": new, "first state": h0}[met],
            grad_a.sum(0),
        ]
        if (
            steps == "all"
            or (steps == "last only" and t == n_steps - 1)
            or (steps == "first only" and t == 0)
        ):
            for grad, part in zip(grads, found, strict=True):
                grad += part
        grad_h = {
            "weight_hh": grad_a @ weight_hh,
            "weight_hh transposed": grad_a @ weight_hh.T,
            "no matrix": grad_a,
            "before tanh": grad_h @ weight_hh,
        }[back]
        if loss == "every state":
            grad_h = grad_h + grad_last
        elif loss == "last state again in each step":
            grad_h = grad_last
    if over_samples == "mean":
        grads = [grad / n for grad in grads]
    if over_steps == "mean":
        grads = [grad / n_steps for grad in grads]
    if bias == "two":
        grads[2] = 2 * grads[2]
    return tuple(grads)


def _bptt_by_matrices(
    xs: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    grad_last: Tensor,
) -> Any:
    states = [h0]
    for x in xs.unbind(1):
        states.append(torch.tanh(x @ weight_ih.T + states[-1] @ weight_hh.T + bias_ih + bias_hh))
    deltas, g = [], grad_last
    for h in states[:0:-1]:
        deltas.append(g - g * h * h)
        g = deltas[-1].matmul(weight_hh)
    delta = torch.stack(deltas[::-1], dim=1)
    old = torch.stack(states[:-1], dim=1)
    return [
        torch.einsum("bth,btf->hf", delta, xs),
        torch.einsum("bth,btk->hk", delta, old),
        delta.sum((0, 1)),
    ]


def _bptt_sample_by_sample(
    xs: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    grad_last: Tensor,
) -> Any:
    g_ih = torch.zeros(weight_ih.shape)
    g_hh = torch.zeros(weight_hh.shape)
    g_b = torch.zeros(bias_ih.shape)
    for b in range(xs.shape[0]):
        states = [h0[b]]
        for t in range(xs.shape[1]):
            states.append(torch.tanh(weight_ih @ xs[b, t] + bias_ih + weight_hh @ states[t] + bias_hh))
        g = grad_last[b]
        for t in range(xs.shape[1] - 1, -1, -1):
            slope = torch.diag(1 - states[t + 1] ** 2)
            a = slope @ g
            g_ih = g_ih + torch.outer(a, xs[b, t])
            g_hh = g_hh + torch.outer(a, states[t])
            g_b = g_b + a
            g = weight_hh.T @ a
    return g_ih, g_hh, g_b


BPTT_TASK = Task(
    id="rnn.bptt_gradient",
    signature="bptt_gradient(xs, h0, weight_ih, weight_hh, bias_ih, bias_hh, grad_last)",
    points=5,
    reference=rnn.bptt_gradient,
    probes=_bptt_probes,
    twin=_bptt_twin,
    forbidden=LAYERS | {"backward", "grad"},
    variants=[_bptt_by_matrices, _bptt_sample_by_sample],
    hints=(
        "One step has three inputs: x, the old state and the weights. What does each of them do to the new state?",
        "Through tanh the gradient is multiplied by 1 - h_t squared, through the matrix by weight_hh. "
        "The weights are the same in all steps, so their gradients of all steps are added.",
        "states = [h0, h_1, ..., h_T]; g = grad_last\nfor t = T-1, ..., 0:\n    a = g * (1 - states[t+1] squared)\n"
        "    add a.T @ xs[:, t], a.T @ states[t] and the sum of a over the samples to the three results\n"
        "    g = a @ weight_hh",
    ),
    mistakes=[
        Fault(
            "bptt-slope-missing",
            "The gradient passes tanh as if it were not there: the slope 1 - h_t squared is missing.",
            "Multiply the gradient of the new state with 1 - h_t squared first.",
            BPTT,
            settings=[{"slope": "missing"}],
        ),
        Fault(
            "bptt-slope-wrong",
            "The slope of tanh is taken wrongly: from the sum before tanh, from the old state, or by another formula.",
            "The slope is 1 - h_t squared, with the new state h_t of the same step.",
            BPTT,
            settings=[
                {"slope": "1 - sum squared"},
                {"slope": "1 - old state squared"},
                {"slope": "1 - new state"},
                {"slope": "sigmoid's"},
            ],
        ),
        Fault(
            "bptt-matrix-transposed",
            "On the way back weight_hh is transposed. It is square, so this runs.",
            "Forwards h @ weight_hh.T, backwards grad @ weight_hh.",
            BPTT,
            settings=[{"back": "weight_hh transposed"}],
        ),
        Fault(
            "bptt-way-back-wrong",
            "On the way to the step before, weight_hh or the slope of tanh is left out.",
            "The gradient of the old state is (gradient of the new state times slope) @ weight_hh.",
            BPTT,
            settings=[{"back": "no matrix"}, {"back": "before tanh"}],
        ),
        Fault(
            "bptt-one-step-only",
            "Only one step counts: the gradient of the other steps is missing in the sums.",
            "Add up over all steps: the same weights work in each of them.",
            BPTT,
            settings=[{"steps": "last only"}, {"steps": "first only"}],
        ),
        Fault(
            "bptt-wrong-state-met",
            "The gradient of weight_hh uses the wrong state: weight_hh has met the state before its step.",
            "Use h_(t-1) for step t, and h0 for the first.",
            BPTT,
            settings=[{"met": "new state"}, {"met": "first state"}],
        ),
        Fault(
            "bptt-averaged",
            "The gradients are divided by the number of samples or of steps.",
            "Add up over samples and steps; a mean, if there is one, is already in grad_last.",
            BPTT,
            settings=[{"over_samples": "mean"}, {"over_steps": "mean"}],
        ),
        Fault(
            "bptt-loss-at-every-step",
            "You add grad_last at every step. The loss looks at the last state only.",
            "Start with grad_last, and from then on use what comes back through weight_hh.",
            BPTT,
            settings=[{"loss": "every state"}, {"loss": "last state again in each step"}],
        ),
        Fault(
            "bptt-bias-doubled",
            "The gradient of the bias is twice as large as it should be.",
            "Each of the two biases has this gradient; return it once.",
            BPTT,
            settings=[{"bias": "two"}],
        ),
    ],
)


# ----- gradient_by_distance ---------------------------------------------------------------------------------


def _distance_probes(generator: torch.Generator) -> list[Probe]:
    def probe(name: str, n: int, steps: int, n_in: int, n_hidden: int, core: bool = False) -> Probe:
        w = _weights(generator, n_in, n_hidden)
        model = Recurrent(w["weight_ih"], w["weight_hh"], w["bias_ih"] + w["bias_hh"])
        return Probe(name, {"model": model, "xs": _halves(generator, n, steps, n_in)}, core=core)

    return [
        probe("two sequences of four steps", 2, 4, 3, 4, core=True),
        probe("five sequences of seven steps", 5, 7, 2, 6, core=True),
        probe("a single sequence", 1, 5, 3, 3),
        probe("a single step", 3, 1, 4, 2),
    ]


def _distance_twin(
    model: Any,
    xs: Tensor,
    *,
    order: str = "last first",
    size: str = "norm",
    samples: str = "together",
    output: str = "sum",
    taken: str = "gradient",
) -> Tensor:
    inputs = xs.clone().requires_grad_(True)
    outputs = model(inputs)
    total = {
        "sum": outputs.sum(),
        "mean": outputs.mean(),
        "squares": outputs.pow(2).sum(),
        "norm": outputs.norm(),
        "first number": outputs[:, 0].sum(),
    }[output]
    (gradient,) = torch.autograd.grad(total, inputs)
    if taken == "gradient times input":
        gradient = gradient * xs
    if samples == "first only":
        gradient = gradient[:1]
    if samples == "mean before":
        gradient = gradient.mean(dim=0, keepdim=True)
    elif samples == "sum before":
        gradient = gradient.sum(dim=0, keepdim=True)
    norms: Tensor
    if samples == "mean after":
        norms = gradient.norm(dim=2).mean(dim=0)
    else:
        norms = {
            "norm": gradient.pow(2).sum((0, 2)).sqrt(),
            "squares": gradient.pow(2).sum((0, 2)),
            "absolute values": gradient.abs().sum((0, 2)),
            "mean absolute value": gradient.abs().mean((0, 2)),
            "sum": gradient.sum((0, 2)),
            "largest": gradient.abs().amax((0, 2)),
            "root of the mean square": gradient.pow(2).mean((0, 2)).sqrt(),
        }[size]
    if taken == "relative to the last step":
        norms = norms / norms[-1]
    elif taken == "added up":
        norms = norms.flip(0).cumsum(0).flip(0)
    return norms.flip(0) if order == "last first" else norms


def _distance_by_backward(model: Any, xs: Tensor) -> Any:
    inputs: Any = xs.clone()
    inputs.requires_grad = True
    model(inputs).sum().backward()
    return torch.stack([inputs.grad[:, t].norm() for t in reversed(range(xs.shape[1]))])


def _distance_step_by_step(model: Any, xs: Tensor) -> Any:
    steps = [x.clone().requires_grad_() for x in xs.unbind(1)]
    outputs = model(torch.stack(steps, dim=1))
    gradients = torch.autograd.grad(outputs, steps, grad_outputs=torch.ones_like(outputs))
    return torch.tensor([float((g**2).sum()) ** 0.5 for g in gradients[::-1]])


def _distance_on_the_input_itself(model: Any, xs: Tensor) -> Any:
    xs.requires_grad_()
    model(xs).sum().backward()
    norms = torch.linalg.vector_norm(xs.grad, dim=(0, 2))
    return norms[torch.arange(len(norms) - 1, -1, -1)]


DISTANCE_TASK = Task(
    id="rnn.gradient_by_distance",
    signature="gradient_by_distance(model, xs)",
    points=3,
    reference=rnn.gradient_by_distance,
    probes=_distance_probes,
    twin=_distance_twin,
    forbidden=LAYERS,
    variants=[_distance_by_backward, _distance_step_by_step, _distance_on_the_input_itself],
    hints=(
        "With respect to what is the gradient taken, and what shape does it have?",
        "The gradient of the sum of all outputs with respect to xs has the shape (B, T, F). "
        "One number for each step: the root of the sum of squares over samples and features.",
        "inputs = a copy of xs that requires a gradient\ngradient of model(inputs).sum() with respect to inputs\n"
        "norm over the axes 0 and 2, turned round so that the last step comes first",
    ),
    mistakes=[
        Fault(
            "distance-first-step-first",
            "The first step stands first. Entry k belongs to the step k steps before the last.",
            "Turn the result round, for example with flip(0).",
            DISTANCE,
            settings=[{"order": "first first"}],
        ),
        Fault(
            "distance-not-a-norm",
            "The numbers of a step are not combined to a Euclidean norm.",
            "Take the root of the sum of squares over samples and features.",
            DISTANCE,
            settings=[
                {"size": name}
                for name in (
                    "squares",
                    "absolute values",
                    "mean absolute value",
                    "sum",
                    "largest",
                    "root of the mean square",
                )
            ],
        ),
        Fault(
            "distance-samples-combined",
            "The samples are combined otherwise: one alone, added before the norm where they cancel, or averaged.",
            "Let the norm run over samples and features together.",
            DISTANCE,
            settings=[
                {"samples": name} for name in ("first only", "mean before", "sum before", "mean after")
            ],
        ),
        Fault(
            "distance-of-another-output",
            "The gradient is not that of the sum of all outputs.",
            "Add up everything that model(xs) returns and differentiate that.",
            DISTANCE,
            settings=[{"output": name} for name in ("mean", "squares", "norm", "first number")],
        ),
        Fault(
            "distance-of-something-else",
            "This is not the gradient's norm itself: it is multiplied with the input, divided by one step's norm, or added up.",
            "Return one norm for each step, as it is.",
            DISTANCE,
            settings=[
                {"taken": name} for name in ("gradient times input", "relative to the last step", "added up")
            ],
        ),
    ],
)


# ----- clip_grad_norm ---------------------------------------------------------------------------------------


def _clip_probes(generator: torch.Generator) -> list[Probe]:
    def probe(
        name: str,
        shapes: list[tuple[int, ...]],
        max_norm: float,
        size: float = 1.0,
        without: int = -1,
        core: bool = False,
    ) -> Probe:
        values = tuple(_halves(generator, *shape) for shape in shapes)
        gradients = tuple(
            None if number == without else size * ((randn(generator, *shape) * 4).round() + 0.5)
            for number, shape in enumerate(shapes)
        )
        parameters = Parameters(values, gradients, watch_gradients=True)
        return Probe(name, {"parameters": parameters, "max_norm": max_norm}, core=core)

    return [
        probe("two vectors, bound 1", [(2,), (2,)], 1.0, core=True),
        probe("a layer and its bias, bound 0.5", [(4, 3), (4,)], 0.5, core=True),
        probe("a gradient that is short enough", [(3, 2), (2,)], 1000.0),
        probe("an exploded gradient", [(2, 2), (3,)], 5.0, size=1e9),
        probe("the second of three tensors has no gradient", [(2, 2), (3,), (2,)], 2.0, without=1),
        probe("gradients that are 0", [(2,), (3,)], 1.0, size=0.0),
    ]


def _clip_twin(
    parameters: Iterable[Tensor],
    max_norm: float,
    *,
    norm_of: str = "all together",
    size: str = "root of squares",
    when: str = "too long",
    how: str = "one factor",
    returned: str = "norm before",
    missing: str = "left out",
) -> float | None:
    parameters = list(parameters)
    if missing == "error" and any(parameter.grad is None for parameter in parameters):
        raise AttributeError("'NoneType' object has no attribute 'norm'")
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]

    def length(tensors: list[Tensor]) -> float:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        lengths = {
            "root of squares": flat.norm(),
            "squares": flat.pow(2).sum(),
            "absolute values": flat.abs().sum(),
            "largest": flat.abs().max(),
            "root of the mean square": flat.pow(2).mean().sqrt(),
        }
        return float(lengths[size])

    each = [length([gradient]) for gradient in gradients]
    before = {
        "all together": length(gradients),
        "each tensor": length(gradients),
        "sum of the tensors' norms": sum(each),
        "mean of the tensors' norms": sum(each) / len(each),
        "largest of the tensors' norms": max(each),
        "first tensor": each[0],
        "last tensor": each[-1],
    }[norm_of]
    with torch.no_grad():
        for parameter in parameters:
            gradient = parameter.grad
            if gradient is None:
                continue
            norm = length([gradient]) if norm_of == "each tensor" else before
            factor = max_norm / norm if norm else math.nan
            if when == "too long" and not norm > max_norm:
                continue
            if when == "never" or (when == "first tensor only" and parameter is not parameters[0]):
                continue
            if how == "one factor":
                gradient *= factor
            elif how == "cut off":
                gradient.clamp_(-max_norm, max_norm)
            elif how == "times the bound":
                gradient *= max_norm
            elif how == "divided by the norm":
                gradient /= norm
            elif how == "the weights":
                parameter *= factor
            elif how == "set to zero":
                gradient.zero_()
            else:
                gradient *= float(how)
        after = length(gradients)
    return {
        "norm before": before,
        "norm after": after,
        "factor": max_norm / before if before else math.nan,
        "nothing": None,
    }[returned]


def _weights_moved(probe: Probe, got: Outcome, wanted: Outcome) -> str:
    """Say that the parameters themselves were changed, where only their gradients may be."""
    moved = [name for name, value in got.values.items() if name.endswith(" was changed") and value is True]
    return f"{moved[0]}: only its gradient may change." if moved else ""


def _clip_going_through_twice(parameters: Iterable[Tensor], max_norm: float) -> float:
    total = 0.0
    for parameter in parameters:
        if parameter.grad is not None:
            total += float(parameter.grad.pow(2).sum())
    norm = math.sqrt(total)
    if norm > max_norm:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(max_norm / norm)
    return norm


def _clip_as_torch(parameters: Iterable[Tensor], max_norm: float) -> Any:
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for g in gradients:
        g.mul_(factor)
    return norm


def _clip_with_new_gradients(parameters: Iterable[Any], max_norm: float) -> Any:
    trained = [p for p in parameters if p.grad is not None]
    norm = torch.cat([p.grad.reshape(-1) for p in trained]).double().norm().item()
    for p in trained:
        p.grad = p.grad * min(1.0, max_norm / (norm + 1e-12))
    return norm


CLIP_TASK = Task(
    id="rnn.clip_grad_norm",
    signature="clip_grad_norm(parameters, max_norm)",
    points=3,
    reference=rnn.clip_grad_norm,
    probes=_clip_probes,
    twin=_clip_twin,
    forbidden=frozenset(
        {"clip_grad_norm", "clip_grad_value", "clip_grads_with_norm", "get_total_norm", "renorm"}
    ),
    properties=[_weights_moved],
    variants=[_clip_as_torch, _clip_with_new_gradients],
    hints=(
        "All gradients together are one long arrow. How long is it, and what may clipping not change about it?",
        "The norm is the root of the sum of all squares in all tensors. If it is above max_norm, every gradient is multiplied "
        "with the same factor max_norm / norm; else nothing changes.",
        "gradients = list of the gradients that are not None\nnorm = root of the sum of all their squares\n"
        "if norm > max_norm: multiply each gradient, in place, with max_norm / norm\nreturn norm",
    ),
    mistakes=[
        Fault(
            "clip-each-tensor",
            "Every tensor is clipped by itself, which changes the direction of the whole gradient.",
            "Compute one norm over all tensors and use one factor for all of them.",
            CLIP,
            settings=[{"norm_of": "each tensor"}],
        ),
        Fault(
            "clip-norm-of-parts",
            "The common norm is put together wrongly from the tensors: a sum, mean or maximum of their norms, or one of them.",
            "Add the squares of all entries of all tensors, then take one root.",
            CLIP,
            settings=[
                {"norm_of": name}
                for name in (
                    "sum of the tensors' norms",
                    "mean of the tensors' norms",
                    "largest of the tensors' norms",
                    "first tensor",
                    "last tensor",
                )
            ],
        ),
        Fault(
            "clip-other-norm",
            "The length is not the Euclidean norm.",
            "Take the root of the sum of squares.",
            CLIP,
            settings=[
                {"size": name}
                for name in ("squares", "absolute values", "largest", "root of the mean square")
            ],
        ),
        Fault(
            "clip-always",
            "The gradient is brought to the length max_norm even where it is shorter: small gradients are blown up, "
            "and a gradient of 0 becomes NaN.",
            "Multiply only where the norm is above max_norm.",
            CLIP,
            settings=[{"when": "always"}],
        ),
        Fault(
            "clip-by-value",
            "Each entry is cut off at the bound by itself, which changes the direction.",
            "Multiply all entries with one factor, max_norm / norm.",
            CLIP,
            settings=[{"how": "cut off"}, {"how": "cut off", "when": "always"}],
        ),
        Fault(
            "clip-wrong-factor",
            "The factor is not max_norm / norm.",
            "Multiply with max_norm and divide by the norm: the new norm is then max_norm.",
            CLIP,
            settings=[
                {"how": "times the bound"},
                {"how": "divided by the norm"},
                {"how": "set to zero"},
            ],
        ),
        Fault(
            "rnn-gradient-scaled-away",
            "Gradients are multiplied by a tiny constant: afterwards the weights do not move at all.",
            "Use the factor max_norm / norm, and only where the norm is above max_norm.",
            CLIP,
            settings=[
                {"how": how, "when": when} for how in ("1e-9", "1e-13") for when in ("always", "too long")
            ],
        ),
        Fault(
            "clip-nothing-changes",
            "Not every gradient changes. A generator of parameters is used up after one loop, "
            "so a second loop over it does nothing; and `g = g * factor` makes a new tensor.",
            "Make a list of the gradients first, and change them in place.",
            CLIP,
            settings=[{"when": "never"}, {"when": "first tensor only"}],
            implementations=[_clip_going_through_twice],
        ),
        Fault(
            "clip-weights-changed",
            "The weights are scaled in place of their gradients.",
            "Change parameter.grad, not the parameter.",
            CLIP,
            settings=[{"how": "the weights"}],
        ),
        Fault(
            "clip-returns-otherwise",
            "What is returned is not the norm before clipping.",
            "Return the norm that you compared with max_norm: its log shows an explosion.",
            CLIP,
            settings=[{"returned": "norm after"}, {"returned": "factor"}, {"returned": "nothing"}],
        ),
        Fault(
            "sgd-none-grad",
            "A parameter without a gradient (grad is None) stops the function.",
            "Leave such a parameter out.",
            CLIP,
            settings=[{"missing": "error"}],
        ),
    ],
)


# ----- orthogonal -------------------------------------------------------------------------------------------


def _orthogonal_probes(generator: torch.Generator) -> list[Probe]:
    def probe(name: str, n: int, core: bool = False) -> Probe:
        # A triangle of twos keeps the matrix far from one that has no inverse, and unlike its transpose.
        matrix = _halves(generator, n, n) / 2 + 2 * torch.ones(n, n).triu()
        return Probe(name, {"matrix": matrix}, core=core)

    return [
        probe("two columns", 2, core=True),
        probe("three columns", 3, core=True),
        probe("six columns", 6),
        Probe("a matrix with a negative entry alone", {"matrix": torch.tensor([[-2.0]])}),
    ]


def _orthogonal_twin(matrix: Tensor, *, along: str = "columns", form: str = "all projections") -> Tensor:
    m = matrix if along == "columns" else matrix.T
    columns: list[Tensor] = []
    for column in m.T:
        rest = column
        for number, earlier in enumerate(columns):
            if form == "all projections" or form == "not normed" or (form == "first only" and number == 0):
                rest = rest - (rest @ earlier) / (earlier @ earlier) * earlier
            elif form == "before only" and number == len(columns) - 1:
                rest = rest - (rest @ earlier) * earlier
        columns.append(rest if form == "not normed" else rest / rest.norm())
    q = torch.stack(columns, dim=1)
    if form == "factor as it comes":
        q = -q
        q[:, -1] = -q[:, -1] if len(q) > 1 else q[:, -1]
    elif form == "qr":
        q = torch.linalg.qr(m).Q
    elif form == "norm of the whole":
        q = m / m.norm()
    elif form == "largest stretch":
        q = m / torch.linalg.matrix_norm(m, ord=2)
    elif form == "identity":
        q = torch.eye(len(m))
    return q if along == "columns" else q.T


def _nearest_orthogonal(matrix: Tensor) -> Tensor:
    u, _, vt = torch.linalg.svd(matrix)
    nearest: Tensor = u @ vt
    return nearest


def _not_orthogonal(probe: Probe, got: Outcome, wanted: Outcome) -> str:
    """Name the first two columns that are not at a right angle, or one that has not the length 1."""
    q = got.values.get("result")
    right = wanted.values.get("result")
    if not isinstance(q, Tensor) or not isinstance(right, Tensor) or q.shape != right.shape:
        return ""
    products = q.double().T @ q.double()
    off = (products - torch.eye(len(products), dtype=torch.float64)).abs()
    if not (off > 1e-3).any():
        return ""
    i, j = divmod(int((off > 1e-3).flatten().nonzero()[0]), len(off))
    if i == j:
        return f"Column {i} of the result has the length {products[i, i].sqrt():.3g} in place of 1."
    return f"Columns {i} and {j} of the result have the dot product {products[i, j]:.3g} in place of 0."


def _orthogonal_by_qr(matrix: Tensor) -> Any:
    q, r = torch.linalg.qr(matrix)
    return q @ torch.diag(torch.sign(torch.diag(r)))


def _orthogonal_classically(matrix: Tensor) -> Any:
    q = matrix.clone()
    for j in range(q.shape[1]):
        column = matrix[:, j]
        for i in range(j):
            column = column - torch.dot(matrix[:, j], q[:, i]) * q[:, i]
        q[:, j] = column / torch.linalg.norm(column)
    return q


def _orthogonal_by_cholesky(matrix: Tensor) -> Any:
    m = matrix.double()
    lower = torch.linalg.cholesky(m.T @ m)
    return m @ torch.linalg.inv(lower).T


ORTHOGONAL_TASK = Task(
    id="rnn.orthogonal",
    signature="orthogonal(matrix)",
    points=2,
    reference=rnn.orthogonal,
    probes=_orthogonal_probes,
    twin=_orthogonal_twin,
    forbidden=frozenset({"orthogonal", "polar"}),
    properties=[_not_orthogonal],
    variants=[_orthogonal_by_qr, _orthogonal_classically, _orthogonal_by_cholesky],
    hints=(
        "What must be taken away from the second column, so that it is at a right angle to the first?",
        "Column j loses its part along every column before it, (column . earlier) * earlier, and is then divided by its length.",
        "for each column, from the left:\n    for each finished column q: column -= (column . q) * q\n"
        "    divide the column by its norm and keep it\nreturn the kept columns side by side",
    ),
    mistakes=[
        Fault(
            "orthogonal-rows-first",
            "The rows are treated in place of the columns.",
            "Begin with the first column, matrix[:, 0].",
            ROTATION,
            settings=[{"along": "rows"}],
        ),
        Fault(
            "orthogonal-columns-turned",
            "Some columns point the other way: a factorisation is free to choose their signs.",
            "Multiply each column of Q with the sign of the diagonal entry of R.",
            ROTATION,
            settings=[{"form": "qr"}],
        ),
        Fault(
            "orthogonal-not-normed",
            "The columns are at right angles, but their lengths are not 1.",
            "Divide each column by its norm.",
            ROTATION,
            settings=[{"form": "not normed"}],
        ),
        Fault(
            "orthogonal-projections-missing",
            "A column loses its part along some earlier columns only, or along none.",
            "Take away the part along every column before it.",
            ROTATION,
            settings=[{"form": "first only"}, {"form": "before only"}, {"form": "no projections"}],
        ),
        Fault(
            "orthogonal-only-scaled",
            "The whole matrix is divided by one number. That bounds how far it stretches, but the angles stay as they were.",
            "Make the columns orthogonal one after the other.",
            ROTATION,
            settings=[{"form": "norm of the whole"}, {"form": "largest stretch"}],
        ),
        Fault(
            "orthogonal-another-one",
            "This is an orthogonal matrix, but not the one that Gram and Schmidt's method gives: the nearest one, or the identity.",
            "Let the first column keep its direction, and change each later one only by the columns before it.",
            ROTATION,
            settings=[{"form": "identity"}],
            implementations=[_nearest_orthogonal],
        ),
    ],
)


# ----- RNNClassifier ----------------------------------------------------------------------------------------


def _classifier_probes(generator: torch.Generator) -> list[Probe]:
    def probe(
        name: str, n: int, steps: int, sizes: tuple[int, int, int], core: bool = False, all_used: bool = True
    ) -> Probe:
        n_in, n_hidden, n_classes = sizes
        w = _weights(generator, n_in, n_hidden)
        # A symmetric square matrix is the same for h @ W and h @ W.T, so that both ways of storing it are right.
        symmetric = (w["weight_hh"] + w["weight_hh"].T) / 2
        state = (
            w["weight_ih"],
            symmetric,
            w["bias_ih"],
            w["bias_hh"],
            randn(generator, n_classes, n_hidden),
            randn(generator, n_classes),
            # For one layer that takes input and state together, and for an output that does.
            torch.cat([w["weight_ih"], symmetric], dim=1),
            randn(generator, n_classes, n_in + n_hidden),
        )
        gradients = ("xs", "parameters") if all_used else ("xs",)
        args = {"xs": _halves(generator, n, steps, n_in)}
        return Probe(name, args, build=sizes, state=state, gradients=gradients, calls=2, core=core)

    return [
        probe("two sequences of three steps", 2, 3, (3, 5, 4), core=True),
        probe("five sequences of six steps", 5, 6, (4, 7, 3), core=True),
        probe("as many sequences as steps", 4, 4, (2, 6, 5)),
        # Where there is one step only, weight_hh may go unused.
        probe("a single step", 3, 1, (3, 4, 2), all_used=False),
        probe("a single sequence", 1, 5, (5, 3, 4)),
    ]


class _FaultyClassifier(nn.Module):
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        n_classes: int,
        *,
        weights: str = "two layers",
        bend: str = "tanh",
        steps: str = "all",
        handed_on: str = "in time",
        start: str = "zeros",
        read: str = "last state",
        output: str = "logits",
        output_bias: bool = True,
        cut: bool = False,
    ) -> None:
        super().__init__()
        self.weights, self.steps, self.handed_on, self.start = weights, steps, handed_on, start
        self.read, self.output, self.cut, self.hidden_size = read, output, cut, hidden_size
        self.activation = _ACTIVATIONS[bend]
        self.kept: Tensor | None = None
        if weights.startswith("joined"):
            self.joined = nn.Linear(input_size + hidden_size, hidden_size)
        else:
            self.from_input = nn.Linear(input_size, hidden_size)
            if weights != "no recurrent layer":
                self.from_state = nn.Linear(hidden_size, hidden_size, bias=weights != "one bias")
        width = input_size + hidden_size if read.startswith("combined") else hidden_size
        self.to_classes = nn.Linear(width, n_classes, bias=output_bias)

    def cell(self, x: Tensor, h: Tensor) -> Tensor:
        if self.cut:
            h = h.detach()
        if self.weights.startswith("joined"):
            both = [h, x] if self.weights == "joined, state first" else [x, h]
            return self.activation(self.joined(torch.cat(both, dim=1)))
        from_state = h if self.weights == "no recurrent layer" else self.from_state(h)
        return self.activation(self.from_input(x) + from_state)

    def first(self, like: Tensor, n: int) -> Tensor:
        if self.start == "normal":
            return torch.randn(n, self.hidden_size)
        if self.start == "uniform":
            return torch.rand(n, self.hidden_size)
        if self.start == "ones":
            return like.new_ones(n, self.hidden_size)
        return like.new_zeros(n, self.hidden_size)

    def forward(self, xs: Tensor) -> Tensor:
        n, n_steps, _ = xs.shape
        if self.handed_on == "over the samples axis":
            steps = list(xs.unbind(0))
        elif self.handed_on == "viewed":
            steps = list(xs.reshape(n_steps, n, -1).unbind(0))
        else:
            steps = list(xs.unbind(1))
        if self.steps == "backwards":
            steps.reverse()
        elif self.steps == "last only":
            steps = steps[-1:]
        elif self.steps == "first only":
            steps = steps[:1]
        elif self.steps == "all but the last":
            steps = steps[:-1] or steps
        elif self.steps == "mean of all":
            steps = [xs.mean(1)]
        elif self.steps == "sum of all":
            steps = [xs.sum(1)]
        if self.handed_on == "from sample to sample":
            h = self.first(xs, 1)
            rows, old_rows = [], []
            for b in range(n):
                for x in steps:
                    old, h = h, self.cell(x[b : b + 1], h)
                rows.append(h)
                old_rows.append(old)
            h, old, states = torch.cat(rows), torch.cat(old_rows), [torch.cat(rows)]
        else:
            h = self.first(xs, len(steps[0]))
            if self.handed_on == "from call to call" and self.kept is not None:
                h = self.kept
            states = []
            for x in steps:
                old, h = h, self.cell(x, h)
                states.append(h)
            self.kept = h.detach()
        seen = {
            "last state": lambda: h,
            "mean state": lambda: torch.stack(states).mean(0),
            "state before": lambda: old,
            "combined": lambda: torch.cat([steps[-1], old], dim=1),
            "combined, state first": lambda: torch.cat([old, steps[-1]], dim=1),
            "every state": lambda: torch.stack(states, dim=1),
        }[self.read]()
        logits: Tensor = self.to_classes(seen)
        return {
            "logits": lambda: logits,
            "softmax": lambda: logits.softmax(-1),
            "log softmax": lambda: logits.log_softmax(-1),
            "tanh": lambda: logits.tanh(),
            "relu": lambda: logits.relu(),
        }[self.output]()


def _right_classifiers() -> list[Callable[..., Any]]:
    """List the networks that are right, too: one bias or one joined layer, the mean state, log probabilities."""

    def form(settings: dict[str, str]) -> Callable[..., Any]:
        return lambda *sizes: _FaultyClassifier(*sizes, **settings)  # type: ignore[arg-type]

    weights = ("two layers", "one bias", "joined, state first")
    reads = ("last state", "mean state")
    outputs = ("logits", "log softmax")
    choices = [{"weights": w, "read": r, "output": o} for w in weights for r in reads for o in outputs]
    return [form(settings) for settings in choices[1:]]  # the first one is the reference


def _census(probe: Probe, got: Outcome, wanted: Outcome) -> str:
    """Count the parameters, and look at the way of the gradient and at random numbers."""
    count, right = got.values.get("number of parameters"), wanted.values.get("number of parameters")
    if count != right:
        return f"parameters() finds {count} numbers; this network has {right}."
    if got.random:
        return "Two calls with the same input give different results: random numbers are drawn in forward."
    gradient = got.values.get("gradient of xs")
    if isinstance(gradient, Tensor) and gradient.dim() == 3:
        silent = (gradient.abs().amax((0, 2)) == 0).nonzero().flatten().tolist()
        if silent:
            return f"No gradient reaches step {silent[0]} of the sequence: it has no influence on the answer."
    return ""


class _ClassifierOfLinears(torch.nn.Module):
    def __init__(self, input_size: int, hidden_size: int, n_classes: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.i2h = torch.nn.Linear(input_size, hidden_size)
        self.h2h = torch.nn.Linear(hidden_size, hidden_size)
        self.h2o = torch.nn.Linear(hidden_size, n_classes)

    def forward(self, xs: Tensor) -> Any:
        h = torch.zeros(xs.size(0), self.hidden_size)
        for t in range(xs.size(1)):
            h = torch.tanh(self.i2h(xs[:, t, :]) + self.h2h(h))
        return self.h2o(h)


class _ClassifierOfOneJoinedLayer(torch.nn.Module):
    def __init__(self, input_size: int, hidden_size: int, n_classes: int) -> None:
        super().__init__()
        self.cell = torch.nn.Linear(input_size + hidden_size, hidden_size)
        self.out = torch.nn.Linear(hidden_size, n_classes)

    def forward(self, xs: Tensor) -> Any:
        h = xs.new_zeros(len(xs), self.cell.out_features)
        for x in xs.unbind(1):
            h = self.cell(torch.cat((x, h), 1)).tanh()
        return self.out(h)


class _ClassifierWithoutASecondBias(torch.nn.Module):
    def __init__(self, input_size: int, hidden_size: int, n_classes: int) -> None:
        super().__init__()
        self.recurrent = torch.nn.Linear(hidden_size, hidden_size, bias=False)
        self.out = torch.nn.Linear(hidden_size, n_classes)
        self.input = torch.nn.Linear(input_size, hidden_size)

    def forward(self, xs: Tensor) -> Any:
        inputs = self.input(xs).transpose(0, 1)
        h = torch.zeros_like(inputs[0])
        for x in inputs:
            h = torch.tanh(x + self.recurrent(h))
        return torch.log_softmax(self.out(h), dim=1)


class _ClassifierOfParameters(torch.nn.Module):
    def __init__(self, input_size: int, hidden_size: int, n_classes: int) -> None:
        super().__init__()
        self.w_x = torch.nn.Parameter(torch.randn(input_size, hidden_size) * 0.1)
        self.w_h = torch.nn.Parameter(torch.randn(hidden_size, hidden_size) * 0.1)
        self.b = torch.nn.Parameter(torch.zeros(1, hidden_size))
        self.w_o = torch.nn.Parameter(torch.randn(hidden_size, n_classes) * 0.1)
        self.b_o = torch.nn.Parameter(torch.zeros(n_classes))

    def forward(self, xs: Tensor) -> Any:
        h = torch.zeros(1, self.w_h.shape[0])
        states = []
        for t in range(xs.shape[1]):
            h = torch.tanh(xs[:, t] @ self.w_x + h @ self.w_h + self.b)
            states.append(h)
        return torch.stack(states).mean(0) @ self.w_o + self.b_o


CLASSIFIER_TASK = Task(
    id="rnn.RNNClassifier",
    signature="RNNClassifier(input_size, hidden_size, n_classes)",
    points=4,
    reference=rnn.RNNClassifier,
    probes=_classifier_probes,
    twin=_FaultyClassifier,
    accepts=_right_classifiers(),
    forbidden=LAYERS | {"lstm", "gru", "lstm_cell", "gru_cell", "gru_tanh", "RNNClassifier"},
    properties=[_census],
    variants=[
        _ClassifierOfLinears,
        _ClassifierOfOneJoinedLayer,
        _ClassifierWithoutASecondBias,
        _ClassifierOfParameters,
    ],
    hints=(
        "Which layers does the network have, and how often is each of them used for one sequence?",
        "One state for each sample, zeros at the beginning of every call. The same two layers at every step; "
        "the output layer once, at the end.",
        "in __init__: from_input = Linear(F, H), from_state = Linear(H, H), output = Linear(H, C)\n"
        "in forward: h = zeros (B, H)\nfor each step t: h = tanh(from_input(xs[:, t]) + from_state(h))\n"
        "return output(h)",
    ),
    mistakes=[
        Fault(
            "rnn-image-as-one-step",
            "The loop runs once: only one row, or a sum or mean of all rows, is seen, and the recurrent weights never matter.",
            "Go through all steps, one row at a time, and hand the state on.",
            FALSE,
            settings=[{"steps": name} for name in ("last only", "first only", "mean of all", "sum of all")],
        ),
        Fault(
            "rnn-state-across-samples",
            "The state lives on from one sample, or from one call, to the next: the answer for a sample depends on others.",
            "Make a state of zeros at the beginning of every forward, one row for each sample.",
            FALSE,
            settings=[{"handed_on": "from sample to sample"}, {"handed_on": "from call to call"}],
        ),
        Fault(
            "rnn-loop-over-samples",
            "The loop runs over axis 0, the samples, in place of axis 1, the time.",
            "Take xs[:, t] for each step t.",
            UNROLL,
            settings=[{"handed_on": "over the samples axis"}],
        ),
        Fault(
            "rnn-view-instead-of-transpose",
            "A view or reshape cuts the memory anew: the rows of different samples are mixed.",
            "Use transpose(0, 1), or take xs[:, t].",
            WRONG,
            settings=[{"handed_on": "viewed"}],
        ),
        Fault(
            "rnn-output-from-combined",
            "The class is read from the last input and the state before it, so the last update of the state is never used.",
            "Read the class from the state that you have computed last.",
            WRONG,
            settings=[
                {"read": read, "weights": weights}
                for read in ("combined", "combined, state first")
                for weights in ("two layers", "one bias", "joined", "joined, state first")
            ],
        ),
        Fault(
            "rnn-wrong-state-read",
            "The class is read from the state before the last one, or from each state.",
            "Read it from the state after the last step (the mean over all states is accepted, too).",
            MODULE,
            settings=[
                {"read": "state before"},
                {"read": "every state"},
                {"steps": "all but the last"},
            ],
        ),
        Fault(
            "rnn-random-h0",
            "Random numbers are drawn in forward, for the first state most often (or by a Dropout): two calls, two answers.",
            "Start from zeros.",
            WRONG,
            settings=[{"start": "normal"}, {"start": "uniform"}],
            sign=lambda probe, got, wanted: got.random,
        ),
        Fault(
            "rnn-first-state-not-zero",
            "The first state is not 0.",
            "Start from zeros.",
            UNROLL,
            settings=[{"start": "ones"}],
        ),
        Fault(
            "rnn-no-recurrent-weight",
            "The old state is added as it is; there is no recurrent layer. H squared parameters are missing.",
            "Give the state a layer of its own: nn.Linear(hidden_size, hidden_size).",
            FALSE,
            settings=[{"weights": "no recurrent layer"}],
        ),
        Fault(
            "rnn-time-reversed",
            "The steps are taken from the last to the first.",
            "Begin with xs[:, 0].",
            UNROLL,
            settings=[{"steps": "backwards"}],
        ),
        *_wrong_activation("bend"),
        Fault(
            "loss-double-softmax",
            "The network returns probabilities. The cross-entropy applies softmax again.",
            "Return logits, the output layer's numbers as they are.",
            MODULE,
            settings=[{"output": "softmax"}],
        ),
        Fault(
            "rnn-output-bent",
            "The logits are bent by tanh or ReLU.",
            "Return the output layer's numbers as they are.",
            MODULE,
            settings=[{"output": "tanh"}, {"output": "relu"}],
        ),
        Fault(
            "net-bias-missing",
            "The output layer has no bias.",
            "Use nn.Linear with its bias.",
            MODULE,
            settings=[{"output_bias": False}],
        ),
        Fault(
            "rnn-state-detached",
            "The logits are right, but the state is detached between the steps: only the last step is learnt from.",
            "Hand the state on as it is.",
            BPTT,
            settings=[{"cut": True}],
        ),
    ],
)


# ----- grade this: functions that read a sequence, as source text --------------------------------------------


def _right_by_a_loop(xs: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor) -> Tensor:
    h = torch.zeros(xs.shape[0], bias.shape[0])
    for t in range(xs.shape[1]):
        h = torch.tanh(xs[:, t] @ weight_ih.T + h @ weight_hh.T + bias)
    return h


def _right_inputs_first(xs: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor) -> Tensor:
    inputs = xs @ weight_ih.T + bias
    h = torch.tanh(inputs[:, 0])
    for x in inputs[:, 1:].unbind(1):
        h = torch.tanh(x + h @ weight_hh.T)
    return h


def _right_joined(xs: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor) -> Tensor:
    joined = torch.cat([weight_hh, weight_ih], dim=1)
    h = xs.new_zeros(len(xs), len(bias))
    for x in xs.transpose(0, 1):
        h = (torch.cat([h, x], dim=1) @ joined.T + bias).tanh()
    return h


def _wrong_last_row_only(xs: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor) -> Tensor:
    return torch.tanh(xs[:, -1] @ weight_ih.T + bias)


def _wrong_state_kept_for_the_next_sample(
    xs: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor
) -> Tensor:
    h = torch.zeros(bias.shape[0])
    rows = []
    for sample in xs:
        for x in sample:
            h = torch.tanh(weight_ih @ x + weight_hh @ h + bias)
        rows.append(h)
    return torch.stack(rows)


def _wrong_state_added(xs: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor) -> Tensor:
    h = torch.zeros(xs.shape[0], bias.shape[0])
    for t in range(xs.shape[1]):
        h = torch.tanh(xs[:, t] @ weight_ih.T + h + bias)
    return h


def _wrong_viewed(xs: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor) -> Tensor:
    h = torch.zeros(xs.shape[0], bias.shape[0])
    for x in xs.reshape(xs.shape[1], xs.shape[0], xs.shape[2]):
        h = torch.tanh(x @ weight_ih.T + h @ weight_hh.T + bias)
    return h


def _wrong_random_start(xs: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor) -> Tensor:
    h = torch.rand(xs.shape[0], bias.shape[0])
    for t in range(xs.shape[1]):
        h = torch.tanh(xs[:, t] @ weight_ih.T + h @ weight_hh.T + bias)
    return h


def _wrong_relu(xs: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor) -> Tensor:
    h = torch.zeros(xs.shape[0], bias.shape[0])
    for t in range(xs.shape[1]):
        h = torch.relu(xs[:, t] @ weight_ih.T + h @ weight_hh.T + bias)
    return h


def _wrong_matrix_turned(xs: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor) -> Tensor:
    h = torch.zeros(xs.shape[0], bias.shape[0])
    for t in range(xs.shape[1]):
        h = torch.tanh(xs[:, t] @ weight_ih.T + h @ weight_hh + bias)
    return h


def _wrong_last_step_missing(xs: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor) -> Tensor:
    h = torch.zeros(xs.shape[0], bias.shape[0])
    for t in range(max(1, xs.shape[1] - 1)):
        h = torch.tanh(xs[:, t] @ weight_ih.T + h @ weight_hh.T + bias)
    return h


RIGHT_SPECIMENS = (_right_by_a_loop, _right_inputs_first, _right_joined)
WRONG_SPECIMENS = (
    _wrong_last_row_only,
    _wrong_state_kept_for_the_next_sample,
    _wrong_state_added,
    _wrong_viewed,
    _wrong_random_start,
    _wrong_relu,
    _wrong_matrix_turned,
    _wrong_last_step_missing,
)


def _specimen_probes(generator: torch.Generator) -> list[Probe]:
    return specimen_probes("last_state", RIGHT_SPECIMENS, WRONG_SPECIMENS, generator)


def _expected(xs: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor) -> Tensor:
    return rnn.unroll(
        xs, xs.new_zeros(len(xs), len(bias)), weight_ih, weight_hh, bias, torch.zeros_like(bias)
    )[:, -1]


def _example(n: int, steps: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count = torch.arange(n * steps * 2).reshape(n, steps, 2)
    weight_ih = torch.tensor([[0.5, -0.2], [0.3, 0.4], [-0.6, 0.1]])
    weight_hh = torch.tensor([[0.1, 0.7, -0.3], [-0.5, 0.2, 0.6], [0.4, -0.1, 0.3]])
    return torch.sin(count.float()), weight_ih, weight_hh, torch.tensor([-0.4, 0.2, -0.1])


def _agrees(last_state: Any, example: tuple[Tensor, Tensor, Tensor, Tensor]) -> bool:
    return torch.allclose(last_state(*example), _expected(*example), atol=1e-4)


def _examine(last_state: Any) -> bool:
    """Accept a function that reads sequences when it is right on three samples of four steps."""
    return _agrees(last_state, _example(3, 4))


def _examine_one_sample(last_state: Any) -> bool:
    return _agrees(last_state, _example(1, 4))


def _examine_one_step(last_state: Any) -> bool:
    return _agrees(last_state, _example(3, 1))


def _examine_shape(last_state: Any) -> bool:
    xs, *weights = _example(3, 4)
    result = last_state(3 * xs, *weights)
    return result.shape == (3, 3) and bool((result.abs() < 1).all())


def _examine_twice(last_state: Any) -> bool:
    example = _example(3, 4)
    return torch.equal(last_state(*example), last_state(*example))


def _examine_with_assert(last_state: Any) -> None:
    xs = torch.tensor([[[1.0], [0.0]], [[0.0], [-2.0]], [[0.5], [1.0]]])
    weight_ih = torch.tensor([[1.0], [0.5]])
    weight_hh = torch.tensor([[0.0, 2.0], [-1.0, 0.5]])
    bias = torch.tensor([-0.5, 0.1])
    result = last_state(xs, weight_ih, weight_hh, bias)
    for sample, row in zip(xs, result, strict=True):
        h = torch.zeros(2)
        for x in sample:
            h = torch.tanh(weight_ih @ x + weight_hh @ h + bias)
        assert (row - h).abs().max() < 1e-4


GRADE_THIS = Task(
    id="rnn.grade_this",
    signature="examine(last_state)",
    points=3,
    reference=_examine,
    probes=_specimen_probes,
    variants=[_examine_with_assert],
    hints=(
        "Which inputs would show that samples disturb each other, and which that the old state is not used as it should be?",
        "Use at least two samples and three steps, a weight_hh that is not symmetric, a bias that is not 0, "
        "and compare with the states that your own loop gives.",
        "xs of shape (3, 4, 2), four tensors of different unequal numbers\nexpected: tanh of each step, in a loop, from zeros\n"
        "return whether last_state(...) is close to expected",
    ),
    mistakes=[
        Fault(
            "test-on-one-sequence",
            "With a single sample nobody can disturb a neighbour, and view equals transpose.",
            "Use at least two different samples.",
            UNROLL,
            implementations=[_examine_one_sample],
        ),
        Fault(
            "test-on-one-step",
            "With a single step the old state is 0, so weight_hh is never tested.",
            "Use three steps or more.",
            UNROLL,
            implementations=[_examine_one_step],
        ),
        Fault(
            "test-of-the-shape-only",
            "The right shape, and numbers between -1 and 1, come out of many wrong functions.",
            "Compare with values that you worked out.",
            UNROLL,
            implementations=[_examine_shape],
        ),
        Fault(
            "test-of-two-calls-only",
            "Two equal calls show that nothing is random, and no more.",
            "Compare with values that you worked out.",
            UNROLL,
            implementations=[_examine_twice],
        ),
        *verdict_faults(UNROLL),
    ],
)


# ----- read claims --------------------------------------------------------------------------------------------


_CLAIMS = {
    "time steps": 1,
    "parameters": 28 * 128 + 128 * 128 + 128 + 128 + 128 * 10 + 10,
    "answers given": 2,
    "reach": 0.8**27,
    "clip factor": 5 / 40,
    "rate divided by": 2**10 * 3**10,
}


READ_CLAIMS = Task(
    id="rnn.read_claims",
    signature="answers: a dictionary",
    points=3,
    reference=_CLAIMS.get,
    probes=answer_probes(
        {
            "time steps": "the number of time steps that the network of the first log takes for one image",
            "parameters": "the number of parameters of a true recurrent network over 28 rows",
            "answers given": "the smallest number of different answers that can give 19 % on a balanced test set of ten classes",
            "reach": "the gradient at the first of 28 rows, relative to the last, when each step multiplies it by 0.8",
            "clip factor": "the factor by which clipping to 5 multiplies a gradient of norm 40",
            "rate divided by": "by how much the learning rate has been divided after the epochs 0 to 29",
        }
    ),
    is_value=True,
    hints=(
        "What would each number be if the claim were true? Which count in the log contradicts it?",
        "A layer from [row; state] to the state has input size F + H. A network that always gives one answer gets the share of one class. "
        "Between the first and the last of n rows lie n - 1 steps.",
        "time steps: 784 / (912 - 128)\nparameters: F H + H H + two biases H, and H C + C for the output\n"
        "answers given: one answer gets 10 %, so how many are needed for 19 %?\nreach: 0.8 to the power of the steps between\n"
        "clip factor: bound / norm\nrate: multiply the divisors of all 30 epochs",
    ),
    mistakes=[
        known_answer(
            _CLAIMS,
            "time steps",
            28,
            fault_id="rnn-image-as-one-step",
            does="28 rows are what the network should see. The layer takes 912 = 784 + 128 numbers: the image at once.",
            todo="Subtract the state from the layer's input, and ask how many such pieces an image has.",
            reread=FALSE,
        ),
        known_answer(
            _CLAIMS,
            "parameters",
            28 * 28 * 128 + 128 * 128 + 128 + 128 + 128 * 10 + 10,
            fault_id="claims-image-for-a-row",
            does="You gave the input layer all 784 pixels. At each step it takes one row of 28.",
            todo="Use F = 28: the weights do not grow with the number of steps.",
            reread=MODULE,
        ),
        known_answer(
            _CLAIMS,
            "parameters",
            28 * (28 * 128 + 128 * 128 + 128 + 128) + 128 * 10 + 10,
            fault_id="claims-weights-for-each-step",
            does="You gave each of the 28 steps weights of its own.",
            todo="All steps share one set of weights: count it once.",
            reread=UNROLL,
        ),
        known_answer(
            _CLAIMS,
            "parameters",
            28 * 128 + 128 * 128 + 128 * 10,
            fault_id="log-biases-forgotten",
            does="You counted the weights and forgot the biases.",
            todo="Add two biases of the cell and one of the output layer.",
            reread=MODULE,
        ),
        known_answer(
            _CLAIMS,
            "answers given",
            1,
            fault_id="claims-one-answer",
            does="A network that always gives the same answer gets exactly 10 % of a balanced test set.",
            todo="Ask how many classes have to be right, in whole or in part, for 19 %.",
            reread=CASE,
        ),
        known_answer(
            _CLAIMS,
            "reach",
            0.8**28,
            fault_id="claims-steps-between",
            does="You counted 28 steps. Between the first and the last of 28 rows lie 27.",
            todo="Count the steps between, not the rows.",
            reread=DISTANCE,
        ),
        known_answer(
            _CLAIMS,
            "clip factor",
            40 / 5,
            fault_id="clip-wrong-factor",
            does="You divided the norm by the bound: this factor would make the gradient longer.",
            todo="The factor is the bound divided by the norm.",
            reread=CLIP,
        ),
        known_answer(
            _CLAIMS,
            "rate divided by",
            3,
            fault_id="rnn-compounding-lr-decay",
            does="3 is what was meant. The rule divides the rate that is already divided, in every epoch.",
            todo="Multiply the divisors of all 30 epochs: ten times 1, ten times 2, ten times 3.",
            reread=WRONG,
        ),
    ],
)

TASKS = [
    CELL_TASK,
    UNROLL_TASK,
    BPTT_TASK,
    DISTANCE_TASK,
    CLIP_TASK,
    ORTHOGONAL_TASK,
    CLASSIFIER_TASK,
    GRADE_THIS,
    READ_CLAIMS,
]
