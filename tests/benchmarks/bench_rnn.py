"""Forwards and backwards through time: our layer, torch's own, and the loop that indexes its inputs.

All have the same weights and read the same sequences, in turn, in one process and one thread, and seconds
are those of the processor. The ratio of each round is taken by itself; the median over the rounds is
compared with the target.
"""

from collections.abc import Callable
from statistics import median
from time import process_time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dianlib.rnn import RNN

ROUNDS, REPEATS = 15, 5
OURS, TORCH, INDEXED = "dianlib", "nn.RNN", "inputs[:, t] in the loop"
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
        OURS: lambda: ours(xs),
        TORCH: lambda: theirs(xs)[0],
        INDEXED: lambda: indexed(ours, xs),
    }
    times: dict[str, list[float]] = {name: [] for name in layers}

    def one_round() -> None:
        # The order turns, so that nobody always follows the same other.
        turn = len(times[OURS]) % len(layers)
        names = list(layers)
        for name in names[turn:] + names[:turn]:
            started = process_time()
            for _ in range(REPEATS):
                layers[name]()[:, -1].sum().backward()
            times[name].append((process_time() - started) / REPEATS)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        benchmark.pedantic(one_round, rounds=ROUNDS, warmup_rounds=1)
    finally:
        torch.set_num_threads(threads)
    ratios = {
        name: median(a / b for a, b in zip(times[OURS][1:], times[name][1:], strict=True)) for name in TARGETS
    }
    benchmark.extra_info.update({f"ours / {name}": round(ratio, 3) for name, ratio in ratios.items()})
    with capsys.disabled():
        print(f"\n\nforwards and backwards, {n} x {n_steps} x {n_inputs}, state {n_hidden}, one thread")
        for name, values in times.items():
            target = f"ours takes {ratios[name]:.2f} x, target {TARGETS[name]}" if name in TARGETS else ""
            print(f"{name:>26}: {1000 * median(values[1:]):7.1f} ms  {target}")
    missed = [name for name, target in TARGETS.items() if ratios[name] > target]
    assert not missed, f"target missed against {', '.join(missed)}: {ratios}"
