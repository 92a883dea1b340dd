"""Fewer keys and values than queries: grouped-query attention, and the cache that makes it worth while.

Letters: B samples, L new tokens, S tokens to look at (the cache and the new ones), D the width of the model,
H query heads and G key-value heads of d = D / H numbers each. G = H is multi-head attention, G = 1 is
multi-query attention (Shazeer 2019), and what lies between is grouped-query attention (Ainslie et al. 2023).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dianlib.attention import causal_mask, scaled_dot_product_attention
from dianlib.multihead import merge_heads, split_heads
from dianlib.positions import apply_rope


def repeat_kv(x: Tensor, n_repeats: int) -> Tensor:
    """Copy every key-value head for its query heads, which are neighbours: (B, G, S, d) -> (B, G n, S, d).

    Query head h then reads key-value head h // n. The copy costs memory; `grouped_attention` needs none.
    """
    return x.repeat_interleave(n_repeats, dim=1)


def grouped_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Let H query heads read G key-value heads: (B, H, L, d), (B, G, S, d), (B, G, S, d) -> (B, H, L, d).

    Nothing is repeated: the H / G heads of a group ask the same keys, so those of a new token stand below
    each other, as H / G queries of one head. ``mask`` is bool, broadcasts to (B, H, L, S), and is True where
    a query may attend.
    """
    batch, n_heads, length, head_dim = query.shape
    if length > 1:  # with many queries torch's own sharing is as fast, and takes the mask as it is
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    n_kv_heads = key.shape[1]
    below_each_other = query.reshape(batch, n_kv_heads, n_heads // n_kv_heads, head_dim)
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
        if mask.shape[1] > 1:  # a row for each head
            mask = mask.reshape(len(mask), n_kv_heads, -1, mask.shape[-1])
    output = F.scaled_dot_product_attention(below_each_other, key, value, attn_mask=mask)
    return output.reshape(query.shape)


class KVCache:
    """Keep the keys and values of the tokens so far, so that each token is projected once.

    The memory doubles when it is full, as that of a Python list: joining the old and the new at every
    token would copy everything at every token. Meant for generation: call it under ``torch.no_grad()``.
    """

    def __init__(self) -> None:
        self.length = 0
        self._room: list[Tensor] = []  # keys and values, with free places behind the last token

    def __len__(self) -> int:
        return self.length

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add L tokens, (B, G, L, d) each, and return the keys and values of all: (B, G, S, d) each."""
        start, end = self.length, self.length + key.shape[2]
        if not self._room:
            self._room = [key[:, :, :0], value[:, :, :0]]
        if end > self._room[0].shape[2]:
            self._room = [self._moved(part, max(2 * start, end)) for part in self._room]
        for part, new in zip(self._room, (key, value), strict=True):
            part[:, :, start:end] = new
        self.length = end
        keys, values = (part[:, :, :end] for part in self._room)
        return keys, values

    def _moved(self, part: Tensor, places: int) -> Tensor:
        batch, n_kv_heads, _, head_dim = part.shape
        larger = part.new_empty(batch, n_kv_heads, places, head_dim)
        larger[:, :, : self.length] = part[:, :, : self.length]
        return larger

    @property
    def nbytes(self) -> int:
        """Count the bytes of the keys and values of the tokens so far, without the free places."""
        return sum(part[:, :, : self.length].nbytes for part in self._room)


class GroupedQueryAttention(nn.Module):
    """Attend with H query heads on G key-value heads: (B, L, D) -> (B, L, D).

    ``mask`` is bool, broadcasts to (B, H, L, S), and is True where a query may attend. With a ``cache`` the
    new tokens look at those in it as well, and are added to it. Raises ValueError where D cannot be cut in H
    heads, or H in G groups.
    """

    def __init__(self, d_model: int, n_heads: int, n_kv_heads: int) -> None:
        super().__init__()
        if d_model % n_heads or n_heads % n_kv_heads:
            raise ValueError(
                f"{n_heads} heads must divide the width {d_model}, and {n_kv_heads} key-value heads those."
            )
        self.n_heads, self.n_kv_heads = n_heads, n_kv_heads
        head_dim = d_model // n_heads
        self.q_proj = nn.Linear(d_model, n_heads * head_dim)
        self.k_proj = nn.Linear(d_model, n_kv_heads * head_dim)
        self.v_proj = nn.Linear(d_model, n_kv_heads * head_dim)
        self.o_proj = nn.Linear(n_heads * head_dim, d_model)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        query, key, value = self.project(x)
        if cache is not None:  # an empty cache counts as False
            key, value = cache.append(key, value)
        output: Tensor = self.o_proj(merge_heads(grouped_attention(query, key, value, mask)))
        return output

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Make queries (B, H, L, d), and keys and values (B, G, L, d)."""
        return (
            split_heads(self.q_proj(x), self.n_heads),
            split_heads(self.k_proj(x), self.n_kv_heads),
            split_heads(self.v_proj(x), self.n_kv_heads),
        )

    def weights(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return what each query head looks at, for a heat map: (B, L, D) -> (B, H, L, L)."""
        query, key, value = self.project(x)
        key, value = (repeat_kv(part, self.n_heads // self.n_kv_heads) for part in (key, value))
        _, weights = scaled_dot_product_attention(query, key, value, mask)
        assert weights is not None
        return weights


def cache_bytes(
    n_layers: int, n_kv_heads: int, head_dim: int, length: int, batch: int = 1, bytes_per_value: int = 2
) -> int:
    """Count the bytes of a cache: a key and a value of d numbers, for each layer, head, token and sample."""
    return 2 * n_layers * n_kv_heads * head_dim * length * batch * bytes_per_value


def mha_to_gqa(k_weight: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
    """Merge the key (or value) heads of each group by their mean: (H d, D) -> (G d, D); a bias likewise.

    Training goes on afterwards (Ainslie et al. 2023, section 2.1). Raises ValueError where H heads do not
    divide the rows, or G key-value heads the heads.
    """
    if len(k_weight) % n_heads or n_heads % n_kv_heads:
        raise ValueError(
            f"{n_heads} heads must divide {len(k_weight)} rows, and {n_kv_heads} key-value heads those."
        )
    groups: Tensor = k_weight.unflatten(0, (n_kv_heads, n_heads // n_kv_heads, -1))
    return groups.mean(dim=1).flatten(0, 1)


class LatentAttention(nn.Module):
    """Keep one short vector a token, and make all keys and values from it: (B, L, D) -> (B, L, D).

    The cache of a token is a latent vector of C numbers and one rotated key of R numbers that all heads
    share. ``forward`` makes every key and value; ``absorbed`` gives the same and makes none of them: each
    head turns its query into a question to the latent vectors. Source: DeepSeek-AI 2024 (DeepSeek-V2),
    section 2.1, without its compression of the queries.
    """

    def __init__(self, d_model: int, n_heads: int, latent_dim: int, rotary_dim: int) -> None:
        super().__init__()
        self.n_heads, self.head_dim = n_heads, d_model // n_heads
        self.scale = (self.head_dim + rotary_dim) ** -0.5
        self.q_proj = nn.Linear(d_model, n_heads * self.head_dim, bias=False)
        self.q_rotary = nn.Linear(d_model, n_heads * rotary_dim, bias=False)
        self.down = nn.Linear(d_model, latent_dim, bias=False)
        self.k_rotary = nn.Linear(d_model, rotary_dim, bias=False)
        self.k_up = nn.Linear(latent_dim, n_heads * self.head_dim, bias=False)
        self.v_up = nn.Linear(latent_dim, n_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(n_heads * self.head_dim, d_model)

    def kept(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Make what a cache would hold: latent vectors (B, L, C) and rotated keys (B, L, R)."""
        return self.down(x), apply_rope(self.k_rotary(x), positions)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
        latent, rotary_key = self.kept(x, positions)
        key, value = (split_heads(up(latent), self.n_heads) for up in (self.k_up, self.v_up))
        scores = split_heads(self.q_proj(x), self.n_heads) @ key.mT
        weights = self._weights(scores, x, positions, rotary_key, mask)
        output: Tensor = self.o_proj(merge_heads(weights @ value))
        return output

    def absorbed(self, x: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
        latent, rotary_key = self.kept(x, positions)
        k_up, v_up = (
            up.weight.unflatten(0, (self.n_heads, -1)) for up in (self.k_up, self.v_up)
        )  # (H, d, C)
        # q (W c) = (q W) c: the question goes to the latent vectors, and W is applied once, not once a token.
        scores = split_heads(self.q_proj(x), self.n_heads) @ k_up @ latent.unsqueeze(1).mT
        weights = self._weights(scores, x, positions, rotary_key, mask)
        output: Tensor = self.o_proj(merge_heads(weights @ latent.unsqueeze(1) @ v_up.mT))
        return output

    def _weights(
        self, scores: Tensor, x: Tensor, positions: Tensor, rotary_key: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Add the scores of the rotated parts, (B, H, L, R) with (B, 1, L, R), and normalise."""
        rotary_query = apply_rope(split_heads(self.q_rotary(x), self.n_heads), positions)
        scores = (scores + rotary_query @ rotary_key.unsqueeze(1).mT) * self.scale
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return scores.softmax(dim=-1)


class TokenModel(nn.Module):
    """A small language model of attention layers: tokens (B, L) -> logits of the next token (B, L, V).

    It is what `decode` needs: it is told the place of each token and which tokens each may look at, and it
    fills one cache for each layer.
    """

    def __init__(
        self, vocab_size: int, d_model: int, n_heads: int, n_kv_heads: int, n_layers: int, max_length: int
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, d_model)
        self.places = nn.Embedding(max_length, d_model)
        self.layers = nn.ModuleList(
            GroupedQueryAttention(d_model, n_heads, n_kv_heads) for _ in range(n_layers)
        )
        self.readout = nn.Linear(d_model, vocab_size)

    def new_cache(self) -> list[KVCache]:
        """Make an empty cache for each layer."""
        return [KVCache() for _ in self.layers]

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
        cache: list[KVCache] | None = None,
    ) -> Tensor:
        kept_by_layer = [None] * len(self.layers) if cache is None else cache
        x = self.tokens(tokens) + self.places(positions)
        for layer, kept in zip(self.layers, kept_by_layer, strict=True):
            x = x + layer(x, mask, kept)
        logits: Tensor = self.readout(x)
        return logits


@torch.no_grad()
def decode(model: nn.Module, prompt: Tensor, n_new: int) -> Tensor:
    """Write the likeliest next token ``n_new`` times: (B, L) int64 -> (B, L + n_new), the prompt included.

    ``model`` is called as model(tokens, positions, mask, cache) and gives logits (B, L, V); its
    ``new_cache()`` is empty. Every token is read once: the prompt in one pass, then one token at a time.
    """
    cache = model.new_cache()  # type: ignore[operator]
    tokens = new = prompt
    for _ in range(n_new):
        n_new_tokens, n_tokens = new.shape[1], tokens.shape[1]
        positions = torch.arange(n_tokens - n_new_tokens, n_tokens)
        # A prompt must not see its own future; a single last token may see everything.
        mask = causal_mask(n_new_tokens, n_tokens) if n_new_tokens > 1 else None
        new = model(new, positions, mask, cache)[:, -1:].argmax(dim=-1)
        tokens = torch.cat([tokens, new], dim=1)
    return tokens
