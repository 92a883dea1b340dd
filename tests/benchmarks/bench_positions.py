"""The rotation beside three other ways to write it, forwards and backwards.

All rotate the same queries by the same precomputed table. torch has no rotary layer of its own, so what
stands beside ours are its complex product alone, whole columns, and halves, as in Hugging Face's
Transformers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from in_turn import in_turn
from torch import Tensor

from dianlib import positions as pos

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
    for same in (by_product, by_columns):  # the halves are other pairs, and another result
        torch.testing.assert_close(pos.rotate_pairs(x, table), same(x, table))

    def one_pass(rotate: Callable[..., Tensor]) -> None:
        rotate(x, table).square().mean().backward()
        x.grad = None

    title = f"rotary, {' x '.join(map(str, SHAPES[shape]))}"
    trials = {name: partial(one_pass, rotate) for name, rotate in WAYS.items()}
    ratios = in_turn(benchmark, capsys, title, trials, rounds=15)
    worst = max(ratios.values())
    assert worst <= LIMIT, f"ours takes {worst:.2f} x, limit {LIMIT}"
