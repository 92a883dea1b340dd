"""One training pass of multi-head attention: ours, torch's own layer, and heads one after the other.

All have the same weights and the same sequences.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from in_turn import in_turn
from torch import Tensor, nn
from torch.nn import functional as F

from dianlib.multihead import MultiHeadAttention

# Batch, tokens, width, heads.
SHAPES = {"short": (64, 32, 128, 4), "long": (16, 256, 128, 8)}
LIMIT = 1.0  # how many times torch's seconds ours may take


def copied(ours: MultiHeadAttention, width: int, n_heads: int) -> nn.MultiheadAttention:
    theirs = nn.MultiheadAttention(width, n_heads, batch_first=True)
    layers = (ours.q_proj, ours.k_proj, ours.v_proj)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([layer.weight for layer in layers]))
        theirs.in_proj_bias.copy_(torch.cat([layer.bias for layer in layers]))
    theirs.out_proj.load_state_dict(ours.o_proj.state_dict())
    return theirs


def one_after_the_other(layer: MultiHeadAttention, x: Tensor) -> Tensor:
    q, k, v = (part(x).chunk(layer.n_heads, dim=-1) for part in (layer.q_proj, layer.k_proj, layer.v_proj))
    heads = [F.scaled_dot_product_attention(*head) for head in zip(q, k, v, strict=True)]
    joined: Tensor = layer.o_proj(torch.cat(heads, dim=-1))
    return joined


@pytest.mark.parametrize("shape", SHAPES)
def test_a_pass_forwards_and_backwards(
    benchmark: Any, shape: str, capsys: pytest.CaptureFixture[str]
) -> None:
    n, length, width, n_heads = SHAPES[shape]
    torch.manual_seed(0)
    ours = MultiHeadAttention(width, n_heads)
    theirs = copied(ours, width, n_heads)
    x = torch.randn(n, length, width, generator=torch.Generator().manual_seed(0))
    calls: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {
        "dianlib": (ours, lambda: ours(x, x, x, need_weights=False)[0]),
        "dianlib with weights": (ours, lambda: ours(x, x, x)[0]),
        "nn.MultiheadAttention": (theirs, lambda: theirs(x, x, x, need_weights=False)[0]),
        "head by head": (ours, lambda: one_after_the_other(ours, x)),
    }
    outputs = [call() for _, call in calls.values()]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-4, atol=1e-5)

    def one_pass(module: nn.Module, call: Callable[[], Tensor]) -> None:
        call().square().mean().backward()
        module.zero_grad()

    title = f"batch {n}, {length} tokens, width {width}, {n_heads} heads"
    trials = {name: partial(one_pass, *call) for name, call in calls.items()}
    ratios = in_turn(benchmark, capsys, title, trials, rounds=9)
    ratio = ratios["nn.MultiheadAttention"]
    assert ratio <= LIMIT, f"ours takes {ratio:.2f} x, limit {LIMIT}"
