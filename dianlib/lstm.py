"""Long short-term memory and the gated recurrent unit, by hand and as modules.

Letters: B sequences in a batch, T steps, F numbers a step, H the hidden size, C classes. Weights
are stored as in torch.nn: a matrix holds one block of H rows for each gate, and there are two biases.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

State = tuple[Tensor, Tensor]


def lstm_cell(
    x: Tensor, state: State, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor
) -> State:
    """Take one step of a long short-term memory: (B, F), (h, c) of (B, H) each -> the new (h, c).

    ``weight_ih`` (4H, F), ``weight_hh`` (4H, H) and the two biases (4H,) hold four blocks of H rows, in
    torch's order: input gate, forget gate, candidate, output gate (Hochreiter and Schmidhuber 1997; the
    forget gate is from Gers, Schmidhuber and Cummins 2000).
    """
    h, c = state
    scores = linear(x, weight_ih, bias_ih) + linear(h, weight_hh, bias_hh)
    return _remember(scores, c)


def _remember(scores: Tensor, c: Tensor) -> State:
    """Turn the four blocks of scores (B, 4H) into gates, and apply them to the cell state (B, H)."""
    i, f, g, o = scores.chunk(4, dim=-1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru_cell(
    x: Tensor, h: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor
) -> Tensor:
    """Take one step of a gated recurrent unit: (B, F), (B, H) -> (B, H).

    ``weight_ih`` (3H, F), ``weight_hh`` (3H, H) and the two biases (3H,) hold three blocks of H rows:
    reset gate, update gate, candidate (Cho et al. 2014). As in torch the reset gate acts *after* the
    product with ``weight_hh``, and an update gate of 1 keeps the old state.
    """
    return _update(linear(x, weight_ih, bias_ih), linear(h, weight_hh, bias_hh), h)


def _update(from_input: Tensor, from_state: Tensor, h: Tensor) -> Tensor:
    """Mix the old state (B, H) with a candidate, by the scores (B, 3H) of the input and of the state."""
    r_x, z_x, n_x = from_input.chunk(3, dim=-1)
    r_h, z_h, n_h = from_state.chunk(3, dim=-1)
    reset, update = (r_x + r_h).sigmoid(), (z_x + z_h).sigmoid()
    candidate = (n_x + reset * n_h).tanh()
    return candidate + update * (h - candidate)


class _Recurrent(nn.Module):
    """What both layers share: parameters with torch's names, so that a state_dict fits both ways."""

    def __init__(self, input_size: int, hidden_size: int, n_blocks: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        rows = n_blocks * hidden_size
        self.weight_ih_l0 = nn.Parameter(torch.empty(rows, input_size))
        self.weight_hh_l0 = nn.Parameter(torch.empty(rows, hidden_size))
        self.bias_ih_l0 = nn.Parameter(torch.empty(rows))
        self.bias_hh_l0 = nn.Parameter(torch.empty(rows))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(hidden_size**-0.5), hidden_size**-0.5)

    def zeros(self, x: Tensor) -> Tensor:
        """Make the state before the first step: (B, H)."""
        return x.new_zeros(len(x), self.hidden_size)


class LSTM(_Recurrent):
    """Run the cell over sequences: (B, T, F) -> outputs (B, T, H) and the last state (h, c), (B, H) each.

    ``forget_bias`` is what the forget gate's two biases add up to at the start; None leaves them
    random around 0, as torch.nn.LSTM does (Jozefowicz, Zaremba and Sutskever 2015 recommend 1).
    """

    def __init__(self, input_size: int, hidden_size: int, forget_bias: float | None = 1.0) -> None:
        super().__init__(input_size, hidden_size, n_blocks=4)
        if forget_bias is not None:
            open_forget_gates(self, forget_bias)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        h, c = (self.zeros(x), self.zeros(x)) if state is None else state
        # The inputs' share of the scores needs no state: one product for all steps.
        from_inputs = linear(x, self.weight_ih_l0, self.bias_ih_l0 + self.bias_hh_l0)
        outputs = []
        for from_input in from_inputs.unbind(1):  # indexing [:, t] makes backward quadratic in T
            h, c = _remember(from_input + linear(h, self.weight_hh_l0), c)
            outputs.append(h)
        return torch.stack(outputs, dim=1), (h, c)


