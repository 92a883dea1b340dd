"""Four ways to tell attention where a token stands: added waves, a learned table, rotation, and biases.

Letters: L places, or queries where there are S keys, D the width of the model, H heads of d = D / H; dots
stand for any leading dimensions. Where there are fewer queries than keys, the queries are the last ones,
as when earlier keys come from a cache.
"""

import math

import torch
from torch import Tensor, nn

from dianlib.attention import scaled_dot_product_attention
from dianlib.multihead import merge_heads, split_heads


def sinusoidal(length: int, d_model: int) -> Tensor:
    """Make waves to add to the tokens: -> (L, D), sines in the even columns, cosines in the odd ones.

    Columns 2i and 2i + 1 are a pair of one frequency, 10000^(-2i/D) (Vaswani et al. 2017, section 3.5).
    Raises ValueError for an odd width.
    """
    angles = torch.arange(length).unsqueeze(1) * rope_frequencies(d_model)  # (L, D/2)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


class LearnedPositions(nn.Module):
    """Add a trained vector for each place: (..., L, D) -> (..., L, D).

    Raises ValueError for a sequence that is longer than the table.
    """

    def __init__(self, max_length: int, d_model: int) -> None:
        super().__init__()
        self.table = nn.Parameter(0.02 * torch.randn(max_length, d_model))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2] > len(self.table):
            raise ValueError(f"there is no vector for place {len(self.table)}; make the table longer.")
        return x + self.table[: x.shape[-2]]


def rope_frequencies(head_dim: int, base: float = 10000.0) -> Tensor:
    """Return how far each pair turns from one place to the next, in radians: -> (d/2,), the fastest first.

    Pair i turns by base^(-2i/d) (Su et al. 2024, equation 15). Raises ValueError for an odd width.
    """
    if head_dim % 2:
        raise ValueError(f"a width of {head_dim} cannot be cut in pairs; take an even one.")
    return base ** -(torch.arange(0, head_dim, 2) / head_dim)


def rope_table(positions: Tensor, head_dim: int, base: float = 10000.0) -> Tensor:
    """Return all rotations as complex numbers e^(i angle): positions (L,) -> (L, d/2), for all layers."""
    angles = positions.unsqueeze(-1) * rope_frequencies(head_dim, base).to(positions.device)
    return torch.polar(torch.ones_like(angles), angles)


def rotate_pairs(x: Tensor, turns: Tensor) -> Tensor:
    """Turn each pair of neighbours (2i, 2i + 1) by its angle: (..., L, d), complex (L, d/2) -> (..., L, d).

    A pair (u, v) is the complex number u + iv, and a product turns it: on a processor faster than columns.
    """
    # Complex numbers need at least 32 bits for each part, and a pair side by side in memory.
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2)).contiguous()
    return torch.view_as_real(torch.view_as_complex(wide) * turns).flatten(-2).to(x.dtype)


def apply_rope(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """Rotate queries or keys by their places: x (..., L, d), positions (L,) -> (..., L, d).

    The pairs are neighbours, as in the paper (Su et al. 2024, section 3.2.2). Values are not rotated.
    Raises ValueError for an odd width.
    """
    return rotate_pairs(x, rope_table(positions, x.shape[-1], base))


def to_neighbours(weight: Tensor, n_heads: int) -> Tensor:
    """Reorder the rows of a projection, half-split pairs -> neighbours: (D, ...) -> (D, ...).

    A model trained with the pairs (i, i + d/2) gives the same scores with the pairs (2i, 2i + 1) when
    this is done to the weights (out, in), and biases, of the projections of queries and keys. Raises
    ValueError when the rows cannot be cut in ``n_heads`` heads of an even width.
    """
    n_rows = len(weight)
    if n_rows % (2 * n_heads):
        raise ValueError(f"{n_rows} rows cannot be cut in {n_heads} heads of an even width.")
    halves = weight.reshape(n_heads, 2, n_rows // n_heads // 2, -1)
    return halves.transpose(1, 2).reshape(weight.shape)


def rotary_attention(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, n_heads: int) -> tuple[Tensor, Tensor]:
    """Attend to all places with rotated queries and keys: (B, L, D) -> (B, L, D), weights (B, H, L, L).

    The weights w_q, w_k and w_v (D, D) act from the right. The places are 0 to L - 1.
    """
    q, k, v = (split_heads(x @ weight, n_heads) for weight in (w_q, w_k, w_v))
    positions = torch.arange(x.shape[1], device=x.device)
    output, weights = scaled_dot_product_attention(apply_rope(q, positions), apply_rope(k, positions), v)
    assert weights is not None  # they are asked for
    return merge_heads(output), weights


def alibi_slopes(n_heads: int) -> Tensor:
    """Return the slope of each head: -> (H,), 2^(-8/H), 2^(-16/H), ... (Press et al. 2022, section 3).

    Where H is no power of two, the slopes are those of the next smaller power, and then every other one of
    twice that power, as in the authors' program.
    """
    smaller = 2 ** int(math.log2(n_heads))
    slopes = torch.exp2(-8 * torch.arange(1, smaller + 1) / smaller)
    if smaller == n_heads:
        return slopes
    between = torch.exp2(-4 * torch.arange(1, 2 * smaller, 2) / smaller)
    return torch.cat([slopes, between[: n_heads - smaller]])


def distances(n_queries: int, n_keys: int) -> Tensor:
    """Return how many places each key stands after its query, negative before it: -> (L, S) int64."""
    places = torch.arange(n_keys)
    return places - places[n_keys - n_queries :].unsqueeze(1)


def alibi_bias(n_heads: int, n_queries: int, n_keys: int) -> Tensor:
    """Make a penalty for distance, to add to the scaled scores: -> (H, L, S), 0 or below.

    Head h loses its slope for every place between query and key, on both sides.
    """
    return alibi_slopes(n_heads)[:, None, None] * -distances(n_queries, n_keys).abs()


def relative_scores(query: Tensor, key: Tensor, table: Tensor) -> Tensor:
    """Score keys by content and by distance: (..., L, d), (..., S, d), table (2R + 1, d) -> (..., L, S).

    The score is query . (key + row) / sqrt(d), where the row R + r of the table belongs to a key that stands
    r places after the query (before it: r < 0), and distances beyond R share the outermost row of their side
    (Shaw, Uszkoreit and Vaswani 2018, section 3).
    """
    reach = len(table) // 2
    rows = distances(query.shape[-2], key.shape[-2]).clamp(-reach, reach) + reach  # (L, S)
    by_distance = query @ table.T  # (..., L, 2R + 1): one product for each row, and then a look-up
    rows = rows.to(table.device).expand(*by_distance.shape[:-1], -1)
    return (query @ key.transpose(-2, -1) + by_distance.gather(-1, rows)) / math.sqrt(query.shape[-1])
