"""The encodings against matrices, complex numbers and loops: values, gradients and properties."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dianlib import positions as pos
from dianlib.attention import causal_mask
from dianlib.data import order_task
from dianlib.multihead import merge_heads, split_heads

B, H, L, D = 3, 4, 7, 24
d = D // H


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


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


# ----- sinusoidal and learned ------------------------------------------------------------------------------


def test_the_waves_are_those_of_the_formula() -> None:
    table = pos.sinusoidal(11, 6)
    for place in range(11):
        for pair in range(3):
            angle = place / 10000 ** (2 * pair / 6)
            assert table[place, 2 * pair].item() == pytest.approx(math.sin(angle), abs=1e-12)
            assert table[place, 2 * pair + 1].item() == pytest.approx(math.cos(angle), abs=1e-12)


def test_the_product_of_two_places_depends_on_their_distance_only() -> None:
    table = pos.sinusoidal(50, 16)
    products = table @ table.T
    for distance in (0, 1, 5, 20):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    torch.testing.assert_close(products.diagonal(), torch.full((50,), 8.0))


def test_a_step_is_one_rotation_for_all_places() -> None:
    """The encoding of p + 3 is the same linear map of the encoding of p, whatever p is."""
    table = pos.sinusoidal(20, 8)
    step = torch.linalg.lstsq(table[:-3], table[3:]).solution
    torch.testing.assert_close(table[:-3] @ step, table[3:])


def test_learned_positions_are_an_embedding_of_the_place() -> None:
    torch.manual_seed(0)
    layer = pos.LearnedPositions(L, D)
    embedding = nn.Embedding.from_pretrained(layer.table.detach(), freeze=False)
    x = randn(1, B, L - 2, D)
    torch.testing.assert_close(layer(x), x + embedding(torch.arange(L - 2)))
    layer(x).sum().backward()
    assert layer.table.grad is not None
    assert (layer.table.grad[: L - 2] == B).all()
    assert (layer.table.grad[L - 2 :] == 0).all()
    with pytest.raises(ValueError, match="no vector for place 7; make the table longer"):
        layer(randn(1, B, L + 1, D))


# ----- rotary ----------------------------------------------------------------------------------------------


def test_frequencies_fall_from_one_in_equal_ratios() -> None:
    torch.testing.assert_close(pos.rope_frequencies(8), torch.tensor([1.0, 0.1, 0.01, 0.001]))
    torch.testing.assert_close(pos.rope_frequencies(4, base=100.0), torch.tensor([1.0, 0.1]))


def by_matrices(x: Tensor, places: Tensor) -> Tensor:
    """Rotate with a full matrix for each place, made by the exponential of its skew generator."""
    generator = torch.zeros(x.shape[-1], x.shape[-1])
    for pair in range(x.shape[-1] // 2):
        theta = 10000 ** (-2 * pair / x.shape[-1])
        generator[2 * pair + 1, 2 * pair], generator[2 * pair, 2 * pair + 1] = theta, -theta
    turns = torch.linalg.matrix_exp(places.double()[:, None, None] * generator)
    return torch.einsum("lij,...lj->...li", turns, x)


def by_complex_numbers(x: Tensor, places: Tensor) -> Tensor:
    numbers = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    theta = torch.tensor([10000 ** (-2 * i / x.shape[-1]) for i in range(x.shape[-1] // 2)])
    turns = torch.polar(torch.ones(len(places), len(theta)), torch.outer(places.double(), theta))
    return torch.view_as_real(numbers * turns).flatten(-2)


@pytest.mark.parametrize("oracle", [by_matrices, by_complex_numbers])
@pytest.mark.parametrize("shape", [(L, d), (B, L, d), (B, H, L, d)])
def test_apply_rope_equals_matrices_and_complex_numbers(
    oracle: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    places = torch.tensor([3, 0, 11, 4, 1, 90, 2])
    x = randn(1, *shape)
    assert_same_gradients(pos.apply_rope(x, places), oracle(x, places), [x])


def test_scores_depend_on_the_distance_and_lengths_stay() -> None:
    q, k = randn(1, d), randn(2, d)

    def score(m: int, n: int) -> Any:
        (rotated_q,), (rotated_k,) = (
            pos.apply_rope(vector[None], torch.tensor([place])) for vector, place in ((q, m), (k, n))
        )
        torch.testing.assert_close(rotated_q.norm(), q.norm())
        return rotated_q @ rotated_k

    torch.testing.assert_close(score(5, 2), score(105, 102))
    assert (score(5, 2) - score(5, 3)).abs() > 1e-3
    assert (score(5, 2) - score(2, 5)).abs() > 1e-3
    assert torch.equal(pos.apply_rope(q[None], torch.tensor([0]))[0], q)


def rotate_half_split(x: Tensor, places: Tensor) -> Tensor:
    """The convention of GPT-NeoX and of Llama in Transformers: pairs (i, i + d/2)."""
    angles = torch.outer(places.double(), pos.rope_frequencies(x.shape[-1]))
    cos, sin = (torch.cat([part, part], dim=-1) for part in (angles.cos(), angles.sin()))
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def test_reordered_projections_carry_one_convention_over_to_the_other() -> None:
    x, places = randn(1, B, L, D).detach(), torch.arange(L)
    w_q, w_k = randn(2, D, D), randn(3, D, D)  # (out, in), as in nn.Linear

    def scores(rotate: Callable[[Tensor, Tensor], Tensor], w_q: Tensor, w_k: Tensor) -> Tensor:
        q, k = (rotate(split_heads(x @ weight.T, H), places) for weight in (w_q, w_k))
        return q @ k.transpose(-2, -1)

    ours = scores(pos.apply_rope, pos.to_neighbours(w_q, H), pos.to_neighbours(w_k, H))
    assert_same_gradients(ours, scores(rotate_half_split, w_q, w_k), [w_q, w_k])
    assert (scores(pos.apply_rope, w_q, w_k) - ours).abs().max() > 1
    assert pos.to_neighbours(torch.arange(12), 2).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_rotary_attention_equals_the_fused_kernel_on_rotated_heads() -> None:
    x, weights = randn(1, B, L, D), [randn(seed, D, D) for seed in (2, 3, 4)]
    w_q, w_k, w_v = weights
    output, attention = pos.rotary_attention(x, w_q, w_k, w_v, H)
    q, k, v = (split_heads(x @ weight, H) for weight in weights)
    places = torch.arange(L)
    q, k = by_complex_numbers(q, places), by_complex_numbers(k, places)
    assert_same_gradients(output, merge_heads(F.scaled_dot_product_attention(q, k, v)), [x, *weights])
    torch.testing.assert_close(attention.sum(dim=-1), torch.ones(B, H, L))
    torch.testing.assert_close(merge_heads(attention @ v), output)


def test_low_precision_goes_in_and_comes_out_and_angles_keep_theirs() -> None:
    torch.set_default_dtype(torch.float32)
    x, places = randn(1, L, d).detach(), 1000 + torch.arange(L)
    low = pos.apply_rope(x.bfloat16(), places)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(
        low.float(), pos.apply_rope(x.bfloat16().float(), places), atol=0.02, rtol=0.01
    )


# ----- biases ----------------------------------------------------------------------------------------------


def test_slopes_are_the_published_ones() -> None:
    eight = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert pos.alibi_slopes(8).tolist() == eight
    sixteen = [2 ** (-(i + 1) / 2) for i in range(16)]
    torch.testing.assert_close(pos.alibi_slopes(16), torch.tensor(sixteen))
    # No power of two: eight of those above, and then the first, third, ... of sixteen.
    torch.testing.assert_close(pos.alibi_slopes(12), torch.tensor(eight + sixteen[0:8:2]))
    assert pos.alibi_slopes(1).tolist() == [2**-8]


def test_alibi_by_hand_and_with_a_cache() -> None:
    bias = pos.alibi_bias(8, 3, 3)
    assert bias.shape == (8, 3, 3)
    assert bias[0].tolist() == [[0, -0.5, -1], [-0.5, 0, -0.5], [-1, -0.5, 0]]
    torch.testing.assert_close(pos.alibi_bias(4, 2, 7), pos.alibi_bias(4, 7, 7)[:, -2:])


def test_under_a_causal_mask_only_the_key_matters() -> None:
    """The part of the query is one number for a row, and the softmax does not see it."""
    scores, mask = randn(1, H, L, L).detach(), causal_mask(L)
    by_key = pos.alibi_slopes(H)[:, None, None] * torch.arange(L)
    weights = [
        (scores + bias).masked_fill(~mask, -torch.inf).softmax(-1)
        for bias in (pos.alibi_bias(H, L, L), by_key)
    ]
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize(("n_queries", "reach"), [(L, 2), (3, 2), (L, 12), (1, 1), (L, 0)])
def test_relative_scores_equal_loops(n_queries: int, reach: int) -> None:
    query, key = randn(1, B, H, n_queries, d), randn(2, B, H, L, d)
    table = randn(3, 2 * reach + 1, d)
    rows = []
    for i in range(n_queries):
        for j in range(L):
            distance = max(-reach, min(reach, j - (L - n_queries + i)))
            rows.append((query[..., i, :] * (key[..., j, :] + table[reach + distance])).sum(-1) / d**0.5)
    wanted = torch.stack(rows, dim=-1).reshape(B, H, n_queries, L)
    assert_same_gradients(pos.relative_scores(query, key, table), wanted, [query, key, table])


# ----- order -----------------------------------------------------------------------------------------------


def test_only_positions_break_the_symmetry() -> None:
    x, weights = randn(1, B, L, D).detach(), [randn(seed, D, D).detach() for seed in (2, 3, 4)]
    order = torch.tensor([4, 0, 6, 2, 5, 1, 3])
    q, k, v = (split_heads(x @ weight, H) for weight in weights)
    blind = merge_heads(F.scaled_dot_product_attention(q, k, v))
    q, k, v = (split_heads(x[:, order] @ weight, H) for weight in weights)
    torch.testing.assert_close(merge_heads(F.scaled_dot_product_attention(q, k, v)), blind[:, order])
    w_q, w_k, w_v = weights
    seeing = [pos.rotary_attention(tokens, w_q, w_k, w_v, H)[0] for tokens in (x, x[:, order])]
    assert (seeing[1] - seeing[0][:, order]).abs().max() > 0.01


def test_two_symbols_of_the_order_task_are_marked_and_differ() -> None:
    inputs, marked = order_task(200, 6, generator=torch.Generator().manual_seed(0))
    assert inputs.shape == (200, 6, 9)
    assert (inputs[..., :8].sum(-1) == 1).all()
    for sequence, symbols in zip(inputs, marked, strict=True):
        places = sequence[:, 8].nonzero().flatten()
        assert sequence[places, :8].argmax(-1).tolist() == symbols.tolist()
    assert (marked[:, 0] != marked[:, 1]).all()
    assert (inputs[:, :-1, 8].sum(0) > 20).all()  # every place but the last is marked now and then
    assert (inputs[:, -1, 8] == 0).all()
    with pytest.raises(ValueError, match="length must be at least 3"):
        order_task(3, 2)


# ----- what cannot be done ---------------------------------------------------------------------------------


def test_bad_input_gets_a_sentence() -> None:
    with pytest.raises(ValueError, match="a width of 5 cannot be cut in pairs; take an even one"):
        pos.sinusoidal(4, 5)
    with pytest.raises(ValueError, match="a width of 3 cannot be cut in pairs"):
        pos.apply_rope(randn(1, 2, 3), torch.arange(2))
    with pytest.raises(ValueError, match="10 rows cannot be cut in 3 heads of an even width"):
        pos.to_neighbours(randn(1, 10, 4), 3)
