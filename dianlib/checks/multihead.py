"""Tasks of the chapter "Multi-head attention": right answers, and the wrong ones that are known."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dianlib import multihead
from dianlib.checks.kinds import (
    DETACHED,
    answer_probes,
    known_answer,
    randn,
    specimen_probes,
    verdict_faults,
    without_gradient,
)
from dianlib.checks.running import Outcome, Probe
from dianlib.checks.task import Fault, Task

READINGS = "multihead: The whole width for every head, or a piece of it?"
SPLIT = "multihead: What do view and transpose do to the numbers?"
MATHS = "multihead: The mathematics, with shapes"
STEPS = "multihead: From eight small matrices to one"
LIBRARY = "multihead: The library version, beside torch"
LEARN = "multihead: What do the heads learn?"
CASE = "multihead: The case, solved"

# The layer of torch is the answer itself; attention for one head is not.
_LAYERS = frozenset({"multi_head_attention_forward", "MultiheadAttention", "_native_multi_head_attention"})


# ----- split_heads ----------------------------------------------------------------------------------------


def _split_probes(generator: torch.Generator) -> list[Probe]:
    def probe(name: str, shape: tuple[int, int, int], n_heads: int, core: bool = False) -> Probe:
        x = torch.randperm(math.prod(shape), generator=generator).float().reshape(shape)
        return Probe(name, {"x": x, "n_heads": n_heads}, gradients=("x",), core=core)

    return [
        probe("two tokens of width 4, two heads", (1, 2, 4), 2, core=True),
        probe("three samples, five tokens, eight heads of 3", (3, 5, 24), 8, core=True),
        probe("as many tokens as heads", (2, 4, 12), 4),
        probe("one head", (2, 3, 5), 1),
        probe("heads of a single number", (2, 6, 3), 3),
    ]


def _split_twin(x: Tensor, n_heads: int, *, cut: str = "columns", detached: bool = False) -> Tensor:
    b, length, width = x.shape
    d = width // n_heads
    right = x.reshape(b, length, n_heads, d).transpose(1, 2)
    if cut == "view":
        right = x.reshape(b, n_heads, length, d)
    elif cut == "no transpose":
        right = right.transpose(1, 2)
    elif cut == "every H-th column":
        right = x.reshape(b, length, d, n_heads).permute(0, 3, 1, 2)
    elif cut == "axes swapped":
        right = right.transpose(2, 3)
    elif cut == "heads first":
        right = right.transpose(0, 1)
    elif cut == "whole width":
        right = x.unsqueeze(1).repeat(1, n_heads, 1, 1)
    elif cut == "sequence":
        right = torch.stack(x.split(math.ceil(length / n_heads), dim=1), dim=1)
    return right.detach() if detached else right


def _split_by_slices(x: Any, n_heads: int) -> Any:
    d = x.shape[-1] // n_heads
    return torch.stack([x[:, :, h * d : (h + 1) * d] for h in range(n_heads)], dim=1)


def _split_by_einsum(x: Any, n_heads: int) -> Any:
    b, n, width = x.shape
    return torch.einsum("blhd->bhld", x.view(b, n, n_heads, width // n_heads)).contiguous()


def _split_by_chunks(x: Any, n_heads: int) -> Any:
    return torch.cat([part.unsqueeze(1) for part in x.chunk(n_heads, dim=2)], dim=1)


SPLIT_HEADS = Task(
    id="multihead.split_heads",
    signature="split_heads(x, n_heads)",
    points=2,
    reference=multihead.split_heads,
    probes=_split_probes,
    twin=_split_twin,
    forbidden=_LAYERS,
    variants=[_split_by_slices, _split_by_einsum, _split_by_chunks],
    hints=(
        "Write down the numbers of one token. Which of them should head 0 get, and which head 1?",
        "Head h gets the columns h d to (h + 1) d - 1 of every token. Cut the last axis first; moving an axis is a second step.",
        "d = width // n_heads\ncut the last axis: (B, L, H, d)\nexchange the axes of length and heads: (B, H, L, d)",
    ),
    mistakes=[
        Fault(
            "mha-split-by-view",
            "You view (B, L, D) as (B, H, L, d) at once: the memory is cut anew, and head 0 holds the first tokens only.",
            "View to (B, L, H, d) first, then exchange the axes 1 and 2 with transpose.",
            SPLIT,
            settings=[{"cut": "view"}],
        ),
        Fault(
            "mha-heads-not-moved",
            "Your heads still stand behind the tokens: (B, L, H, d). Attention would then run over the heads of one token.",
            "Exchange the axes 1 and 2.",
            SPLIT,
            settings=[{"cut": "no transpose"}],
        ),
        Fault(
            "mha-heads-interleaved",
            "A head gets every H-th column; it must get d columns side by side.",
            "Cut the last axis as (H, d), not as (d, H).",
            SPLIT,
            settings=[{"cut": "every H-th column"}],
        ),
        Fault(
            "mha-split-axes-order",
            "The right pieces in another order of the axes; wanted is (B, H, L, d).",
            "Name the axes at each step, and exchange only those of length and heads.",
            SPLIT,
            settings=[{"cut": "axes swapped"}, {"cut": "heads first"}],
        ),
        Fault(
            "mha-full-width-heads",
            "Every head gets the whole width.",
            "A head is d = D / H wide: cut the last axis in H pieces.",
            READINGS,
            settings=[{"cut": "whole width"}],
        ),
        Fault(
            "mha-sequence-cut",
            "You cut the sequence: each head gets some of the tokens, in full width.",
            "Cut the width. Every head sees every token.",
            READINGS,
            settings=[{"cut": "sequence"}],
        ),
        Fault("backward-detached", *DETACHED, SPLIT, settings=[{"detached": True}], sign=without_gradient),
    ],
)


# ----- merge_heads ----------------------------------------------------------------------------------------


def _merge_probes(generator: torch.Generator) -> list[Probe]:
    def probe(name: str, shape: tuple[int, int, int, int], core: bool = False) -> Probe:
        x = torch.randperm(math.prod(shape), generator=generator).float().reshape(shape)
        return Probe(name, {"x": x}, gradients=("x",), core=core)

    return [
        probe("two heads of 2, two tokens", (1, 2, 2, 2), core=True),
        probe("three samples, eight heads of 3, five tokens", (3, 8, 5, 3), core=True),
        probe("as many heads as tokens", (2, 4, 4, 3)),
        probe("one head", (2, 1, 3, 5)),
        probe("heads of a single number", (2, 3, 6, 1)),
    ]


def _merge_twin(x: Tensor, *, join: str = "columns", detached: bool = False) -> Tensor:
    b, n_heads, length, d = x.shape
    joined = {
        "columns": lambda: x.transpose(1, 2).reshape(b, length, n_heads * d),
        "last two": lambda: x.transpose(2, 3).reshape(b, length, n_heads * d),
        "no transpose": lambda: x.reshape(b, length, n_heads * d),
        "every H-th column": lambda: x.permute(0, 2, 3, 1).reshape(b, length, n_heads * d),
        "sum": lambda: x.sum(1),
        "mean": lambda: x.mean(1),
        "along the tokens": lambda: x.reshape(b, n_heads * length, d),
        "not joined": lambda: x.transpose(1, 2),
    }[join]()
    return joined.detach() if detached else joined


def _merge_by_cat(x: Any) -> Any:
    return torch.cat([x[:, h] for h in range(x.shape[1])], dim=-1)


def _merge_by_einsum(x: Any) -> Any:
    y = torch.einsum("bhld->blhd", x).contiguous()
    return y.view(y.shape[0], y.shape[1], -1)


MERGE_HEADS = Task(
    id="multihead.merge_heads",
    signature="merge_heads(x)",
    points=2,
    reference=multihead.merge_heads,
    probes=_merge_probes,
    twin=_merge_twin,
    forbidden=_LAYERS,
    variants=[_merge_by_cat, _merge_by_einsum],
    hints=(
        "Which two axes must stand next to each other before they can become one?",
        "It undoes split_heads: merge_heads(split_heads(x, H)) is x. Exchange the axes of heads and length, then join the last two.",
        "exchange the axes 1 and 2: (B, L, H, d)\njoin the last two axes: (B, L, H d)",
    ),
    mistakes=[
        Fault(
            "mha-merge-transpose-last-two",
            "You swap the last two axes before joining: every number is kept, and none of them is in its place.",
            "Exchange the axes of heads and length, 1 and 2, and then join the last two.",
            SPLIT,
            settings=[{"join": "last two"}],
        ),
        Fault(
            "mha-merge-without-transpose",
            "You reshape (B, H, L, d) without moving an axis: a row of the result holds several tokens of one head.",
            "Exchange the axes 1 and 2 before you reshape.",
            SPLIT,
            settings=[{"join": "no transpose"}],
        ),
        Fault(
            "mha-heads-interleaved",
            "The heads are shuffled like cards: first number of each head, then the second of each. They must lie side by side.",
            "Join (H, d), not (d, H).",
            SPLIT,
            settings=[{"join": "every H-th column"}],
        ),
        Fault(
            "mha-heads-averaged",
            "You add or average the heads; what one of them found can no longer be told from the others.",
            "Lay the heads side by side: the result is H d wide.",
            SPLIT,
            settings=[{"join": "sum"}, {"join": "mean"}],
        ),
        Fault(
            "mha-heads-not-joined",
            "The heads are not joined along the width: each token must become one row of H d numbers.",
            "Exchange the axes 1 and 2, then flatten the last two.",
            SPLIT,
            settings=[{"join": "along the tokens"}, {"join": "not joined"}],
        ),
        Fault("backward-detached", *DETACHED, SPLIT, settings=[{"detached": True}], sign=without_gradient),
    ],
)


# ----- parameter_count ------------------------------------------------------------------------------------


def _count_probes(generator: torch.Generator) -> list[Probe]:
    sizes = [("width 4, two heads", 4, 2), ("width 24, eight heads", 24, 8)]
    sizes += [("width 256, eight heads", 256, 8), ("one head", 10, 1), ("as many heads as numbers", 6, 6)]
    drawn = int(torch.randint(2, 20, (1,), generator=generator))
    sizes += [(f"width {drawn * 12}, twelve heads", drawn * 12, 12)]
    return [
        Probe(name, {"d_model": width, "n_heads": heads}, core=i < 3)
        for i, (name, width, heads) in enumerate(sizes)
    ]


def _count_twin(
    d_model: int,
    n_heads: int,
    *,
    width: str = "D by D",
    bias: str = "each",
    output: str = "counted",
    times: str = "once",
) -> int:
    d = d_model // n_heads
    n_in, n_out = {
        "D by D": (d_model, d_model),
        "d by d": (d, d),
        "D by d": (d_model, d),
        "D by D H": (d_model, d_model * n_heads),
    }[width]
    last_in = n_out if width == "D by D H" else d_model
    biases = {
        "each": (3 * n_out, d_model),
        "none": (0, 0),
        "output only": (0, d_model),
        "inputs only": (3 * n_out, 0),
    }
    inner, last = biases[bias]
    total = 3 * n_in * n_out + inner
    if output == "counted":
        total += last_in * d_model + last
    return total * (n_heads if times == "heads" else 1)


def _count_in_one_line(d_model: int, n_heads: int) -> int:
    return 4 * d_model * (d_model + 1)


def _count_layers(d_model: int, n_heads: int) -> Any:
    layers = [torch.nn.Linear(d_model, d_model) for _ in range(4)]
    return sum(parameter.numel() for layer in layers for parameter in layer.parameters())


def _count_by_heads(d_model: int, n_heads: int) -> float:
    per_head = 3 * (d_model + 1) * (d_model / n_heads)
    return n_heads * per_head + d_model**2 + d_model


PARAMETER_COUNT = Task(
    id="multihead.parameter_count",
    signature="parameter_count(d_model, n_heads)",
    points=2,
    reference=multihead.parameter_count,
    probes=_count_probes,
    twin=_count_twin,
    forbidden=_LAYERS,
    variants=[_count_in_one_line, _count_layers, _count_by_heads],
    hints=(
        "How many numbers does one nn.Linear(n, m) hold, and how many such layers are there?",
        "Four layers map D numbers to D numbers, each with a bias. Cutting the width in heads creates no number and drops none.",
        "one layer: D * D weights and D biases\nthere are four: q_proj, k_proj, v_proj, o_proj",
    ),
    mistakes=[
        Fault(
            "mha-shared-small-projection",
            "You count one small layer of d by d for all heads: that is the layer that cuts first and projects afterwards.",
            "Project the whole width with D by D, then cut.",
            CASE,
            settings=[{"width": "d by d"}],
        ),
        Fault(
            "mha-full-width-heads",
            "You count heads of full width: H matrices of D by D for each of queries, keys and values.",
            "A head is D / H wide, so the H matrices of D by D / H hold D by D numbers together.",
            READINGS,
            settings=[{"width": "D by D H"}],
        ),
        Fault(
            "count-one-head",
            "You count the projections of a single head, D by d.",
            "There are H of them: H d = D.",
            MATHS,
            settings=[{"width": "D by d"}],
        ),
        Fault(
            "heads-are-more-weights",
            "You multiply by the number of heads. More heads are more attention patterns, of the same weights.",
            "Count the four layers once.",
            READINGS,
            settings=[{"times": "heads"}],
        ),
        Fault(
            "count-biases",
            "Some or all biases are missing.",
            "Each of the four layers has D biases.",
            MATHS,
            settings=[{"bias": "none"}, {"bias": "output only"}, {"bias": "inputs only"}],
        ),
        Fault(
            "mha-no-output-projection",
            "The layer after the heads, o_proj, is missing.",
            "Count four layers: q_proj, k_proj, v_proj and o_proj.",
            MATHS,
            settings=[{"output": "left out"}],
        ),
    ],
)


# ----- MultiHeadAttention ---------------------------------------------------------------------------------

_LAYER_NAMES = tuple(f"{layer}_proj.{part}" for layer in "qkvo" for part in ("weight", "bias"))


def _module_probes(generator: torch.Generator) -> list[Probe]:
    def probe(
        name: str,
        sizes: tuple[int, int],
        n: int,
        n_queries: int,
        n_keys: int,
        mask: Tensor | None = None,
        core: bool = False,
        weight: float = 1.0,
    ) -> Probe:
        width = sizes[0]
        state: list[Tensor] = []
        for scale in (2.0, 2.0, 1.0, 1.0):  # large scores: the softmax must not be nearly uniform
            state += [
                randn(generator, width, width) * scale / math.sqrt(width),
                randn(generator, width) * 0.5,
            ]
        args = {
            name: (randn(generator, n, length, width) * 4).round() / 4 + 0.0  # no -0.0 in a report
            for name, length in (("query", n_queries), ("key", n_keys), ("value", n_keys))
        }
        wanted = (*args, "parameters")
        if mask is not None:
            args["mask"] = mask
        return Probe(
            name,
            args,
            build=sizes,
            state=tuple(state),
            names=_LAYER_NAMES,
            gradients=wanted,
            core=core,
            weight=weight,
        )

    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    padding = (torch.arange(7) < torch.tensor([[7], [3], [5]]))[:, None, None, :]
    of_heads = torch.rand(2, 4, 3, 4, generator=generator) < 0.6
    of_heads[..., 0] = True
    return [
        probe("one sample, three tokens of width 6, two heads", (6, 2), 1, 3, 3, core=True),
        probe("three samples, five queries, seven keys, eight heads of 3", (24, 8), 3, 5, 7, core=True),
        probe("a causal mask (5, 5)", (12, 4), 3, 5, 5, causal, weight=2.0),
        probe("a padding mask (3, 1, 1, 7)", (12, 3), 3, 2, 7, padding, weight=2.0),
        probe("a mask of its own for every head", (8, 4), 2, 3, 4, of_heads),
        probe("one sample, one query, one head", (4, 1), 1, 1, 4),
    ]


class _FaultyModule(nn.Module):
    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        projection: str = "full",
        split: str = "columns",
        scale: str = "sqrt d",
        softmax: str = "keys",
        mask: str = "before",
        merge: str = "columns",
        output: str = "o_proj",
        returned: str = "every head",
        source: str = "as given",
        bias: bool = True,
        cut: str = "",
    ) -> None:
        super().__init__()
        self.n_heads, self.d = n_heads, d_model // n_heads
        self.projection, self.split, self.scale, self.axis = projection, split, scale, softmax
        self.how_masked, self.merge, self.output, self.returned = mask, merge, output, returned
        self.source, self.cut = source, cut
        n_in = self.d if projection == "small" else d_model
        n_out = {"small": self.d, "full width": d_model * n_heads}.get(projection, d_model)
        narrow = source == "values of one number"
        n_value = (1 if projection == "small" else n_heads) if narrow else n_out
        self.q_proj = nn.Linear(n_in, n_out, bias)
        self.k_proj = nn.Linear(n_in, n_out, bias)
        self.v_proj = nn.Linear(n_in, n_value, bias)
        if output != "no layer":
            joined = n_heads if narrow else n_out * n_heads if projection == "small" else n_out
            self.o_proj = nn.Linear(joined, d_model, bias)

    def _cut(self, x: Tensor, split: str) -> Tensor:
        b, length, width = x.shape
        d = width // self.n_heads
        if split == "view":
            return x.reshape(b, self.n_heads, length, d)
        if split == "interleaved":
            return x.reshape(b, length, d, self.n_heads).permute(0, 3, 1, 2)
        return x.reshape(b, length, self.n_heads, d).transpose(1, 2)

    def _heads(self, layer: nn.Module, x: Tensor, split: str) -> Tensor:
        if self.projection == "small":
            heads: Tensor = layer(self._cut(x, split))
            return heads
        return self._cut(layer(x), split)

    def _weights(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        axis = {"keys": -1, "queries": -2, "heads": 1, "samples": 0, "none": None}[self.axis]

        def normalised(scores: Tensor) -> Tensor:
            return scores if axis is None else scores.softmax(axis)

        if self.how_masked == "if mask":
            mask = mask or None
        if mask is None or self.how_masked == "ignored":
            return normalised(scores)
        if self.how_masked == "after":
            return normalised(scores).masked_fill(~mask, 0.0)
        forbidden = mask if self.how_masked.startswith("inverted") else ~mask
        low = {"-1e-9": -1e-9, "inverted, -inf": -math.inf}.get(self.how_masked, -1e30)
        return normalised(scores.masked_fill(forbidden, low))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Any:
        if self.source == "query for all":
            key = value = query
        elif self.source == "values from the keys":
            value = key
        k_split = v_split = "columns" if self.split == "queries by view" else self.split
        q_split = "view" if self.split == "queries by view" else self.split
        if self.split == "keys by view":
            q_split, k_split, v_split = "columns", "view", "columns"
        q = self._heads(self.q_proj, query, q_split)
        k = self._heads(self.k_proj, key, k_split)
        v = self._heads(self.v_proj, value, v_split)
        d_model = self.d * self.n_heads
        divisor = {
            "sqrt d": math.sqrt(q.shape[-1]),
            "sqrt D": math.sqrt(d_model),
            "sqrt H": math.sqrt(self.n_heads),
            "none": 1.0,
            "d": float(q.shape[-1]),
            "times": 1 / math.sqrt(q.shape[-1]),
        }[self.scale]
        if self.source == "features":
            weights = self._weights(q.transpose(-2, -1) @ k / divisor, mask)
            heads = v @ weights
        else:
            weights = self._weights(q @ k.transpose(-2, -1) / divisor, mask)
            heads = weights @ v
        b, _, length, _ = heads.shape
        if self.merge == "last two":
            joined = heads.transpose(2, 3).reshape(b, length, -1)
        elif self.merge == "no transpose":
            joined = heads.reshape(b, length, -1)
        elif self.merge == "interleaved":
            joined = heads.permute(0, 2, 3, 1).reshape(b, length, -1)
        elif self.merge == "mean":  # as wide as o_proj wants it
            joined = heads.mean(1).repeat(1, 1, self.n_heads)
        else:
            joined = heads.transpose(1, 2).reshape(b, length, -1)
        if self.output == "discarded":
            joined = query.repeat(1, 1, self.n_heads)[..., : joined.shape[-1]]
        result = self.o_proj(joined) if self.output in ("o_proj", "discarded") else joined
        if self.returned == "mean":
            weights = weights.mean(1)
        if self.cut == "all":
            return result.detach(), weights.detach()
        return result, weights.detach() if self.cut == "weights" else weights


def _form(**setting: Any) -> Any:
    """Make a rarer form of a mistake, which is named alone and not looked for in pairs."""
    return partial(_FaultyModule, **setting)


def _row_sums(probe: Probe, got: Outcome, wanted: Outcome) -> str:
    """Say along which axis the weights sum to one, when it is not the last."""
    weights, right = got.values.get("result[1]"), wanted.values.get("result[1]")
    if not isinstance(weights, Tensor) or not isinstance(right, Tensor) or weights.shape != right.shape:
        return ""
    sums = weights.double().sum(-1)
    off = (sums - 1).abs() > 1e-3
    if not off.any():
        return ""
    place = off.nonzero()[0].tolist()
    names = {2: "the queries", 1: "the heads", 0: "the samples"}
    for axis, name in names.items():
        if weights.shape[axis] > 1 and bool(((weights.double().sum(axis) - 1).abs() < 1e-3).all()):
            return f"The weights sum to 1 over {name}; every row must sum to 1 over the keys."
    return f"Row {place[2]} of head {place[1]}, sample {place[0]}, sums to {float(sums[tuple(place)]):.2f}, not to 1."


def _count(probe: Probe, got: Outcome, wanted: Outcome) -> str:
    """Say that the module has other parameters, or returns its output alone."""
    count, right = got.values.get("number of parameters"), wanted.values.get("number of parameters")
    if count != right:
        return (
            f"parameters() finds {count} numbers; this module has {right}: four layers nn.Linear(D, D) "
            "called q_proj, k_proj, v_proj and o_proj."
        )
    return "It returned one tensor; return the pair (output, weights)." if "result" in got.values else ""


class _ByEinsum(torch.nn.Module):
    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            torch.nn.Linear(d_model, d_model) for _ in range(4)
        )

    def forward(self, query: Any, key: Any, value: Any, mask: Any = None) -> Any:
        q, k, v = (
            layer(x).unflatten(-1, (self.n_heads, -1))
            for layer, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        scores = torch.einsum("blhd,bshd->bhls", q, k) * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores + torch.zeros_like(scores).masked_fill(mask.logical_not(), -1e9)
        weights = torch.softmax(scores, dim=-1)
        return self.o_proj(torch.einsum("bhls,bshd->blhd", weights, v).flatten(2)), weights


class _ByLoops(torch.nn.Module):
    # one head after the other, on slices of the projections
    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.o_proj = torch.nn.Linear(d_model, d_model)
        self.v_proj = torch.nn.Linear(d_model, d_model)
        self.k_proj = torch.nn.Linear(d_model, d_model)
        self.q_proj = torch.nn.Linear(d_model, d_model)
        self.d = d_model // n_heads

    def forward(self, query: Any, key: Any, value: Any, mask: Any = None) -> Any:
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        outputs, maps = [], []
        for number, start in enumerate(range(0, q.shape[-1], self.d)):
            part = slice(start, start + self.d)
            scores = torch.bmm(q[..., part], k[..., part].mT) / self.d**0.5
            if mask is not None:
                allowed = mask.expand(len(q), q.shape[-1] // self.d, *scores.shape[1:])[:, number]
                scores = scores.masked_fill(allowed == 0, -1e4)
            exponentials = torch.exp(scores - scores.amax(-1, keepdim=True))
            maps.append(exponentials / exponentials.sum(-1, keepdim=True))
            outputs.append(maps[-1] @ v[..., part])
        return self.o_proj(torch.cat(outputs, dim=-1)), torch.stack(maps, dim=1)


class _Fused(torch.nn.Module):
    # one layer for queries, keys and values; heads in the batch; torch's kernel for the output
    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.in_proj = torch.nn.Linear(d_model, 3 * d_model)
        self.o_proj = torch.nn.Linear(d_model, d_model)

    def forward(self, query: Any, key: Any, value: Any, mask: Any = None) -> Any:
        w, b = self.in_proj.weight.chunk(3), self.in_proj.bias.chunk(3)
        q, k, v = (
            torch.nn.functional.linear(x, w[i], b[i])
            .view(x.shape[0], x.shape[1], self.n_heads, -1)
            .transpose(1, 2)
            for i, x in enumerate((query, key, value))
        )
        scores = (q @ k.transpose(2, 3)) / (q.shape[3] ** 0.5)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(mixed.transpose(1, 2).reshape(query.shape)), scores.softmax(-1)


MODULE = Task(
    id="multihead.MultiHeadAttention",
    signature="MultiHeadAttention(d_model, n_heads)",
    points=6,
    reference=multihead.MultiHeadAttention,
    probes=_module_probes,
    twin=_FaultyModule,
    # Weights that are only looked at need no gradient.
    accepts=[lambda d_model, n_heads: _FaultyModule(d_model, n_heads, cut="weights")],
    forbidden=_LAYERS,
    properties=[_count, _row_sums],
    variants=[_ByEinsum, _ByLoops, _Fused],
    hints=(
        "Which of these comes first, and why: cutting the width in heads, or the projection?",
        "Project the whole width, then cut. Attend in all heads at once, over the last axis, with the root of the width of a head. "
        "Join the heads, then apply o_proj.",
        "q, k, v = split_heads(q_proj(query)), split_heads(k_proj(key)), split_heads(v_proj(value))\n"
        "scores = q k^T / sqrt(d); where mask is False, a very low number\nweights = softmax over the keys\n"
        "return o_proj(merge_heads(weights v)), weights",
    ),
    mistakes=[
        Fault(
            "mha-shared-small-projection",
            "You cut first and project afterwards: all heads share one small matrix of d by d, and each sees its own slice only.",
            "Project the whole width with nn.Linear(D, D), then cut the result in heads.",
            CASE,
            settings=[{"projection": "small"}],
        ),
        Fault(
            "mha-full-width-heads",
            "Your heads have the full width: queries, keys and values are H D wide, with H times the parameters.",
            "A head is D / H wide. Use nn.Linear(D, D) and cut its result.",
            READINGS,
            settings=[{"projection": "full width"}],
        ),
        Fault(
            "mha-value-width-one",
            "The values are one number wide in each head, so a head returns a single number for a token.",
            "Give the values the width D / H, too.",
            MATHS,
            implementations=[_form(source="values of one number")],
        ),
        Fault(
            "mha-split-by-view",
            "Queries, keys or values are viewed as (B, H, L, d) at once, which cuts the sequence: head 0 holds the first tokens only.",
            "View to (B, L, H, d), then exchange the axes 1 and 2.",
            SPLIT,
            settings=[{"split": "view"}],
            implementations=[_form(split="keys by view"), _form(split="queries by view")],
        ),
        Fault(
            "mha-heads-interleaved",
            "A head takes every H-th column, or the heads are joined so; here a head is d columns side by side.",
            "Cut the last axis as (H, d), and join it so.",
            SPLIT,
            settings=[{"split": "interleaved", "merge": "interleaved"}],
            implementations=[_form(split="interleaved"), _form(merge="interleaved")],
        ),
        Fault(
            "mha-merge-transpose-last-two",
            "Before joining the heads you swap the last two axes: every number is kept, and none is in its place.",
            "Exchange the axes of heads and length, 1 and 2, and then join the last two.",
            SPLIT,
            settings=[{"merge": "last two"}],
        ),
        Fault(
            "mha-merge-without-transpose",
            "You reshape the heads (B, H, L, d) to (B, L, D) without moving an axis: a row then holds several tokens of one head.",
            "Exchange the axes 1 and 2 before you join.",
            SPLIT,
            settings=[{"merge": "no transpose"}],
        ),
        Fault(
            "mha-heads-averaged",
            "The heads are averaged before o_proj, so it cannot tell them apart.",
            "Lay the heads side by side: the input of o_proj is H d wide.",
            SPLIT,
            implementations=[_form(merge="mean")],
        ),
        Fault(
            "sdpa-scale-sqrt-embed",
            "The scores are divided by the root of the model's width D, or of the number of heads.",
            "Divide by the root of the width of one head, d = D / H.",
            MATHS,
            settings=[{"scale": "sqrt D"}],
            implementations=[_form(scale="sqrt H")],
        ),
        Fault(
            "sdpa-no-scale",
            "The scores are not divided at all: the softmax is too sharp.",
            "Divide by the root of the width of one head.",
            MATHS,
            settings=[{"scale": "none"}],
        ),
        Fault(
            "sdpa-scale-by-d",
            "The scores are divided by d, or multiplied by its root; the standard deviation of a dot product is the root of d.",
            "Divide by the root of d.",
            MATHS,
            settings=[{"scale": "d"}],
            implementations=[_form(scale="times")],
        ),
        Fault(
            "sdpa-softmax-wrong-axis",
            "The softmax runs over the queries, the heads or the samples.",
            "Normalise over the keys, the last axis: dim=-1.",
            MATHS,
            settings=[{"softmax": "queries"}],
            implementations=[_form(softmax="heads"), _form(softmax="samples")],
        ),
        Fault(
            "sdpa-no-softmax",
            "The scores are used as they are; weights can be negative and do not sum to 1.",
            "Apply the softmax over the keys.",
            MATHS,
            settings=[{"softmax": "none"}],
        ),
        Fault(
            "sdpa-feature-attention",
            "Your matrix compares features, d by d; it must compare tokens.",
            "Multiply queries with transposed keys: (L, d) times (d, S) is (L, S).",
            MATHS,
            settings=[{"source": "features"}],
        ),
        Fault(
            "mask-never-applied",
            "The result is the same with and without the mask: it is not used, or a number as small as -1e-9 is added.",
            "Where the mask is False, set the score to a very low number before the softmax.",
            MATHS,
            settings=[{"mask": "ignored"}],
        ),
        Fault(
            "mask-minus-1e-9",
            "Forbidden scores become -1e-9, which is almost zero: exp(0) = 1, and the weight stays.",
            "You meant -1e9, or minus infinity.",
            MATHS,
            settings=[{"mask": "-1e-9"}],
        ),
        Fault(
            "mask-polarity",
            "The mask is turned round: you attend where it says False.",
            "True means: may attend. Fill the scores where the mask is False.",
            MATHS,
            settings=[{"mask": "inverted"}],
            implementations=[_form(mask="inverted, -inf")],
        ),
        Fault(
            "mask-after-softmax",
            "The mask acts after the softmax, so the rows no longer sum to 1.",
            "Mask the scores first, normalise afterwards.",
            MATHS,
            settings=[{"mask": "after"}],
        ),
        Fault(
            "mask-tensor-truthiness",
            "You write `if mask:`, which asks a whole tensor for one truth value and fails as soon as it has two.",
            "Write `if mask is not None:`.",
            MATHS,
            implementations=[_form(mask="if mask")],
        ),
        Fault(
            "mha-no-output-projection",
            "The joined heads are returned as they are: o_proj is missing, so the heads are never mixed.",
            "Return o_proj(merge_heads(heads)).",
            MATHS,
            settings=[{"output": "not used"}],
            implementations=[_form(output="no layer")],
        ),
        Fault(
            "mha-attention-output-discarded",
            "The heads are computed, and then o_proj is applied to the input: nothing of the attention reaches the output.",
            "Apply o_proj to the joined heads.",
            MATHS,
            settings=[{"output": "discarded"}],
        ),
        Fault(
            "mha-weights-averaged",
            "You return the mean of the heads' weights, (B, L, S), as torch's layer does unless told otherwise.",
            "Return the weights of every head, (B, H, L, S).",
            LEARN,
            settings=[{"returned": "mean"}],
        ),
        Fault(
            "mha-self-attention-only",
            "Keys or values come from the wrong argument, so that only self-attention is right.",
            "Project three arguments: q_proj(query), k_proj(key), v_proj(value).",
            MATHS,
            settings=[{"source": "query for all"}],
            implementations=[_form(source="values from the keys")],
        ),
        Fault(
            "mha-without-biases",
            "Your four layers have no biases.",
            "Leave nn.Linear its bias: bias=True is what it does unless it is told otherwise.",
            MATHS,
            implementations=[_form(bias=False)],
        ),
        Fault("backward-detached", *DETACHED, STEPS, settings=[{"cut": "all"}], sign=without_gradient),
    ],
)


# ----- head_contributions ---------------------------------------------------------------------------------


def _contribution_probes(generator: torch.Generator) -> list[Probe]:
    def probe(name: str, shape: tuple[int, int, int, int], core: bool = False) -> Probe:
        _, n_heads, _, d = shape
        width = n_heads * d
        args = {
            "heads": (randn(generator, *shape) * 4).round() / 4,
            "o_weight": (randn(generator, width, width) * 4).round() / 4,
        }
        return Probe(name, args, gradients=tuple(args), core=core)

    return [
        probe("one sample, two heads of 2, one token", (1, 2, 1, 2), core=True),
        probe("three samples, eight heads of 3, five tokens", (3, 8, 5, 3), core=True),
        probe("as many heads as numbers in a head", (2, 3, 3, 3)),
        probe("one head", (2, 1, 4, 5)),
    ]


def _contribution_twin(
    heads: Tensor, o_weight: Tensor, *, block: str = "columns", result: str = "apart", detached: bool = False
) -> Tensor:
    _, n_heads, _, d = heads.shape
    width = n_heads * d
    matrices = {  # (H, d, D): what the numbers of head h are multiplied with
        "columns": lambda: o_weight.T.reshape(n_heads, d, width),
        "rows": lambda: o_weight.reshape(n_heads, d, width),
        "every H-th column": lambda: o_weight.T.reshape(d, n_heads, width).transpose(0, 1),
        "view": lambda: o_weight.reshape(n_heads, width, d).transpose(1, 2),
        "first block": lambda: o_weight.T.reshape(n_heads, d, width)[:1].repeat(n_heads, 1, 1),
    }[block]()
    apart = heads @ matrices
    found = {
        "apart": lambda: apart,
        "summed": lambda: apart.sum(1),
        "divided": lambda: apart / n_heads,
        "own columns": lambda: torch.diagonal(apart.unflatten(-1, (n_heads, d)), 0, 1, 3).movedim(-1, 1),
    }[result]()
    return found.detach() if detached else found


def _contributions_by_loop(heads: Any, o_weight: Any) -> Any:
    _, n_heads, _, d = heads.shape
    return torch.stack([heads[:, h] @ o_weight[:, h * d : h * d + d].t() for h in range(n_heads)], dim=1)


def _contributions_by_silencing(heads: Any, o_weight: Any) -> Any:
    # every head but one is set to zero, then the whole layer is applied
    n_heads = heads.shape[1]
    parts = []
    for h in range(n_heads):
        only = torch.zeros(n_heads)
        only[h] = 1
        joined = (heads * only[None, :, None, None]).transpose(1, 2).flatten(2)
        parts.append(torch.nn.functional.linear(joined, o_weight))
    return torch.stack(parts, 1)


CONTRIBUTIONS = Task(
    id="multihead.head_contributions",
    signature="head_contributions(heads, o_weight)",
    points=3,
    reference=multihead.head_contributions,
    probes=_contribution_probes,
    twin=_contribution_twin,
    forbidden=_LAYERS,
    variants=[_contributions_by_loop, _contributions_by_silencing],
    hints=(
        "Set all heads but one to zero. Which columns of o_weight still matter?",
        "nn.Linear computes joined @ o_weight.T. The numbers of head h stand in columns h d to (h + 1) d - 1 of the joined row, "
        "so they meet the same columns of o_weight.",
        "for each head h: block = o_weight[:, h * d : (h + 1) * d], of shape (D, d)\n"
        "its contribution is heads[:, h] @ block.T, of shape (B, L, D)\nstack them along axis 1",
    ),
    mistakes=[
        Fault(
            "mha-output-block-rows",
            "You take d rows of o_weight for a head; nn.Linear stores its weight as (out, in), so a head owns d columns.",
            "Take o_weight[:, h * d : (h + 1) * d].",
            STEPS,
            settings=[{"block": "rows"}],
        ),
        Fault(
            "mha-heads-interleaved",
            "You give a head every H-th column of o_weight; its numbers lie side by side.",
            "Take d columns in a row.",
            SPLIT,
            settings=[{"block": "every H-th column"}],
        ),
        Fault(
            "mha-split-by-view",
            "You view o_weight as (H, D, d) at once, which mixes its rows.",
            "Slice its columns, or cut the last axis first and move the axis afterwards.",
            SPLIT,
            settings=[{"block": "view"}],
        ),
        Fault(
            "mha-one-output-block",
            "Every head is multiplied with the first block of o_weight.",
            "Give each head its own columns.",
            STEPS,
            settings=[{"block": "first block"}],
        ),
        Fault(
            "mha-heads-averaged",
            "The contributions are added, or divided by the number of heads; wanted is what each head adds.",
            "Keep the axis of the heads: (B, H, L, D). Their sum is the output.",
            STEPS,
            settings=[{"result": "summed"}, {"result": "divided"}],
        ),
        Fault(
            "mha-output-not-mixed",
            "You keep only the head's own d places of the output; o_proj writes each head to all D places.",
            "Return all D numbers for every head.",
            STEPS,
            settings=[{"result": "own columns"}],
        ),
        Fault("backward-detached", *DETACHED, STEPS, settings=[{"detached": True}], sign=without_gradient),
    ],
)


# ----- head_distances -------------------------------------------------------------------------------------


def _distance_probes(generator: torch.Generator) -> list[Probe]:
    def probe(name: str, shape: tuple[int, int, int, int], core: bool = False) -> Probe:
        return Probe(name, {"weights": (randn(generator, *shape) * 2).softmax(-1)}, core=core)

    disjoint = torch.zeros(1, 2, 2, 4)
    disjoint[0, 0, :, 0], disjoint[0, 1, :, 3] = 1, 1
    return [
        Probe("two heads that look at different tokens", {"weights": disjoint}, core=True),
        probe("three samples, four heads, five queries, seven keys", (3, 4, 5, 7), core=True),
        probe("two samples, three heads, six tokens", (2, 3, 6, 6)),
        probe("one head", (2, 1, 3, 4)),
    ]


def _distance_twin(
    weights: Tensor, *, measure: str = "total variation", half: bool = True, mean: str = "last"
) -> Tensor:
    if mean == "samples first":
        weights = weights.mean(0, keepdim=True)
    elif mean == "queries first":
        weights = weights.mean(2, keepdim=True)
    elif mean == "softmax again":
        weights = weights.softmax(-1)
    a, b = weights.unsqueeze(2), weights.unsqueeze(1)
    rows = {
        "total variation": lambda: (a - b).abs().sum(-1),
        "mean over keys": lambda: (a - b).abs().mean(-1),
        "signed": lambda: (a - b).sum(-1),
        "squares": lambda: (a - b).square().sum(-1),
        "Euclid": lambda: (a - b).square().sum(-1).sqrt(),
        "largest": lambda: (a - b).abs().amax(-1),
        "overlap": lambda: 2 * torch.minimum(a, b).sum(-1),
        "cosine": lambda: 2 * (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt(),
    }[measure]()
    found = rows.sum((0, 3)) if mean == "summed" else rows.mean((0, 3))
    return found / 2 if half else found


def _distances_by_loops(weights: Any) -> Any:
    b, n_heads, n_queries, _ = weights.shape
    found = torch.zeros(n_heads, n_heads)
    for g in range(n_heads):
        for h in range(n_heads):
            for sample in weights.unbind(0):
                found[g, h] += (sample[g] - sample[h]).clamp(min=0).sum() / (b * n_queries)
    return found


def _distances_by_cdist(weights: Any) -> Any:
    rows = weights.permute(0, 2, 1, 3).flatten(0, 1)
    distances: Tensor = torch.cdist(rows, rows, p=1)
    return distances.mean(dim=0) * 0.5


DISTANCES = Task(
    id="multihead.head_distances",
    signature="head_distances(weights)",
    points=3,
    reference=multihead.head_distances,
    probes=_distance_probes,
    twin=_distance_twin,
    forbidden=_LAYERS,
    variants=[_distances_by_loops, _distances_by_cdist],
    hints=(
        "Two rows of weights both sum to 1. How much would you have to move to turn one into the other?",
        "For one query: half the sum over the keys of the absolute difference. Then the mean over samples and queries, for each pair of heads.",
        "for each pair of heads g, h: difference = |weights[:, g] - weights[:, h]|\nsum over the keys, divide by 2\n"
        "mean over samples and queries; the result is (H, H)",
    ),
    mistakes=[
        Fault(
            "distance-without-half",
            "Heads that look at different tokens get 2: what leaves one token and arrives at another is counted twice.",
            "Divide by 2.",
            LEARN,
            settings=[{"half": False}],
        ),
        Fault(
            "distance-mean-over-keys",
            "You take the mean over the keys, so that longer sequences look more alike.",
            "Sum over the keys; take the mean over samples and queries only.",
            LEARN,
            settings=[{"measure": "mean over keys"}],
        ),
        Fault(
            "distance-signed",
            "Differences without their absolute value cancel: two rows both sum to 1, so this is always 0.",
            "Take the absolute value before you sum.",
            LEARN,
            settings=[{"measure": "signed"}],
        ),
        Fault(
            "distance-other-measure",
            "You measure squares, a length or the largest difference; asked for is the share that has to move.",
            "Sum the absolute differences over the keys.",
            LEARN,
            settings=[{"measure": "squares"}, {"measure": "Euclid"}, {"measure": "largest"}],
        ),
        Fault(
            "distance-is-similarity",
            "You measure how alike the heads are: the diagonal, each head with itself, must be 0.",
            "Return a distance: 0 for the same, 1 for disjoint.",
            LEARN,
            settings=[{"measure": "overlap"}, {"measure": "cosine"}],
        ),
        Fault(
            "distance-of-mean-maps",
            "You average the maps over samples or queries first, and compare afterwards: differences cancel.",
            "Compare row by row, and average the distances.",
            LEARN,
            settings=[{"mean": "samples first"}, {"mean": "queries first"}],
        ),
        Fault(
            "distance-summed",
            "You sum over samples and queries, so that the number grows with the data.",
            "Take the mean.",
            LEARN,
            settings=[{"mean": "summed"}],
        ),
        Fault(
            "softmax-twice",
            "The weights are probabilities already; a second softmax makes them nearly equal.",
            "Compare the weights as they come.",
            LEARN,
            settings=[{"mean": "softmax again"}],
        ),
    ],
)


# ----- grade this: implementations as source text -----------------------------------------------------------


def _right_matrices(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor, n_heads: int) -> Tensor:
    b, n, width = x.shape
    q, k, v = ((x @ w).reshape(b, n, n_heads, -1).transpose(1, 2) for w in (w_q, w_k, w_v))
    weights = torch.softmax(q @ k.transpose(2, 3) / (width // n_heads) ** 0.5, dim=-1)
    return (weights @ v).transpose(1, 2).reshape(b, n, width) @ w_o


def _right_loop(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor, n_heads: int) -> Tensor:
    d = x.shape[-1] // n_heads
    heads = []
    for start in range(0, x.shape[-1], d):
        q, k, v = (x @ w[:, start : start + d] for w in (w_q, w_k, w_v))
        heads.append((q @ k.mT / d**0.5).softmax(-1) @ v)
    return torch.cat(heads, -1) @ w_o


def _right_sum_of_heads(
    x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor, n_heads: int
) -> Tensor:
    d = x.shape[-1] // n_heads
    result = torch.zeros_like(x)
    for h in range(n_heads):
        own = slice(h * d, (h + 1) * d)
        scores = torch.einsum("bld,bsd->bls", x @ w_q[:, own], x @ w_k[:, own]) * d**-0.5
        result = result + scores.softmax(dim=2) @ (x @ (w_v[:, own] @ w_o[own]))
    return result


def _wrong_merge(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor, n_heads: int) -> Tensor:
    b, n, width = x.shape
    q, k, v = ((x @ w).reshape(b, n, n_heads, -1).transpose(1, 2) for w in (w_q, w_k, w_v))
    weights = torch.softmax(q @ k.transpose(2, 3) / (width // n_heads) ** 0.5, dim=-1)
    return (weights @ v).transpose(2, 3).reshape(b, n, width) @ w_o


def _wrong_split(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor, n_heads: int) -> Tensor:
    b, n, width = x.shape
    q, k, v = ((x @ w).reshape(b, n_heads, n, -1) for w in (w_q, w_k, w_v))
    weights = torch.softmax(q @ k.transpose(2, 3) / (width // n_heads) ** 0.5, dim=-1)
    return (weights @ v).transpose(1, 2).reshape(b, n, width) @ w_o


def _wrong_small(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor, n_heads: int) -> Tensor:
    b, n, width = x.shape
    d = width // n_heads
    pieces = x.reshape(b, n, n_heads, d).transpose(1, 2)
    q, k, v = (pieces @ w[:d, :d] for w in (w_q, w_k, w_v))
    weights = torch.softmax(q @ k.transpose(2, 3) / d**0.5, dim=-1)
    return (weights @ v).transpose(1, 2).reshape(b, n, width) @ w_o


def _wrong_scale(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor, n_heads: int) -> Tensor:
    b, n, width = x.shape
    q, k, v = ((x @ w).reshape(b, n, n_heads, -1).transpose(1, 2) for w in (w_q, w_k, w_v))
    weights = torch.softmax(q @ k.transpose(2, 3) / width**0.5, dim=-1)
    return (weights @ v).transpose(1, 2).reshape(b, n, width) @ w_o


def _wrong_no_scale(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor, n_heads: int) -> Tensor:
    b, n, width = x.shape
    q, k, v = ((x @ w).reshape(b, n, n_heads, -1).transpose(1, 2) for w in (w_q, w_k, w_v))
    weights = torch.softmax(q @ k.transpose(2, 3), dim=-1)
    return (weights @ v).transpose(1, 2).reshape(b, n, width) @ w_o


def _wrong_axis(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor, n_heads: int) -> Tensor:
    b, n, width = x.shape
    q, k, v = ((x @ w).reshape(b, n, n_heads, -1).transpose(1, 2) for w in (w_q, w_k, w_v))
    weights = torch.softmax(q @ k.transpose(2, 3) / (width // n_heads) ** 0.5, dim=-2)
    return (weights @ v).transpose(1, 2).reshape(b, n, width) @ w_o


def _wrong_over_heads(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor, n_heads: int) -> Tensor:
    b, n, width = x.shape
    q, k, v = ((x @ w).reshape(b, n, n_heads, -1) for w in (w_q, w_k, w_v))
    weights = torch.softmax(q @ k.transpose(2, 3) / (width // n_heads) ** 0.5, dim=-1)
    return (weights @ v).reshape(b, n, width) @ w_o


def _wrong_no_output(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor, n_heads: int) -> Tensor:
    b, n, width = x.shape
    q, k, v = ((x @ w).reshape(b, n, n_heads, -1).transpose(1, 2) for w in (w_q, w_k, w_v))
    weights = torch.softmax(q @ k.transpose(2, 3) / (width // n_heads) ** 0.5, dim=-1)
    return (weights @ v).transpose(1, 2).reshape(b, n, width)


def _wrong_not_joined(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor, n_heads: int) -> Tensor:
    b, n, width = x.shape
    q, k, v = ((x @ w).reshape(b, n, n_heads, -1).transpose(1, 2) for w in (w_q, w_k, w_v))
    weights = torch.softmax(q @ k.transpose(2, 3) / (width // n_heads) ** 0.5, dim=-1)
    return weights @ v


def _wrong_discarded(x: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor, n_heads: int) -> Tensor:
    b, n, width = x.shape
    q, k, v = ((x @ w).reshape(b, n, n_heads, -1).transpose(1, 2) for w in (w_q, w_k, w_v))
    weights = torch.softmax(q @ k.transpose(2, 3) / (width // n_heads) ** 0.5, dim=-1)
    (weights @ v).transpose(1, 2).reshape(b, n, width)
    return x @ w_o


RIGHT_SPECIMENS = (_right_matrices, _right_loop, _right_sum_of_heads)
WRONG_SPECIMENS = (
    _wrong_merge,
    _wrong_split,
    _wrong_small,
    _wrong_scale,
    _wrong_no_scale,
    _wrong_axis,
    _wrong_over_heads,
    _wrong_no_output,
    _wrong_not_joined,
    _wrong_discarded,
)


def _specimen_probes(generator: torch.Generator) -> list[Probe]:
    return specimen_probes("multi_head_attention", RIGHT_SPECIMENS, WRONG_SPECIMENS, generator)


def _question(length: int = 5, width: int = 12, n_heads: int = 4, scale: float = 0.6) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(3)
    x = randn(generator, 3, length, width)
    w_q, w_k, w_v, w_o = (scale * randn(generator, width, width) for _ in range(4))
    return x, w_q, w_k, w_v, w_o, n_heads


def _agrees(attend: Any, question: tuple[Any, ...]) -> bool:
    wanted = _right_loop(*question)
    got = attend(*question)
    return bool(got.shape == wanted.shape and torch.allclose(got, wanted, atol=1e-4))


def _examine(multi_head_attention: Any) -> bool:
    """Accept what agrees with one head after the other, for several heads, tokens and uneven scores."""
    return _agrees(multi_head_attention, _question())


def _examine_with_torch(multi_head_attention: Any) -> None:
    torch.manual_seed(1)
    layer = torch.nn.MultiheadAttention(6, 3, bias=False, batch_first=True)
    x = torch.randn(2, 4, 6)
    with torch.no_grad():
        layer.in_proj_weight.mul_(3)
        w_q, w_k, w_v = (w.T for w in layer.in_proj_weight.chunk(3))
        wanted, _ = layer(x, x, x)
        got = multi_head_attention(x, w_q, w_k, w_v, layer.out_proj.weight.T, 3)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def _shapes_only(multi_head_attention: Any) -> bool:
    question = _question()
    return bool(multi_head_attention(*question).shape == question[0].shape)


def _moves_with_tokens(multi_head_attention: Any) -> bool:
    x, *rest = _question()
    moved = multi_head_attention(x.flip(1), *rest)
    return bool(torch.allclose(moved, multi_head_attention(x, *rest).flip(1), atol=1e-4))


def _equal_tokens(multi_head_attention: Any) -> bool:
    x, *rest = _question()
    return _agrees(multi_head_attention, (x[:, :1].expand_as(x).contiguous(), *rest))


GRADE_THIS = Task(
    id="multihead.grade_this",
    signature="examine(multi_head_attention)",
    points=3,
    reference=_examine,
    probes=_specimen_probes,
    variants=[_examine_with_torch],
    hints=(
        "Which mistakes can nobody see with one head? Which with one token, or with tokens that are all equal?",
        "Compare numbers, not shapes: with several samples, tokens and heads, weights that are not small, and a result that you trust, "
        "for example one head after the other, or torch's layer with your weights copied into it.",
        "draw x of shape (3, 5, 12) and four weights (12, 12); n_heads = 4\nwanted = for each head: softmax(q k^T / sqrt(3)) v on its own "
        "columns; join, times w_o\nreturn True if the result is close to wanted, else False",
    ),
    mistakes=[
        Fault(
            "mha-no-oracle",
            "You look at the shape only. Nearly every wrong implementation returns the right shape.",
            "Compare numbers with an implementation that you trust.",
            LIBRARY,
            implementations=[_shapes_only],
        ),
        Fault(
            "test-with-one-head",
            "With one head there is nothing to split or to join, and wrong cutting goes unseen.",
            "Use several heads.",
            SPLIT,
            implementations=[lambda attend: _agrees(attend, _question(n_heads=1))],
        ),
        Fault(
            "test-with-one-token",
            "With a single token every weight is 1, and every order of the axes is the same.",
            "Use several tokens.",
            SPLIT,
            implementations=[lambda attend: _agrees(attend, _question(length=1))],
        ),
        Fault(
            "test-with-equal-tokens",
            "All tokens are equal, or the weights are zero, so that attention is uniform and any scale or axis of the softmax will do.",
            "Use different tokens, and weights that make the attention uneven.",
            MATHS,
            implementations=[_equal_tokens],
        ),
        Fault(
            "test-of-order-only",
            "You test that the output moves with its tokens. That is true of many wrong implementations.",
            "Compare numbers with an implementation that you trust.",
            LIBRARY,
            implementations=[_moves_with_tokens],
        ),
        *verdict_faults(LIBRARY),
    ],
)


# ----- read claims ------------------------------------------------------------------------------------------

_CLAIMS = {
    "weights of the class": 3 * 64 * 64,
    "weights of the paper": 3 * 384 * 384,
    "heads that change": 1,
    "heads that should change": 6,
    "too flat": math.sqrt(6),
    "mean of a sharp head": 1 / 6,
    "full width": 6,
}


READ_CLAIMS = Task(
    id="multihead.read_claims",
    signature="answers: a dictionary",
    points=3,
    reference=_CLAIMS.get,
    accepts=[{**_CLAIMS, "too flat": 2.4495}.get, {**_CLAIMS, "too flat": 2.449}.get],
    probes=answer_probes(
        {
            "weights of the class": "how many weights the three layers of the class hold",
            "weights of the paper": "how many weights the paper's three projections hold",
            "heads that change": "in how many heads of the class the attention changes",
            "heads that should change": "in how many heads it should change",
            "too flat": "by which factor all scores are too small",
            "mean of a sharp head": "what the mean map shows of one sharp head",
            "full width": "how many times as many weights the heads of full width have",
        }
    ),
    is_value=True,
    hints=(
        "What does each of the three layers see: the whole token, or a piece of it?",
        "The class cuts first, so its layers map 64 numbers to 64. The paper maps 384 to 384, and every head reads all 384.",
        "class: 3 * 64 * 64; paper: 3 * 384 * 384\nchange: only the head with that slice; in the paper every head\n"
        "flat: sqrt(384) / sqrt(64); mean: 1 of 6 heads\nfull width: 6 matrices of 384 by 384 against 6 of 384 by 64",
    ),
    mistakes=[
        known_answer(
            _CLAIMS,
            "weights of the class",
            3 * 6 * 64 * 64,
            "claims-layers-counted-per-head",
            "You counted one small layer for each head. The class has a single one, which all heads share.",
            "Count what stands in __init__: three layers of 64 by 64.",
            CASE,
        ),
        known_answer(
            _CLAIMS,
            "weights of the class",
            4 * 64 * 64,
            "claims-output-counted",
            "You counted four layers; the question is about queries, keys and values.",
            "Count three layers.",
            CASE,
        ),
        known_answer(
            _CLAIMS,
            "weights of the paper",
            4 * 384 * 384,
            "claims-output-counted",
            "You counted four layers; the question is about queries, keys and values.",
            "Count three layers.",
            READINGS,
        ),
        known_answer(
            _CLAIMS,
            "weights of the paper",
            3 * 384 * 64,
            "count-one-head",
            "You counted the projections of one head.",
            "There are six heads: 6 times 384 by 64.",
            READINGS,
        ),
        known_answer(
            _CLAIMS,
            "weights of the paper",
            3 * 6 * 384 * 384,
            "mha-full-width-heads",
            "You counted heads of full width.",
            "In the paper a head is D / H wide.",
            READINGS,
        ),
        known_answer(
            _CLAIMS,
            "heads that change",
            6,
            "claims-slice-seen-by-all",
            "In the class a head reads its own slice of the token; the others cannot notice a change there.",
            "Follow columns 0 to 63 through the reshape.",
            CASE,
        ),
        known_answer(
            _CLAIMS,
            "heads that should change",
            1,
            "claims-slice-seen-by-one",
            "In the paper every head projects the whole token, so every head can notice.",
            "Project first, then cut.",
            READINGS,
        ),
        known_answer(
            _CLAIMS,
            "too flat",
            6.0,
            "claims-root-forgotten",
            "You divided the widths; both stand under a root.",
            "Compute sqrt(384) / sqrt(64).",
            MATHS,
        ),
        known_answer(
            _CLAIMS,
            "too flat",
            1 / math.sqrt(6),
            "claims-factor-turned",
            "This is the share that is left; asked is how many times too small the scores are.",
            "Turn the fraction round.",
            MATHS,
        ),
        known_answer(
            _CLAIMS,
            "too flat",
            math.sqrt(64),
            "claims-root-of-the-head",
            "This is the right divisor, not the ratio of the two.",
            "Divide the wrong divisor by the right one.",
            MATHS,
        ),
        known_answer(
            _CLAIMS,
            "mean of a sharp head",
            1.0,
            "claims-mean-shows-a-head",
            "The mean map adds five heads that do not look there.",
            "Divide by the number of heads.",
            LEARN,
        ),
        known_answer(
            _CLAIMS,
            "full width",
            1.0,
            "mha-full-width-heads",
            "Heads of full width need a matrix of 384 by 384 each.",
            "Compare 6 of 384 by 384 with 6 of 384 by 64.",
            READINGS,
        ),
        known_answer(
            _CLAIMS,
            "full width",
            36.0,
            "claims-width-counted-twice",
            "Only the width of the result grows; the width of the input is 384 in both.",
            "Compare 6 of 384 by 384 with 6 of 384 by 64.",
            READINGS,
        ),
    ],
)

TASKS = [
    SPLIT_HEADS,
    MERGE_HEADS,
    PARAMETER_COUNT,
    MODULE,
    CONTRIBUTIONS,
    DISTANCES,
    GRADE_THIS,
    READ_CLAIMS,
]
