"""Multi-head attention against torch with copied weights, values and gradients, and by its properties."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dianlib import multihead
from dianlib.data import lookup_task

# Not one of these numbers is 1, and no two are equal where they could be exchanged.
B, Q, S, D, H = 3, 5, 7, 24, 8
CAUSAL = torch.ones(S, S, dtype=torch.bool).tril()
PADDING = (torch.arange(S) < torch.tensor([[7], [2], [5]]))[:, None, None, :]


def randn(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def pair(width: int = D, n_heads: int = H) -> tuple[multihead.MultiHeadAttention, nn.MultiheadAttention]:
    """Make our layer, and torch's with the same weights; the biases are not zero."""
    torch.manual_seed(0)
    ours = multihead.MultiHeadAttention(width, n_heads).double()
    theirs = nn.MultiheadAttention(width, n_heads, batch_first=True).double()
    layers = (ours.q_proj, ours.k_proj, ours.v_proj)
    with torch.no_grad():
        for layer in layers[:2]:
            layer.weight.mul_(3)  # uneven attention
        theirs.in_proj_weight.copy_(torch.cat([layer.weight for layer in layers]))
        theirs.in_proj_bias.copy_(torch.cat([layer.bias for layer in layers]))
        theirs.out_proj.weight.copy_(ours.o_proj.weight)
        theirs.out_proj.bias.copy_(ours.o_proj.bias)
    return ours, theirs


def gradients(results: tuple[Tensor, ...], wanted: list[Tensor]) -> list[Tensor]:
    """Differentiate an uneven sum of all results."""
    total = torch.stack(
        [(part * randn(90 + i, *part.shape).detach()).sum() for i, part in enumerate(results)]
    )
    return list(torch.autograd.grad(total.sum(), wanted))


@pytest.mark.parametrize("kind", ["cross", "self", "causal", "padding"])
def test_the_module_equals_torch(kind: str) -> None:
    ours, theirs = pair()
    n_queries = Q if kind in ("cross", "padding") else S
    query, key, value = randn(1, B, n_queries, D), randn(2, B, S, D), randn(3, B, S, D)
    mask = {"causal": CAUSAL, "padding": PADDING}.get(kind)
    options: dict[str, Any] = {}  # torch's masks are True where attention is forbidden
    if kind == "causal":
        options = {"attn_mask": ~CAUSAL}
    elif kind == "padding":
        options = {"key_padding_mask": ~PADDING[:, 0, 0]}
    got = ours(query, key, value, mask)
    wanted = theirs(query, key, value, average_attn_weights=False, **options)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
    our_parameters, their_parameters = list(ours.parameters()), list(theirs.parameters())
    of_ours = gradients(got, [query, key, value, *our_parameters])
    of_theirs = gradients(wanted, [query, key, value, *their_parameters])
    for a, b in zip(of_ours[:3], of_theirs[:3], strict=True):
        torch.testing.assert_close(a, b)
    # torch keeps the three matrices below one another, and the three biases.
    torch.testing.assert_close(torch.cat(of_ours[3:9:2]), of_theirs[3])
    torch.testing.assert_close(torch.cat(of_ours[4:9:2]), of_theirs[4])
    for a, b in zip(of_ours[9:], of_theirs[5:], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("mask", [None, CAUSAL, PADDING, CAUSAL & PADDING])
def test_the_fused_kernel_gives_the_same_output(mask: Tensor | None) -> None:
    ours, _ = pair()
    x = randn(1, B, S, D)
    with_weights, weights = ours(x, x, x, mask)
    without, none = ours(x, x, x, mask, need_weights=False)
    assert weights is not None
    assert none is None
    torch.testing.assert_close(with_weights, without)
    wanted = [x, *ours.parameters()]
    for a, b in zip(gradients((with_weights,), wanted), gradients((without,), wanted), strict=True):
        torch.testing.assert_close(a, b)


def test_the_module_is_the_formula_of_the_paper() -> None:
    """Vaswani et al. 2017, section 3.2.2: a matrix (D, d) for each head, heads side by side, times W^O."""
    ours, _ = pair()
    x = randn(1, B, S, D)
    d = D // H
    heads = []
    for h in range(H):
        rows = slice(h * d, (h + 1) * d)
        q, k, v = (
            F.linear(x, layer.weight[rows], layer.bias[rows])
            for layer in (ours.q_proj, ours.k_proj, ours.v_proj)
        )
        heads.append(F.scaled_dot_product_attention(q, k, v))
    torch.testing.assert_close(ours(x, x, x)[0], ours.o_proj(torch.cat(heads, dim=-1)))


def test_rows_of_weights_sum_to_one_and_no_forbidden_key_has_any() -> None:
    ours, _ = pair()
    query, x = randn(1, B, Q, D), randn(2, B, S, D)
    _, weights = ours(query, x, x, PADDING)
    assert weights.shape == (B, H, Q, S)
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, H, Q).double())
    assert (weights.masked_select(~PADDING) == 0).all()


def test_a_query_that_may_attend_to_nothing_gets_the_bias_alone() -> None:
    ours, _ = pair()
    x = randn(1, B, S, D)
    mask = torch.ones(S, S, dtype=torch.bool)
    mask[2] = False
    for need_weights in (True, False):
        output, _ = ours(x, x, x, mask, need_weights=need_weights)
        torch.testing.assert_close(output[:, 2], ours.o_proj.bias.expand(B, D))
        assert torch.autograd.grad(output.sum(), x)[0].isfinite().all()