class GRU(_Recurrent):
    """Run the gated recurrent unit over sequences: (B, T, F) -> (B, T, H) and the last state (B, H)."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size, n_blocks=3)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        h = self.zeros(x) if state is None else state
        outputs = []
        for from_input in linear(x, self.weight_ih_l0, self.bias_ih_l0).unbind(1):
            # The reset gate multiplies bias_hh too, so the two biases stay apart here.
            h = _update(from_input, linear(h, self.weight_hh_l0, self.bias_hh_l0), h)
            outputs.append(h)
        return torch.stack(outputs, dim=1), h


class LSTMClassifier(nn.Module):
    """Read a sequence and name its class from the last hidden state: (B, T, F) -> logits (B, C)."""

    def __init__(
        self, input_size: int, hidden_size: int, n_classes: int, forget_bias: float | None = 1.0
    ) -> None:
        super().__init__()
        self.lstm = LSTM(input_size, hidden_size, forget_bias)
        self.output = nn.Linear(hidden_size, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        _, (h, _) = self.lstm(x)
        logits: Tensor = self.output(h)
        return logits


def open_forget_gates(model: nn.Module, value: float) -> None:
    """Set the forget gates' bias of every layer to ``value``, in place: an LSTM of torch, or ours.

    The gate sees the sum of two biases, so one gets the value and the other 0. Raises ValueError
    for a module without the biases of an LSTM.
    """
    _set_gate_bias(model, 1, value)


def remember_for(model: nn.Module, steps: float) -> None:
    """Let an LSTM of torch, or ours, start with a memory of about ``steps`` steps, in place.

    The forget gates' bias becomes log(steps), so that a share of 1/e is left after about ``steps`` steps, and
    the input gates' -log(steps), so that little is written at first (after Tallec and Ollivier 2018,
    who draw a different number of steps for each unit). Raises ValueError as `open_forget_gates` does.
    """
    _set_gate_bias(model, 1, math.log(steps))
    _set_gate_bias(model, 0, -math.log(steps))


@torch.no_grad()
def _set_gate_bias(model: nn.Module, block: int, value: float) -> None:
    biases = {name: p for name, p in model.named_parameters() if name.startswith(("bias_ih", "bias_hh"))}
    if not biases or any(len(bias) != 4 * getattr(model, "hidden_size", 0) for bias in biases.values()):
        raise ValueError("this module has no forget gates; give a torch.nn.LSTM or a dianlib.lstm.LSTM.")
    for name, bias in biases.items():
        bias.chunk(4)[block].fill_(value if name.startswith("bias_ih") else 0.0)


@torch.no_grad()
def gates(
    xs: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor
) -> dict[str, Tensor]:
    """Read what the cell decides at every step, from zero states: (B, T, F) -> four of (B, T, H).

    The keys are "input", "forget" and "output" for the gates, between 0 and 1, and "candidate", between
    -1 and 1. torch.nn.LSTM does not return them.
    """
    h, c = (xs.new_zeros(len(xs), weight_hh.shape[1]) for _ in range(2))
    steps = []
    for x in xs.unbind(1):
        scores = linear(x, weight_ih, bias_ih) + linear(h, weight_hh, bias_hh)
        steps.append(scores)
        h, c = _remember(scores, c)
    i, f, g, o = torch.stack(steps, dim=1).chunk(4, dim=-1)
    return {"input": i.sigmoid(), "forget": f.sigmoid(), "candidate": g.tanh(), "output": o.sigmoid()}


def to_torch_order(weight: Tensor, order: str) -> Tensor:
    """Put the blocks of an LSTM's weight or bias into torch's order: (4H, ...) -> (4H, ...).

    ``order`` names the four blocks as they stand, for example "iofg" in ONNX: i input gate, f forget
    gate, g candidate, o output gate. Raises ValueError for another word.
    """
    if sorted(order) != sorted("ifgo"):
        raise ValueError(f"an order names each of the blocks i, f, g and o once, not {order!r}.")
    block = dict(zip(order, weight.chunk(4), strict=True))
    return torch.cat([block[name] for name in "ifgo"])


N_BLOCKS = {"rnn": 1, "gru": 3, "lstm": 4}


def n_parameters(kind: str, input_size: int, hidden_size: int) -> int:
    """Count the parameters of one layer of torch: "rnn", "gru" or "lstm" have 1, 3 or 4 blocks.

    A block has H F + H H weights and 2 H biases. Raises ValueError for another kind.
    """
    if kind not in N_BLOCKS:
        raise ValueError(f"the kinds are {', '.join(N_BLOCKS)}, not {kind!r}.")
    return N_BLOCKS[kind] * hidden_size * (input_size + hidden_size + 2)


def hidden_size_at_budget(kind: str, input_size: int, budget: int) -> int:
    """Return the largest hidden size whose layer has at most ``budget`` parameters; 0 if none has."""
    hidden_size = 0
    while n_parameters(kind, input_size, hidden_size + 1) <= budget:
        hidden_size += 1
    return hidden_size
