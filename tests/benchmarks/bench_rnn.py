"""Forwards and backwards through time: our layer, torch's own, and the loop that indexes its inputs.

All have the same weights and read the same sequences.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from in_turn import in_turn
from torch import Tensor, nn

from dianlib.rnn import RNN

TORCH, INDEXED = "nn.RNN", "inputs[:, t] in the loop"
# How many times the other's time ours may take at most.
TARGETS = {TORCH: 1.15, INDEXED: 0.8}
# Samples, steps, inputs and state numbers: Fashion-MNIST by rows, and a longer sequence.
SIZES = [(64, 28, 28, 128), (64, 100, 64, 256)]


def indexed(layer: RNN, xs: Tensor) -> Tensor:
    inputs = xs @ layer.weight_ih_l0.T + (layer.bias_ih_l0 + layer.bias_hh_l0)
    h, states = inputs.new_zeros(len(inputs), len(layer.bias_hh_l0)), []
    for t in range(inputs.shape[1]):
        h = torch.tanh(torch.addmm(inputs[:, t], h, layer.weight_hh_l0.T))
        states.append(h)
    return torch.stack(states, dim=1)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_forwards_and_backwards(
    benchmark: Any, size: tuple[int, int, int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    n, n_steps, n_inputs, n_hidden = size
    generator = torch.Generator().manual_seed(0)
    xs = torch.randn(n, n_steps, n_inputs, generator=generator)
    ours, theirs = RNN(n_inputs, n_hidden), nn.RNN(n_inputs, n_hidden, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(xs), theirs(xs)[0])
    torch.testing.assert_close(ours(xs), indexed(ours, xs))
    layers: dict[str, Callable[[], Tensor]] = {
        "dianlib": lambda: ours(xs),
        TORCH: lambda: theirs(xs)[0],
        INDEXED: lambda: indexed(ours, xs),
    }

    def one_pass(layer: Callable[[], Tensor]) -> None:
        layer()[:, -1].sum().backward()

    title = f"forwards and backwards, {n} x {n_steps} x {n_inputs}, state {n_hidden}"
    trials = {name: partial(one_pass, layer) for name, layer in layers.items()}
    ratios = in_turn(benchmark, capsys, title, trials, rounds=15, calls=5)
    missed = [name for name, target in TARGETS.items() if ratios[name] > target]
    assert not missed, f"target missed against {', '.join(missed)}: {ratios}"
