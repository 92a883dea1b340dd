"""The rotation beside three other ways to write it, forwards and backwards.

All rotate the same queries by the same precomputed table, and run in turn, in one process and one thread;
seconds are those of the processor. The ratio of each round is taken by itself; the median over the rounds
is compared with the target. torch has no rotary layer of its own, so what stands beside ours are its complex
product alone, whole columns, and halves, as in Hugging Face's Transformers.
"""

from collections.abc import Callable
from statistics import median
from time import process_time
from typing import Any

import pytest
import torch
from torch import Tensor

from dianlib import positions as pos

ROUNDS = 15
# Samples, heads, places, width of a head: a training batch, and one long sequence.
SHAPES = {"batch": (16, 8, 128, 64), "long": (1, 8, 2048, 64)}
LIMIT = 1.2  # times the seconds of the fastest of the others


def by_product(x: Tensor, turns: Tensor) -> Tensor:
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns).flatten(-2)


def by_columns(x: Tensor, turns: Tensor) -> Tensor:
    u, v = x[..., 0::2], x[..., 1::2]
    cos, sin = turns.real, turns.imag
    return torch.stack([u * cos - v * sin, u * sin + v * cos], dim=-1).flatten(-2)


def by_halves(x: Tensor, turns: Tensor) -> Tensor:
    cos, sin = turns.real, turns.imag
    first, second = x.chunk(2, dim=-1)
    return x * cos.repeat(1, 2) + torch.cat([-second, first], dim=-1) * sin.repeat(1, 2)


WAYS = {
    "dianlib": pos.rotate_pairs,
    "complex product": by_product,
    "columns": by_columns,
    "halves": by_halves,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_rotation_forwards_and_backwards(
    benchmark: Any, shape: str, capsys: pytest.CaptureFixture[str]
) -> None:
    x = torch.randn(SHAPES[shape], generator=torch.Generator().manual_seed(0)).requires_grad_()
    table = pos.rope_table(torch.arange(x.shape[-2]), x.shape[-1])
    torch.testing.assert_close(pos.rotate_pairs(x, table), by_columns(x, table))

    def seconds(rotate: Callable[..., Tensor]) -> float:
        x.grad = None
        started = process_time()
        rotate(x, table).square().mean().backward()
        return process_time() - started

    taken: dict[str, list[float]] = {name: [] for name in WAYS}

    def one_round() -> None:
        # The order turns, so that nobody always follows the same other.
        names = list(WAYS)
        turn = len(taken["dianlib"]) % len(names)
        for name in names[turn:] + names[:turn]:
            taken[name].append(seconds(WAYS[name]))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more of them would wait for each other, and for other work on the computer
    try:
        benchmark.pedantic(one_round, rounds=ROUNDS, warmup_rounds=1)
    finally:
        torch.set_num_threads(threads)
    ratios = {
        name: median(ours / other for ours, other in zip(taken["dianlib"][1:], times[1:], strict=True))
        for name, times in taken.items()
    }
    benchmark.extra_info.update({f"ours / {name}": round(ratio, 3) for name, ratio in ratios.items()})
    with capsys.disabled():
        print(f"\n\nrotary, {' x '.join(map(str, SHAPES[shape]))}, one thread")
        for name, times in taken.items():
            print(f"{name:>22}: {1000 * median(times[1:]):7.1f} ms  ours takes {ratios[name]:.2f} x")
    worst = max(ratios.values())
    assert worst <= LIMIT, f"ours takes {worst:.2f} x, limit {LIMIT}"
