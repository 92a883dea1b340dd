"""Tasks of the chapter "Long short-term memory": right answers, and the wrong ones that are known."""

import math
from collections.abc import Callable
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from dianlib import lstm
from dianlib.checks.judging import close
from dianlib.checks.kinds import (
    DETACHED,
    answer_probes,
    known_answer,
    randn,
    specimen_probes,
    verdict_faults,
    without_gradient,
)
from dianlib.checks.running import Layer, Outcome, Probe, Tensors
from dianlib.checks.task import Fault, Task

GATES = "lstm: What to forget, what to write, what to show?"
STEP = "lstm: One step: four blocks, three gates, two states"
SEQUENCE = "lstm: From one step to a sequence"
ROAD = "lstm: Why is the cell state a road for gradients?"
START = "lstm: Where does a forget gate start?"
GRU = "lstm: The gated recurrent unit: two gates, one state"
BUDGET = "lstm: What does a gate cost?"
ROWS = "lstm: Rows of an image as steps in time"
LOOK = "lstm: What do the gates do after training?"
WRONG = "lstm: Tempting, but wrong"
CASE = "lstm: The case, solved"

# The cells and layers of torch: the answers themselves.
_LSTM = frozenset({"lstm", "lstm_cell", "_thnn_fused_lstm_cell", "mkldnn_rnn_layer"})
_GRU = frozenset({"gru", "gru_cell", "_thnn_fused_gru_cell"})


def _weights(generator: torch.Generator, n_blocks: int, n_in: int, hidden_size: int) -> dict[str, Tensor]:
    """Draw weights and two biases: the biases are large and differ from block to block."""
    rows = n_blocks * hidden_size
    return {
        "weight_ih": (randn(generator, rows, n_in) * 4).round() / 4,
        "weight_hh": (randn(generator, rows, hidden_size) * 4).round() / 4,
        "bias_ih": (randn(generator, rows) * 4).round() / 4,
        "bias_hh": (randn(generator, rows) * 4).round() / 4 + 0.125,
    }


def _parts(scores: Tensor, order: str, split: str = "blocks") -> dict[str, Tensor]:
    """Cut the scores (..., k H) into named blocks, or into every k-th column."""
    n_blocks = len(order)
    if split == "interleaved":
        cut = scores.reshape(*scores.shape[:-1], -1, n_blocks).unbind(-1)
    else:
        cut = scores.chunk(n_blocks, dim=-1)
    return dict(zip(order, cut, strict=True))


def _bias(bias_ih: Tensor, bias_hh: Tensor, which: str, n_blocks: int) -> tuple[Tensor, Tensor]:
    """Return the two biases as a mistaken learner would use them."""
    if which.startswith("block "):
        block = int(which.removeprefix("block "))
        first, second = (b.chunk(n_blocks)[block].repeat(n_blocks) for b in (bias_ih, bias_hh))
        return first, second
    factors = {"both": (1, 1), "ih only": (1, 0), "hh only": (0, 1), "none": (0, 0)}[which]
    return bias_ih * factors[0], bias_hh * factors[1]


def _bias_faults() -> list[Fault]:
    return [
        Fault(
            "lstm-bias-missing",
            "The scores lack bias_ih, bias_hh, or both.",
            "Add both biases: torch keeps two, and the gate sees their sum.",
            STEP,
            settings=[{"bias": "ih only"}, {"bias": "hh only"}, {"bias": "none"}],
        ),
        Fault(
            "lstm-one-bias-for-all-gates",
            "Each gate has its own bias; yours share one block of it.",
            "Cut the bias into blocks as you cut the scores, one block for each gate.",
            STEP,
            settings=[{"bias": "block 0"}, {"bias": "block 1"}],
        ),
    ]


# ----- lstm_cell ----------------------------------------------------------------------------------------


def _cell_probes(generator: torch.Generator) -> list[Probe]:
    def probe(name: str, n: int, n_in: int, hidden_size: int, core: bool = False, cell: float = 1.0) -> Probe:
        h, c = (randn(generator, n, hidden_size).tanh(), randn(generator, n, hidden_size) * cell)
        args = {
            "x": (randn(generator, n, n_in) * 4).round() / 4,
            "state": Tensors((h, c)),
            **_weights(generator, 4, n_in, hidden_size),
        }
        return Probe(name, args, gradients=tuple(args), core=core)

    return [
        probe("two samples of three numbers, two hidden units", 2, 3, 2, core=True),
        probe("four samples of three numbers, five hidden units", 4, 3, 5, core=True, cell=2.0),
        probe("as many inputs as hidden units", 3, 4, 4),
        probe("large cell states", 3, 2, 3, cell=5.0),
        probe("a single sample", 1, 5, 3),
    ]


_SQUASHES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "none": lambda x: x,
}


def _squash(name: str, x: Tensor) -> Tensor:
    return _SQUASHES[name](x)


def _cell_twin(
    x: Tensor,
    state: tuple[Tensor, Tensor],
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    *,
    order: str = "ifgo",
    split: str = "blocks",
    bias: str = "both",
    gates: str = "sigmoid",
    candidate: str = "tanh",
    update: str = "f c + i g",
    shown: str = "o tanh(c)",
    recurrent: str = "h",
    peephole: str = "none",
    taken: str = "h, c",
    returned: str = "h, c",
    cut: bool = False,
) -> tuple[Tensor, Tensor]:
    h, c = state if taken == "h, c" else state[::-1]
    b_ih, b_hh = _bias(bias_ih, bias_hh, bias, 4)
    old = {"h": h, "c": c, "none": h * 0}[recurrent]
    part = _parts(x @ weight_ih.T + b_ih + old @ weight_hh.T + b_hh, order, split)
    before, after = (c * (peephole == place) for place in ("before", "after"))
    i, f, o = (_squash(gates, part[name] + before) + after for name in "ifo")
    g = _squash(candidate, part["g"])
    new = {
        "f c + i g": lambda: f * c + i * g,
        "f (c + g)": lambda: f * (c + g),
        "tanh": lambda: (f * c + i * g).tanh(),
        "f c + g": lambda: f * c + g + i * 0,
        "c + i g": lambda: c + i * g + f * 0,
        "f c + (1 - f) g": lambda: f * c + (1 - f) * g + i * 0,
        "(1 - f) c + i g": lambda: (1 - f) * c + i * g,
    }[update]()
    h_new = {
        "o tanh(c)": lambda: o * new.tanh(),
        "o c": lambda: o * new,
        "tanh(c)": lambda: new.tanh() + o * 0,
        "o tanh(old c)": lambda: o * c.tanh(),
        "o sigmoid(c)": lambda: o * new.sigmoid(),
    }[shown]()
    if cut:
        h_new, new = h_new.detach(), new.detach()
    return (h_new, new) if returned == "h, c" else (new, h_new)


def _cell_by_slices(x: Any, state: Any, weight_ih: Any, weight_hh: Any, bias_ih: Any, bias_hh: Any) -> Any:
    h, c = state
    n = h.shape[1]
    a = x @ weight_ih.T + bias_ih + h @ weight_hh.T + bias_hh
    i, f = torch.sigmoid(a[:, :n]), torch.sigmoid(a[:, n : 2 * n])
    g, o = torch.tanh(a[:, 2 * n : 3 * n]), torch.sigmoid(a[:, 3 * n :])
    c_new = f * c + i * g
    return [o * torch.tanh(c_new), c_new]


def _cell_gate_by_gate(x: Any, state: Any, weight_ih: Any, weight_hh: Any, bias_ih: Any, bias_hh: Any) -> Any:
    def score(k: int) -> Tensor:
        n = state[0].shape[-1]
        rows = slice(k * n, (k + 1) * n)
        result: Tensor = torch.nn.functional.linear(x, weight_ih[rows], bias_ih[rows])
        return result + torch.nn.functional.linear(state[0], weight_hh[rows], bias_hh[rows])

    i, f, g, o = score(0).sigmoid(), score(1).sigmoid(), score(2).tanh(), score(3).sigmoid()
    c = torch.addcmul(f * state[1], i, g)
    return o * c.tanh(), c


def _cell_on_one_matrix(
    x: Any, state: Any, weight_ih: Any, weight_hh: Any, bias_ih: Any, bias_hh: Any
) -> Any:
    h, c = state
    both = torch.cat([x, h], dim=1) @ torch.cat([weight_ih, weight_hh], dim=1).T + (bias_ih + bias_hh)
    both = both.reshape(len(x), 4, -1)
    i, f, o = 1 / (1 + torch.exp(-both[:, 0])), both[:, 1].sigmoid(), both[:, 3].sigmoid()
    c = f * c + i * (2 * torch.sigmoid(2 * both[:, 2]) - 1)
    return o * c.tanh(), c


