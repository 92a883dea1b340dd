"""A fully connected network, by hand and as a module.

Letters: B samples in a batch, C classes. A layer from ``n_in`` to ``n_out`` numbers has
a weight of shape (n_out, n_in) and a bias of shape (n_out,), as in torch.nn.Linear.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Map the last axis with one affine map: (..., n_in) -> (..., n_out), x W^T + b."""
    return x @ weight.T + bias


def relu(x: Tensor) -> Tensor:
    """Keep what is positive, replace the rest by 0: any shape -> the same shape."""
    return x * (x > 0)


def softmax(logits: Tensor) -> Tensor:
    """Turn scores into probabilities: (..., C) -> (..., C), each row sums to 1.

    Only differences of scores matter, so the largest of each row is subtracted first:
    exp then never overflows.
    """
    shifted = logits - logits.max(dim=-1, keepdim=True).values
    exponentials = shifted.exp()
    return exponentials / exponentials.sum(dim=-1, keepdim=True)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean of -log softmax at the true classes: (B, C), (B,) int64 -> ()."""
    shifted = logits - logits.max(dim=-1, keepdim=True).values
    # log softmax in one step: the log of a softmax that rounds to 0 would be -inf.
    log_probabilities = shifted - shifted.exp().sum(dim=-1, keepdim=True).log()
    return -log_probabilities.gather(-1, targets.unsqueeze(-1)).mean()


def cross_entropy_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """Return d cross_entropy / d logits, which is (softmax - one-hot) / B.

    Shapes: (B, C), (B,) int64 -> (B, C).
    """
    gradient = softmax(logits)
    rows = torch.arange(len(targets), device=targets.device)
    gradient[rows, targets] -= 1
    return gradient / len(targets)


@torch.no_grad()
def sgd_step(parameters: Iterable[Tensor], lr: float) -> None:
    """Move every parameter that has a gradient, in place: p <- p - lr * p.grad."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter -= lr * parameter.grad


class MLP(nn.Module):
    """A chain of linear layers with ReLU between them; its outputs are logits.

    ``MLP([784, 128, 256, 10])`` maps inputs of 784 numbers each to (B, 10); images,
    (B, 28, 28) for example, are flattened. Raises ValueError for fewer than two sizes
    (Rumelhart, Hinton and Williams 1986).
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        if len(sizes) < 2:
            raise ValueError(f"give an input and an output size, not {list(sizes)}.")
        # parameters() does not look into a plain list: the layers would never be trained.
        layers = (nn.Linear(n_in, n_out) for n_in, n_out in pairwise(sizes))
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(start_dim=1)
        *hidden_layers, output_layer = self.layers
        for layer in hidden_layers:
            x = torch.relu(layer(x))
        logits: Tensor = output_layer(x)
        return logits
