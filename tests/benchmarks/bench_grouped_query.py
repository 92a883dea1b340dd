"""One token of grouped-query attention: queries below each other, torch's own sharing, and repeated keys.

All have the same numbers. Decoding reads the whole cache for every token, so a way that copies it first pays
for the copy at every token. The last benchmark writes with a whole model, with a cache and without.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from in_turn import in_turn
from torch import Tensor
from torch.nn import functional as F

from dianlib.attention import causal_mask
from dianlib.grouped_query import TokenModel, grouped_attention, repeat_kv

HEADS, HEAD_DIM = 8, 64
# Batch, new tokens, all tokens, calls a round.
SHAPES = {
    "decode, 1,024 tokens": (1, 1, 1024, 20),
    "decode, 4,096 tokens": (1, 1, 4096, 6),
    "decode, 4,096 tokens, batch 8": (8, 1, 4096, 1),
    "prefill of 512 tokens": (1, 512, 512, 1),
}

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def by_torch(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def by_repeating(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    share = query.shape[1] // key.shape[1]
    return F.scaled_dot_product_attention(
        query, repeat_kv(key, share), repeat_kv(value, share), attn_mask=mask
    )


WAYS: dict[str, Attention] = {
    "dianlib": grouped_attention,
    "enable_gqa": by_torch,
    "repeating": by_repeating,
}


@pytest.mark.parametrize("n_kv_heads", [2, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_sharing_keys(
    benchmark: Any, shape: str, n_kv_heads: int, capsys: pytest.CaptureFixture[str]
) -> None:
    batch, length, n_tokens, calls = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    query, full_key, full_value = (
        torch.randn(batch, HEADS, n, HEAD_DIM, generator=generator) for n in (length, n_tokens, n_tokens)
    )
    key, value = (part[:, :n_kv_heads].contiguous() for part in (full_key, full_value))
    mask = causal_mask(length, n_tokens) if length > 1 else None
    trials: dict[str, Callable[[], object]] = {
        name: partial(way, query, key, value, mask) for name, way in WAYS.items()
    }
    results = [trial() for trial in trials.values()]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])
    trials["multi-head"] = partial(grouped_attention, query, full_key, full_value, mask)
    title = f"{shape}, {HEADS} heads on {n_kv_heads}"
    with torch.no_grad():
        ratios = in_turn(benchmark, capsys, title, trials, rounds=15, calls=calls)
    # Not slower than torch's own sharing, in this much noise, and faster than a copy where a cache is read.
    assert ratios["enable_gqa"] <= 1.1
    if length == 1:
        assert ratios["repeating"] < 0.8
        assert ratios["multi-head"] < 1


@pytest.mark.parametrize("n_kv_heads", [8, 2, 1])
def test_a_token_with_a_cache(benchmark: Any, n_kv_heads: int, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = TokenModel(100, HEADS * HEAD_DIM, HEADS, n_kv_heads, n_layers=2, max_length=600)
    tokens, places, mask = torch.zeros(1, 512, dtype=torch.int64), torch.arange(512), causal_mask(512)
    cache = model.new_cache()
    trials: dict[str, Callable[[], object]] = {
        "with a cache": lambda: model(tokens[:, :1], torch.tensor([512]), None, cache),
        "without": lambda: model(tokens, places, mask),
    }
    title = f"token 513 of a model with {n_kv_heads} key-value heads"
    with torch.no_grad():
        model(tokens, places, mask, cache)
        ratios = in_turn(benchmark, capsys, title, trials, rounds=15)
    assert ratios["without"] < 1 / 5
