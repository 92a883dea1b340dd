"""One token of grouped-query attention: queries below each other, torch's own sharing, and repeated keys.

All have the same numbers, and run in turn, in one process and one thread; seconds are those of the processor.
The ratio of each round is taken by itself; the median over the rounds is compared with the target. Decoding
reads the whole cache for every token, so a way that copies it first pays for the copy at every token. The
last benchmark writes with a whole model, with a cache and without.
"""

from collections.abc import Callable
from statistics import median
from time import process_time
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dianlib.attention import causal_mask
from dianlib.grouped_query import TokenModel, grouped_attention, repeat_kv

ROUNDS, HEADS, HEAD_DIM = 15, 8, 64
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


def in_turn(benchmark: Any, trials: dict[str, Callable[[], object]], calls: int) -> dict[str, list[float]]:
    """Time all trials round by round; the order turns, so that nobody always follows the same other."""
    taken: dict[str, list[float]] = {name: [] for name in trials}

    def one_round() -> None:
        names = list(trials)
        turn = len(taken[names[0]]) % len(names)
        for name in names[turn:] + names[:turn]:
            started = process_time()
            for _ in range(calls):
                trials[name]()
            taken[name].append((process_time() - started) / calls)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more of them would wait for each other, and for other work on the computer
    try:
        with torch.no_grad():
            benchmark.pedantic(one_round, rounds=ROUNDS, warmup_rounds=1)
    finally:
        torch.set_num_threads(threads)
    return {name: times[1:] for name, times in taken.items()}


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
        name: (lambda way=way: way(query, key, value, mask)) for name, way in WAYS.items()
    }
    trials["multi-head"] = lambda: grouped_attention(query, full_key, full_value, mask)
    taken = in_turn(benchmark, trials, calls)
    ratios = {
        name: median(ours / other for ours, other in zip(taken["dianlib"], times, strict=True))
        for name, times in taken.items()
    }
    benchmark.extra_info.update({f"ours / {name}": round(ratio, 3) for name, ratio in ratios.items()})
    with capsys.disabled():
        print(f"\n\n{shape}, {HEADS} heads on {n_kv_heads}, one thread")
        for name, times in taken.items():
            print(f"{name:>14}: {1e3 * median(times):8.3f} ms  ours takes {ratios[name]:.2f} x")
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
    with torch.no_grad():
        model(tokens, places, mask, cache)
    trials: dict[str, Callable[[], object]] = {
        "with a cache": lambda: model(tokens[:, :1], torch.tensor([512]), None, cache),
        "without": lambda: model(tokens, places, mask),
    }
    taken = in_turn(benchmark, trials, calls=1)
    ratio = median(b / a for a, b in zip(taken["with a cache"], taken["without"], strict=True))
    benchmark.extra_info["without / with a cache"] = round(ratio, 1)
    with capsys.disabled():
        print(f"\n\ntoken 513 of a model with {n_kv_heads} key-value heads: without a cache {ratio:.0f} x")
    assert ratio > 5