def _cell_by_loops(x: Any, state: Any, weight_ih: Any, weight_hh: Any, bias_ih: Any, bias_hh: Any) -> Any:
    h, c = state
    n = h.shape[1]
    hs, cs = [], []
    for b in range(len(x)):
        for j in range(n):
            a = [
                (weight_ih[j + k * n] * x[b]).sum()
                + (weight_hh[j + k * n] * h[b]).sum()
                + bias_ih[j + k * n]
                + bias_hh[j + k * n]
                for k in range(4)
            ]
            cs.append(a[1].sigmoid() * c[b, j] + a[0].sigmoid() * a[2].tanh())
            hs.append(a[3].sigmoid() * cs[-1].tanh())
    return torch.stack(hs).reshape(len(x), n), torch.stack(cs).reshape(len(x), n)


def _outside(probe: Probe, got: Outcome, wanted: Outcome) -> str:
    """Say that h left the range that an output gate and tanh leave it, or that c never does."""
    h = got.values.get("result[0]")
    if not isinstance(h, Tensor) or h.is_complex() or h.numel() == 0:
        return ""
    largest = float(h.abs().max())
    return f"h reaches {largest:.2f}; o * tanh(c) stays between -1 and 1." if largest > 1.0001 else ""


LSTM_CELL = Task(
    id="lstm.lstm_cell",
    signature="lstm_cell(x, state, weight_ih, weight_hh, bias_ih, bias_hh)",
    points=4,
    reference=lstm.lstm_cell,
    probes=_cell_probes,
    twin=_cell_twin,
    forbidden=_LSTM,
    properties=[_outside],
    variants=[_cell_by_slices, _cell_gate_by_gate, _cell_on_one_matrix, _cell_by_loops],
    hints=(
        "The scores have 4H columns. Which H of them belong to the gate that decides what is forgotten?",
        "scores = x W_ih^T + b_ih + h W_hh^T + b_hh has the blocks i, f, g, o. The gates i, f, o pass through a sigmoid and the "
        "candidate g through tanh; then c = f c + i g and h = o tanh(c).",
        "h, c = state\nscores = x @ weight_ih.T + bias_ih + h @ weight_hh.T + bias_hh\ncut scores into four blocks i, f, g, o\n"
        "c = sigmoid(f) * c + sigmoid(i) * tanh(g)\nreturn sigmoid(o) * tanh(c), c",
    ),
    mistakes=[
        Fault(
            "lstm-gate-order",
            "The four blocks are taken in another order than i, f, g, o, as other libraries store them.",
            "Torch's order is input gate, forget gate, candidate, output gate.",
            STEP,
            settings=[{"order": order} for order in ("ifog", "igfo", "iofg", "figo")],
        ),
        Fault(
            "lstm-blocks-interleaved",
            "You take every fourth score for a gate; a gate's scores stand side by side.",
            "Cut the last axis into four blocks of H columns, for example with chunk(4, dim=-1).",
            STEP,
            settings=[{"split": "interleaved"}],
        ),
        Fault(
            "lstm-h-without-tanh-c",
            "You return h = o * c, which leaves the range from -1 to 1.",
            "Squash the cell state before you show it: h = o * tanh(c).",
            GATES,
            settings=[{"shown": "o c"}],
        ),
        Fault(
            "lstm-shown-wrong",
            "The hidden state is not o * tanh(c) of the new cell state: the output gate, the tanh or the new c is missing.",
            "Compute the new c first, then h = o * tanh(c).",
            GATES,
            settings=[{"shown": "tanh(c)"}, {"shown": "o tanh(old c)"}, {"shown": "o sigmoid(c)"}],
        ),
        Fault(
            "lstm-tanh-on-cell-update",
            "You squash the new cell state with tanh, so it can never leave -1 to 1, and the old memory is bent at each step.",
            "Leave c = f * c + i * g as it is; that is what lets it remember. The tanh belongs into h.",
            ROAD,
            settings=[{"update": "tanh"}],
        ),
        Fault(
            "lstm-forget-gate-on-candidate",
            "You compute c = f * (c + g): one gate does both jobs, and the input gate has no influence.",
            "Let f multiply the past and i the candidate: c = f * c + i * g.",
            GATES,
            settings=[{"update": "f (c + g)"}],
        ),
        Fault(
            "lstm-gate-unused",
            "The update of the cell lacks one of its two gates, or uses the forget gate for both.",
            "Use both: c = f * c + i * g, where f and i come from blocks of their own.",
            GATES,
            settings=[{"update": "f c + g"}, {"update": "c + i g"}, {"update": "f c + (1 - f) g"}],
        ),
        Fault(
            "lstm-forget-gate-turned",
            "The forget gate is turned round: you keep the share 1 - f.",
            "A forget gate of 1 keeps everything: c = f * c + i * g.",
            GATES,
            settings=[{"update": "(1 - f) c + i g"}],
        ),
        Fault(
            "lstm-candidate-not-tanh",
            "The candidate does not pass through tanh, so it can only be positive, or grow without bound.",
            "Use tanh for the block g, and the sigmoid for the three gates.",
            GATES,
            settings=[{"candidate": "sigmoid"}, {"candidate": "none"}],
        ),
        Fault(
            "lstm-gates-not-sigmoid",
            "The gates do not pass through a sigmoid, so they leave the range from 0 to 1.",
            "Use the sigmoid for i, f and o.",
            GATES,
            settings=[{"gates": "tanh"}, {"gates": "none"}],
        ),
        Fault(
            "lstm-peephole-after-sigmoid",
            "You add the cell state to the gates after the sigmoid, so they leave the range from 0 to 1.",
            "Leave the cell state out here; a peephole, where one is wanted, is added before the sigmoid.",
            WRONG,
            settings=[{"peephole": "after"}],
        ),
        Fault(
            "lstm-peephole",
            "The gates look at the cell state as well (a peephole); this cell has none.",
            "Compute the scores from x and h only.",
            STEP,
            settings=[{"peephole": "before"}],
        ),
        Fault(
            "lstm-recurrent-state-wrong",
            "The old hidden state is not what weight_hh multiplies: that is the cell state, or nothing.",
            "Add h @ weight_hh.T, with the old h.",
            STEP,
            settings=[{"recurrent": "c"}, {"recurrent": "none"}],
        ),
        Fault(
            "lstm-state-order",
            "The two states are exchanged: the state is the pair (h, c), hidden state first.",
            "Unpack h, c = state, and return the pair (h, c).",
            STEP,
            settings=[{"taken": "c, h"}, {"returned": "c, h"}],
        ),
        *_bias_faults(),
        Fault("backward-detached", *DETACHED, ROAD, settings=[{"cut": True}], sign=without_gradient),
    ],
)


# ----- gru_cell -----------------------------------------------------------------------------------------


def _gru_probes(generator: torch.Generator) -> list[Probe]:
    def probe(name: str, n: int, n_in: int, hidden_size: int, core: bool = False) -> Probe:
        args = {
            "x": (randn(generator, n, n_in) * 4).round() / 4,
            "h": (randn(generator, n, hidden_size) * 4).round() / 4,
            **_weights(generator, 3, n_in, hidden_size),
        }
        return Probe(name, args, gradients=tuple(args), core=core)

    return [
        probe("two samples of three numbers, two hidden units", 2, 3, 2, core=True),
        probe("four samples of three numbers, five hidden units", 4, 3, 5, core=True),
        probe("as many inputs as hidden units", 3, 4, 4),
        probe("a single sample", 1, 5, 3),
    ]


def _gru_twin(
    x: Tensor,
    h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    *,
    order: str = "rzn",
    split: str = "blocks",
    bias: str = "both",
    gates: str = "sigmoid",
    candidate: str = "tanh",
    reset: str = "after the product",
    mix: str = "z keeps",
    cut: bool = False,
) -> Tensor:
    b_ih, b_hh = _bias(bias_ih, bias_hh, bias, 3)
    w_n = _parts(weight_hh.T, order, split)["n"]
    bias_n = _parts(b_hh, order, split)["n"]
    from_x = _parts(x @ weight_ih.T + b_ih, order, split)
    from_h = _parts(h @ weight_hh.T + b_hh, order, split)
    r, z = (_squash(gates, from_x[name] + from_h[name]) for name in "rz")
    score = {
        "after the product": lambda: from_x["n"] + r * from_h["n"],
        "before the product": lambda: from_x["n"] + (r * h) @ w_n + bias_n,
        "bias outside": lambda: from_x["n"] + r * (h @ w_n) + bias_n,
        "on the sum": lambda: r * (from_x["n"] + from_h["n"]),
        "missing": lambda: from_x["n"] + from_h["n"] + 0 * r,
    }[reset]()
    n = _squash(candidate, score)
    result = {
        "z keeps": lambda: z * h + (1 - z) * n,
        "z takes": lambda: (1 - z) * h + z * n,
        "old state lost": lambda: (1 - z) * n,
        "old state whole": lambda: h + (1 - z) * n,
    }[mix]()
    return result.detach() if cut else result


