"""Tasks of the chapter "Grouped-query attention and its cache": right answers, and the wrong ones that are known."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dianlib import grouped_query
from dianlib.checks.kinds import (
    DETACHED,
    answer_probes,
    known_answer,
    randn,
    specimen_probes,
    verdict_faults,
    without_gradient,
)
from dianlib.checks.running import Cache, CachedModel, Outcome, Probe
from dianlib.checks.task import Candidate, Fault, Task

PRICE = "grouped_query: What does a token leave behind?"
SHARE = "grouped_query: Who shares with whom?"
STEPS = "grouped_query: From a loop over heads to no copy at all"
LAYER = "grouped_query: One class from multi-head to multi-query"
CACHE = "grouped_query: A cache must not change a number"
COST = "grouped_query: What does sharing cost?"
CONVERT = "grouped_query: How do many heads become few?"
WRONG = "grouped_query: Tempting, but wrong"
CASE = "grouped_query: The case, solved"


# ----- cache_bytes --------------------------------------------------------------------------------------------


def _bytes_probes(generator: torch.Generator) -> list[Probe]:
    def probe(name: str, *sizes: int, core: bool = False) -> Probe:
        names = ("n_layers", "n_kv_heads", "head_dim", "length", "batch", "bytes_per_value")
        return Probe(name, dict(zip(names, sizes, strict=True)), core=core)

    drawn = [int(n) for n in torch.randint(2, 12, (5,), generator=generator)]
    return [
        probe("two layers, one key-value head of three numbers, five tokens", 2, 1, 3, 5, 1, 4, core=True),
        probe("three samples, two bytes a number", 3, 2, 5, 7, 3, 2),
        probe("one byte a number", 4, 8, 6, 9, 2, 1),
        probe("other sizes", *drawn, 2),
        probe("no token yet", 2, 4, 8, 0, 1, 2),
    ]


def _bytes_twin(
    n_layers: int,
    n_kv_heads: int,
    head_dim: int,
    length: int,
    batch: int,
    bytes_per_value: int,
    *,
    kept: int = 2,
    layers: bool = True,
    heads: bool = True,
    samples: bool = True,
    tokens: str = "length",
    size: str = "given",
) -> float:
    n_tokens = {"length": length, "squared": length**2, "one less": length - 1}[tokens]
    n_bytes = {"given": bytes_per_value, "none": 1, "bits": 8 * bytes_per_value, "four": 4}[size]
    numbers = kept * (n_layers if layers else 1) * (n_kv_heads if heads else 1) * head_dim * n_tokens
    return numbers * (batch if samples else 1) * n_bytes


def _bytes_of_tensors(
    n_layers: int, n_kv_heads: int, head_dim: int, length: int, batch: int, bytes_per_value: int
) -> int:
    total = 0
    for _ in range(n_layers):
        for _ in ("keys", "values"):
            total += (
                torch.empty(batch, n_kv_heads, length, head_dim, dtype=torch.uint8).numel() * bytes_per_value
            )
    return total


def _bytes_by_token(
    n_layers: Any, n_kv_heads: Any, head_dim: Any, length: Any, batch: Any, bytes_per_value: Any
) -> Any:
    of_a_token = float(n_kv_heads * head_dim * bytes_per_value)
    return 2.0 * of_a_token * n_layers * length * batch


CACHE_BYTES = Task(
    id="grouped_query.cache_bytes",
    signature="cache_bytes(n_layers, n_kv_heads, head_dim, length, batch, bytes_per_value)",
    points=2,
    reference=grouped_query.cache_bytes,
    probes=_bytes_probes,
    twin=_bytes_twin,
    forbidden=frozenset({"cache_bytes"}),
    variants=[_bytes_of_tensors, _bytes_by_token],
    hints=(
        "Which tensors does one layer keep for one token?",
        "A layer keeps a key and a value, and each of them has n_kv_heads times head_dim numbers.",
        "count the numbers of a key; twice for key and value; times layers, tokens and samples; times the bytes of a number",
    ),
    mistakes=[
        Fault(
            "kv-bytes-of-keys-only",
            "You count the keys and forget the values, or the other way round.",
            "Count both: every token leaves a key and a value.",
            PRICE,
            settings=[{"kept": 1}],
        ),
        Fault(
            "kv-bytes-with-queries",
            "You count three tensors; the query of a token is used once and not kept.",
            "Count a key and a value, nothing else.",
            PRICE,
            settings=[{"kept": 3}],
        ),
        Fault(
            "kv-bytes-of-one-layer",
            "You count one layer; every layer has keys and values of its own.",
            "Multiply by the number of layers.",
            PRICE,
            settings=[{"layers": False}],
        ),
        Fault(
            "kv-bytes-of-one-head",
            "You count one key-value head, as if this were multi-query attention.",
            "Multiply by the number of key-value heads.",
            PRICE,
            settings=[{"heads": False}],
        ),
        Fault(
            "kv-bytes-of-one-sample",
            "You count one sample; every sample of the batch has tokens of its own.",
            "Multiply by the batch.",
            PRICE,
            settings=[{"samples": False}],
        ),
        Fault(
            "kv-bytes-squared-length",
            "You multiply by the square of the length: that is the size of the attention weights, which are not kept.",
            "A token leaves its key and value once: multiply by the length.",
            PRICE,
            settings=[{"tokens": "squared"}],
        ),
        Fault(
            "kv-bytes-size-of-a-number",
            "You do not multiply by the bytes of a number: this counts numbers, bits, or four bytes for each.",
            "Multiply by bytes_per_value, as given.",
            PRICE,
            settings=[{"size": "none"}, {"size": "bits"}, {"size": "four"}],
        ),
        Fault(
            "kv-bytes-token-missing",
            "You count one token too few.",
            "All tokens of the cache count, the last one too.",
            PRICE,
            settings=[{"tokens": "one less"}],
        ),
    ],
)


# ----- repeat_kv ------------------------------------------------------------------------------------------------


def _repeat_probes(generator: torch.Generator) -> list[Probe]:
    def probe(name: str, shape: tuple[int, ...], n_repeats: int, core: bool = False) -> Probe:
        x = (randn(generator, *shape) * 4).round() / 4
        # Numbers of their own, so that no two rows are alike by chance.
        x = x + torch.arange(x.numel()).reshape(shape) / 64
        return Probe(name, {"x": x, "n_repeats": n_repeats}, gradients=("x",), core=core)

    return [
        probe("two key-value heads, each for two query heads", (1, 2, 2, 1), 2, core=True),
        probe("two key-value heads, each for four query heads", (3, 2, 5, 3), 4, core=True),
        probe("three key-value heads, each for two", (2, 3, 4, 2), 2),
        probe("one key-value head for all five", (2, 1, 3, 4), 5),
        probe("nothing to repeat", (2, 4, 3, 2), 1),
    ]


def _repeat_twin(
    x: Tensor,
    n_repeats: int,
    *,
    order: str = "neighbours",
    axis: int = 1,
    flat: str = "yes",
    cut: bool = False,
) -> Tensor:
    if order == "not":
        result = x
    elif order == "first":
        result = x[:, :1].repeat_interleave(n_repeats * x.shape[1], 1)
    elif order == "mean":
        result = x.mean(1, keepdim=True).repeat_interleave(n_repeats * x.shape[1], 1)
    elif order == "heads times":  # as often as there are key-value heads
        result = x.repeat_interleave(x.shape[1], axis)
    elif order == "tiled":
        result = torch.cat([x] * n_repeats, axis)
    else:
        result = x.repeat_interleave(n_repeats, axis)
    if flat == "no" and axis == 1:
        result = result.unflatten(1, (-1, n_repeats) if order == "neighbours" else (1, -1))
    elif flat == "by view":  # the axis for the copies is put behind the tokens
        copies = x[:, :, :, None].expand(-1, -1, -1, n_repeats, -1)
        result = copies.reshape(len(x), -1, *x.shape[2:])
    return result.detach() if cut else result


def _repeat_by_interleave(x: Any, n_repeats: int) -> Any:
    return torch.repeat_interleave(x, n_repeats, dim=1)


def _repeat_by_expand(x: Any, n_repeats: int) -> Any:
    b, g, s, d = x.shape
    return x[:, :, None, :, :].expand(b, g, n_repeats, s, d).reshape(b, g * n_repeats, s, d)


def _repeat_by_index(x: Any, n_repeats: int) -> Any:
    heads = torch.arange(x.shape[1] * n_repeats) // n_repeats
    return x[:, heads]


def _repeat_by_loops(x: Any, n_repeats: int) -> Any:
    heads = []
    for g in range(x.size(1)):
        for _ in range(n_repeats):
            heads.append(x[:, g])
    return torch.stack(heads, dim=1)


def _repeat_by_einsum(x: Any, n_repeats: int) -> Any:
    ones = torch.ones(n_repeats, dtype=x.dtype)
    return torch.einsum("bgsd,r->bgrsd", x, ones).flatten(1, 2)


REPEAT_KV = Task(
    id="grouped_query.repeat_kv",
    signature="repeat_kv(x, n_repeats)",
    points=2,
    reference=grouped_query.repeat_kv,
    probes=_repeat_probes,
    twin=_repeat_twin,
    forbidden=frozenset({"repeat_kv"}),
    variants=[
        _repeat_by_interleave,
        _repeat_by_expand,
        _repeat_by_index,
        _repeat_by_loops,
        _repeat_by_einsum,
    ],
    hints=(
        "With two key-value heads and eight query heads: which key-value head does query head 3 read?",
        "Query head h reads key-value head h // n_repeats, so the copies of one head stand side by side: 0, 0, 0, 0, 1, 1, 1, 1.",
        "make a new axis behind the heads: (B, G, 1, S, d)\nlet it be n_repeats long\njoin the two axes: (B, G * n_repeats, S, d)",
    ),
    mistakes=[
        Fault(
            "gqa-tiled-grouping",
            "The heads stand as 0, 1, 0, 1: query head h reads key-value head h mod G, and neighbours share nothing.",
            "Put the copies of a head side by side, with repeat_interleave or expand, not with repeat: 0, 0, 1, 1.",
            SHARE,
            settings=[{"order": "tiled"}],
        ),
        Fault(
            "gqa-repeat-wrong-axis",
            "You repeat along another axis than the heads: samples, tokens or numbers are doubled.",
            "Repeat along axis 1, where the key-value heads stand.",
            SHARE,
            settings=[{"axis": 0}, {"axis": 2}, {"axis": 3}],
        ),
        Fault(
            "gqa-repeat-by-view",
            "The new axis stands behind the tokens, and the view then cuts the memory across: tokens of one head land in another.",
            "Put the new axis right behind the heads, (B, G, n, S, d), before you join the two.",
            SHARE,
            settings=[{"flat": "by view"}],
        ),
        Fault(
            "gqa-kv-not-repeated",
            "Nothing is repeated, so there are still G heads for H queries.",
            "Return (B, G * n_repeats, S, d).",
            SHARE,
            settings=[{"order": "not"}],
        ),
        Fault(
            "gqa-repeats-and-heads-exchanged",
            "Each head is repeated as often as there are key-value heads, not n_repeats times.",
            "The number of copies is n_repeats = H / G; G itself counts the heads that are copied.",
            SHARE,
            settings=[{"order": "heads times"}],
        ),
        Fault(
            "gqa-one-head-for-all",
            "All query heads get the same key-value head, the first or the mean of all.",
            "Keep all G heads; each serves a group of its own.",
            SHARE,
            settings=[{"order": "first"}, {"order": "mean"}],
        ),
        Fault(
            "gqa-group-axis-left",
            "The copies stand on an axis of their own: the result has five axes.",
            "Join the axis of the heads and the axis of the copies, with flatten(1, 2) or reshape.",
            SHARE,
            settings=[{"flat": "no"}],
        ),
        Fault("backward-detached", *DETACHED, SHARE, settings=[{"cut": True}], sign=without_gradient),
    ],
)


# ----- GroupedQueryAttention ------------------------------------------------------------------------------------

NAMES = tuple(f"{part}_proj.{kind}" for part in "qkvo" for kind in ("weight", "bias"))


def _layer_probes(generator: torch.Generator) -> list[Probe]:
    def probe(
        name: str,
        sizes: tuple[int, int, int],
        shape: tuple[int, int],
        mask: str = "none",
        past: int | None = None,
        core: bool = False,
    ) -> Probe:
        d_model, n_heads, n_kv_heads = sizes
        n, length = shape
        head_dim = d_model // n_heads
        width = n_kv_heads * head_dim
        state: list[Tensor] = []
        for rows in (d_model, width, width, d_model):
            state += [randn(generator, rows, d_model) / 4, randn(generator, rows)]
        args: dict[str, Any] = {"x": (randn(generator, n, length, d_model) * 4).round() / 4}
        n_keys = length + (past or 0)
        allowed = torch.ones(n, 1, length, n_keys, dtype=torch.bool)
        if mask in ("causal", "causal and padding"):
            allowed = allowed.tril(n_keys - length)
        if mask == "causal and padding":  # the last tokens of some samples are no tokens
            lengths = torch.tensor([n_keys, n_keys - 1, n_keys - 2])[:n]
            allowed = allowed & (torch.arange(n_keys) < lengths[:, None])[:, None, None]
        args["mask"] = None if mask == "none" else allowed[0, 0] if mask == "causal" else allowed
        if past is not None:
            held = [randn(generator, n, n_kv_heads, past, head_dim) for _ in range(2)]
            args["cache"] = Cache(*held) if past else Cache()
        return Probe(name, args, sizes, tuple(state), NAMES, gradients=("x",), core=core)

    return [
        probe("four heads of two numbers, two key-value heads", (8, 4, 2), (1, 3), core=True),
        probe("eight heads, two key-value heads", (24, 8, 2), (3, 5), core=True),
        probe("a causal mask", (24, 8, 2), (3, 5), "causal"),
        probe("a causal mask and padding", (24, 8, 4), (3, 5), "causal and padding"),
        probe("one key-value head: multi-query attention", (24, 8, 1), (2, 4), "causal"),
        probe("as many key-value heads as heads: multi-head attention", (12, 4, 4), (2, 4), "causal"),
        probe("an empty cache", (24, 8, 2), (3, 5), "causal", past=0),
        probe("two new tokens behind a cache of three", (24, 8, 2), (2, 2), "causal", past=3),
        probe("one new token behind a cache of four", (24, 6, 3), (3, 1), past=4),
    ]


class _FaultyGroupedQuery(nn.Module):
    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_kv_heads: int,
        *,
        grouping: str = "neighbours",
        combine: str = "no",
        query: str = "D x D",
        width: str = "G d",
        scale: str = "sqrt d",
        axis: str = "keys",
        masking: str = "before",
        cache: str = "appended",
        split: str = "heads",
        merge: str = "heads",
        output: str = "projected",
        bias: bool = True,
        allowed: str = "H by G",
        length: str = "own",
        cut: bool = False,
    ) -> None:
        super().__init__()
        if allowed == "d by G":
            assert (d_model // n_heads) % n_kv_heads == 0
        self.d, self.h, self.g = d_model // n_heads, n_heads, n_kv_heads
        self.grouping, self.combine, self.query, self.width = grouping, combine, query, width
        self.scale, self.axis, self.masking, self.cached = scale, axis, masking, cache
        self.split, self.merge, self.output, self.length, self.cut = split, merge, output, length, cut
        rows = {"G d": n_kv_heads * self.d, "D": d_model, "d": self.d}[width]
        self.q_proj = nn.Linear(
            self.d if query == "d x d" else d_model, self.d if query == "d x d" else d_model, bias
        )
        self.k_proj = nn.Linear(d_model, rows, bias)
        self.v_proj = nn.Linear(d_model, rows, bias)
        joined = {"sum, narrow": n_kv_heads * self.d, "sum, added": self.d}.get(combine, d_model)
        self.o_proj = nn.Linear(joined, d_model, bias)

    def _cut(self, x: Tensor, n_heads: int) -> Tensor:
        if self.split == "view":
            return x.reshape(len(x), n_heads, x.shape[1], -1)
        batch, length, width = x.shape
        return x.reshape(batch, length, n_heads, width // n_heads).transpose(1, 2)

    def _shared(self, x: Tensor) -> Tensor:
        """Give each query head, or each group of added ones, its key-value head."""
        if self.combine != "no":
            return x
        n_copies = self.h // x.shape[1]
        if self.grouping == "tiled":
            return x.repeat(1, n_copies, 1, 1)
        if self.grouping == "not":
            return x
        if self.grouping == "first":
            x, n_copies = x[:, :1], self.h
        if self.grouping == "mean":
            x, n_copies = x.mean(1, keepdim=True), self.h
        return x.repeat_interleave(n_copies, 1)

    def _weights(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        dim = {"keys": -1, "queries": -2, "heads": 1}[self.axis]
        if mask is None or self.masking == "ignored":
            return scores.softmax(dim)
        allowed = ~mask if self.masking == "inverted" else mask
        if self.masking == "after":
            return scores.softmax(dim) * allowed
        lowest = 1e-9 if self.masking == "filled with 1e-9" else -1e9
        return scores.masked_fill(~allowed, lowest).softmax(dim)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Any = None) -> Tensor:
        if self.query == "d x d":
            q = self.q_proj(x.unflatten(-1, (self.h, self.d))).transpose(1, 2)
        else:
            q = self._cut(self.q_proj(x), self.h)
        n_cut = {"G d": self.g, "D": self.h, "d": 1}[self.width]
        k, v = self._cut(self.k_proj(x), n_cut), self._cut(self.v_proj(x), n_cut)
        if cache is not None and self.cached != "ignored" and (len(cache) or self.cached != "if cache"):
            if self.cached == "repeated":
                k, v = self._shared(k), self._shared(v)
            all_k, all_v = cache.append(k, v)
            if self.cached != "new only":
                k, v = all_k, all_v
        if self.length == "value's":
            q = q.reshape(len(x), self.h, v.shape[2], self.d)
        if self.combine != "no":
            q = q.unflatten(1, (self.g, -1))
            q = q.mean(2) if self.combine == "mean, repeated" else q.sum(2)
        if self.cached != "repeated" or cache is None:
            k, v = self._shared(k), self._shared(v)
        divisor = {"sqrt d": self.d**0.5, "sqrt D": (self.d * self.h) ** 0.5, "d": self.d, "none": 1.0}
        weights = self._weights(q @ k.transpose(-2, -1) / divisor[self.scale], mask)
        out = weights @ v
        if self.combine in ("sum, repeated", "mean, repeated"):
            out = out.repeat_interleave(self.h // self.g, 1)
        elif self.combine == "sum, added":
            out = out.sum(1, keepdim=True)
        batch, _, n, _ = out.shape
        if self.merge == "last two":
            out = out.transpose(-2, -1).reshape(batch, n, -1)
        elif self.merge == "view":
            out = out.reshape(batch, n, -1)
        else:
            out = out.transpose(1, 2).flatten(2)
        result: Tensor = self.o_proj(out) if self.output == "projected" else out
        return result.detach() if self.cut else result


class _LayerByLoops(torch.nn.Module):
    def __init__(self, d_model: int, n_heads: int, n_kv_heads: int) -> None:
        super().__init__()
        if d_model % n_heads != 0 or n_heads % n_kv_heads != 0:
            raise ValueError("these sizes do not fit")
        self.n_heads, self.n_kv_heads = n_heads, n_kv_heads
        self.d = d_model // n_heads
        self.o_proj = torch.nn.Linear(d_model, d_model)
        self.v_proj = torch.nn.Linear(d_model, n_kv_heads * self.d)
        self.k_proj = torch.nn.Linear(d_model, n_kv_heads * self.d)
        self.q_proj = torch.nn.Linear(d_model, d_model)

    def forward(self, x: Any, mask: Any = None, cache: Any = None) -> Any:
        b, length, _ = x.shape
        q = self.q_proj(x).view(b, length, self.n_heads, self.d)
        k = self.k_proj(x).view(b, length, self.n_kv_heads, self.d).transpose(1, 2)
        v = self.v_proj(x).view(b, length, self.n_kv_heads, self.d).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)
        heads = []
        for h in range(self.n_heads):
            g = h // (self.n_heads // self.n_kv_heads)
            scores = q[:, :, h] @ k[:, g].transpose(1, 2) / self.d**0.5
            if mask is not None:
                allowed = mask if mask.dim() == 2 else mask[:, 0]
                scores = scores.masked_fill(~allowed, float("-inf"))
            heads.append(scores.softmax(-1) @ v[:, g])
        return self.o_proj(torch.cat(heads, dim=-1))


class _LayerByEinsum(torch.nn.Module):
    def __init__(self, d_model: int, n_heads: int, n_kv_heads: int) -> None:
        super().__init__()
        assert n_heads % n_kv_heads == 0
        self.g, self.r, self.d = n_kv_heads, n_heads // n_kv_heads, d_model // n_heads
        self.q_proj = torch.nn.Linear(d_model, d_model)
        self.k_proj = torch.nn.Linear(d_model, self.g * self.d)
        self.v_proj = torch.nn.Linear(d_model, self.g * self.d)
        self.o_proj = torch.nn.Linear(d_model, d_model)

    def forward(self, x: Any, mask: Any = None, cache: Any = None) -> Any:
        b, n, _ = x.shape
        q = self.q_proj(x).reshape(b, n, self.g, self.r, self.d)
        k, v = (p(x).reshape(b, n, self.g, self.d).permute(0, 2, 1, 3) for p in (self.k_proj, self.v_proj))
        if cache is not None:
            k, v = cache.append(k, v)
        scores = torch.einsum("blgrd,bgsd->bgrls", q, k) * self.d**-0.5
        if mask is not None:
            shape = mask if mask.dim() == 2 else mask.unsqueeze(2)
            scores = torch.where(shape, scores, torch.tensor(-1e9))
        out = torch.einsum("bgrls,bgsd->blgrd", torch.softmax(scores, -1), v)
        return self.o_proj(out.reshape(b, n, -1))


class _LayerByRepeating(torch.nn.Module):
    # keys and values are repeated behind the cache
    def __init__(self, d_model: int, n_heads: int, n_kv_heads: int) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.d_model = n_heads, n_kv_heads, d_model
        d = d_model // n_heads
        self.q_proj = torch.nn.Linear(d_model, d_model)
        self.k_proj = torch.nn.Linear(d_model, d * n_kv_heads)
        self.v_proj = torch.nn.Linear(d_model, d * n_kv_heads)
        self.o_proj = torch.nn.Linear(d_model, d_model)

    def forward(self, x: Any, mask: Any = None, cache: Any = None) -> Any:
        def split(t: Any, h: int) -> Any:
            return t.view(t.size(0), t.size(1), h, -1).transpose(1, 2)

        q, k, v = split(self.q_proj(x), self.n_heads), self.k_proj(x), self.v_proj(x)
        k, v = split(k, self.n_kv_heads), split(v, self.n_kv_heads)
        if cache is not None:
            k, v = cache.append(k, v)
        n = self.n_heads // self.n_kv_heads
        k, v = k.repeat_interleave(n, dim=1), v.repeat_interleave(n, dim=1)
        scores = torch.matmul(q, k.transpose(2, 3)) / (q.size(-1) ** 0.5)
        if mask is not None:
            scores = scores + (~mask).to(scores.dtype) * -1e9
        out = torch.matmul(torch.softmax(scores, dim=3), v)
        return self.o_proj(out.transpose(1, 2).contiguous().view(x.size(0), x.size(1), self.d_model))


def _parameters(probe: Probe, got: Outcome, wanted: Outcome) -> str:
    count, right = got.values.get("number of parameters"), wanted.values.get("number of parameters")
    if count is not None and count != right:
        return (
            f"parameters() finds {count} numbers; this layer has {right}: q_proj and o_proj map D to D, "
            "k_proj and v_proj map D to G d, all with a bias."
        )
    return ""


def _kept(probe: Probe, got: Outcome, wanted: Outcome) -> str:
    name = "cache.length afterwards"
    found, right = got.values.get(name), wanted.values.get(name)
    if found == right:
        return ""
    return f"The cache holds {found} tokens after the call; with the new ones it should hold {right}."


def _alone(**setting: Any) -> Candidate:
    """Make a form of a mistake that is looked for by itself, and not in pairs."""
    return partial(_FaultyGroupedQuery, **setting)


GROUPED = Task(
    id="grouped_query.GroupedQueryAttention",
    signature="GroupedQueryAttention(d_model, n_heads, n_kv_heads)",
    points=5,
    reference=grouped_query.GroupedQueryAttention,
    probes=_layer_probes,
    twin=_FaultyGroupedQuery,
    # torch's kernels share keys by themselves: the answer.
    forbidden=frozenset({"scaled_dot_product_attention", "multi_head_attention_forward"}),
    properties=[_parameters, _kept],
    variants=[_LayerByLoops, _LayerByEinsum, _LayerByRepeating],
    hints=(
        "How many rows do k_proj and v_proj have, and how many attention matrices does the layer compute?",
        "H queries, G keys and values. New keys and values go through the cache before anything is repeated; then head h reads "
        "key-value head h // (H / G), and everything else is multi-head attention.",
        "q: (B, H, L, d), k and v: (B, G, L, d)\nif cache is not None: k, v = cache.append(k, v)\nrepeat k and v for their neighbours: (B, H, S, d)\n"
        "scores = q k^T / sqrt(d), masked, softmax over the keys\nmerge the heads of weights @ v, then o_proj",
    ),
    mistakes=[
        Fault(
            "gqa-tiled-grouping",
            "Query head h reads key-value head h mod G: heads 0, 2, 4 share one, and neighbours do not.",
            "Neighbours share: repeat with repeat_interleave, or cut the heads as (G, H / G).",
            SHARE,
            settings=[{"grouping": "tiled"}],
        ),
        Fault(
            "gqa-kv-not-repeated",
            "The key-value heads are not repeated, so this runs for G = 1 and for G = H only.",
            "Repeat each key-value head H / G times, or cut the queries as (G, H / G).",
            SHARE,
            settings=[{"grouping": "not"}],
        ),
        Fault(
            "gqa-one-head-for-all",
            "All query heads read the same key-value head, the first or the mean of all.",
            "Keep all G key-value heads; each serves a group of its own.",
            SHARE,
            settings=[{"grouping": "first"}],
            implementations=[_alone(grouping="mean")],
        ),
        Fault(
            "gqa-sums-in-group",
            "The queries of a group are added (or averaged) before the attention, so a group has one pattern instead of H / G.",
            "Keep all H queries; only keys and values are shared.",
            CASE,
            settings=[{"combine": "sum, repeated"}, {"combine": "sum, narrow"}],
            implementations=[_alone(combine="mean, repeated"), _alone(combine="sum, added")],
        ),
        Fault(
            "mqa-small-shared-query",
            "One small matrix of d by d makes the queries of all heads from slices of the input.",
            "Queries need the full projection: q_proj maps D to D, and is cut into heads afterwards.",
            LAYER,
            implementations=[_alone(query="d x d")],
        ),
        Fault(
            "gqa-kv-full-width",
            "Your k_proj and v_proj have as many heads as the queries: nothing is saved.",
            "They map D to G d, with d = D / H.",
            LAYER,
            implementations=[_alone(width="D")],
        ),
        Fault(
            "gqa-always-one-head",
            "Your k_proj and v_proj have one head, whatever n_kv_heads says: that is multi-query attention.",
            "They map D to G d.",
            LAYER,
            implementations=[_alone(width="d")],
        ),
        Fault(
            "gqa-value-length-for-query",
            "The query is reshaped with the length of the values, which is longer as soon as there is a cache.",
            "Use the query's own length.",
            CACHE,
            settings=[{"length": "value's"}],
        ),
        Fault(
            "gqa-wrong-assert",
            "You demand that G divides the width of a head, and so refuse sizes that are fine.",
            "G must divide the number of heads, not the head's width.",
            SHARE,
            implementations=[_alone(allowed="d by G")],
        ),
        Fault(
            "kv-cache-ignored",
            "The cache is never used: new tokens do not see the old ones, and are not kept.",
            "Call k, v = cache.append(k, v), and attend to what it returns.",
            CACHE,
            settings=[{"cache": "ignored"}],
        ),
        Fault(
            "kv-empty-cache-falsy",
            "An empty cache counts as False, so `if cache:` skips it and the first tokens are never kept.",
            "Write `if cache is not None:`.",
            CACHE,
            settings=[{"cache": "if cache"}],
        ),
        Fault(
            "kv-attends-to-new-only",
            "The cache is filled, and what it returns is not used: the new tokens look at themselves only.",
            "Attend to the keys and values that append returns.",
            CACHE,
            settings=[{"cache": "new only"}],
        ),
        Fault(
            "kv-cache-of-repeated-heads",
            "Keys and values are repeated before they go into the cache, which then is as large as that of multi-head attention.",
            "Keep G heads in the cache; repeat what it returns.",
            CACHE,
            settings=[{"cache": "repeated"}],
        ),
        Fault(
            "sdpa-scale-sqrt-embed",
            "The scores are divided by the root of the width D, not of a head: the attention is too flat.",
            "Divide by the root of d = D / H.",
            STEPS,
            settings=[{"scale": "sqrt D"}],
        ),
        Fault(
            "sdpa-no-scale",
            "The scores are not divided by the root of d.",
            "Divide by the root of d = D / H.",
            STEPS,
            settings=[{"scale": "none"}],
        ),
        Fault(
            "sdpa-scale-by-d",
            "The scores are divided by d, not by its root.",
            "Divide by the root of d = D / H.",
            STEPS,
            settings=[{"scale": "d"}],
        ),
        Fault(
            "sdpa-softmax-wrong-axis",
            "The softmax runs over the queries or the heads, not over the keys.",
            "Normalise along the last axis.",
            STEPS,
            settings=[{"axis": "queries"}],
            implementations=[_alone(axis="heads")],
        ),
        Fault(
            "mask-never-applied",
            "The mask has no effect: it is not used, or it adds a number like -1e-9, which is almost 0.",
            "Fill the scores with -inf, or the lowest number, where the mask is False, before the softmax.",
            LAYER,
            settings=[{"masking": "ignored"}],
        ),
        Fault(
            "mask-polarity",
            "The mask is turned round: you attend only where it is False.",
            "True means that a query may attend.",
            LAYER,
            settings=[{"masking": "inverted"}],
        ),
        Fault(
            "mask-after-softmax",
            "The weights are set to zero after the softmax, so the rows no longer sum to 1.",
            "Mask the scores, then take the softmax.",
            LAYER,
            settings=[{"masking": "after"}],
        ),
        Fault(
            "mask-minus-1e-9",
            "Masked scores are filled with about 0 (1e-9 instead of -1e9), so masked keys keep weight.",
            "Use -inf, or the lowest number of the type.",
            LAYER,
            settings=[{"masking": "filled with 1e-9"}],
        ),
        Fault(
            "mha-split-by-view",
            "A view cuts the heads out of the memory across the tokens: head 0 gets the first tokens only.",
            "View as (B, L, H, d), then exchange the two middle axes.",
            LAYER,
            settings=[{"split": "view"}],
        ),
        Fault(
            "mha-merge-transpose-last-two",
            "The heads are merged by exchanging the last two axes, or none: the numbers are right and in the wrong places.",
            "Exchange the axes of heads and tokens, (1, 2), then join the last two.",
            LAYER,
            settings=[{"merge": "last two"}],
            implementations=[_alone(merge="view")],
        ),
        Fault(
            "mha-no-output-projection",
            "The heads are joined, and o_proj is not applied.",
            "Return o_proj of the joined heads.",
            LAYER,
            settings=[{"output": "joined"}],
        ),
        Fault(
            "gqa-bias-missing",
            "The four projections have no bias here.",
            "Use nn.Linear with its bias.",
            LAYER,
            implementations=[_alone(bias=False)],
        ),
        Fault("backward-detached", *DETACHED, LAYER, settings=[{"cut": True}], sign=without_gradient),
    ],
)


# ----- KVCache --------------------------------------------------------------------------------------------------


def _cache_probes(generator: torch.Generator) -> list[Probe]:
    def probe(
        name: str,
        shape: tuple[int, int, int],
        lengths: list[int],
        looks: str = "each",
        dtype: torch.dtype = torch.float32,
        core: bool = False,
    ) -> Probe:
        n, n_kv_heads, head_dim = shape
        args: dict[str, Any] = {}
        steps: list[tuple[str, ...]] = []
        if looks == "before":
            steps += [("length",), ("nbytes",)]
        for number, length in enumerate(lengths, 1):
            for part in ("key", "value"):
                drawn = (randn(generator, n, n_kv_heads, length, head_dim) * 4).round() / 4
                args[f"{part}{number}"] = drawn.to(dtype)
            steps.append(("append", f"key{number}", f"value{number}"))
            if looks != "last":
                steps += [("length",), ("nbytes",)]
        if looks == "last":
            steps += [("length",), ("nbytes",)]
        return Probe(name, args, (), steps=tuple(steps), core=core)

    return [
        probe("one token, then another", (2, 2, 8), [1, 1], core=True),
        probe("a prompt of four tokens, then one at a time", (2, 2, 3), [4, 1, 1], core=True),
        probe("before the first token, and then three and two", (2, 3, 2), [3, 2], looks="before"),
        probe("numbers of two bytes", (2, 2, 4), [2, 3], dtype=torch.float16),
        probe("numbers of eight bytes, looked at once at the end", (1, 4, 2), [1] * 6, "last", torch.float64),
    ]


class _FaultyCache:
    def __init__(
        self,
        *,
        order: str = "behind",
        axis: int = 2,
        kept: str = "both",
        returned: str = "all",
        counted: str = "tokens",
        weighed: str = "bytes",
    ) -> None:
        self.order, self.axis, self.kept, self.returned = order, axis, kept, returned
        self.counted, self.weighed = counted, weighed
        self.parts: list[Tensor] = []
        self.calls = 0

    def append(self, key: Tensor, value: Tensor) -> Any:
        new = {"both": [key, value], "keys twice": [key, key], "exchanged": [value, key]}[self.kept]
        self.calls += 1
        if not self.parts or self.order == "replaced":
            self.parts = new
        elif self.order == "first only":
            pass
        else:
            pairs = zip(self.parts, new, strict=True)
            turn = -1 if self.order == "before" else 1
            self.parts = [torch.cat([old, added][::turn], self.axis) for old, added in pairs]
        if self.returned == "nothing":
            return None
        parts = new if self.returned == "new" else self.parts
        return parts[0], parts[1]

    @property
    def length(self) -> int:
        if not self.parts:
            return 0
        key = self.parts[0]
        axis_1, axis_2, samples = key.shape[1], key.shape[2], len(key)
        return {"tokens": axis_2, "calls": self.calls, "of all samples": samples * axis_2, "heads": axis_1}[
            self.counted
        ]

    @property
    def nbytes(self) -> int:
        if not self.parts:
            return 0
        key, value = self.parts
        return {
            "bytes": key.nbytes + value.nbytes,
            "keys": key.nbytes,
            "numbers": key.numel() + value.numel(),
            "four bytes": 4 * (key.numel() + value.numel()),
            "of one token": (key.nbytes + value.nbytes) // key.shape[2],
        }[self.weighed]


class _CacheInLists:
    def __init__(self) -> None:
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []

    def append(self, key: Any, value: Any) -> Any:
        self.k.append(key)
        self.v.append(value)
        return [torch.cat(self.k, dim=2), torch.cat(self.v, dim=-2)]

    def length(self) -> int:
        return sum(k.shape[2] for k in self.k)

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.k + self.v)


class _CacheInOneTensor:
    def __init__(self) -> None:
        self.both: Any = None

    def append(self, key: Any, value: Any) -> Any:
        new = torch.stack((key, value))
        self.both = new if self.both is None else torch.cat((self.both, new), -2)
        return self.both[0], self.both[1]

    @property
    def length(self) -> int:
        return 0 if self.both is None else int(self.both.size(3))

    @property
    def nbytes(self) -> int:
        return 0 if self.both is None else int(self.both.nbytes)


class _CacheWithRoom:
    def __init__(self) -> None:
        self.length, self.nbytes = 0, 0
        self.room: Any = None

    def append(self, key: Any, value: Any) -> Any:
        if self.room is None:
            b, g, _, d = key.shape
            self.room = (key.new_zeros(b, g, 64, d), value.new_zeros(b, g, 64, d))
        n = self.length + key.shape[2]
        self.room[0][:, :, self.length : n] = key
        self.room[1][:, :, self.length : n] = value
        self.length = n
        self.nbytes += key.nbytes + value.nbytes
        return self.room[0][:, :, :n], self.room[1][:, :, :n]


KV_CACHE = Task(
    id="grouped_query.KVCache",
    signature="KVCache()",
    points=3,
    reference=grouped_query.KVCache,
    probes=_cache_probes,
    twin=_FaultyCache,
    forbidden=frozenset({"KVCache"}),
    variants=[_CacheInLists, _CacheInOneTensor, _CacheWithRoom],
    hints=(
        "Which axis of (B, G, L, d) counts the tokens?",
        "Keep what came before, put the new tokens behind it along axis 2, and return everything; an element of a tensor has "
        "element_size() bytes.",
        "at first: self.keys = self.values = None\nappend: the first time keep key and value, later join them behind the old ones along axis 2; return both\n"
        "length: shape[2] of the keys, or 0\nnbytes: numbers times element_size(), for keys and values",
    ),
    mistakes=[
        Fault(
            "kv-cache-overwritten",
            "Each append replaces what was there: only the newest tokens are kept.",
            "Join the old and the new along axis 2, and keep the result.",
            CACHE,
            settings=[{"order": "replaced"}],
        ),
        Fault(
            "kv-cache-never-grows",
            "Only the first tokens are kept; later ones are lost.",
            "Join the old and the new along axis 2, and keep the result.",
            CACHE,
            settings=[{"order": "first only"}],
        ),
        Fault(
            "kv-cache-in-front",
            "New tokens are put in front of the old ones, so places no longer fit the causal mask.",
            "Put them behind: torch.cat([old, new], dim=2).",
            CACHE,
            settings=[{"order": "before"}],
        ),
        Fault(
            "kv-cache-wrong-axis",
            "You join along another axis than the tokens: heads or samples are added.",
            "Tokens stand on axis 2 of (B, G, L, d).",
            CACHE,
            settings=[{"axis": 1}, {"axis": 0}],
        ),
        Fault(
            "kv-cache-keys-for-values",
            "Keys and values are exchanged, or the keys are kept twice.",
            "Keep keys with keys and values with values, and return them in this order.",
            CACHE,
            settings=[{"kept": "keys twice"}, {"kept": "exchanged"}],
        ),
        Fault(
            "kv-cache-returns-new-only",
            "Your append keeps everything and returns only the new tokens, or nothing.",
            "Return the keys and values of all tokens so far: the attention needs them.",
            CACHE,
            settings=[{"returned": "new"}, {"returned": "nothing"}],
        ),
        Fault(
            "kv-cache-length-miscounted",
            "Your length counts something else than the tokens of a sample: calls, heads, or the tokens of all samples.",
            "Return shape[2] of the keys.",
            CACHE,
            settings=[{"counted": "calls"}, {"counted": "of all samples"}, {"counted": "heads"}],
        ),
        Fault(
            "kv-bytes-of-keys-only",
            "Your nbytes counts the keys and not the values.",
            "Count both.",
            PRICE,
            settings=[{"weighed": "keys"}],
        ),
        Fault(
            "kv-bytes-size-of-a-number",
            "Your nbytes counts numbers, or takes four bytes for each.",
            "Multiply by element_size(): a number of float16 has two bytes.",
            PRICE,
            settings=[{"weighed": "numbers"}, {"weighed": "four bytes"}],
        ),
        Fault(
            "kv-bytes-of-one-token",
            "Your nbytes counts one token, not all that are kept.",
            "Count the tensors as they are.",
            PRICE,
            settings=[{"weighed": "of one token"}],
        ),
    ],
)


# ----- mha_to_gqa -----------------------------------------------------------------------------------------------


def _merge_probes(generator: torch.Generator) -> list[Probe]:
    def probe(
        name: str, head_dim: int, width: int, n_heads: int, n_kv_heads: int, core: bool = False
    ) -> Probe:
        weight = (randn(generator, n_heads * head_dim, width) * 8).round() / 8
        args = {"k_weight": weight, "n_heads": n_heads, "n_kv_heads": n_kv_heads}
        return Probe(name, args, gradients=("k_weight",), core=core)

    return [
        probe("four heads of one row become two", 1, 2, 4, 2, core=True),
        probe("eight heads of three rows become two", 3, 24, 8, 2, core=True),
        probe("six heads become three", 4, 5, 6, 3),
        probe("all become one", 2, 8, 4, 1),
        probe("nothing to merge", 3, 4, 4, 4),
    ]


def _merge_twin(
    k_weight: Tensor,
    n_heads: int,
    n_kv_heads: int,
    *,
    how: str = "mean",
    grouping: str = "neighbours",
    layout: str = "blocks of rows",
    number: str = "G groups",
    cut: bool = False,
) -> Tensor:
    n_groups = n_kv_heads if number == "G groups" else n_heads // n_kv_heads
    rows, width = k_weight.shape
    if layout == "columns":
        # The heads are looked for along the wrong axis, where it can be cut.
        heads = k_weight.T.reshape(n_heads, -1, rows)
    elif layout == "every H-th row":
        heads = k_weight.reshape(-1, n_heads, width).transpose(0, 1)
    else:
        heads = k_weight.reshape(n_heads, -1, width)
    if grouping == "neighbours":
        groups: Tensor = heads.unflatten(0, (n_groups, -1))
    else:
        groups = heads.unflatten(0, (-1, n_groups)).transpose(0, 1)
    merging: dict[str, Callable[[], Tensor]] = {
        "mean": lambda: groups.mean(1),
        "sum": lambda: groups.sum(1),
        "first": lambda: groups[:, 0],
        "last": lambda: groups[:, -1],
        "largest": lambda: groups.amax(1),
        "mean of all": lambda: heads.mean(0).expand(n_groups, -1, -1),
        "mean over rows": lambda: groups.mean(2),
        "mean, repeated": lambda: groups.mean(1, keepdim=True).expand_as(groups).flatten(0, 1),
    }
    result = merging[how]().flatten(0, 1)
    if layout == "columns":
        result = result.T
    return result.detach() if cut else result


def _merge_by_loops(k_weight: Any, n_heads: int, n_kv_heads: int) -> Any:
    d = k_weight.shape[0] // n_heads
    size = n_heads // n_kv_heads
    rows = []
    for g in range(n_kv_heads):
        for j in range(d):
            rows.append(sum(k_weight[(g * size + i) * d + j] for i in range(size)) / size)
    return torch.stack(rows)


def _merge_by_matrix(k_weight: Any, n_heads: int, n_kv_heads: int) -> Any:
    heads = torch.arange(n_heads) // (n_heads // n_kv_heads)
    share = torch.nn.functional.one_hot(heads, n_kv_heads).T.to(k_weight.dtype) * n_kv_heads / n_heads
    return torch.einsum("gh,hdw->gdw", share, k_weight.view(n_heads, -1, k_weight.size(1))).reshape(
        -1, k_weight.size(1)
    )


def _merge_by_chunks(k_weight: Any, n_heads: int, n_kv_heads: int) -> Any:
    merged = []
    for group in k_weight.chunk(n_kv_heads):
        heads = torch.stack(group.chunk(n_heads // n_kv_heads))
        merged.append(heads.mean(dim=0))
    return torch.cat(merged, dim=0)


MERGE = Task(
    id="grouped_query.mha_to_gqa",
    signature="mha_to_gqa(k_weight, n_heads, n_kv_heads)",
    points=3,
    reference=grouped_query.mha_to_gqa,
    probes=_merge_probes,
    twin=_merge_twin,
    forbidden=frozenset({"mha_to_gqa"}),
    variants=[_merge_by_loops, _merge_by_matrix, _merge_by_chunks],
    hints=(
        "Which rows of the weight belong to head h, and which heads to group g?",
        "A head is a block of d rows, a group a block of H / G heads; the new head is the mean of the group's heads, row by row.",
        "view the weight as (G, H / G, d, D)\nmean over the second axis\njoin the first two axes: (G d, D)",
    ),
    mistakes=[
        Fault(
            "gqa-tiled-grouping",
            "You merge heads g, g + G, g + 2 G; later head h will read key-value head h // (H / G), made of others.",
            "Merge neighbours: a group is a block of H / G heads.",
            CONVERT,
            settings=[{"grouping": "tiled"}],
        ),
        Fault(
            "gqa-merge-sum",
            "The heads of a group are added, so keys are H / G times as long as before.",
            "Take the mean.",
            CONVERT,
            settings=[{"how": "sum"}],
        ),
        Fault(
            "gqa-merge-picks-one",
            "One head of each group is taken, or the largest numbers, and the others are thrown away.",
            "Take the mean over the heads of the group.",
            CONVERT,
            settings=[{"how": "first"}, {"how": "last"}, {"how": "largest"}],
        ),
        Fault(
            "gqa-one-head-for-all",
            "All heads are averaged, so all key-value heads are the same.",
            "Take the mean within each group.",
            CONVERT,
            settings=[{"how": "mean of all"}],
        ),
        Fault(
            "gqa-merge-over-rows",
            "You average the rows inside a head, not the heads of a group.",
            "The mean runs over the H / G heads; the d rows of a head stay apart.",
            CONVERT,
            settings=[{"how": "mean over rows"}],
        ),
        Fault(
            "gqa-merge-keeps-all",
            "The result has H heads still, each the mean of its group: nothing is saved.",
            "Return each mean once: (G d, D).",
            CONVERT,
            settings=[{"how": "mean, repeated"}],
        ),
        Fault(
            "gqa-group-size-for-number",
            "You make H / G groups of G heads; there should be G groups of H / G heads.",
            "Take n_kv_heads for the number of groups, not their size.",
            CONVERT,
            settings=[{"number": "groups of G"}],
        ),
        Fault(
            "gqa-merge-wrong-layout",
            "You take other numbers for a head: every H-th row, or columns. A head is a block of d rows of a Linear layer's weight.",
            "View the rows as (H, d), in this order.",
            CONVERT,
            settings=[{"layout": "every H-th row"}, {"layout": "columns"}],
        ),
        Fault("backward-detached", *DETACHED, CONVERT, settings=[{"cut": True}], sign=without_gradient),
    ],
)


# ----- decode ---------------------------------------------------------------------------------------------------


def _decode_probes(generator: torch.Generator) -> list[Probe]:
    vocab_size, width, places = 13, 6, 24

    def model() -> CachedModel:
        layers = tuple(
            (randn(generator, width, width), randn(generator, width, width), randn(generator, width, width))
            for _ in range(2)
        )
        return CachedModel(
            2 * randn(generator, vocab_size, width),
            2 * randn(generator, places, width),
            layers,
            randn(generator, vocab_size, width),
        )

    def probe(name: str, n: int, length: int, n_new: int, core: bool = False) -> Probe:
        prompt = torch.randint(vocab_size, (n, length), generator=generator)
        return Probe(name, {"model": model(), "prompt": prompt, "n_new": n_new}, core=core)

    return [
        probe("a prompt of three tokens, and four new ones", 1, 3, 4, core=True),
        probe("four prompts of five tokens, and eight new ones", 4, 5, 8, core=True),
        probe("another model", 3, 7, 6),
        probe("a prompt of one token", 5, 1, 7),
        probe("one new token", 6, 6, 1),
    ]


def _decode_twin(
    model: Any,
    prompt: Tensor,
    n_new: int,
    *,
    prefill: str = "causal",
    places: str = "counted on",
    fed: str = "new",
    cache: str = "one",
    read: str = "last",
    choose: str = "argmax",
    returned: str = "all",
    written: int = 0,
) -> Tensor:
    kept = model.new_cache()
    tokens = new = prompt
    for step in range(n_new + written):
        n, total = new.shape[1], tokens.shape[1]
        positions = torch.arange(total - n, total)
        if places == "restart":
            positions = torch.arange(n)
        elif places == "one late" and step:
            positions = positions + 1
        elif places == "by step" and step:
            positions = positions * 0 + step
        n_keys = n + (kept[0].length if cache == "one" else total - n)
        mask: Tensor | None = torch.ones(n, n_keys, dtype=torch.bool).tril(n_keys - n)
        assert mask is not None
        if prefill == "cut" and n == 1:
            mask = None
        elif prefill == "none" and n > 1:
            mask = torch.ones_like(mask)
        elif prefill == "inverted" and n > 1:
            mask = ~mask
        elif prefill == "strict" and n > 1:
            mask = mask.tril(n_keys - n - 1)
        elif prefill == "first key only" and n == 1:
            mask = torch.ones(n, n_keys, dtype=torch.bool).tril()
        if cache == "new each time":
            kept = model.new_cache()
        logits = model(new, positions, mask, None if cache == "none" else kept)
        place = {"last": -1, "first": 0}[read]
        chosen = logits[:, place : place + 1 or None]
        new = chosen.argmax(-1) if choose == "argmax" else chosen.argmin(-1)
        tokens = torch.cat([tokens, new], 1)
        if fed == "everything":
            new = tokens
    return tokens if returned == "all" else tokens[:, prompt.shape[1] :]


def _read_last_too(model: Any, prompt: Tensor, n_new: int) -> Tensor:
    """Read the last new token, too, whose successor nobody asked for."""
    tokens = grouped_query.decode(model, prompt, n_new)
    model.n_read += 1
    return tokens


def _decode_with_lists(model: Any, prompt: Any, n_new: int) -> Any:
    cache = model.new_cache()
    n = prompt.size(1)
    mask = torch.tril(torch.ones(n, n)).bool()
    logits = model(prompt, torch.arange(n), mask, cache)
    found = [prompt]
    for i in range(n_new):
        found.append(logits[:, -1].argmax(dim=1, keepdim=True))
        if i + 1 < n_new:
            logits = model(found[-1], torch.tensor([n + i]), None, cache)
    return torch.cat(found, dim=1)


def _decode_prompt_token_by_token(model: Any, prompt: Any, n_new: int) -> Any:
    cache = model.new_cache()
    tokens = prompt
    place = 0
    while tokens.shape[1] < prompt.shape[1] + n_new:
        logits = model(tokens[:, place : place + 1], torch.tensor([place]), cache=cache)
        place += 1
        if place == tokens.shape[1]:
            tokens = torch.cat([tokens, logits[:, 0].argmax(-1)[:, None]], 1)
    return tokens


def _decode_reading_the_last(model: Any, prompt: Any, n_new: int) -> Any:
    cache = model.new_cache()
    tokens, new, start = prompt, prompt, 0
    places = torch.arange(prompt.shape[1])
    logits = model(new, places, places[None, :] <= places[:, None], cache)
    start = prompt.shape[1]
    for _ in range(n_new):
        new = torch.argmax(torch.softmax(logits[:, -1:], -1), -1)
        tokens = torch.cat((tokens, new), dim=-1)
        logits = model(new, torch.full((1,), start), torch.ones(1, start + 1, dtype=torch.bool), cache)
        start += 1
    return tokens


def _reads(probe: Probe, got: Outcome, wanted: Outcome) -> str:
    name = "tokens that model has read"
    found, right = got.values.get(name), wanted.values.get(name)
    if not isinstance(found, int) or not isinstance(right, int) or found <= right + 1:
        return ""
    return f"The model has read {found} tokens in each sample; {right} are enough when each is read once."


DECODE = Task(
    id="grouped_query.decode",
    signature="decode(model, prompt, n_new)",
    points=4,
    reference=grouped_query.decode,
    probes=_decode_probes,
    twin=_decode_twin,
    accepts=[_read_last_too],
    forbidden=frozenset({"decode"}),
    properties=[_reads],
    variants=[_decode_with_lists, _decode_prompt_token_by_token, _decode_reading_the_last],
    hints=(
        "The prompt has five tokens. What is the place of the first new token, and which tokens may token 2 of the prompt look at?",
        "Read the prompt once, with a causal mask and the places 0 to L - 1; then one token at a time, at the places L, L + 1, and so on, "
        "with the same cache.",
        "cache = model.new_cache(); new = prompt; place = 0\nrepeat n_new times:\n    logits = model(new, places of new, causal mask for new, cache)\n"
        "    place = place + length of new\n    new = argmax of the logits at the last token, as a column\n    put it behind the tokens\nreturn prompt and new tokens",
    ),
    mistakes=[
        Fault(
            "kv-no-causal-in-prefill",
            "The prompt is read without a causal mask: its tokens see their own future, and leave other keys than in training.",
            "Give the prompt a causal mask; a cache does not bring one.",
            CACHE,
            settings=[{"prefill": "none"}],
        ),
        Fault(
            "mask-causal-inverted",
            "The mask of the prompt is upside down, or hides each token from itself.",
            "Token i may look at 0 to i: torch.ones(L, L, dtype=torch.bool).tril().",
            CACHE,
            settings=[{"prefill": "inverted"}, {"prefill": "strict"}],
        ),
        Fault(
            "kv-mask-top-left",
            "The mask of a new token is aligned to the first key, so it sees the first token only.",
            "A new token may look at everything in the cache and at itself: a row of True.",
            CACHE,
            settings=[{"prefill": "first key only"}],
        ),
        Fault(
            "kv-position-restarts",
            "Each new token gets place 0, as if it were the first of a sequence.",
            "Count on: the first new token stands at place L, the next at L + 1.",
            CACHE,
            settings=[{"places": "restart"}],
        ),
        Fault(
            "kv-position-off",
            "The new tokens get wrong places: one too far, or counted from 1 behind the prompt.",
            "The prompt has the places 0 to L - 1, so the first new token has L.",
            CACHE,
            settings=[{"places": "one late"}, {"places": "by step"}],
        ),
        Fault(
            "kv-cache-not-used",
            "Everything is read again for every new token: the tokens are right, and the cache saves nothing.",
            "Read the prompt once, then give the model only the token that is new, with the same cache.",
            CACHE,
            settings=[
                {"cache": "none", "fed": "everything"},
                {"cache": "new each time", "fed": "everything"},
            ],
        ),
        Fault(
            "kv-cache-fed-twice",
            "The whole sequence is read again with a cache that holds it already, so every token is there several times.",
            "Give the model only the new token.",
            CACHE,
            settings=[{"fed": "everything"}],
        ),
        Fault(
            "kv-cache-lost",
            "The cache is new, or missing, at every step, so a new token sees nothing but itself.",
            "Call new_cache() once, before the loop.",
            CACHE,
            settings=[
                {"cache": "new each time", "prefill": "cut", "fed": "new"},
                {"cache": "none", "prefill": "cut", "fed": "new"},
            ],
        ),
        Fault(
            "dec-reads-first-logits",
            "You read the logits at the first token of the prompt; the next token follows from the last.",
            "Take logits[:, -1].",
            CACHE,
            settings=[{"read": "first"}],
        ),
        Fault(
            "dec-argmin",
            "You take the unlikeliest token.",
            "Take the argmax of the logits.",
            CACHE,
            settings=[{"choose": "argmin"}],
        ),
        Fault(
            "dec-prompt-missing",
            "The prompt is not part of the result.",
            "Return (B, L + n_new): the prompt, then the new tokens.",
            CACHE,
            settings=[{"returned": "new"}],
        ),
        Fault(
            "dec-length-off-by-one",
            "There is one new token too many or too few.",
            "Write n_new tokens.",
            CACHE,
            settings=[{"written": 1}, {"written": -1}],
        ),
    ],
)


# ----- grade this: implementations of attention with shared keys as source text ----------------------------------


def _right_by_interleave(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    n = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(n, dim=1), value.repeat_interleave(n, dim=1)
    scores: Tensor = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    return scores.softmax(dim=-1) @ value


def _right_by_groups(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    b, h, n, d = query.shape
    q = query.reshape(b, key.shape[1], -1, d)
    weights = torch.softmax(q @ key.mT / d**0.5, dim=-1)
    return (weights @ value).reshape(b, h, n, d)


def _right_by_heads(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    share = query.shape[1] // key.shape[1]
    heads = []
    for h in range(query.shape[1]):
        k, v = key[:, h // share], value[:, h // share]
        weights = (query[:, h] @ k.transpose(1, 2) * query.shape[-1] ** -0.5).softmax(-1)
        heads.append(weights @ v)
    return torch.stack(heads, dim=1)


def _wrong_tiled(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    n = query.shape[1] // key.shape[1]
    key, value = key.repeat(1, n, 1, 1), value.repeat(1, n, 1, 1)
    scores: Tensor = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    return scores.softmax(dim=-1) @ value


def _wrong_tiled_values(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    n = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(n, dim=1), value.repeat(1, n, 1, 1)
    scores: Tensor = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    return scores.softmax(dim=-1) @ value


def _wrong_added(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    g = key.shape[1]
    n = query.shape[1] // g
    q = query.unflatten(1, (g, n)).sum(dim=2)
    scores: Tensor = q @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    return (scores.softmax(dim=-1) @ value).repeat_interleave(n, dim=1)


def _wrong_not_repeated(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores: Tensor = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    return scores.softmax(dim=-1) @ value


def _wrong_first_head(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores: Tensor = query @ key[:, :1].transpose(-2, -1) / query.shape[-1] ** 0.5
    return scores.softmax(dim=-1) @ value[:, :1]


def _wrong_exchanged(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    n = key.shape[1]
    heads = torch.arange(query.shape[1]) // n % n
    key, value = key[:, heads], value[:, heads]
    scores: Tensor = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    return scores.softmax(dim=-1) @ value


def _wrong_scale(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    n = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(n, dim=1), value.repeat_interleave(n, dim=1)
    scores: Tensor = query @ key.transpose(-2, -1) / (query.shape[1] * query.shape[-1]) ** 0.5
    return scores.softmax(dim=-1) @ value


def _wrong_axis(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    n = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(n, dim=1), value.repeat_interleave(n, dim=1)
    scores: Tensor = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    return scores.softmax(dim=-2) @ value


def _wrong_length(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    b, h, _, d = query.shape
    n = h // key.shape[1]
    q = query.reshape(b, key.shape[1], n, key.shape[2], d)
    scores = torch.einsum("bgnld,bgsd->bgnls", q, key) / d**0.5
    return torch.einsum("bgnls,bgsd->bgnld", scores.softmax(-1), value).flatten(1, 2)


def _wrong_mean(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    n = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(n, dim=1), value.repeat_interleave(n, dim=1)
    scores: Tensor = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    heads: Tensor = (scores.softmax(dim=-1) @ value).unflatten(1, (-1, n))
    return heads.mean(dim=2, keepdim=True).expand_as(heads).flatten(1, 2)


RIGHT_SPECIMENS = (_right_by_interleave, _right_by_groups, _right_by_heads)
WRONG_SPECIMENS = (
    _wrong_tiled,
    _wrong_tiled_values,
    _wrong_added,
    _wrong_not_repeated,
    _wrong_first_head,
    _wrong_exchanged,
    _wrong_scale,
    _wrong_axis,
    _wrong_length,
    _wrong_mean,
)


def _specimen_probes(generator: torch.Generator) -> list[Probe]:
    return specimen_probes("grouped_attention", RIGHT_SPECIMENS, WRONG_SPECIMENS, generator)


def _question(
    n_heads: int = 6, n_kv_heads: int = 2, n_queries: int = 3, n_keys: int = 4, same_heads: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    query, key, value = (
        2 * randn(generator, 2, *shape, 3)
        for shape in ((n_heads, n_queries), (n_kv_heads, n_keys), (n_kv_heads, n_keys))
    )
    return (
        (query, key[:, :1].expand_as(key), value[:, :1].expand_as(value))
        if same_heads
        else (query, key, value)
    )


def _agrees(attention: Any, question: tuple[Tensor, Tensor, Tensor]) -> bool:
    wanted = grouped_query.grouped_attention(*question)
    got = attention(*question)
    return got.shape == wanted.shape and torch.allclose(got, wanted, atol=1e-5)


def _examine(grouped_attention: Any) -> bool:
    """Accept attention that is right for six heads on two key-value heads."""
    return _agrees(grouped_attention, _question())


def _examine_by_looking(grouped_attention: Any) -> None:
    # Query head h points at key h % 3 of its key-value head, and value (g, s) is the number 10 g + s.
    sharp = 60.0
    query = sharp * torch.eye(3)[torch.arange(6) % 3].reshape(1, 6, 1, 3)
    key = torch.eye(4)[:, :3].expand(1, 2, 4, 3)
    value = (
        torch.tensor([[0.0, 1.0, 2.0, 3.0], [10.0, 11.0, 12.0, 13.0]]).reshape(1, 2, 4, 1).expand(1, 2, 4, 3)
    )
    found = grouped_attention(query, key, value)
    assert found.shape == (1, 6, 1, 3)
    assert torch.allclose(found[0, :, 0, 0], torch.tensor([0.0, 1.0, 2.0, 10.0, 11.0, 12.0]), atol=1e-3)
    # And softly: the scale shows in the odds of two keys, here exp(1) to 1.
    soft = 3**0.5 * torch.tensor([1.0, 0.0, 0.0]).expand(1, 2, 1, 3)
    pair = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]).expand(1, 1, 2, 3)
    weight = grouped_attention(soft, pair, torch.tensor([[1.0], [0.0]]).expand(1, 1, 2, 3))
    assert torch.allclose(weight, torch.full((1, 2, 1, 3), 0.7310586), atol=1e-4)


GRADE_THIS = Task(
    id="grouped_query.grade_this",
    signature="examine(grouped_attention)",
    points=3,
    reference=_examine,
    probes=_specimen_probes,
    variants=[_examine_by_looking],
    hints=(
        "For which H and G do `repeat` and `repeat_interleave` give the same? For which are H / G and G the same number?",
        "Use 1 < G < H with H / G different from G, more keys than queries, all numbers different, and compare with numbers that you "
        "trust: torch's scaled_dot_product_attention with enable_gqa=True, or your own loop over heads.",
        "draw query (2, 6, 3, 4), key and value (2, 2, 5, 4)\nwanted = the attention that you trust\n"
        "return True if the shapes are equal and all numbers are close, else False",
    ),
    mistakes=[
        Fault(
            "test-with-one-key-value-head",
            "Your key-value heads are all one, so nobody can read the wrong one.",
            "Take 1 < G < H: for example six query heads and two key-value heads.",
            SHARE,
            implementations=[lambda f: _agrees(f, _question(n_kv_heads=1))],
        ),
        Fault(
            "test-with-as-many-heads",
            "You have as many key-value heads as heads, so nothing is shared.",
            "Take 1 < G < H: for example six query heads and two key-value heads.",
            SHARE,
            implementations=[lambda f: _agrees(f, _question(n_kv_heads=6))],
        ),
        Fault(
            "test-with-square-of-groups",
            "Your H is the square of G, so H / G and G are the same number, and whoever exchanges them is not seen.",
            "Take sizes where H / G and G differ: six heads on two.",
            SHARE,
            implementations=[lambda f: _agrees(f, _question(4, 2))],
        ),
        Fault(
            "test-with-equal-lengths",
            "You have as many queries as keys, so whoever mixes up the two lengths is not seen.",
            "Take more keys than queries, as with a cache.",
            STEPS,
            implementations=[lambda f: _agrees(f, _question(n_keys=3))],
        ),
        Fault(
            "test-with-equal-heads",
            "Your key-value heads hold the same numbers, so it does not matter which one is read.",
            "Draw other numbers for each head.",
            SHARE,
            implementations=[lambda f: _agrees(f, _question(same_heads=True))],
        ),
        Fault(
            "test-of-shapes-only",
            "You look at the shape; most wrong implementations have the right one.",
            "Compare the numbers.",
            STEPS,
            implementations=[lambda f: f(*_question()).shape == (2, 6, 3, 3)],
        ),
        *verdict_faults(SHARE),
    ],
)


# ----- read a claim ---------------------------------------------------------------------------------------------

_TOKEN = 2 * 32 * 8 * 128 * 2  # bytes of a token in Llama 3 8B
_CLAIM = {
    "patterns": 2.0,
    "ceiling": 2 / 4 + 2 / 4 / 8,
    "key-value heads": 1.0,
    "bytes per token": float(_TOKEN),
    "tokens": 8 * 2**30 / _TOKEN,
    "tokens with 32": 8 * 2**30 / (4 * _TOKEN),
    "scores": 32.0,
}


READ_CLAIM = Task(
    id="grouped_query.read_a_claim",
    signature="answers: a dictionary",
    points=3,
    reference=_CLAIM.get,
    probes=answer_probes(
        {
            "patterns": "how many different attention patterns the friend's layer has in a sample",
            "ceiling": "the best accuracy of a layer that looks at two items and guesses the rest",
            "key-value heads": "the number of key-value heads in multi-query attention",
            "bytes per token": "the bytes that one token leaves behind",
            "tokens": "how many tokens fit into 8 GiB",
            "tokens with 32": "how many tokens would fit if every query head had its own keys and values",
            "scores": "how many scores one layer computes for a new token and one key",
        }
    ),
    is_value=True,
    hints=(
        "Whose queries are there, after the queries of a group have been added?",
        "One pattern for each group is left. Of four answers two are looked up and two are guessed among eight values. A token leaves "
        "a key and a value in every layer, for every key-value head.",
        "ceiling: 2 / 4 * 1 + 2 / 4 * 1 / 8\nbytes: 2 * layers * key-value heads * head size * 2\ntokens: 8 * 2**30 / bytes\n"
        "scores: one for each query head",
    ),
    mistakes=[
        known_answer(
            _CLAIM,
            "patterns",
            4.0,
            "gqa-sums-in-group",
            "You counted the heads that the layer should have; the friend's code adds them up in pairs.",
            "Count the softmaxes that this code computes: one for each group.",
            CASE,
        ),
        known_answer(
            _CLAIM,
            "patterns",
            1.0,
            "mqa-gqa-definitions-swapped",
            "One pattern would be left with a single key-value head; this layer has two.",
            "Count the groups.",
            CASE,
        ),
        known_answer(
            _CLAIM,
            "ceiling",
            0.5,
            "case-guessing-forgotten",
            "You gave no points for guessing; one guess in eight is right.",
            "Add the two guessed answers' share, 2/4 times 1/8.",
            CASE,
        ),
        known_answer(
            _CLAIM,
            "key-value heads",
            32.0,
            "mqa-gqa-definitions-swapped",
            "As many key-value heads as query heads is multi-head attention.",
            "Multi-query attention: many queries, one key-value head.",
            SHARE,
        ),
        known_answer(
            _CLAIM,
            "key-value heads",
            8.0,
            "mqa-gqa-definitions-swapped",
            "Eight key-value heads for 32 query heads is grouped-query attention.",
            "Multi-query attention: many queries, one key-value head.",
            SHARE,
        ),
        known_answer(
            _CLAIM,
            "bytes per token",
            _TOKEN / 2,
            "kv-bytes-of-keys-only",
            "You counted the keys only, or one byte a number.",
            "A token leaves a key and a value, and a number has two bytes here.",
            PRICE,
        ),
        known_answer(
            _CLAIM,
            "bytes per token",
            _TOKEN / 32,
            "kv-bytes-of-one-layer",
            "You counted one layer.",
            "Multiply by the number of layers.",
            PRICE,
        ),
        known_answer(
            _CLAIM,
            "bytes per token",
            _TOKEN * 4.0,
            "gqa-kv-full-width",
            "You counted 32 key-value heads; this model keeps eight.",
            "Only the key-value heads leave something behind.",
            PRICE,
        ),
        known_answer(
            _CLAIM,
            "tokens",
            8e9 / _TOKEN,
            "kv-gigabyte-is-not-gibibyte",
            "You took a GiB for a billion bytes.",
            "A GiB has 2**30 bytes.",
            PRICE,
        ),
        known_answer(
            _CLAIM,
            "scores",
            8.0,
            "gqa-sums-in-group",
            "You counted one score for each key-value head; sharing keys does not share queries.",
            "Every query head computes a score of its own.",
            SHARE,
        ),
    ],
)

TASKS = [CACHE_BYTES, REPEAT_KV, GROUPED, KV_CACHE, MERGE, DECODE, GRADE_THIS, READ_CLAIM]
