"""A recurrent network: one cell, unrolled in time, and the gradient that comes back through it.

Letters: B samples, T steps in time, F numbers in each step, H numbers in the hidden state.
The weights have the shapes of torch.nn.RNN: weight_ih (H, F) for the input, weight_hh (H, H)
for the state of the step before, and a bias (H,) for each of the two.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def rnn_cell(
    x: Tensor, h: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor
) -> Tensor:
    """Take one step in time: input (B, F) and old state (B, H) -> new state (B, H) (Elman 1990)."""
    return torch.tanh(x @ weight_ih.T + bias_ih + h @ weight_hh.T + bias_hh)


def unroll(
    xs: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    activation: Callable[[Tensor], Tensor] = torch.tanh,
) -> Tensor:
    """Apply the cell T times: xs (B, T, F), h0 (B, H) -> all states (B, T, H).

    Raises ValueError when there is no step.
    """
    if xs.shape[1] == 0:
        raise ValueError("a sequence needs at least one step in time.")
    # The inputs wait for no state, so one product serves all steps.
    inputs = xs @ weight_ih.T + (bias_ih + bias_hh)
    h, states = h0, []
    # unbind, not inputs[:, t]: each such index has a gradient as large as all of inputs.
    for x in inputs.unbind(dim=1):
        h = activation(torch.addmm(x, h, weight_hh.T))  # x + h @ weight_hh.T
        states.append(h)
    return torch.stack(states, dim=1)


class RNN(nn.Module):
    """One recurrent layer: (B, T, F) -> the states (B, T, H), from h0 (B, H) or zeros.

    The parameters have the names and the first values of torch.nn.RNN, so that a
    state_dict fits both. The activation is tanh unless another one is given.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        activation: Callable[[Tensor], Tensor] = torch.tanh,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.weight_ih_l0 = nn.Parameter(torch.empty(hidden_size, input_size))
        self.weight_hh_l0 = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.bias_ih_l0 = nn.Parameter(torch.empty(hidden_size))
        self.bias_hh_l0 = nn.Parameter(torch.empty(hidden_size))
        bound = 1 / math.sqrt(hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, xs: Tensor, h0: Tensor | None = None) -> Tensor:
        if h0 is None:
            h0 = xs.new_zeros(len(xs), len(self.bias_hh_l0))
        weights = self.weight_ih_l0, self.weight_hh_l0
        biases = self.bias_ih_l0, self.bias_hh_l0
        return unroll(xs, h0, *weights, *biases, activation=self.activation)


class RNNClassifier(nn.Module):
    """Classify a sequence by the last state: (B, T, F) -> logits (B, C).

    ``RNNClassifier(28, 128, 10)`` takes images (B, 28, 28) row by row, from the top.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        n_classes: int,
        activation: Callable[[Tensor], Tensor] = torch.tanh,
    ) -> None:
        super().__init__()
        self.rnn = RNN(input_size, hidden_size, activation)
        self.output = nn.Linear(hidden_size, n_classes)

    def forward(self, xs: Tensor) -> Tensor:
        states = self.rnn(xs)
        logits: Tensor = self.output(states[:, -1])
        return logits


def bptt_gradient(
    xs: Tensor,
    h0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    grad_last: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Go back through time by hand: from dL / dh_T (B, H) to the weights.

    Returns dL / dweight_ih (H, F), dL / dweight_hh (H, H) and dL / dbias (H,); the last
    one holds for both biases. The cell is the one of `rnn_cell` (Rumelhart, Hinton and
    Williams 1986; Werbos 1990).
    """
    states = unroll(xs, h0, weight_ih, weight_hh, bias_ih, bias_hh)
    states_and_first = [h0, *states.unbind(dim=1)]
    grad_weight_ih = torch.zeros_like(weight_ih)
    grad_weight_hh = torch.zeros_like(weight_hh)
    grad_bias = torch.zeros_like(bias_hh)
    grad_h = grad_last
    for t in reversed(range(xs.shape[1])):
        new, old = states_and_first[t + 1], states_and_first[t]
        grad_a = grad_h * (1 - new**2)  # through tanh: its slope is 1 - tanh^2
        # The weights are the same in every step, so what each step says is added up.
        grad_weight_ih += grad_a.T @ xs[:, t]
        grad_weight_hh += grad_a.T @ old
        grad_bias += grad_a.sum(dim=0)
        grad_h = grad_a @ weight_hh  # to the state before
    return grad_weight_ih, grad_weight_hh, grad_bias


def gradient_by_distance(model: Callable[[Tensor], Tensor], xs: Tensor) -> Tensor:
    """Measure how much of each step reaches the output: xs (B, T, F) -> norms (T,), the last step first.

    Entry k is the Euclidean norm, over samples and features, of the gradient of the sum of
    ``model(xs)`` with respect to the step k steps before the last one.
    """
    inputs = xs.detach().clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(model(inputs).sum(), inputs)
    return gradient.pow(2).sum(dim=(0, 2)).sqrt().flip(0)


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float) -> float:
    """Shrink all gradients by one factor, in place, to a common norm of at most max_norm.

    Returns the norm before. A parameter without a gradient is left out (Pascanu, Mikolov
    and Bengio 2013, algorithm 1). Raises ValueError when max_norm is not positive.
    """
    if max_norm <= 0:
        raise ValueError(f"max_norm must be above 0, not {max_norm}.")
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = math.sqrt(sum(gradient.pow(2).sum().item() for gradient in gradients))
    if norm > max_norm:
        for gradient in gradients:
            gradient *= max_norm / norm
    return norm


def orthogonal(matrix: Tensor) -> Tensor:
    """Turn an invertible matrix (n, n) into an orthogonal one by Gram and Schmidt's method on its columns.

    From a matrix of independent normal numbers comes a random rotation or reflection, a first value for
    weight_hh that keeps every length (Saxe, McClelland and Ganguli 2014).
    """
    q, r = torch.linalg.qr(matrix)
    # A factorisation is free to turn columns round; Gram and Schmidt's does not.
    signed: Tensor = q * r.diagonal().sign()
    return signed