def _gru_by_slices(x: Any, h: Any, weight_ih: Any, weight_hh: Any, bias_ih: Any, bias_hh: Any) -> Any:
    n = h.shape[1]
    a, b = x @ weight_ih.T + bias_ih, h @ weight_hh.T + bias_hh
    gates = torch.sigmoid(a[:, : 2 * n] + b[:, : 2 * n])
    candidate = torch.tanh(a[:, 2 * n :] + gates[:, :n] * b[:, 2 * n :])
    return candidate + gates[:, n:] * (h - candidate)


def _gru_gate_by_gate(x: Any, h: Any, weight_ih: Any, weight_hh: Any, bias_ih: Any, bias_hh: Any) -> Any:
    wr, wz, wn = weight_ih.chunk(3)
    ur, uz, un = weight_hh.chunk(3)
    br, bz, bn = bias_ih.chunk(3)
    cr, cz, cn = bias_hh.chunk(3)
    r = torch.sigmoid(torch.nn.functional.linear(x, wr, br + cr) + h @ ur.T)
    z = torch.sigmoid(torch.nn.functional.linear(x, wz, bz + cz) + h @ uz.T)
    return z * h + (1 - z) * torch.tanh(x @ wn.T + bn + r * (h @ un.T + cn))


GRU_CELL = Task(
    id="lstm.gru_cell",
    signature="gru_cell(x, h, weight_ih, weight_hh, bias_ih, bias_hh)",
    points=3,
    reference=lstm.gru_cell,
    probes=_gru_probes,
    twin=_gru_twin,
    forbidden=_GRU,
    variants=[_gru_by_slices, _gru_gate_by_gate],
    hints=(
        "Which of the two products, of x or of h, does the reset gate multiply, and does a bias belong to it?",
        "r = sigmoid(r_x + r_h), z = sigmoid(z_x + z_h), n = tanh(n_x + r n_h), where n_h holds weight_hh and bias_hh already; "
        "then h' = z h + (1 - z) n.",
        "a = x @ weight_ih.T + bias_ih; b = h @ weight_hh.T + bias_hh\ncut each into three blocks r, z, n\n"
        "r = sigmoid(a_r + b_r); z = sigmoid(a_z + b_z); n = tanh(a_n + r * b_n)\nreturn z * h + (1 - z) * n",
    ),
    mistakes=[
        Fault(
            "gru-reset-before-product",
            "The reset gate multiplies h before the product with weight_hh, as in the published paper.",
            "In torch it multiplies the result: n = tanh(n_x + r * (h W_n^T + b_n)).",
            GRU,
            settings=[{"reset": "before the product"}],
        ),
        Fault(
            "gru-bias-outside-reset",
            "The candidate's part of bias_hh stands outside the reset gate.",
            "Let the reset gate multiply the product and its bias: r * (h W_n^T + b_n).",
            GRU,
            settings=[{"reset": "bias outside"}],
        ),
        Fault(
            "gru-reset-wrong",
            "The reset gate is missing, or it multiplies the part of x, too.",
            "It multiplies only what comes from h: n = tanh(n_x + r * n_h).",
            GRU,
            settings=[{"reset": "on the sum"}, {"reset": "missing"}],
        ),
        Fault(
            "gru-update-swapped",
            "Old state and candidate are exchanged: z multiplies the candidate, as some texts write it.",
            "In torch an update gate of 1 keeps the old state: z * h + (1 - z) * n.",
            GRU,
            settings=[{"mix": "z takes"}],
        ),
        Fault(
            "gru-old-state-wrong",
            "The old state is left out of the new one, or kept whole.",
            "Mix the two: z * h + (1 - z) * n.",
            GRU,
            settings=[{"mix": "old state lost"}, {"mix": "old state whole"}],
        ),
        Fault(
            "gru-gate-order",
            "The three blocks are taken in another order than r, z, n.",
            "Torch's order is reset gate, update gate, candidate.",
            GRU,
            settings=[{"order": "zrn"}, {"order": "rnz"}, {"order": "nzr"}],
        ),
        Fault(
            "lstm-blocks-interleaved",
            "You take every third score for a gate; a gate's scores stand side by side.",
            "Cut the last axis into three blocks of H columns, for example with chunk(3, dim=-1).",
            GRU,
            settings=[{"split": "interleaved"}],
        ),
        Fault(
            "lstm-candidate-not-tanh",
            "The candidate does not pass through tanh.",
            "Use tanh for the block n, and the sigmoid for the two gates.",
            GRU,
            settings=[{"candidate": "sigmoid"}, {"candidate": "none"}],
        ),
        Fault(
            "lstm-gates-not-sigmoid",
            "The gates do not pass through a sigmoid, so they leave the range from 0 to 1.",
            "Use the sigmoid for r and z.",
            GRU,
            settings=[{"gates": "tanh"}, {"gates": "none"}],
        ),
        *_bias_faults(),
        Fault("backward-detached", *DETACHED, ROAD, settings=[{"cut": True}], sign=without_gradient),
    ],
)


# ----- LSTMClassifier -------------------------------------------------------------------------------------


def _classifier_probes(generator: torch.Generator) -> list[Probe]:
    def probe(name: str, sizes: tuple[int, int, int], n: int, steps: int, core: bool = False) -> Probe:
        n_in, hidden_size, n_classes = sizes
        state = (
            *_weights(generator, 4, n_in, hidden_size).values(),
            randn(generator, n_classes, hidden_size),
            randn(generator, n_classes),
        )
        x = (randn(generator, n, steps, n_in) * 4).round() / 4
        wanted = ("x", "parameters")
        return Probe(name, {"x": x}, build=sizes, state=state, gradients=wanted, calls=2, core=core)

    return [
        probe("two sequences of three steps", (2, 3, 5), 2, 3, core=True),
        probe("five sequences of four steps", (4, 3, 2), 5, 4, core=True),
        probe("one sequence of six steps", (3, 2, 4), 1, 6),
        probe("four sequences of a single step", (5, 3, 2), 4, 1),
    ]