def test_attention_has_no_order_of_its_own() -> None:
    ours, _ = pair()
    x, order = randn(1, B, S, D), torch.tensor([3, 0, 6, 2, 5, 1, 4])
    output, weights = ours(x, x, x)
    moved, moved_weights = ours(x[:, order], x[:, order], x[:, order])
    torch.testing.assert_close(moved, output[:, order])
    torch.testing.assert_close(moved_weights, weights[:, :, order][:, :, :, order])


def test_heads_may_be_renumbered() -> None:
    ours, _ = pair()
    renumbered, _ = pair()
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    places = torch.arange(D).reshape(H, -1)[order].flatten()
    with torch.no_grad():
        for layer in (renumbered.q_proj, renumbered.k_proj, renumbered.v_proj):
            layer.weight.copy_(layer.weight[places])
            layer.bias.copy_(layer.bias[places])
        renumbered.o_proj.weight.copy_(renumbered.o_proj.weight[:, places])
    x = randn(1, B, S, D)
    torch.testing.assert_close(renumbered(x, x, x)[0], ours(x, x, x)[0])
    torch.testing.assert_close(renumbered(x, x, x)[1], ours(x, x, x)[1][:, order])


def test_every_head_reads_the_whole_token() -> None:
    ours, _ = pair()
    x, changed = randn(1, B, S, D).detach(), randn(1, B, S, D).detach()
    changed[:, :, : D // H] += 1
    difference = (ours(x, x, x)[1] - ours(changed, changed, changed)[1]).abs().amax(dim=(0, 2, 3))
    assert (difference > 1e-3).all()


def test_split_and_merge() -> None:
    x = torch.arange(float(B * S * D)).reshape(B, S, D)
    heads = multihead.split_heads(x, H)
    assert heads.shape == (B, H, S, D // H)
    for b, h, t, i in ((0, 0, 0, 0), (2, 7, 6, 2), (1, 3, 4, 1)):
        assert heads[b, h, t, i] == x[b, t, h * (D // H) + i]
    assert torch.equal(multihead.merge_heads(heads), x)
    # The heads of torch's own layer are cut in the same way.
    assert torch.equal(heads, x.view(B, S, H, D // H).transpose(1, 2))
    assert torch.equal(multihead.split_heads(x[0], H), heads[0])


@pytest.mark.parametrize(
    "call",
    [
        lambda: multihead.split_heads(torch.zeros(1, 2, 10), 4),
        lambda: multihead.MultiHeadAttention(10, 4),
        lambda: multihead.parameter_count(10, 4),
    ],
)
def test_a_width_that_cannot_be_cut_gets_a_sentence(call: Any) -> None:
    with pytest.raises(ValueError, match="a width of 10 cannot be cut in 4 equal heads"):
        call()


@pytest.mark.parametrize(("width", "n_heads"), [(4, 2), (24, 8), (256, 8), (7, 1)])
def test_parameters_are_counted_as_torch_counts_them(width: int, n_heads: int) -> None:
    for layer in pair(width, n_heads):
        assert sum(p.numel() for p in layer.parameters()) == multihead.parameter_count(width, n_heads)


def test_the_contributions_of_the_heads_add_up() -> None:
    ours, _ = pair()
    heads = randn(1, B, H, S, D // H)
    weight, bias = ours.o_proj.weight, ours.o_proj.bias
    found = multihead.head_contributions(heads, weight)
    assert found.shape == (B, H, S, D)
    together = ours.o_proj(multihead.merge_heads(heads))
    torch.testing.assert_close(found.sum(dim=1) + bias, together)
    # A head that is silenced takes its contribution with it, and nothing else.
    silenced = heads.clone()
    silenced[:, 3] = 0
    without = ours.o_proj(multihead.merge_heads(silenced))
    torch.testing.assert_close(together - without, found[:, 3])


def test_head_distances() -> None:
    weights = randn(1, B, H, Q, S).softmax(-1)
    found = multihead.head_distances(weights)
    assert found.shape == (H, H)
    assert torch.equal(found.diagonal(), torch.zeros(H).double())
    torch.testing.assert_close(found, found.T)
    assert ((found >= 0) & (found <= 1)).all()
    # What is moved is the part of one row that lies above the other.
    above = (weights[:, 2] - weights[:, 5]).clamp(min=0).sum(-1).mean()
    torch.testing.assert_close(found[2, 5], above)
    same = weights[:, :1].expand_as(weights)
    torch.testing.assert_close(multihead.head_distances(same), torch.zeros(H, H).double())
    apart = torch.eye(4)[:, None].expand(4, 3, 4)[None]
    torch.testing.assert_close(multihead.head_distances(apart), 1 - torch.eye(4))


def test_the_lookup_task_asks_for_what_stands_in_the_list() -> None:
    generator = torch.Generator().manual_seed(0)
    questions, items, targets = lookup_task(400, 5, 6, 3, 7, generator=generator)
    assert questions.shape == (400, 5, 3 * 6)
    assert items.shape == (400, 6, 6 + 3 * 7)
    assert targets.shape == (400, 5, 3)
    assert torch.equal(items[:, :, :6].argmax(-1), torch.arange(6).expand(400, 6))
    names = questions.unflatten(-1, (3, 6))
    fields = items[:, :, 6:].unflatten(-1, (3, 7))
    assert (names.sum(-1) == 1).all()
    assert (fields.sum(-1) == 1).all()
    for field in range(3):
        looked_up = torch.gather(fields[:, :, field].argmax(-1), 1, names[:, :, field].argmax(-1))
        assert torch.equal(looked_up, targets[:, :, field])
    shares = torch.bincount(targets.flatten(), minlength=7) / targets.numel()
    assert (shares - 1 / 7).abs().max() < 0.02
    again = lookup_task(400, 5, 6, 3, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again[1], items)
    with pytest.raises(ValueError, match="at least 1"):
        lookup_task(3, n_fields=0)
