"""Scaled dot-product attention and its masks.

Letters: B sequences in a batch; L tokens of D numbers, or L queries where there are S keys; d numbers in a
query or key, v in a value; dots stand for any leading dimensions. A mask is True where a query may attend.
Source: Vaswani et al. 2017, section 3.2.1.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def attention_one_query(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Look up one query: (d,), keys (S, d), values (S, v) -> (v,)."""
    scores = torch.stack([query @ key for key in keys]) / math.sqrt(len(query))
    weights = scores.softmax(dim=0)
    return torch.stack([weight * value for weight, value in zip(weights, values, strict=True)]).sum(dim=0)


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, need_weights: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Look up all queries: (..., L, d), (..., S, d), (..., S, v) -> output (..., L, v), weights (..., L, S).

    ``mask`` is bool and broadcasts to the weights. A query that may attend to nothing gets weights and an
    output of 0. Without ``need_weights`` torch's fused kernel does the work, and the weights are None.
    """
    if not need_weights:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask), None
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    if mask is not None:
        # The lowest number, not -inf: the softmax of a row of only -inf is NaN.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1)
    if mask is not None:
        weights = weights.masked_fill(~mask, 0.0)
    return weights @ value, weights


def self_attention(
    x: Tensor, w_query: Tensor, w_key: Tensor, w_value: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Let tokens look each other up: x (..., L, D) -> output (..., L, v), weights (..., L, L).

    The matrices make queries, keys and values of the same tokens: (D, d), (D, d) and (D, v).
    """
    return scaled_dot_product_attention(x @ w_query, x @ w_key, x @ w_value, mask)


def causal_mask(n_queries: int, n_keys: int | None = None) -> Tensor:
    """Let each query see its own place and all before it: -> (n_queries, n_keys) bool, True = may attend.

    The queries are the last ones of the keys, as when earlier keys come from a cache. Raises ValueError
    for fewer keys than queries.
    """
    n_keys = n_queries if n_keys is None else n_keys
    if n_keys < n_queries:
        raise ValueError(f"{n_queries} queries cannot be the last of {n_keys} keys.")
    return torch.ones(n_queries, n_keys, dtype=torch.bool).tril(n_keys - n_queries)


def padding_mask(lengths: Tensor, max_length: int) -> Tensor:
    """Let all queries see the real tokens only: lengths (B,) int64 -> (B, 1, 1, max_length) bool."""
    places = torch.arange(max_length, device=lengths.device)
    return (places < lengths.unsqueeze(1))[:, None, None, :]
