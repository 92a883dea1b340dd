"""Attention against torch and against scalars, values and gradients, and by its properties."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dianlib.attention import (
    attention_one_query,
    causal_mask,
    padding_mask,
    scaled_dot_product_attention,
    self_attention,
)

B, H, Q, S, d, V = 3, 2, 5, 7, 4, 6


def randn(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def arguments(*lead: int) -> tuple[Tensor, Tensor, Tensor]:
    return randn(0, *lead, Q, d), randn(1, *lead, S, d), randn(2, *lead, S, V)


MASKS = {
    "none": None,
    "causal": causal_mask(Q, S),
    "padding": padding_mask(torch.tensor([7, 2, 4]), S),
    "both": padding_mask(torch.tensor([7, 2, 4]), S) & causal_mask(Q, S),
    "nothing for some": torch.arange(S) < torch.tensor([3, 0, 7, 1, 0]).unsqueeze(1),
}


def assert_same_with_gradients(ours: Tensor, theirs: Tensor, wanted: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(ours, theirs)
    uneven = randn(99, *ours.shape).detach()
    for a, b in zip(
        torch.autograd.grad((ours * uneven).sum(), wanted),
        torch.autograd.grad((theirs * uneven).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


# ----- against torch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_equals_torch_values_and_gradients(name: str, need_weights: bool) -> None:
    inputs = arguments(B, H)
    output, weights = scaled_dot_product_attention(*inputs, MASKS[name], need_weights=need_weights)
    assert (weights is not None) == need_weights
    theirs = F.scaled_dot_product_attention(*inputs, attn_mask=MASKS[name])
    assert_same_with_gradients(output, theirs, inputs)


@pytest.mark.parametrize("lead", [(), (3,), (2, 1, 3)])
def test_any_leading_dimensions(lead: tuple[int, ...]) -> None:
    query, key, value = arguments(*lead)
    output, weights = scaled_dot_product_attention(query, key, value)
    assert weights is not None
    assert output.shape == (*lead, Q, V)
    assert weights.shape == (*lead, Q, S)
    torch.testing.assert_close(output, F.scaled_dot_product_attention(query, key, value))


def test_the_weights_are_those_of_torchs_own_layer() -> None:
    torch.manual_seed(0)
    layer = torch.nn.MultiheadAttention(d, 1, bias=False, batch_first=True).double()
    x, y = randn(3, B, Q, d), randn(4, B, S, d)
    w_query, w_key, w_value = (w.T for w in layer.in_proj_weight.chunk(3))
    mask = causal_mask(Q, S)
    output, weights = scaled_dot_product_attention(x @ w_query, y @ w_key, y @ w_value, mask)
    theirs, their_weights = layer(x, y, y, attn_mask=~mask)  # there True means hidden
    torch.testing.assert_close(weights, their_weights)
    torch.testing.assert_close(layer.out_proj(output), theirs)


def test_one_query_equals_a_row_of_the_matrices_values_and_gradients() -> None:
    query, key, value = arguments()
    one_by_one = torch.stack([attention_one_query(q, key, value) for q in query])
    assert_same_with_gradients(
        one_by_one, F.scaled_dot_product_attention(query, key, value), (query, key, value)
    )


def test_self_attention_projects_and_attends() -> None:
    x, w_query, w_key, w_value = randn(0, B, Q, 8), randn(1, 8, d), randn(2, 8, d), randn(3, 8, V)
    output, weights = self_attention(x, w_query, w_key, w_value, causal_mask(Q))
    theirs = F.scaled_dot_product_attention(x @ w_query, x @ w_key, x @ w_value, is_causal=True)
    assert_same_with_gradients(output, theirs, (x, w_query, w_key, w_value))
    assert weights is not None
    assert weights.shape == (B, Q, Q)


def test_one_weight_by_hand() -> None:
    """Scores 2 log 3 and 0 over the root of 4: the weights are 3/4 and 1/4."""
    query, keys = torch.tensor([math.log(9), 0, 0, 0]), torch.eye(4)[:2]
    values = torch.tensor([[4.0], [8.0]])
    torch.testing.assert_close(attention_one_query(query, keys, values), torch.tensor([5.0]))


# ----- properties ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MASKS)
def test_rows_sum_to_one_or_to_nothing_and_hidden_keys_have_exactly_no_weight(name: str) -> None:
    mask = MASKS[name]
    _, weights = scaled_dot_product_attention(*arguments(B, H), mask)
    assert weights is not None
    allowed = torch.ones(B, H, Q, S, dtype=torch.bool) if mask is None else mask.expand(B, H, Q, S)
    torch.testing.assert_close(weights.sum(-1), allowed.any(-1).double())
    assert (weights[~allowed] == 0).all()
    assert (weights[allowed] > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("need_weights", [True, False])
def test_a_query_with_nothing_to_look_at_gets_zeros_and_no_nan(
    dtype: torch.dtype, need_weights: bool
) -> None:
    inputs = [t.detach().to(dtype).requires_grad_() for t in arguments(B, H)]
    output, _ = scaled_dot_product_attention(*inputs, MASKS["nothing for some"], need_weights=need_weights)
    assert (output[:, :, [1, 4]] == 0).all()
    for gradient in torch.autograd.grad(output.square().sum(), inputs):
        assert gradient.isfinite().all()


def test_gradients_beside_an_empty_row_are_those_of_small_steps() -> None:
    mask = MASKS["nothing for some"]
    assert torch.autograd.gradcheck(
        lambda *args: scaled_dot_product_attention(*args, mask)[0], arguments(1, 1)
    )


def test_the_future_does_not_reach_the_past() -> None:
    x, *matrices = randn(0, B, Q, 8).detach(), randn(1, 8, d), randn(2, 8, d), randn(3, 8, V)
    changed = x.clone()
    changed[:, 3] += 1
    before, after = (self_attention(tokens, *matrices, causal_mask(Q))[0] for tokens in (x, changed))
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3:], after[:, 3:])


def test_what_stands_at_padding_changes_nothing() -> None:
    query, key, value = arguments(B, H)
    hidden = ~MASKS["padding"].transpose(-2, -1)  # type: ignore[union-attr]
    before, _ = scaled_dot_product_attention(query, key, value, MASKS["padding"])
    after, _ = scaled_dot_product_attention(query, key + 100 * hidden, value + 100 * hidden, MASKS["padding"])
    torch.testing.assert_close(after, before)


def test_the_order_of_the_keys_is_not_seen_and_that_of_the_queries_is_kept() -> None:
    query, key, value = arguments(B)
    of_keys, of_queries = (torch.randperm(n, generator=torch.Generator().manual_seed(0)) for n in (S, Q))
    output, _ = scaled_dot_product_attention(query, key, value)
    turned, _ = scaled_dot_product_attention(query[:, of_queries], key[:, of_keys], value[:, of_keys])
    torch.testing.assert_close(turned, output[:, of_queries])


def test_a_constant_added_to_all_scores_of_a_query_changes_nothing() -> None:
    query, key, value = arguments()
    with_one = [torch.cat([t, torch.full((len(t), 1), 3.0).double()], dim=1) for t in (query, key)]
    rescaled = with_one[0] * math.sqrt(d + 1) / math.sqrt(d)
    torch.testing.assert_close(
        scaled_dot_product_attention(rescaled, with_one[1], value)[0],
        scaled_dot_product_attention(query, key, value)[0],
    )


# ----- masks ---------------------------------------------------------------------------------------------


def test_causal_mask_by_hand() -> None:
    assert causal_mask(3).int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert causal_mask(2, 4).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert causal_mask(1, 3).dtype == torch.bool


def test_causal_mask_is_the_end_of_the_square_one() -> None:
    assert torch.equal(causal_mask(2, 6), causal_mask(6)[-2:])
    from torch.nn.attention.bias import causal_lower_right

    query, key, value = arguments(B, H)
    torch.testing.assert_close(
        scaled_dot_product_attention(query, key, value, causal_mask(Q, S))[0],
        F.scaled_dot_product_attention(query, key, value, attn_mask=causal_lower_right(Q, S)),
    )


def test_fewer_keys_than_queries_get_a_sentence() -> None:
    with pytest.raises(ValueError, match="5 queries cannot be the last of 3 keys"):
        causal_mask(5, 3)


def test_padding_mask_by_hand() -> None:
    mask = padding_mask(torch.tensor([2, 0, 3]), 3)
    assert mask.shape == (3, 1, 1, 3)
    assert mask.dtype == torch.bool
    assert mask[:, 0, 0].int().tolist() == [[1, 1, 0], [0, 0, 0], [1, 1, 1]]
