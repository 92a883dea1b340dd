"""Multi-head attention: the width is cut in heads, each head attends for itself, and they are joined.

Letters: B samples, L tokens or queries, S keys, D the width of the model, H heads of d = D / H numbers.
Source: Vaswani et al. 2017, section 3.2.2.
"""

import torch
from torch import Tensor, nn

from dianlib.attention import scaled_dot_product_attention


def split_heads(x: Tensor, n_heads: int) -> Tensor:
    """Cut the width in heads: (B, L, D) -> (B, H, L, d).

    Head h gets the columns h d to (h + 1) d - 1. Raises ValueError when the width cannot be
    cut in ``n_heads`` equal parts.
    """
    if x.shape[-1] % n_heads:
        raise ValueError(f"a width of {x.shape[-1]} cannot be cut in {n_heads} equal heads.")
    *rest, width = x.shape
    return x.reshape(*rest, n_heads, width // n_heads).transpose(-3, -2)


def merge_heads(x: Tensor) -> Tensor:
    """Lay the heads side by side: (B, H, L, d) -> (B, L, H d). It undoes ``split_heads``."""
    return x.transpose(-3, -2).flatten(-2)


class MultiHeadAttention(nn.Module):
    """Attend with H heads: query (B, L, D), key and value (B, S, D).

    Returns the output (B, L, D) and the weights (B, H, L, S). ``mask`` is bool, broadcasts
    to the weights, and is True where a query may attend. Without ``need_weights`` torch's
    fused kernel does the work, and the weights are None.
    """

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"a width of {d_model} cannot be cut in {n_heads} equal heads.")
        self.n_heads = n_heads
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_model)
        self.o_proj = nn.Linear(d_model, d_model)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        *,
        need_weights: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        q = split_heads(self.q_proj(query), self.n_heads)
        k = split_heads(self.k_proj(key), self.n_heads)
        v = split_heads(self.v_proj(value), self.n_heads)
        output, weights = scaled_dot_product_attention(q, k, v, mask, need_weights=need_weights)
        return self.o_proj(merge_heads(output)), weights


def parameter_count(d_model: int, n_heads: int) -> int:
    """Count the numbers of four square projections with bias; the number of heads does not change it.

    Raises ValueError when the width cannot be cut in ``n_heads`` equal parts.
    """
    if d_model % n_heads:
        raise ValueError(f"a width of {d_model} cannot be cut in {n_heads} equal heads.")
    return 4 * (d_model * d_model + d_model)


def head_contributions(heads: Tensor, o_weight: Tensor) -> Tensor:
    """Write the output as a sum over heads: heads (B, H, L, d), o_weight (D, H d) -> (B, H, L, D).

    ``o_weight`` is stored as in nn.Linear, so head h owns its columns h d to (h + 1) d - 1. The sum over
    the heads, plus the bias, is what ``o_proj`` returns.
    """
    _, n_heads, _, head_dim = heads.shape
    blocks = o_weight.unflatten(1, (n_heads, head_dim))  # (D, H, d)
    return torch.einsum("bhld,nhd->bhln", heads, blocks)


def head_distances(weights: Tensor) -> Tensor:
    """Say how differently heads look: weights (B, H, L, S) -> (H, H), from 0, the same, to 1, disjoint.

    The distance of two rows of weights is half the sum of their absolute differences (total variation):
    the share of attention that one head would have to move to look like the other. It is averaged over
    samples and queries.
    """
    difference = weights.unsqueeze(2) - weights.unsqueeze(1)  # (B, H, H, L, S)
    return difference.abs().sum(dim=-1).mean(dim=(0, 3)) / 2
