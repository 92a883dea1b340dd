"""Attention beside torch's own layer: one pass forwards and backwards, with weights and without.

All have the same weights and the same sequences. Where nobody asks for the weights, attention in a multi-head
layer may take no longer than nn.MultiheadAttention, and on long sequences the fused function has to beat the
formula of the textbook.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from in_turn import in_turn
from torch import Tensor, nn

from dianlib.attention import scaled_dot_product_attention
from dianlib.multihead import MultiHeadAttention, merge_heads, split_heads

# Batch, tokens, width, heads: short sentences, and long ones.
SHAPES = {"short": (64, 32, 128, 4), "long": (8, 512, 256, 8)}


class ByFormula(nn.Module):
    """The layer with the attention of the textbook, which keeps every weight."""

    def __init__(self, layer: MultiHeadAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        projected = (layer.q_proj(x), layer.k_proj(x), layer.v_proj(x))
        q, k, v = (split_heads(part, layer.n_heads) for part in projected)
        output, _ = scaled_dot_product_attention(q, k, v, need_weights=True)
        return torch.as_tensor(layer.o_proj(merge_heads(output)))


def contenders(width: int, n_heads: int) -> dict[str, Callable[[Tensor], Tensor]]:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(width, n_heads, batch_first=True)
    ours = MultiHeadAttention(width, n_heads)
    with torch.no_grad():
        parts = zip(theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3), strict=True)
        for layer, (weight, bias) in zip((ours.q_proj, ours.k_proj, ours.v_proj), parts, strict=True):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        ours.o_proj.load_state_dict(theirs.out_proj.state_dict())
    return {
        "dianlib": lambda x: ours(x, x, x, need_weights=False)[0],
        "nn.MultiheadAttention": lambda x: theirs(x, x, x, need_weights=False)[0],
        "by the formula": ByFormula(ours),
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_a_pass_forwards_and_backwards(
    benchmark: Any, shape: str, capsys: pytest.CaptureFixture[str]
) -> None:
    n, length, width, n_heads = SHAPES[shape]
    layers = contenders(width, n_heads)
    x = torch.randn(n, length, width, generator=torch.Generator().manual_seed(0)).requires_grad_()
    results = [layer(x) for layer in layers.values()]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-5, rtol=1e-4)

    def one_pass(layer: Callable[[Tensor], Tensor]) -> None:
        layer(x).square().mean().backward()

    title = f"attention, batch {n}, {length} tokens, width {width}, {n_heads} heads"
    trials = {name: partial(one_pass, layer) for name, layer in layers.items()}
    ratios = in_turn(benchmark, capsys, title, trials, rounds=9)
    theirs = ratios["nn.MultiheadAttention"]
    assert theirs <= 1.05, f"ours takes {theirs:.2f} x"  # 1, and 0.05 for the noise of the computer
    if shape == "long":
        assert ratios["by the formula"] <= 0.9