class _FaultyClassifier(nn.Module):
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        n_classes: int,
        *,
        cell: str = "right",
        carried: str = "both",
        start: str = "zeros",
        axes: str = "as they are",
        direction: str = "forwards",
        read: str = "last h",
        output: str = "logits",
        storage: str = "registered",
        cut: str = "nowhere",
    ) -> None:
        super().__init__()
        self.hidden_size, self.cell, self.carried, self.start = hidden_size, cell, carried, start
        self.axes, self.direction, self.read, self.how, self.cut = axes, direction, read, output, cut
        rows = 4 * hidden_size
        layers = [nn.Linear(input_size, rows), nn.Linear(hidden_size, rows)]
        self.recurrent: Any = layers if storage == "list" else nn.ModuleList(layers)
        self.output = nn.Linear(hidden_size, n_classes)
        self.kept: tuple[Tensor, Tensor] | None = None

    def _begin(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = (len(x), self.hidden_size)
        if self.start == "random":
            return torch.rand(shape), torch.rand(shape)
        if self.start == "kept" and self.kept is not None:
            return self.kept
        value = 1.0 if self.start == "ones" else 0.0
        return x.new_full(shape, value), x.new_full(shape, value)

    def forward(self, x: Tensor) -> Tensor:
        if self.axes == "batch as time":
            x = x.transpose(0, 1)
        elif self.axes == "view":
            x = x.contiguous().view(x.shape[1], x.shape[0], x.shape[2]).transpose(0, 1)
        first, second = self.recurrent
        zero = x.new_zeros(len(x), self.hidden_size)
        h, c = self._begin(x)
        hs, cs = [], []
        steps = x.unbind(1) if self.direction == "forwards" else x.flip(1).unbind(1)
        twin: dict[str, Any] = {
            "right": {},
            "ifog": {"order": "ifog"},
            "o c": {"shown": "o c"},
            "one bias": {"bias": "ih only"},
        }[self.cell]
        for step in steps:
            if self.carried == "none":
                h, c = zero, zero
            h, c = (h if self.carried != "c only" else zero), (c if self.carried != "h only" else zero)
            if self.cut == "between steps":
                h, c = h.detach(), c.detach()
            weights = (first.weight, second.weight, first.bias, second.bias)
            h, c = _cell_twin(step, (h, c), *weights, **twin)
            hs.append(h)
            cs.append(c)
        self.kept = (h.detach(), c.detach())
        seen = {
            "last h": h,
            "last c": c,
            "mean": torch.stack(hs).mean(0),
            "largest": torch.stack(hs).amax(0),
            "sum": torch.stack(hs).sum(0),
        }[self.read]
        if self.cut == "at the end":
            seen = seen.detach()
        scores: Tensor = self.output(seen.relu() if self.how == "relu before" else seen)
        squashed = {"softmax": scores.softmax, "log softmax": scores.log_softmax}
        return squashed[self.how](-1) if self.how in squashed else scores


def _lost_or_made_layers(probe: Probe, got: Outcome, wanted: Outcome) -> bool:
    count, right = got.values.get("number of parameters"), wanted.values.get("number of parameters")
    return isinstance(count, int) and isinstance(right, int) and count < right - 2 * probe.state[2].numel()


def _calls_differ(got: Outcome) -> bool:
    first, second = got.values.get("result"), got.values.get("result of the second call")
    return first is not None and not close(second, first)


def _draws_a_state(probe: Probe, got: Outcome, wanted: Outcome) -> bool:
    same_count = got.values.get("number of parameters") == wanted.values.get("number of parameters")
    return got.random and same_count and _calls_differ(got)


def _count_or_calls(probe: Probe, got: Outcome, wanted: Outcome) -> str:
    count, right = got.values.get("number of parameters"), wanted.values.get("number of parameters")
    if count != right:
        return (
            f"parameters() finds {count} numbers; this module has {right}: "
            "weights (4H, F) and (4H, H), two biases (4H,), and the output layer."
        )
    if _calls_differ(got):
        return "Two calls with the same input give different results."
    return ""


class _ClassifierOfLayers(torch.nn.Module):
    def __init__(self, input_size: int, hidden_size: int, n_classes: int) -> None:
        super().__init__()
        self.from_input = torch.nn.Linear(input_size, 4 * hidden_size)
        self.from_state = torch.nn.Linear(hidden_size, 4 * hidden_size)
        self.head = torch.nn.Linear(hidden_size, n_classes)

    def forward(self, x: Tensor) -> Any:
        h = c = torch.zeros(x.shape[0], self.from_state.in_features)
        for t in range(x.shape[1]):
            a = self.from_input(x[:, t]) + self.from_state(h)
            i, f, g, o = a.chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return torch.log_softmax(self.head(h), -1)


class _ClassifierOfParameters(torch.nn.Module):
    # weights stored as (F, 4H) and (H, 4H), all inputs multiplied at once, the mean of the hidden states read
    def __init__(self, input_size: int, hidden_size: int, n_classes: int) -> None:
        super().__init__()
        self.n = hidden_size
        self.w = torch.nn.Parameter(torch.randn(input_size, 4 * hidden_size) / 4)
        self.u = torch.nn.Parameter(torch.randn(hidden_size, 4 * hidden_size) / 4)
        self.b = torch.nn.Parameter(torch.zeros(4 * hidden_size))
        self.d = torch.nn.Parameter(torch.zeros(4 * hidden_size))
        self.out = torch.nn.Linear(hidden_size, n_classes)

    def forward(self, x: Tensor) -> Any:
        h = torch.zeros(len(x), self.n)
        c = torch.zeros(len(x), self.n)
        hs = []
        for a in (x @ self.w + self.b + self.d).unbind(1):
            i, f, g, o = torch.split(a + h @ self.u, self.n, dim=1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            hs.append(h)
        return self.out(sum(hs) / len(hs))


CLASSIFIER = Task(
    id="lstm.LSTMClassifier",
    signature="LSTMClassifier(input_size, hidden_size, n_classes)",
    points=4,
    reference=lstm.LSTMClassifier,
    probes=_classifier_probes,
    twin=_FaultyClassifier,
    # The mean of the hidden states is as good a summary as the last; log softmax gives logits, too.
    accepts=[
        lambda *sizes: _FaultyClassifier(*sizes, read="mean"),
        lambda *sizes: _FaultyClassifier(*sizes, output="log softmax"),
    ],
    forbidden=_LSTM | {"LSTMClassifier"},
    properties=[_count_or_calls],
    variants=[_ClassifierOfLayers, _ClassifierOfParameters],
    hints=(
        "Which axis of x counts the steps, and what are h and c before the first of them?",
        "Start each sequence with h = c = 0, call the cell once for each step with the states of the step before, and give the last h "
        "to the output layer.",
        "in __init__: weight_ih (4H, F), weight_hh (4H, H), two biases (4H,), output = nn.Linear(H, C)\n"
        "in forward: h = c = zeros (B, H)\nfor each step x_t of shape (B, F): h, c = lstm_cell(x_t, (h, c), ...)\nreturn output(h)",
    ),
    mistakes=[
        Fault(
            "rnn-state-across-samples",
            "The second call starts with the states that the first one left: a sample's answer depends on the samples before it.",
            "Begin every forward call with zeros; time runs inside a sequence, not from one to the next.",
            SEQUENCE,
            settings=[{"start": "kept"}],
        ),
        Fault(
            "rnn-random-h0",
            "The states before the first step are random, so two calls give two answers.",
            "Start from zeros.",
            SEQUENCE,
            settings=[{"start": "random"}],
            sign=_draws_a_state,
        ),
        Fault(
            "lstm-start-not-zero",
            "The states before the first step are ones.",
            "Start from zeros: nothing has been seen, so nothing is remembered.",
            SEQUENCE,
            settings=[{"start": "ones"}],
        ),
        Fault(
            "lstm-state-not-carried",
            "A state is set to zero again at every step, so a part of the memory is lost on the way.",
            "Make the zeros before the loop, and hand both h and c from step to step.",
            SEQUENCE,
            settings=[{"carried": "none"}, {"carried": "h only"}, {"carried": "c only"}],
        ),
        Fault(
            "rnn-view-instead-of-transpose",
            "Your view re-cuts the memory instead of exchanging the axes: steps of one sequence land in another.",
            "Exchange axes with transpose(0, 1), or take the steps with x.unbind(1).",
            SEQUENCE,
            settings=[{"axes": "view"}],
        ),
        Fault(
            "lstm-batch-as-time",
            "You walk along axis 0, the batch: the first sequence is read as the first step of all.",
            "Here x is batch-first: the steps are on axis 1.",
            SEQUENCE,
            settings=[{"axes": "batch as time"}],
        ),
        Fault(
            "lstm-read-backwards",
            "The steps are read from the last to the first.",
            "Go through them in their order.",
            SEQUENCE,
            settings=[{"direction": "backwards"}],
        ),
        Fault(
            "lstm-reads-wrong-state",
            "The class is not read from the last hidden state: it is read from the cell, or from a maximum or sum over the steps.",
            "Give the h of the last step to the output layer.",
            SEQUENCE,
            settings=[{"read": "last c"}, {"read": "largest"}, {"read": "sum"}],
        ),
        Fault(
            "lstm-cell-inside-wrong",
            "The loop is right and the cell inside is not: another gate order, a missing tanh or a missing bias.",
            "Use the lstm_cell of your first task.",
            STEP,
            settings=[{"cell": "ifog"}, {"cell": "o c"}, {"cell": "one bias"}],
        ),
        Fault(
            "loss-double-softmax",
            "The module returns probabilities; the cross-entropy applies softmax again.",
            "Return the output layer's scores as they are.",
            SEQUENCE,
            settings=[{"output": "softmax"}],
        ),
        Fault(
            "lstm-relu-on-state",
            "A ReLU stands between the last hidden state and the output layer, and removes all negative numbers.",
            "Give h to the output layer as it is.",
            SEQUENCE,
            settings=[{"output": "relu before"}],
        ),
        Fault(
            "module-created-or-lost-in-forward",
            "parameters() does not find the weights of the gates: they sit in a plain list, or are no parameters.",
            "Make each an nn.Parameter, or a layer, and assign it to self in __init__.",
            SEQUENCE,
            settings=[{"storage": "list"}],
            sign=_lost_or_made_layers,
        ),
        Fault(
            "backward-detached",
            "The numbers are right, but the gradient does not reach the earlier steps: the states leave autograd on the way.",
            "Hand h and c on as they are, without .detach(), .data or torch.no_grad().",
            ROAD,
            settings=[{"cut": "between steps"}, {"cut": "at the end"}],
            sign=without_gradient,
        ),
    ],
)


# ----- open_forget_gates --------------------------------------------------------------------------------


def _opening_probes(generator: torch.Generator) -> list[Probe]:
    def probe(
        name: str, value: float, sizes: tuple[int, int] = (3, 2), core: bool = False, **options: int
    ) -> Probe:
        module = nn.LSTM(*sizes, **options)
        state = tuple((randn(generator, *p.shape) * 4).round() / 4 + 0.125 for p in module.parameters())
        model = Layer("LSTM", sizes, state, tuple(options.items()))
        return Probe(name, {"model": model, "value": value}, core=core)

    return [
        probe("one layer, bias 1", 1.0, core=True),
        probe("one layer of three units, bias 3", 3.0, (2, 3), core=True),
        probe("two layers, bias 2", 2.0, num_layers=2),
        probe("both directions, bias -1.5", -1.5, bidirectional=1),
    ]


def _opening_twin(
    model: Any,
    value: float,
    *,
    block: int = 1,
    biases: str = "ih",
    how: str = "set",
    layers: str = "all",
    others: str = "kept",
    number: str = "as it is",
) -> None:
    value = {"as it is": value, "sigmoid": 1 / (1 + math.exp(-value)), "one": 1.0}[number]
    names = [
        name.removeprefix("bias_ih") for name, _ in model.named_parameters() if name.startswith("bias_ih")
    ]
    with torch.no_grad():
        for name in names if layers == "all" else names[:1]:
            b_ih, b_hh = getattr(model, f"bias_ih{name}"), getattr(model, f"bias_hh{name}")
            if others == "zeroed":
                b_ih[:], b_hh[:] = b_ih * 0, b_hh * 0
            if how == "not in place":
                continue
            whole = block == 4
            f_ih, f_hh = (b if whole else b.chunk(4)[block] for b in (b_ih, b_hh))
            old_ih, old_hh = f_ih.clone(), f_hh.clone()
            zero, full = torch.zeros(()), torch.tensor(value)
            new_ih, new_hh = {
                "ih": (full, zero),
                "hh": (zero, full),
                "half": (full / 2, full / 2),
                "hh kept": (value - old_hh, old_hh),
                "ih kept": (old_ih, value - old_ih),
                "both": (full, full),
                "ih, hh left random": (full, old_hh),
                "hh, ih left random": (old_ih, full),
            }[biases]
            if how == "added":
                new_ih, new_hh = old_ih + value, old_hh
            f_ih[:], f_hh[:] = new_ih, new_hh


def _split(biases: str) -> Callable[[Any, float], None]:
    return lambda model, value: _opening_twin(model, value, biases=biases)


def _opening_by_data(model: Any, value: float) -> None:
    for name, p in model.named_parameters():
        if "bias" in name:
            n = model.hidden_size
            p.data[n : 2 * n] = value / 2


def _opening_by_names(model: Any, value: float) -> Any:
    with torch.no_grad():
        for names in model.all_weights:
            n = len(names[2]) // 4
            names[2][n : n + n] = value
            names[3][n : n + n].zero_()
    return model


def _forget_sum(probe: Probe, got: Outcome, wanted: Outcome) -> str:
    """Say what the forget gates' biases add up to, layer by layer."""
    for name, bias in got.values.items():
        other = got.values.get(name.replace("bias_ih", "bias_hh"))
        if "bias_ih" in name and isinstance(bias, Tensor) and isinstance(other, Tensor):
            total = (bias + other).chunk(4)[1]
            if not torch.allclose(total, torch.full_like(total, probe.args["value"]), atol=1e-4):
                layer = name.removeprefix("model.bias_ih_").removesuffix(" afterwards")
                numbers = ", ".join(f"{number:.3g}" for number in total.tolist())
                return f"The two biases of the forget gates in layer {layer} add up to {numbers}."
    return "The forget gates are right; another parameter has changed, too."


OPEN = Task(
    id="lstm.open_forget_gates",
    signature="open_forget_gates(model, value)",
    points=2,
    reference=lstm.open_forget_gates,
    probes=_opening_probes,
    twin=_opening_twin,
    # A gate sees the sum of two biases: how they share it is free.
    accepts=[_split("hh"), _split("half"), _split("hh kept"), _split("ih kept")],
    forbidden=frozenset({"open_forget_gates"}),
    properties=[_forget_sum],
    variants=[_opening_by_data, _opening_by_names],
    hints=(
        "Which quarter of a bias belongs to the forget gate, and how many biases does that gate have?",
        "In torch's order i, f, g, o the forget gate has the rows H to 2H. bias_ih and bias_hh are added, so their *sum* must be the "
        "value there, in every layer and direction.",
        "without gradient tracking, for each name and bias in model.named_parameters():\n"
        "    if the name starts with bias_ih: fill rows H to 2H with value\n    if it starts with bias_hh: fill rows H to 2H with 0",
    ),
    mistakes=[
        Fault(
            "lstm-forget-bias-twice",
            "Both biases get the value, and the gate sees their sum: twice the value.",
            "Let the two add up to the value: one gets it, the other gets 0.",
            START,
            settings=[{"biases": "both"}],
        ),
        Fault(
            "lstm-forget-bias-half-set",
            "You set one of the two biases and leave the other as it was drawn, so the sum is not the value.",
            "Set the forget gate's part of the other bias to 0.",
            START,
            settings=[{"biases": "ih, hh left random"}, {"biases": "hh, ih left random"}],
        ),
        Fault(
            "lstm-gate-order",
            "You change the block of another gate.",
            "In torch's order i, f, g, o the forget gate is the second block, rows H to 2H.",
            START,
            settings=[{"block": 0}, {"block": 2}, {"block": 3}],
        ),
        Fault(
            "lstm-forget-bias-everywhere",
            "You fill the whole bias, so all four blocks are changed.",
            "Change the rows H to 2H only.",
            START,
            settings=[{"block": 4}],
        ),
        Fault(
            "lstm-forget-bias-added",
            "You add the value to what the bias already was.",
            "Set it: the old random numbers must not stay.",
            START,
            settings=[{"how": "added"}],
        ),
        Fault(
            "lstm-forget-bias-not-in-place",
            "The biases of the model do not change.",
            "Write into the parameter itself, for example with bias[H:2*H].fill_(value), inside torch.no_grad().",
            START,
            settings=[{"how": "not in place"}],
        ),
        Fault(
            "lstm-forget-bias-first-layer",
            "Only the first layer, or the first direction, is changed.",
            "Go through model.named_parameters(): every name that starts with bias_ih or bias_hh counts.",
            START,
            settings=[{"layers": "first"}],
        ),
        Fault(
            "lstm-other-biases-zeroed",
            "The biases of the other gates are set to 0 on the way.",
            "Leave everything as it is that does not belong to the forget gates.",
            START,
            settings=[{"others": "zeroed"}],
        ),
        Fault(
            "lstm-bias-is-not-the-gate",
            "The bias gets another number than the value: sigmoid of it, or always 1.",
            "Write the value itself into the bias; the cell applies the sigmoid.",
            START,
            settings=[{"number": "sigmoid"}, {"number": "one"}],
        ),
    ],
)


# ----- gates --------------------------------------------------------------------------------------------


def _gates_probes(generator: torch.Generator) -> list[Probe]:
    def probe(name: str, n: int, steps: int, n_in: int, hidden_size: int, core: bool = False) -> Probe:
        args = {
            "xs": (randn(generator, n, steps, n_in) * 4).round() / 4,
            **_weights(generator, 4, n_in, hidden_size),
        }
        return Probe(name, args, core=core)

    return [
        probe("two sequences of three steps, two hidden units", 2, 3, 2, 2, core=True),
        probe("three sequences of five steps, four hidden units", 3, 5, 2, 4, core=True),
        probe("as many sequences as steps", 4, 4, 3, 2),
        probe("one step", 2, 1, 3, 5),
    ]


def _gates_twin(
    xs: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    *,
    order: str = "ifgo",
    squash: str = "sigmoid",
    candidate: str = "tanh",
    bias: str = "both",
    shape: str = "batch first",
    state: str = "carried",
    when: str = "before the update",
    shown: str = "o tanh(c)",
) -> dict[str, Tensor]:
    b_ih, b_hh = _bias(bias_ih, bias_hh, bias, 4)
    h = c = xs.new_zeros(len(xs), weight_hh.shape[1])
    seen = []
    for x in xs.unbind(1):
        if state == "never carried":
            h, c = h * 0, c * 0
        scores = x @ weight_ih.T + b_ih + h @ weight_hh.T + b_hh
        weights = (weight_ih, weight_hh, b_ih, b_hh)
        h, c = _cell_twin(x, (h, c), *weights, order=order, shown=shown)
        if when == "after the update":
            scores = x @ weight_ih.T + b_ih + h @ weight_hh.T + b_hh
        part = _parts(scores, order)
        seen.append([*(_squash(squash, part[name]) for name in "ifo"), _squash(candidate, part["g"])])
    stacked = [torch.stack(gate, dim=0 if shape == "time first" else 1) for gate in zip(*seen, strict=True)]
    if shape == "last step":
        stacked = [gate[:, -1] for gate in stacked]
    elif shape == "mean over steps":
        stacked = [gate.mean(1) for gate in stacked]
    return dict(zip(("input", "forget", "output", "candidate"), stacked, strict=True))


def _gates_by_index(xs: Any, weight_ih: Any, weight_hh: Any, bias_ih: Any, bias_hh: Any) -> Any:
    b, t, _ = xs.shape
    n = weight_hh.shape[1]
    kept = {name: torch.zeros(b, t, n) for name in ("input", "forget", "output", "candidate")}
    h = c = torch.zeros(b, n)
    for k in range(t):
        a = (xs[:, k] @ weight_ih.T + h @ weight_hh.T + bias_ih + bias_hh).view(b, 4, n)
        kept["input"][:, k], kept["forget"][:, k] = a[:, 0].sigmoid(), a[:, 1].sigmoid()
        kept["candidate"][:, k], kept["output"][:, k] = a[:, 2].tanh(), a[:, 3].sigmoid()
        c = kept["forget"][:, k] * c + kept["input"][:, k] * kept["candidate"][:, k]
        h = kept["output"][:, k] * c.tanh()
    return kept


GATES_TASK = Task(
    id="lstm.gates",
    signature="gates(xs, weight_ih, weight_hh, bias_ih, bias_hh)",
    points=3,
    reference=lstm.gates,
    probes=_gates_probes,
    twin=_gates_twin,
    forbidden=frozenset({"gates"}),
    variants=[_gates_by_index],
    hints=(
        "A gate of step t depends on x_t and on one state. Which one, the h before the step or the h after it?",
        "Run the cell over the steps from zeros and, before each update, write down the sigmoid of the blocks i, f and o, and the tanh of "
        "g, of x_t W_ih^T + b_ih + h W_hh^T + b_hh.",
        "h = c = zeros (B, H)\nfor each step x_t:\n    scores as in lstm_cell, cut into i, f, g, o\n"
        "    keep sigmoid(i), sigmoid(f), sigmoid(o), tanh(g)\n    h, c = one step of the cell\nstack each list along axis 1",
    ),
    mistakes=[
        Fault(
            "lstm-gate-order",
            "The blocks are taken in another order than i, f, g, o.",
            "Torch's order is input gate, forget gate, candidate, output gate.",
            STEP,
            settings=[{"order": order} for order in ("ifog", "igfo", "iofg", "figo")],
        ),
        Fault(
            "lstm-gates-not-sigmoid",
            "You return the scores, or their tanh, and not the gates: a gate lies between 0 and 1.",
            "Apply the sigmoid.",
            LOOK,
            settings=[{"squash": "none"}, {"squash": "tanh"}],
        ),
        Fault(
            "lstm-candidate-not-tanh",
            "The candidate does not pass through tanh; it is no gate, and may be negative.",
            "Use tanh for the block g, and the sigmoid for the three gates.",
            GATES,
            settings=[{"candidate": "sigmoid"}, {"candidate": "none"}],
        ),
        Fault(
            "lstm-gates-after-update",
            "The gates are computed from the hidden state after the step, which they have helped to make.",
            "Read them from the h before the step.",
            LOOK,
            settings=[{"when": "after the update"}],
        ),
        Fault(
            "lstm-state-not-carried",
            "The states are zero at every step, so the gates see the input only.",
            "Hand h and c from step to step.",
            SEQUENCE,
            settings=[{"state": "never carried"}],
        ),
        Fault(
            "lstm-gates-axes",
            "The axes are not (B, T, H): time stands first, or the steps are gone.",
            "Stack the steps along axis 1, and keep all of them.",
            LOOK,
            settings=[{"shape": "time first"}, {"shape": "last step"}, {"shape": "mean over steps"}],
        ),
        Fault(
            "lstm-h-without-tanh-c",
            "On the way you compute h = o * c, so the later gates are wrong.",
            "Squash the cell state before you show it: h = o * tanh(c).",
            GATES,
            settings=[{"shown": "o c"}],
        ),
        *_bias_faults(),
    ],
)


# ----- to_torch_order -----------------------------------------------------------------------------------


def _order_probes(generator: torch.Generator) -> list[Probe]:
    def probe(name: str, order: str, *shape: int, core: bool = False) -> Probe:
        numbers = (randn(generator, *shape) * 8).round() / 8
        return Probe(name, {"weight": numbers, "order": order}, core=core)

    return [
        probe("a bias in ONNX's order", "iofg", 8, core=True),
        probe("a matrix that starts with the output gate", "ofig", 12, 8, core=True),
        probe("a matrix in an older TensorFlow's order", "igfo", 20, 4),
        probe("the forget gate first", "figo", 8, 12),
        probe("torch's own order", "ifgo", 12),
    ]


def _order_twin(weight: Tensor, order: str, *, moved: str = "right", cut: str = "rows") -> Tensor:
    places = [order.index(name) for name in "ifgo"]
    places = {
        "right": places,
        "inverse": ["ifgo".index(name) for name in order],
        "not at all": [0, 1, 2, 3],
        "i, f, o, g": [order.index(name) for name in "ifog"],
        "reversed": places[::-1],
    }[moved]
    if cut == "interleaved":
        return weight.reshape(-1, 4, *weight.shape[1:])[:, places].reshape(weight.shape)
    axis = -1 if cut == "columns" else 0
    return torch.cat([weight.chunk(4, dim=axis)[place] for place in places], dim=axis)


def _order_by_rows(weight: Any, order: str) -> Any:
    n = weight.shape[0] // 4
    result = torch.empty_like(weight)
    for there, name in enumerate("ifgo"):
        here = order.index(name)
        result[there * n : (there + 1) * n] = weight[here * n : (here + 1) * n]
    return result


def _order_by_index(weight: Any, order: str) -> Any:
    blocks = weight.reshape(4, -1, *weight.shape[1:])
    return blocks[[order.index("i"), order.index("f"), order.index("g"), order.index("o")]].flatten(0, 1)


ORDER = Task(
    id="lstm.to_torch_order",
    signature="to_torch_order(weight, order)",
    points=2,
    reference=lstm.to_torch_order,
    probes=_order_probes,
    twin=_order_twin,
    forbidden=frozenset({"to_torch_order"}),
    variants=[_order_by_rows, _order_by_index],
    hints=(
        'In the order "iofg", at which of the four places stands the forget gate, and where must it go?',
        "The result is the four blocks in the order i, f, g, o. Block f of the result is the block of the input that stands at the place of "
        'the letter f in the word, order.index("f").',
        'blocks = weight.chunk(4)\nreturn torch.cat of blocks[order.index(name)] for name in "ifgo"',
    ),
    mistakes=[
        Fault(
            "lstm-order-inverse",
            "You move the blocks the other way: from torch's order into the given one.",
            'Ask for each letter of "ifgo" at which place of `order` it stands, and take that block.',
            WRONG,
            settings=[{"moved": "inverse"}],
        ),
        Fault(
            "lstm-gate-order",
            "The blocks come out in another order than i, f, g, o.",
            "Torch's order is input gate, forget gate, candidate, output gate.",
            WRONG,
            settings=[{"moved": "not at all"}, {"moved": "i, f, o, g"}, {"moved": "reversed"}],
        ),
        Fault(
            "lstm-blocks-interleaved",
            "You treat every fourth row as a gate; a gate's rows stand side by side.",
            "Cut the first axis into four blocks of H rows, for example with chunk(4).",
            STEP,
            settings=[{"cut": "interleaved"}],
        ),
        Fault(
            "lstm-order-columns",
            "You move columns. The columns of a weight belong to the inputs, not to the gates.",
            "Cut and join along the first axis.",
            STEP,
            settings=[{"cut": "columns"}],
        ),
    ],
)


# ----- hidden_size_at_budget ----------------------------------------------------------------------------


def _budget_probes(generator: torch.Generator) -> list[Probe]:
    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    def probe(name: str, kind: str, hidden_size: int, extra: int, core: bool = False) -> Probe:
        n_in = draw(20, 90)
        args = {
            "kind": kind,
            "input_size": n_in,
            "budget": lstm.n_parameters(kind, n_in, hidden_size) + extra,
        }
        return Probe(name, args, core=core)

    return [
        probe("an LSTM", "lstm", draw(200, 400), 137, core=True),
        probe("a GRU", "gru", draw(300, 600), 1200, core=True),
        probe("a plain RNN", "rnn", draw(400, 800), 650, core=True),
        probe("a budget that an LSTM meets exactly", "lstm", draw(100, 300), 0),
        probe("one parameter too few for a GRU", "gru", draw(500, 900), -1),
        probe("a large budget for a plain RNN", "rnn", draw(1000, 2000), 900),
        probe("too little for a single unit", "lstm", 0, 3),
    ]


def _budget_twin(
    kind: str,
    input_size: int,
    budget: int,
    *,
    blocks: str = "1, 3, 4",
    biases: int = 2,
    weights: str = "both",
    rounding: str = "down",
) -> int:
    k = dict(zip(("rnn", "gru", "lstm"), map(int, blocks.split(", ")), strict=True))[kind]
    square, slope = (weights != "input only"), (0 if weights == "recurrent only" else input_size) + biases

    def count(hidden_size: int) -> int:
        return k * hidden_size * (square * hidden_size + slope)

    # The larger root of k (s H^2 + slope H) = budget, then a step or two by hand.
    size = (isqrt(slope * slope + 4 * budget // k) - slope) // 2 if square else budget // (k * slope)
    while count(size + 1) <= budget:
        size += 1
    while count(size) > budget:
        size -= 1
    if rounding == "strictly below" and count(size) == budget:
        return size - 1
    if rounding == "up" and count(size) < budget:
        return size + 1
    return size


def _budget_by_formula(kind: str, input_size: int, budget: int) -> int:
    import math

    k = {"rnn": 1, "gru": 3, "lstm": 4}[kind]
    b = input_size + 2
    h = int((math.sqrt(b * b + 4 * budget / k) - b) / 2) + 2
    while k * (h * h + b * h) > budget:
        h -= 1
    return h


def _budget_by_torch(kind: str, input_size: int, budget: int) -> int:
    layer = {"rnn": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}[kind]
    low, high = 0, 4096
    while high - low > 1:
        middle = (low + high) // 2
        n = sum(p.numel() for p in layer(input_size, middle, device="meta").parameters())
        low, high = (middle, high) if n <= budget else (low, middle)
    return low


BUDGET_TASK = Task(
    id="lstm.hidden_size_at_budget",
    signature="hidden_size_at_budget(kind, input_size, budget)",
    points=2,
    reference=lstm.hidden_size_at_budget,
    probes=_budget_probes,
    twin=_budget_twin,
    forbidden=frozenset({"hidden_size_at_budget"}),
    variants=[_budget_by_formula, _budget_by_torch],
    hints=(
        "How many numbers does one block of one layer have: weights for the input, weights for the state, and biases?",
        "A layer has k (H F + H H + 2 H) parameters, with k = 1 for the plain RNN, 3 for the GRU and 4 for the LSTM. "
        "The count grows with H, so go up while it still fits.",
        "k = 1, 3 or 4\nH = 0\nwhile k * (H+1) * (F + (H+1) + 2) <= budget: H = H + 1\nreturn H",
    ),
    mistakes=[
        Fault(
            "lstm-blocks-miscounted",
            "The number of blocks is not 1 for the RNN, 3 for the GRU and 4 for the LSTM.",
            "Count the candidate, too: a GRU has two gates and a candidate, an LSTM three gates and a candidate.",
            BUDGET,
            settings=[{"blocks": "1, 2, 3"}, {"blocks": "1, 1, 1"}, {"blocks": "1, 4, 4"}],
        ),
        Fault(
            "lstm-one-bias-counted",
            "You count one bias for each unit, or none; torch keeps two.",
            "Count 2 H biases for each block.",
            BUDGET,
            settings=[{"biases": 1}, {"biases": 0}],
        ),
        Fault(
            "lstm-weights-miscounted",
            "One of the two weight matrices is left out of the count.",
            "Count H F weights for the input and H H weights for the state.",
            BUDGET,
            settings=[{"weights": "recurrent only"}, {"weights": "input only"}],
        ),
        Fault(
            "lstm-budget-exceeded",
            "The layer has more parameters than the budget allows: you round up.",
            "Take the largest size that still fits.",
            BUDGET,
            settings=[{"rounding": "up"}],
        ),
        Fault(
            "lstm-budget-not-used",
            "A size that meets the budget exactly is refused.",
            "Compare with <=: at most the budget, not less than it.",
            BUDGET,
            settings=[{"rounding": "strictly below"}],
        ),
    ],
)


# ----- grade this: implementations of the cell as source text -------------------------------------------


def _right_fused(
    x: Tensor,
    state: tuple[Tensor, Tensor],
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
) -> tuple[Tensor, Tensor]:
    h, c = state
    i, f, g, o = (x @ weight_ih.T + h @ weight_hh.T + bias_ih + bias_hh).chunk(4, dim=-1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _right_by_blocks(
    x: Tensor,
    state: tuple[Tensor, Tensor],
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
) -> tuple[Tensor, Tensor]:
    h, c = state
    n = h.shape[-1]
    a = [
        x @ weight_ih[k * n : k * n + n].T
        + bias_ih[k * n : k * n + n]
        + h @ weight_hh[k * n : k * n + n].T
        + bias_hh[k * n : k * n + n]
        for k in range(4)
    ]
    new = a[1].sigmoid() * c + a[0].sigmoid() * a[2].tanh()
    return (a[3].sigmoid() * new.tanh(), new)


def _right_by_cat(
    x: Tensor,
    state: tuple[Tensor, Tensor],
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
) -> tuple[Tensor, Tensor]:
    w = torch.cat((weight_ih, weight_hh), dim=1)
    a = torch.cat((x, state[0]), dim=1).matmul(w.t()) + bias_hh + bias_ih
    n = a.shape[1] // 4
    forget, write, show = a[:, n : 2 * n].sigmoid(), a[:, :n].sigmoid(), a[:, 3 * n :].sigmoid()
    c = state[1] * forget + write * a[:, 2 * n : 3 * n].tanh()
    return show * c.tanh(), c


def _wrong_order(
    x: Tensor,
    state: tuple[Tensor, Tensor],
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
) -> tuple[Tensor, Tensor]:
    h, c = state
    i, f, o, g = (x @ weight_ih.T + h @ weight_hh.T + bias_ih + bias_hh).chunk(4, dim=-1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _wrong_h(
    x: Tensor,
    state: tuple[Tensor, Tensor],
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
) -> tuple[Tensor, Tensor]:
    h, c = state
    i, f, g, o = (x @ weight_ih.T + h @ weight_hh.T + bias_ih + bias_hh).chunk(4, dim=-1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * c, c


def _wrong_tanh_on_c(
    x: Tensor,
    state: tuple[Tensor, Tensor],
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
) -> tuple[Tensor, Tensor]:
    h, c = state
    i, f, g, o = (x @ weight_ih.T + h @ weight_hh.T + bias_ih + bias_hh).chunk(4, dim=-1)
    c = torch.tanh(torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g))
    return torch.sigmoid(o) * torch.tanh(c), c


def _wrong_one_gate(
    x: Tensor,
    state: tuple[Tensor, Tensor],
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
) -> tuple[Tensor, Tensor]:
    h, c = state
    _, f, g, o = (x @ weight_ih.T + h @ weight_hh.T + bias_ih + bias_hh).chunk(4, dim=-1)
    c = torch.sigmoid(f) * (c + torch.tanh(g))
    return torch.sigmoid(o) * torch.tanh(c), c


def _wrong_bias(
    x: Tensor,
    state: tuple[Tensor, Tensor],
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
) -> tuple[Tensor, Tensor]:
    h, c = state
    i, f, g, o = (x @ weight_ih.T + h @ weight_hh.T + bias_ih).chunk(4, dim=-1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _wrong_shared_bias(
    x: Tensor,
    state: tuple[Tensor, Tensor],
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
) -> tuple[Tensor, Tensor]:
    h, c = state
    bias = (bias_ih + bias_hh)[: h.shape[-1]].repeat(4)
    i, f, g, o = (x @ weight_ih.T + h @ weight_hh.T + bias).chunk(4, dim=-1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _wrong_old_cell(
    x: Tensor,
    state: tuple[Tensor, Tensor],
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
) -> tuple[Tensor, Tensor]:
    h, c = state
    i, f, g, o = (x @ weight_ih.T + h @ weight_hh.T + bias_ih + bias_hh).chunk(4, dim=-1)
    h = torch.sigmoid(o) * torch.tanh(c)
    return h, torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)


def _wrong_forget(
    x: Tensor,
    state: tuple[Tensor, Tensor],
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
) -> tuple[Tensor, Tensor]:
    h, c = state
    i, _, g, o = (x @ weight_ih.T + h @ weight_hh.T + bias_ih + bias_hh).chunk(4, dim=-1)
    c = c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _wrong_c_before_writing(
    x: Tensor,
    state: tuple[Tensor, Tensor],
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
) -> tuple[Tensor, Tensor]:
    h, c = state
    i, f, g, o = (x @ weight_ih.T + h @ weight_hh.T + bias_ih + bias_hh).chunk(4, dim=-1)
    kept = torch.sigmoid(f) * c
    h = torch.sigmoid(o) * torch.tanh(kept + torch.sigmoid(i) * torch.tanh(g))
    return h, kept


RIGHT_SPECIMENS = (_right_fused, _right_by_blocks, _right_by_cat)
WRONG_SPECIMENS = (
    _wrong_order,
    _wrong_h,
    _wrong_tanh_on_c,
    _wrong_one_gate,
    _wrong_bias,
    _wrong_shared_bias,
    _wrong_old_cell,
    _wrong_forget,
    _wrong_c_before_writing,
)


def _specimen_probes(generator: torch.Generator) -> list[Probe]:
    return specimen_probes("lstm_cell", RIGHT_SPECIMENS, WRONG_SPECIMENS, generator)


def _question(scale: float = 1.0, state: float = 1.0, bias: float = 1.0) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(3)
    x, w_ih, w_hh = (scale * randn(generator, *shape) for shape in ((2, 3), (8, 3), (8, 2)))
    h, c = (state * randn(generator, 2, 2) for _ in range(2))
    b_ih, b_hh = (bias * randn(generator, 8) for _ in range(2))
    return x, (h.tanh(), 3 * c), w_ih, w_hh, b_ih, b_hh


def _agrees(cell: Any, question: tuple[Any, ...], parts: tuple[int, ...] = (0, 1)) -> bool:
    got, wanted = cell(*question), lstm.lstm_cell(*question)
    return all(torch.allclose(got[part], wanted[part], atol=1e-5) for part in parts)


def _examine(lstm_cell: Any) -> bool:
    """Accept a cell that is right, in both states, for numbers that are not small."""
    return _agrees(lstm_cell, _question())


def _examine_by_hand(lstm_cell: Any) -> None:
    # Without weights each gate is the sigmoid of its biases, here 1/2, 3/4, tanh(g) = 0.6 and 1/4.
    bias = torch.tensor([0.0, 1.0986123, 0.6931472, -1.0986123])
    for shift in (0.0, 0.5):
        h, c = lstm_cell(
            torch.zeros(1, 2),
            (torch.zeros(1, 1), torch.tensor([[2.0]])),
            torch.zeros(4, 2),
            torch.zeros(4, 1),
            bias + shift,
            torch.full((4,), -shift),
        )
        assert abs(float(c) - 1.8) < 1e-4, c
        assert abs(float(h) - 0.2367015) < 1e-4, h


GRADE_THIS = Task(
    id="lstm.grade_this",
    signature="examine(lstm_cell)",
    points=3,
    reference=_examine,
    probes=_specimen_probes,
    variants=[_examine_by_hand],
    hints=(
        "Which mistakes can nobody see when the states before the step are zero? And when all biases are zero?",
        "Use weights, states and two biases that are all different from zero, with one cell state above 1, and compare both h and c with "
        "numbers that you trust: your own lstm_cell, torch.lstm_cell, or a pencil.",
        "draw x, h, c, both weights and both biases; c a few times larger than 1\nwanted = the cell that you trust\n"
        "return True if h and c of lstm_cell are both close to wanted, else False",
    ),
    mistakes=[
        Fault(
            "test-with-zero-state",
            "Your states before the step are zero, so nothing can be forgotten, and a wrong forget gate goes unseen.",
            "Start from states that are not zero.",
            GATES,
            implementations=[lambda cell: _agrees(cell, _question(state=0.0))],
        ),
        Fault(
            "test-without-biases",
            "All biases are zero, so a missing or shared bias goes unseen.",
            "Use two biases with different numbers for each gate.",
            STEP,
            implementations=[lambda cell: _agrees(cell, _question(bias=0.0))],
        ),
        Fault(
            "test-of-h-only",
            "You compare h only; the cell state may be anything.",
            "Compare both states.",
            STEP,
            implementations=[lambda cell: _agrees(cell, _question(), parts=(0,))],
        ),
        Fault(
            "test-of-c-only",
            "You compare c only; what is shown may be anything.",
            "Compare both states.",
            STEP,
            implementations=[lambda cell: _agrees(cell, _question(), parts=(1,))],
        ),
        Fault(
            "test-of-range-only",
            "You look at the shape and at the range of h; most wrong cells have both.",
            "Compare with numbers that you trust.",
            STEP,
            implementations=[lambda cell: bool((cell(*_question())[0].abs() < 1).all())],
        ),
        *verdict_faults(GATES),
    ],
)


# ----- read a memory ------------------------------------------------------------------------------------


_OPEN_AT_ONE = 1 / (1 + math.exp(-1.0))
_HALF_IN_200 = 0.5 ** (1 / 200)
_MEMORY = {
    "kept": 0.5**10,
    "gate at bias 1": _OPEN_AT_ONE,
    "half-life": math.log(0.5) / math.log(_OPEN_AT_ONE),
    "bias for 200": math.log(_HALF_IN_200 / (1 - _HALF_IN_200)),
    "guessing": 1 / 8,
    "more parameters": 4 * 64 * (8 + 64 + 2) / (64 * (8 + 64 + 2)),
}


READ_MEMORY = Task(
    id="lstm.read_a_memory",
    signature="answers: a dictionary",
    points=3,
    reference=_MEMORY.get,
    accepts=[
        {**_MEMORY, "gate at bias 1": 0.7311, "half-life": 2.213, "bias for 200": 5.663}.get,
        {**_MEMORY, "half-life": 2.21, "bias for 200": 5.66}.get,
    ],
    probes=answer_probes(
        {
            "kept": "the share of the first cell state that is left after 10 steps with a forget gate of 1/2",
            "gate at bias 1": "the forget gate when its scores are nothing but a bias of 1",
            "half-life": "after how many steps half of the cell is left with that gate",
            "bias for 200": "the bias with which half of the cell is left after 200 steps",
            "guessing": "the accuracy of a network that has forgotten which of eight symbols it saw",
            "more parameters": "how many times as many parameters the LSTM has as the RNN",
        }
    ),
    is_value=True,
    hints=(
        "If a gate keeps the share f in one step, which share does it keep in t steps?",
        "f^t is left after t steps, and f = 1 / (1 + e^-b) for a bias b. Turned round: f = share^(1/t), and b = log(f / (1 - f)).",
        "kept: 0.5 ** 10\ngate: 1 / (1 + exp(-1)); half-life: log(0.5) / log(gate)\n"
        "bias: f = 0.5 ** (1 / 200), then log(f / (1 - f))\nparameters: 4 blocks against 1, all else equal",
    ),
    mistakes=[
        known_answer(
            _MEMORY,
            "kept",
            0.5 / 10,
            "memory-divided-not-raised",
            "You divided by the number of steps; each step multiplies what is left.",
            "Raise the gate to the power of the number of steps.",
            START,
        ),
        known_answer(
            _MEMORY,
            "kept",
            0.5**9,
            "memory-step-off-by-one",
            "You counted nine steps.",
            "Ten steps multiply by the gate ten times.",
            START,
        ),
        known_answer(
            _MEMORY,
            "gate at bias 1",
            1.0,
            "lstm-bias-is-not-the-gate",
            "You took the bias for the gate.",
            "Apply the sigmoid: the gate is 1 / (1 + e^-b).",
            START,
        ),
        known_answer(
            _MEMORY,
            "gate at bias 1",
            math.tanh(1.0),
            "lstm-gates-not-sigmoid",
            "This is tanh(1); gates use the sigmoid.",
            "Compute 1 / (1 + e^-1).",
            START,
        ),
        known_answer(
            _MEMORY,
            "half-life",
            0.5 / (1 - _OPEN_AT_ONE),
            "memory-divided-not-raised",
            "You let the memory shrink by the same amount in each step; it shrinks by the same factor.",
            "Solve gate^t = 1/2 for t, with logarithms.",
            START,
        ),
        known_answer(
            _MEMORY,
            "bias for 200",
            math.log(200),
            "memory-one-over-e",
            "The bias log(200) leaves about 1/e = 37 % after 200 steps, not half.",
            "Compute the gate first, 0.5^(1/200), and then log(f / (1 - f)).",
            START,
        ),
        known_answer(
            _MEMORY,
            "bias for 200",
            _HALF_IN_200,
            "lstm-bias-is-not-the-gate",
            "This is the gate that you need, not the bias.",
            "Turn the sigmoid round: b = log(f / (1 - f)).",
            START,
        ),
        known_answer(
            _MEMORY,
            "guessing",
            0.5,
            "memory-guess-of-two",
            "One half is guessing among two symbols.",
            "Count the symbols: all eight are equally frequent.",
            CASE,
        ),
        known_answer(
            _MEMORY,
            "more parameters",
            3.0,
            "lstm-blocks-miscounted",
            "You counted the three gates and forgot the candidate.",
            "An LSTM has four blocks of the size of the RNN's only one.",
            BUDGET,
        ),
    ],
)

TASKS = [
    LSTM_CELL,
    GRU_CELL,
    CLASSIFIER,
    OPEN,
    GATES_TASK,
    ORDER,
    BUDGET_TASK,
    GRADE_THIS,
    READ_MEMORY,
]
