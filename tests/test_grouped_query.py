"""Grouped-query attention against torch, values and gradients; the cache against no cache; the arithmetic."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dianlib import grouped_query, multihead, positions
from dianlib.attention import causal_mask, padding_mask
from dianlib.data import attributes_task
from dianlib.grouped_query import GroupedQueryAttention, KVCache, TokenModel

B, L, S, H, HEAD_DIM = 3, 5, 7, 8, 3
D = H * HEAD_DIM
GROUPS = [1, 2, 4, 8]


def randn(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def assert_same_gradients(ours: Tensor, theirs: Tensor, wanted: list[Tensor]) -> None:
    """Compare two results of one shape, and the gradients of an uneven sum of each."""
    torch.testing.assert_close(ours, theirs)
    uneven = randn(99, *ours.shape).detach()
    for a, b in zip(
        torch.autograd.grad((ours * uneven).sum(), wanted),
        torch.autograd.grad((theirs * uneven).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


# ----- grouping -----------------------------------------------------------------------------------------


def test_neighbours_share_a_key_value_head() -> None:
    x = randn(0, B, 2, S, HEAD_DIM)
    repeated = grouped_query.repeat_kv(x, 4)
    assert repeated.shape == (B, 8, S, HEAD_DIM)
    for head in range(8):
        assert torch.equal(repeated[:, head], x[:, head // 4])


def masks(length: int) -> dict[str, Tensor | None]:
    causal = causal_mask(length, S)
    padding = padding_mask(torch.tensor([7, 4, 6]), S)
    per_head = torch.rand(B, H, length, S, generator=torch.Generator().manual_seed(1)) < 0.6
    return {
        "none": None,
        "causal (L, S)": causal,
        "padding (B, 1, 1, S)": padding,
        "both (B, 1, L, S)": causal & padding,
        "for each head (B, H, L, S)": per_head,
        "for each head (H, L, S)": per_head[0],
        "for each head (1, H, 1, S)": per_head[:1, :, :1],
    }


@pytest.mark.parametrize("n_kv_heads", GROUPS)
@pytest.mark.parametrize("length", [1, L])
@pytest.mark.parametrize("name", masks(1))
def test_grouped_attention_equals_torch(name: str, length: int, n_kv_heads: int) -> None:
    mask = masks(length)[name]
    q = randn(1, B, H, length, HEAD_DIM)
    k, v = (randn(s, B, n_kv_heads, S, HEAD_DIM) for s in (2, 3))
    ours = grouped_query.grouped_attention(q, k, v, mask)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    assert_same_gradients(ours, theirs, [q, k, v])
    share = H // n_kv_heads
    k_repeated, v_repeated = (part[:, torch.arange(H) // share] for part in (k, v))
    repeated = F.scaled_dot_product_attention(q, k_repeated, v_repeated, attn_mask=mask)
    assert_same_gradients(grouped_query.grouped_attention(q, k, v, mask), repeated, [q, k, v])


def test_grouped_attention_copies_no_key() -> None:
    """The largest tensor that it makes is smaller than the repeated keys."""
    q, k, v = randn(1, 1, 8, 1, 16), randn(2, 1, 2, 500, 16), randn(3, 1, 2, 500, 16)
    with torch.profiler.profile(profile_memory=True) as profile:
        grouped_query.grouped_attention(q, k, v)
    largest = max(event.self_cpu_memory_usage for event in profile.key_averages())
    assert largest < grouped_query.repeat_kv(k, 4).nbytes


@pytest.mark.parametrize("n_kv_heads", GROUPS)
def test_the_layer_equals_multi_head_attention_of_torch_with_repeated_weights(n_kv_heads: int) -> None:
    torch.manual_seed(0)
    ours = GroupedQueryAttention(D, H, n_kv_heads).double()
    theirs = nn.MultiheadAttention(D, H, batch_first=True).double()

    def repeated(weight: Tensor) -> Tensor:
        return weight.unflatten(0, (n_kv_heads, HEAD_DIM)).repeat_interleave(H // n_kv_heads, 0).flatten(0, 1)

    parts = [ours.q_proj, ours.k_proj, ours.v_proj]
    with torch.no_grad():
        for name in ("weight", "bias"):
            q, k, v = (getattr(part, name) for part in parts)
            getattr(theirs, f"in_proj_{name}").copy_(torch.cat([q, repeated(k), repeated(v)]))
        theirs.out_proj.load_state_dict(ours.o_proj.state_dict())
    x, mask = randn(4, B, L, D), causal_mask(L)
    their_output, their_weights = theirs(x, x, x, attn_mask=~mask, average_attn_weights=False)
    assert_same_gradients(ours(x, mask), their_output, [x])
    torch.testing.assert_close(ours.weights(x, mask), their_weights)


def test_as_many_key_value_heads_as_heads_is_multi_head_attention() -> None:
    torch.manual_seed(0)
    ours, theirs = GroupedQueryAttention(D, H, H).double(), multihead.MultiHeadAttention(D, H).double()
    theirs.load_state_dict(ours.state_dict())
    x = randn(4, B, L, D)
    output, weights = theirs(x, x, x)
    assert_same_gradients(ours(x), output, [x])
    torch.testing.assert_close(ours.weights(x), weights)


def test_a_key_value_head_reaches_the_heads_of_its_group_only() -> None:
    layer, x = GroupedQueryAttention(D, H, 2).double(), randn(4, B, L, D)
    before = layer.weights(x)
    with torch.no_grad():
        layer.k_proj.weight[:HEAD_DIM] += 1
    moved = (layer.weights(x) - before).abs().amax(dim=(0, 2, 3)) > 1e-6
    assert moved.tolist() == [True] * 4 + [False] * 4


@pytest.mark.parametrize(("d_model", "n_heads", "n_kv_heads"), [(24, 5, 5), (24, 8, 3), (24, 6, 4)])
def test_sizes_that_cannot_be_cut_get_a_sentence(d_model: int, n_heads: int, n_kv_heads: int) -> None:
    with pytest.raises(ValueError, match="must divide"):
        GroupedQueryAttention(d_model, n_heads, n_kv_heads)


# ----- the cache ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [[7], [1] * 7, [4, 1, 1, 1], [3, 2, 2], [1, 6]])
@pytest.mark.parametrize("n_kv_heads", GROUPS)
@torch.no_grad()
def test_a_cache_changes_no_number(n_kv_heads: int, chunks: list[int]) -> None:
    torch.manual_seed(0)
    layer, x, cache = GroupedQueryAttention(D, H, n_kv_heads).double(), randn(4, B, 7, D), KVCache()
    outputs = [
        layer(part, causal_mask(part.shape[1], len(cache) + part.shape[1]), cache)
        for part in x.split(chunks, 1)
    ]
    torch.testing.assert_close(torch.cat(outputs, dim=1), layer(x, causal_mask(7)))
    assert cache.length == 7


def test_the_cache_returns_all_and_leaves_what_it_has_returned() -> None:
    cache, parts = KVCache(), [randn(n, B, 2, n, HEAD_DIM).detach() for n in (3, 1, 1, 4, 1)]
    returned = [cache.append(part, -part) for part in parts]
    for number, (keys, values) in enumerate(returned, 1):
        assert torch.equal(keys, torch.cat(parts[:number], dim=2))
        assert torch.equal(values, -keys)


def test_the_cache_counts_the_bytes_of_real_tensors() -> None:
    for dtype, size in ((torch.float16, 2), (torch.float32, 4)):
        cache = KVCache()
        assert (cache.length, cache.nbytes, bool(cache)) == (0, 0, False)
        for _ in range(5):
            keys, values = cache.append(*(torch.zeros(B, 2, 3, HEAD_DIM, dtype=dtype) for _ in range(2)))
            expected = keys.numel() * keys.element_size() + values.numel() * values.element_size()
            assert cache.nbytes == expected
            assert cache.nbytes == grouped_query.cache_bytes(1, 2, HEAD_DIM, cache.length, B, size)


def test_a_token_costs_a_constant_number_of_copies_on_the_average() -> None:
    cache, new, places = KVCache(), torch.zeros(1, 1, 1, 1), []
    for _ in range(1000):
        cache.append(new, new)
        places.append(cache._room[0].shape[2])
    assert sum(a for a, b in zip([0, *places], places, strict=False) if a != b) < 2 * 1000
    assert places[-1] < 2 * 1000


def model_of(n_kv_heads: int, seed: int = 0) -> TokenModel:
    torch.manual_seed(seed)
    return TokenModel(11, D, H, n_kv_heads, n_layers=2, max_length=20).double()


@torch.no_grad()
def without_cache(model: TokenModel, tokens: Tensor, n_new: int) -> Tensor:
    for _ in range(n_new):
        length = tokens.shape[1]
        logits = model(tokens, torch.arange(length), causal_mask(length))
        tokens = torch.cat([tokens, logits[:, -1:].argmax(dim=-1)], dim=1)
    return tokens


@pytest.mark.parametrize("length", [1, 6])
@pytest.mark.parametrize("n_kv_heads", GROUPS)
def test_decoding_with_a_cache_writes_what_decoding_without_writes(n_kv_heads: int, length: int) -> None:
    different = 0
    for seed in range(4):
        model = model_of(n_kv_heads, seed)
        prompt = torch.randint(11, (B, length), generator=torch.Generator().manual_seed(seed))
        found = grouped_query.decode(model, prompt, 9)
        assert torch.equal(found, without_cache(model, prompt, 9))
        assert torch.equal(found[:, :length], prompt)
        different += len(found[:, length:].unique())
    assert different > 8  # not one token for ever
    assert torch.equal(grouped_query.decode(model_of(1), prompt, 0), prompt)


def test_decoding_reads_every_token_once() -> None:
    model, seen = model_of(2), []

    class Watched(nn.Module):
        new_cache = staticmethod(model.new_cache)

        def forward(self, tokens: Tensor, positions: Tensor, mask: Any, cache: Any) -> Tensor:
            seen.append(positions.tolist())
            result: Tensor = model(tokens, positions, mask, cache)
            return result

    grouped_query.decode(Watched(), torch.tensor([[1, 2, 3]]), 4)
    assert seen == [[0, 1, 2], [3], [4], [5]]


# ----- a latent cache ------------------------------------------------------------------------------------


def latent_attention(latent_dim: int = 10) -> grouped_query.LatentAttention:
    torch.manual_seed(0)
    return grouped_query.LatentAttention(D, H, latent_dim, rotary_dim=4).double()


@pytest.mark.parametrize("mask", [None, causal_mask(L)])
def test_the_absorbed_projections_change_no_number(mask: Tensor | None) -> None:
    layer, x, places = latent_attention(), randn(4, B, L, D), torch.arange(L)
    assert_same_gradients(
        layer.absorbed(x, places, mask), layer(x, places, mask), [x, *list(layer.parameters())]
    )


def test_latent_attention_is_multi_head_attention_with_keys_of_two_parts() -> None:
    layer, x, places, mask = latent_attention(), randn(4, B, L, D), torch.arange(L), causal_mask(L)
    latent, rotary_key = layer.kept(x, places)
    assert (latent.shape, rotary_key.shape) == ((B, L, 10), (B, L, 4))
    rotary_query = positions.apply_rope(multihead.split_heads(layer.q_rotary(x), H), places)
    query = torch.cat([multihead.split_heads(layer.q_proj(x), H), rotary_query], dim=-1)
    shared = rotary_key.unsqueeze(1).expand(-1, H, -1, -1)
    key = torch.cat([multihead.split_heads(layer.k_up(latent), H), shared], dim=-1)
    value = multihead.split_heads(layer.v_up(latent), H)
    theirs = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(layer(x, places, mask), layer.o_proj(multihead.merge_heads(theirs)))


def test_rotated_scores_depend_on_the_distance_only() -> None:
    layer, x, mask = latent_attention(), randn(4, B, L, D), causal_mask(L)
    near = layer(x, torch.arange(L), mask)
    torch.testing.assert_close(layer(x, torch.arange(L) + 100, mask), near)
    assert not torch.allclose(layer(x, 3 * torch.arange(L), mask), near)


# ----- the arithmetic -----------------------------------------------------------------------------------


def test_merging_weights_takes_the_mean_of_each_group() -> None:
    weight = randn(5, D, 6)
    merged = grouped_query.mha_to_gqa(weight, H, 2)
    heads = weight.reshape(H, HEAD_DIM, 6)
    torch.testing.assert_close(merged, torch.cat([heads[:4].mean(0), heads[4:].mean(0)]))
    torch.testing.assert_close(grouped_query.mha_to_gqa(weight, H, H), weight)
    bias = randn(6, D)
    torch.testing.assert_close(grouped_query.mha_to_gqa(bias, H, 1), bias.reshape(H, HEAD_DIM).mean(0))


def test_merging_heads_that_are_alike_changes_nothing() -> None:
    torch.manual_seed(0)
    grouped, full = GroupedQueryAttention(D, H, 2).double(), GroupedQueryAttention(D, H, H).double()
    state = grouped.state_dict()
    for name in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
        rows = state[name].unflatten(0, (2, HEAD_DIM)).repeat_interleave(4, 0).flatten(0, 1)
        torch.testing.assert_close(grouped_query.mha_to_gqa(rows, H, 2), state[name])
        state = {**state, name: rows}
    full.load_state_dict(state)
    x = randn(4, B, L, D)
    torch.testing.assert_close(full(x), grouped(x))


@pytest.mark.parametrize(("rows", "n_heads", "n_kv_heads"), [(24, 5, 1), (24, 8, 3), (24, 2, 4)])
def test_weights_that_cannot_be_merged_get_a_sentence(rows: int, n_heads: int, n_kv_heads: int) -> None:
    with pytest.raises(ValueError, match="must divide"):
        grouped_query.mha_to_gqa(torch.zeros(rows, 3), n_heads, n_kv_heads)


# Layers, key-value heads, head size; bytes of a token in 16 bits, from the models' published configurations.
@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((32, 32, 128), 512 * 1024), ((32, 8, 128), 128 * 1024), ((80, 8, 128), 320 * 1024)],
)
def test_bytes_of_a_token_in_known_models(sizes: tuple[int, int, int], expected: int) -> None:
    assert grouped_query.cache_bytes(*sizes, length=1) == expected
    assert grouped_query.cache_bytes(*sizes, length=10, batch=3, bytes_per_value=1) == 15 * expected


# ----- the task -----------------------------------------------------------------------------------------


def test_the_attributes_task_asks_for_attributes_of_four_items() -> None:
    values, asked, targets = attributes_task(
        200, n_items=6, n_attributes=3, n_values=5, generator=torch.Generator()
    )
    assert (values.shape, asked.shape, targets.shape) == ((200, 6, 3), (200, 3), (200, 3))
    assert values.unique().tolist() == list(range(5))
    for n in range(200):
        assert len(set(asked[n].tolist())) == 3
        for attribute in range(3):
            assert targets[n, attribute] == values[n, asked[n, attribute], attribute]
    with pytest.raises(ValueError, match=re.escape("at least as many items")):
        attributes_task(3, n_items=2, n_attributes=3)
