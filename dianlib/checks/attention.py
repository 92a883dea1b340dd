"""Tasks of the chapter "Attention": right answers, and the wrong ones that are known."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dianlib import attention
from dianlib.checks.judging import close
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
from dianlib.checks.task import Candidate, Fault, Task

ONE_QUERY = "attention: One query against every key"
ALL_QUERIES = "attention: All queries at once"
ROLES = "attention: Where do queries, keys and values come from?"
SCALE = "attention: Why divide by √d?"
SOFTMAX = "attention: Why softmax?"
CAUSAL = "attention: Who may look at whom?"
PADDING = "attention: Padding and the future together"
EMPTY = "attention: What does a query get that may look at nothing?"
WHICH = "attention: Which mask belongs where?"
WRONG = "attention: Tempting, but wrong"

# The answer itself, in torch's several places.
_ATTENTION = frozenset({"scaled_dot_product_attention", "multi_head_attention_forward"})


def _rounded(generator: torch.Generator, *shape: int) -> Tensor:
    """Draw numbers in steps of a quarter: they are read more easily in a report."""
    return (randn(generator, *shape) * 4).round() / 4


# ----- the twin of all attention: one choice for each way to go wrong ---------------------------------------


def _divide(scores: Tensor, query: Tensor, value: Tensor, scale: str) -> Tensor:
    """Divide the scores by what ``scale`` says; d is the width of a query."""
    d, n_heads = query.shape[-1], query.shape[-3] if query.dim() > 3 else 1
    if scale == "times root d":
        return scores * math.sqrt(d)
    divisor = {
        "root d": math.sqrt(d),
        "none": 1.0,
        "d": float(d),
        "root of the model's width": math.sqrt(d * n_heads),
        "root of the heads": math.sqrt(n_heads),
        "root of the keys": math.sqrt(scores.shape[-1]),
        "root of the value's width": math.sqrt(value.shape[-1]),
    }[scale]
    return scores / divisor


def _normalise(scores: Tensor, softmax: str) -> Tensor:
    match softmax:
        case "over the keys":
            return scores.softmax(-1)
        case "over the queries":
            return scores.softmax(-2)
        case "over the first axis":
            return scores.softmax(0)
        case "over the second axis":
            return scores.softmax(1)
        case "without a shift":
            return scores.exp() / scores.exp().sum(-1, keepdim=True)
        case "sigmoid":
            return scores.sigmoid()
        case "relu":
            return scores.relu()
        case "share of the sum":
            return scores / scores.sum(-1, keepdim=True)
        case _:
            return scores


_FILLED = {
    "filled with -1e-9": -1e-9,
    "filled with 1e-9": 1e-9,
    "filled with 1e9": 1e9,
    "filled with -100": -100.0,
}


def _apply_mask(scores: Tensor, mask: Tensor, masked: str, low: float) -> Tensor:
    """Change the scores as a learner would who has this idea of a mask."""
    if masked == "asked whether true":
        bool(mask)  # torch refuses this for more than one element
    if masked in _FILLED:
        return scores.masked_fill(~mask, _FILLED[masked])
    match masked:
        case "before":
            return scores.masked_fill(~mask, low)
        case "inverted":
            return scores.masked_fill(mask, low)
        case "scores times mask":
            return scores * mask
        case "plus mask":
            return scores + mask
        case "plus -1e-9":
            return scores + ~mask * -1e-9
        case _:
            return scores


def _twin(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: str = "root d",
    softmax: str = "over the keys",
    masked: str = "before",
    empty: str = "zeros",
    output: str = "weighted values",
    returned: str = "output, weights",
    cut: bool = False,
) -> Any:
    """Attend, with one setting for each way to go wrong."""
    raw = _divide(query @ key.transpose(-2, -1), query, value, scale)
    scores = raw
    low = -torch.inf if empty == "nan" else torch.finfo(raw.dtype).min
    if mask is not None:
        scores = _apply_mask(raw, mask, masked, low)
        allowed = ~mask if masked == "inverted" else mask
        if empty == "nan in the gradient only" and masked in ("before", "inverted"):
            # Added, not filled: the gradient of a filled score is 0 whatever comes back.
            scores = raw + torch.zeros_like(raw).masked_fill(~allowed, -torch.inf)
        if empty == "as without a mask" and masked in ("before", "inverted"):
            scores = torch.where(allowed.any(-1, keepdim=True), scores, raw)
    weights = _normalise(scores, softmax)
    if mask is not None and masked in ("before", "inverted"):
        if empty == "zeros":
            weights = weights.masked_fill(~allowed, 0.0)
        elif empty == "nan in the gradient only":
            weights = weights.masked_fill(~allowed.any(-1, keepdim=True), 0.0)
    elif mask is not None and masked == "after":
        weights = weights * mask
    result = _collect(weights, value, key, output)
    if cut:
        result, weights = result.detach(), weights.detach()
    return {
        "output, weights": (result, weights),
        "weights, output": (weights, result),
        "output, scores": (result, raw),
        "output": result,
    }[returned]


def _collect(weights: Tensor, value: Tensor, key: Tensor, output: str) -> Tensor:
    match output:
        case "weighted values":
            return weights @ value
        case "weighted keys":
            return weights @ key
        case "transposed weights":
            return weights.transpose(-2, -1) @ value
        case "best value":
            # Of the shape that the product of weights and values has.
            return torch.nn.functional.one_hot(weights.argmax(-1), weights.shape[-1]).to(value.dtype) @ value
        case _:
            return (torch.ones_like(weights) / weights.shape[-1]) @ value


def _alone(**setting: Any) -> list[Candidate]:
    """Return the two forms of a rarer mistake: by itself, and with equal weights for a query without keys."""
    return [partial(_twin, **setting), partial(_twin, empty="uniform", **setting)]


def _scale_faults(others: list[str], by_heads: bool, alone: bool = False) -> list[Fault]:
    """Return the wrong divisors; those by the model's width where queries are cut in heads.

    With ``alone`` the rarer ones form no pairs with other mistakes.
    """

    def forms(*scales: str) -> dict[str, Any]:
        if alone:
            return {"implementations": [form for scale in scales for form in _alone(scale=scale)]}
        return {"settings": [{"scale": scale} for scale in scales]}

    faults = [
        Fault(
            "sdpa-no-scale",
            "The scores are not divided: your weights are too sharp.",
            "Divide the scores by the square root of d, the width of a query.",
            SCALE,
            settings=[{"scale": "none"}],
        ),
        Fault(
            "sdpa-scale-by-d",
            "You divide by d, not by its root: your weights are too flat.",
            "The variance of a score is d, so its standard deviation is the root of d: divide by that.",
            SCALE,
            settings=[{"scale": "d"}],
        ),
        Fault(
            "sdpa-scale-multiplied",
            "You multiply by the square root of d: your weights are far too sharp.",
            "Divide the scores by the square root of d.",
            SCALE,
            **forms("times root d"),
        ),
    ]
    if by_heads:
        faults.append(
            Fault(
                "sdpa-scale-sqrt-embed",
                "You divide by the root of the model's width, or of the number of heads, and not of the width of a query.",
                "A score adds up d products, where d is the last size of query: divide by the root of that.",
                SCALE,
                settings=[{"scale": "root of the model's width"}, {"scale": "root of the heads"}],
            )
        )
    if others:
        faults.append(
            Fault(
                "sdpa-scale-other-size",
                "You divide by the root of another size, such as the number of keys.",
                "Divide by the root of d, the last size of query.",
                SCALE,
                **forms(*others),
            )
        )
    return faults


# ----- attention_one_query ------------------------------------------------------------------------------------


def _one_query_probes(generator: torch.Generator) -> list[Probe]:
    def probe(name: str, s: int, d: int, v: int, scale: float = 1.0, core: bool = False) -> Probe:
        args = {
            "query": _rounded(generator, d) * scale,
            "keys": _rounded(generator, s, d),
            "values": _rounded(generator, s, v),
        }
        return Probe(name, args, gradients=tuple(args) if scale == 1 else (), core=core)

    return [
        probe("three keys of width two, values of width two", 3, 2, 2, core=True),
        probe("five keys of width four, values of width three", 5, 4, 3, core=True),
        probe("a single key", 1, 3, 2),
        # exp overflows in float32 above 88.
        probe("scores of several hundred", 6, 5, 2, scale=300.0),
    ]


def _one_query_twin(query: Tensor, keys: Tensor, values: Tensor, **settings: Any) -> Tensor:
    result, _ = _twin(query[None], keys, values, **settings)
    return torch.as_tensor(result[0])


def _one_query_of_scores(query: Tensor, keys: Tensor, values: Tensor) -> Any:
    return (keys @ query / math.sqrt(len(query))).softmax(0)


def _one_query_of_cosines(query: Tensor, keys: Tensor, values: Tensor) -> Any:
    lengths = keys.norm(dim=-1) * query.norm()
    return (keys @ query / lengths).softmax(0) @ values


def _one_query_by_loops(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    scores = []
    for key in keys:
        score = torch.zeros((), dtype=query.dtype)
        for a, b in zip(query, key):  # noqa: B905
            score = score + a * b
        scores.append(score / len(query) ** 0.5)
    largest = max(float(score.detach()) for score in scores)
    exponentials = [(score - largest).exp() for score in scores]
    total = sum(exponentials)
    result = torch.zeros_like(values[0])
    for e, value in zip(exponentials, values):  # noqa: B905
        result = result + e / total * value
    return result


def _one_query_by_matrices(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    weights = torch.softmax(keys.matmul(query) * query.shape[0] ** -0.5, dim=0)
    return (weights[:, None] * values).sum(dim=0)


def _one_query_by_einsum(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    scores = torch.einsum("d,sd->s", query / torch.tensor(float(len(query))).sqrt(), keys)
    return torch.einsum("s,sv->v", (scores - scores.logsumexp(0)).exp(), values)


ATTENTION_ONE_QUERY = Task(
    id="attention.attention_one_query",
    signature="attention_one_query(query, keys, values)",
    points=2,
    reference=attention.attention_one_query,
    probes=_one_query_probes,
    twin=_one_query_twin,
    forbidden=_ATTENTION,
    variants=[_one_query_by_loops, _one_query_by_matrices, _one_query_by_einsum],
    hints=(
        "How many scores does one query get, and how many weights?",
        "The score of key j is query . key_j / sqrt(d). Softmax over the S scores gives the weights, and the result is the sum of "
        "all values, each times its weight.",
        "scores = for each key: dot(query, key) / sqrt(d)   # (S,)\nweights = softmax(scores)   # (S,)\n"
        "return sum over j of weights[j] * values[j]   # (v,)",
    ),
    mistakes=[
        *_scale_faults(["root of the keys", "root of the value's width"], by_heads=False),
        Fault(
            "sdpa-no-softmax",
            "The scores are used as weights as they are, so weights can be negative and do not sum to 1.",
            "Turn the scores into weights with softmax over the keys.",
            SOFTMAX,
            settings=[{"softmax": "none"}],
        ),
        Fault(
            "sdpa-other-normalisation",
            "The weights are no softmax of the scores: you cut at 0, use a sigmoid, or divide by the sum.",
            "Use softmax over the keys: exp of each score, divided by the sum of all of them.",
            SOFTMAX,
            settings=[{"softmax": "relu"}, {"softmax": "sigmoid"}, {"softmax": "share of the sum"}],
        ),
        Fault(
            "softmax-no-max-shift",
            "exp overflows for scores above 88.",
            "Use torch.softmax, or subtract the largest score first.",
            SOFTMAX,
            settings=[{"softmax": "without a shift"}],
        ),
        Fault(
            "attn-keys-for-values",
            "You add up the keys; what is collected are the values.",
            "Multiply each value with its weight, and add them up.",
            ONE_QUERY,
            settings=[{"output": "weighted keys"}],
        ),
        Fault(
            "attn-best-value-only",
            "You return one value alone, or the plain mean of all.",
            "Each value counts with its own weight.",
            ONE_QUERY,
            settings=[{"output": "best value"}, {"output": "mean"}],
        ),
        Fault(
            "attn-weights-returned",
            "You return the weights, one for each key; asked is for what they collect.",
            "Multiply each value with its weight, and add them up: the result has the width of a value.",
            ONE_QUERY,
            implementations=[_one_query_of_scores],
        ),
        Fault(
            "attn-cosine",
            "You divide each score by the lengths of its query and key: that is a cosine, and no score of this attention.",
            "Divide by the root of d only; a longer key may count more.",
            SCALE,
            implementations=[_one_query_of_cosines],
        ),
        Fault("sdpa-detached", *DETACHED, ONE_QUERY, settings=[{"cut": True}], sign=without_gradient),
    ],
)


# ----- self_attention -----------------------------------------------------------------------------------------


def _self_probes(generator: torch.Generator) -> list[Probe]:
    def probe(name: str, shape: tuple[int, ...], d: int, v: int, core: bool = False) -> Probe:
        width = shape[-1]
        args = {
            "x": _rounded(generator, *shape),
            "w_query": _rounded(generator, width, d),
            "w_key": _rounded(generator, width, d),
            "w_value": _rounded(generator, width, v),
        }
        return Probe(name, args, gradients=tuple(args), core=core)

    return [
        probe("four tokens of width three, projected to two", (4, 3), 2, 2, core=True),
        probe("two sequences of five tokens of width six", (2, 5, 6), 3, 4, core=True),
        probe("as many tokens as numbers in a token", (4, 4), 4, 4),
        probe("a single token", (1, 3), 2, 3),
    ]


def _self_twin(
    x: Tensor,
    w_query: Tensor,
    w_key: Tensor,
    w_value: Tensor,
    *,
    projected: str = "each by its own",
    scale: str = "root d",
    **settings: Any,
) -> Any:
    if projected == "all by one":
        w_key = w_value = w_query
    elif projected == "keys like queries":
        w_key = w_query
    elif projected == "exchanged":
        w_query, w_key = w_key, w_query
    query, key, value = x @ w_query, x @ w_key, x @ w_value
    if projected == "values not":
        value = x
    elif projected == "queries not":
        query = x
    elif projected == "none":
        query = key = value = x
    if scale == "root of D":
        query, scale = query / math.sqrt(x.shape[-1]), "none"
    return _twin(query, key, value, scale=scale, **settings)


def _self_of_features(x: Tensor, w_query: Tensor, w_key: Tensor, w_value: Tensor) -> Any:
    query, key, value = x @ w_query, x @ w_key, x @ w_value
    weights = (query.transpose(-2, -1) @ key / math.sqrt(key.shape[-1])).softmax(-1)
    return value @ weights, weights


def _self_by_loops(x: Tensor, w_query: Tensor, w_key: Tensor, w_value: Tensor) -> Any:
    flat = x.reshape(-1, x.shape[-2], x.shape[-1])
    outputs, maps = [], []
    for tokens in flat:
        rows = []
        for token in tokens:
            query = token @ w_query
            scores = torch.stack([(query * (other @ w_key)).sum() for other in tokens])
            rows.append(torch.softmax(scores / query.numel() ** 0.5, dim=0))
        maps.append(torch.stack(rows))
        outputs.append(
            torch.stack([sum(w * (t @ w_value) for w, t in zip(row, tokens)) for row in rows])  # noqa: B905
        )
    return (
        torch.stack(outputs).reshape(*x.shape[:-1], -1),
        torch.stack(maps).reshape(*x.shape[:-1], x.shape[-2]),
    )


def _self_by_one_matrix(x: Tensor, w_query: Tensor, w_key: Tensor, w_value: Tensor) -> Any:
    # x Wq (x Wk)^T = x (Wq Wk^T) x^T: the two matrices act as one
    scores = x @ (w_query @ w_key.T) @ x.mT / w_query.shape[1] ** 0.5
    weights = torch.nn.functional.softmax(scores, dim=-1)
    return [weights @ x @ w_value, weights]


def _self_by_einsum(x: Tensor, w_query: Tensor, w_key: Tensor, w_value: Tensor) -> Any:
    query, key, value = torch.cat([w_query, w_key, w_value], 1).split(
        [w_query.shape[1]] * 2 + [w_value.shape[1]], 1
    )
    scores = torch.einsum("...ia,ab,cb,...jc->...ij", x, query, key, x) * w_key.size(1) ** -0.5
    weights = scores.softmax(dim=-1)
    return torch.einsum("...ij,...ja,ab->...ib", weights, x, value), weights


def _role_property(probe: Probe, got: Outcome, wanted: Outcome) -> str:
    return _row_sums(got)


def _weights_in(got: Outcome) -> Tensor | None:
    """Return the weights of an answer when they are finite numbers."""
    weights = got.values.get("result[1]")
    if not isinstance(weights, Tensor) or weights.is_complex() or weights.dim() < 2:
        return None
    return weights.double() if weights.numel() and bool(weights.isfinite().all()) else None


def _axes_of_ones(weights: Tensor) -> list[int]:
    """Return the axes before the last along which all weights sum to 1."""
    return [axis for axis in range(weights.dim() - 1) if bool(((weights.sum(axis) - 1).abs() < 1e-3).all())]


def _row_sums(got: Outcome) -> str:
    """Say which weight is negative, which axis sums to 1 in place of the last, or which row does not."""
    weights = _weights_in(got)
    if weights is None:
        return ""
    if bool((weights < 0).any()):
        return f"A weight is negative: {weights.min():.4g}. Softmax gives no negative numbers."
    off = (weights.sum(-1) - 1).abs() > 1e-3
    if not bool(off.any()):
        return ""
    row = off.flatten().nonzero()[0]
    total = float(weights.sum(-1).flatten()[row])
    text = f"Row {int(row) % weights.shape[-2]} of the weights sums to {total:.4g}, not to 1."
    others = _axes_of_ones(weights)
    names = {2: ["queries"], 3: ["batch", "queries"], 4: ["batch", "heads", "queries"]}.get(weights.dim())
    return f"{text} They sum to 1 over the {names[others[-1]]}." if others and names else text


SELF_ATTENTION = Task(
    id="attention.self_attention",
    signature="self_attention(x, w_query, w_key, w_value)",
    points=2,
    reference=attention.self_attention,
    probes=_self_probes,
    twin=_self_twin,
    forbidden=_ATTENTION,
    properties=[_role_property],
    variants=[_self_by_loops, _self_by_one_matrix, _self_by_einsum],
    hints=(
        "A token plays three parts. Which matrix makes it a query, which a key, and which a value?",
        "Q = x W_q, K = x W_k, V = x W_v. The scores Q K^T have shape (L, L): divide by the root of the width of Q, softmax over the "
        "last axis, and multiply with V.",
        "Q, K, V = x @ w_query, x @ w_key, x @ w_value\nweights = softmax(Q @ K with its last two axes exchanged / sqrt(d), last axis)\n"
        "return weights @ V, weights",
    ),
    mistakes=[
        Fault(
            "attn-one-projection-for-all",
            "Queries, keys or values share a matrix, or are exchanged, or are not projected at all. One token then asks and answers "
            "with the same words.",
            "Use three matrices: x @ w_query, x @ w_key, x @ w_value.",
            ROLES,
            settings=[
                {"projected": "all by one"},
                {"projected": "keys like queries"},
                {"projected": "exchanged"},
                {"projected": "values not"},
                {"projected": "queries not"},
                {"projected": "none"},
            ],
        ),
        *_scale_faults([], by_heads=False),
        Fault(
            "sdpa-scale-sqrt-embed",
            "You divide by the root of D, the width of a token. Your weights are too flat.",
            "A score adds up d products, where d is the width of a query after the projection: divide by the root of d.",
            SCALE,
            settings=[{"scale": "root of D"}],
        ),
        Fault(
            "sdpa-softmax-wrong-axis",
            "Your weights sum to 1 over the queries, down the columns.",
            "Normalise over the keys, the last axis: each row belongs to one query and sums to 1.",
            ALL_QUERIES,
            settings=[{"softmax": "over the queries"}],
        ),
        Fault(
            "sdpa-no-softmax",
            "These scores were never turned into weights: some are negative, and rows do not sum to 1.",
            "Apply softmax over the keys, the last axis.",
            SOFTMAX,
            settings=[{"softmax": "none"}],
        ),
        Fault(
            "sdpa-feature-attention",
            "Your matrix compares the numbers inside the tokens, (d, d): features attend to features.",
            "Compare positions: Q K^T has shape (L, L).",
            ALL_QUERIES,
            implementations=[_self_of_features],
        ),
        Fault(
            "attn-weights-transposed",
            "You multiply the values with the weights turned over, so columns are read as rows.",
            "Output i is the sum over j of weights[i, j] times value j: weights @ V.",
            ALL_QUERIES,
            settings=[{"output": "transposed weights"}],
        ),
        Fault(
            "attn-returned-order",
            "You return the weights first, or one of the two alone.",
            "Return the output, then the weights.",
            ALL_QUERIES,
            settings=[{"returned": "weights, output"}, {"returned": "output"}],
        ),
        Fault("sdpa-detached", *DETACHED, ALL_QUERIES, settings=[{"cut": True}], sign=without_gradient),
    ],
)


# ----- scaled_dot_product_attention -------------------------------------------------------------------------


def _mask_of(lengths: list[int], width: int) -> Tensor:
    return torch.arange(width) < torch.tensor(lengths).unsqueeze(1)


def _random_mask(generator: torch.Generator, *shape: int) -> Tensor:
    """Draw a mask in which every query may attend to at least one key."""
    mask = torch.rand(shape, generator=generator) < 0.6
    place = torch.randint(shape[-1], shape[:-1], generator=generator).unsqueeze(-1)
    return mask.scatter(-1, place, True)


def _attention_probes(generator: torch.Generator) -> list[Probe]:
    def probe(
        name: str,
        batch: tuple[int, ...],
        sizes: tuple[int, int, int, int],
        mask: Tensor | None = None,
        scale: float = 1.0,
        core: bool = False,
        gradient: bool = True,
    ) -> Probe:
        q, s, d, v = sizes
        args = {
            "query": _rounded(generator, *batch, q, d) * scale,
            "key": _rounded(generator, *batch, s, d),
            "value": _rounded(generator, *batch, s, v),
        }
        names = tuple(args)
        if mask is not None:
            args["mask"] = mask
        return Probe(name, args, gradients=names if gradient else (), core=core)

    nothing = _random_mask(generator, 3, 4, 5)
    nothing[0, 2] = nothing[1, 0] = False  # these two queries may attend to nothing
    # Each first query may attend to one key only, the one that fits it least: its score is far below 0.
    large = probe("scores of several hundred, with a mask", (2,), (3, 6, 4, 2), scale=300.0, gradient=False)
    least = (large.args["query"][:, :1] @ large.args["key"].mT).argmin(-1, keepdim=True)
    large.args["mask"] = _random_mask(generator, 2, 3, 6)
    large.args["mask"][:, :1] = torch.zeros(2, 1, 6, dtype=torch.bool).scatter(-1, least, True)
    # Two keys of the same score, of which one is hidden; their values are so large that a weight
    # that is changed by 1e-9 shows. In float64, where 1 and 1 + 1e-9 differ.
    balance = Probe(
        "a hidden key with a value of a thousand million",
        {
            "query": torch.zeros(2, 3, dtype=torch.float64),
            "key": torch.ones(2, 3, dtype=torch.float64),
            "value": torch.tensor([[1e9, 1.0], [-1e9, 2.0]], dtype=torch.float64),
            "mask": torch.tensor([[True, False], [False, True]]),
        },
    )
    return [
        probe("three queries and three keys of width two, no mask", (), (3, 3, 2, 2), core=True),
        probe("three batches, eight heads, 5 queries, 7 keys, no mask", (3, 8), (5, 7, 3, 4), core=True),
        probe("the same sizes with a mask", (3, 8), (5, 7, 3, 4), _random_mask(generator, 3, 1, 5, 7), core=True),
        probe("six tokens that may not see the future", (4,), (6, 6, 5, 3), torch.ones(6, 6).tril().bool()),
        probe(
            "sequences of 5, 2 and 7 tokens, filled up to 7", (3, 2), (4, 7, 3, 5),
            _mask_of([5, 2, 7], 7)[:, None, None, :],
        ),
        balance,
        # exp overflows in float32 above 88, and there the gradients of softmax are all but 0.
        large,
        probe("queries that may attend to nothing", (3,), (4, 5, 3, 2), nothing, gradient=False),
        probe("gradients beside queries that may attend to nothing", (3,), (4, 5, 3, 2), nothing),
    ]  # fmt: skip


def _of_features(query: Tensor, key: Tensor, value: Tensor, mask: Any = None) -> Any:
    weights = (query.transpose(-2, -1) @ key / math.sqrt(query.shape[-1])).softmax(-1)
    return value @ weights, weights


def _negative_weights(probe: Probe, got: Outcome, wanted: Outcome) -> bool:
    weights = _weights_in(got)
    return weights is not None and bool((weights < -1e-6).any())


def _sums_over_another_axis(probe: Probe, got: Outcome, wanted: Outcome) -> bool:
    """See weights that sum to 1 along another axis and not along the rows, where no mask disturbs them."""
    weights = _weights_in(got)
    if weights is None or "mask" in probe.args or bool((weights < 0).any()):
        return False
    return bool((weights.sum(-1) - 1).abs().max() > 1e-2) and bool(_axes_of_ones(weights))


def _only_empty_rows_differ(probe: Probe, got: Outcome, wanted: Outcome) -> bool:
    """See weights that are right but in the rows of queries that may attend to nothing."""
    weights, right, mask = got.values.get("result[1]"), wanted.values["result[1]"], probe.args.get("mask")
    if mask is None or not isinstance(weights, Tensor) or weights.shape != right.shape:
        return False
    filled = mask.expand(right.shape).any(-1)
    return not bool(filled.all()) and close(weights[filled], right[filled]) and not close(weights, right)


def _attention_property(probe: Probe, got: Outcome, wanted: Outcome) -> str:
    weights, right, mask = _weights_in(got), wanted.values["result[1]"], probe.args.get("mask")
    if weights is None or weights.shape != right.shape:
        return ""
    if mask is None:
        return _row_sums(got)
    mask = mask.expand(right.shape)
    if bool((weights[~mask] > 1e-6).any()):
        place = ((weights > 1e-6) & ~mask).nonzero()[0].tolist()
        *batch, query, key = place
        where = f" of {batch}" if batch else ""
        if not bool(mask[*batch, query].any()):
            return f"Query {query}{where} may attend to nothing, and has a weight of {weights[*place]:.4g}."
        return f"Query {query}{where} must not see key {key}, and gives it a weight of {weights[*place]:.4g}."
    total = weights.sum(-1)
    off = ((total - 1).abs() > 1e-3) & mask.any(-1)
    return f"A row of the weights sums to {total[off][0]:.4g}, not to 1." if bool(off.any()) else ""


def _by_loops(query: Any, key: Any, value: Any, mask: Any = None) -> Any:
    def one(q: Tensor, k: Tensor, v: Tensor, m: Any) -> Any:
        rows = []
        for i in range(len(q)):
            seen = [j for j in range(len(k)) if m is None or bool(m[i, j])]
            row = torch.zeros(len(k), dtype=q.dtype)
            if seen:
                scores = torch.stack([(q[i] * k[j]).sum() for j in seen]) / len(q[i]) ** 0.5
                row = row.index_put((torch.tensor(seen),), scores.softmax(0))
            rows.append(row)
        weights = torch.stack(rows)
        return weights @ v, weights

    lead = query.shape[:-2]
    q, k, v = (t.reshape(-1, *t.shape[-2:]) for t in (query, key, value))
    if mask is not None:
        mask = mask.expand(*lead, query.shape[-2], key.shape[-2]).reshape(-1, query.shape[-2], key.shape[-2])
    pairs = [one(q[b], k[b], v[b], None if mask is None else mask[b]) for b in range(len(q))]
    outputs, maps = (torch.stack(part) for part in zip(*pairs))  # noqa: B905
    return outputs.reshape(*lead, *outputs.shape[1:]), maps.reshape(*lead, *maps.shape[1:])


def _by_einsum(query: Any, key: Any, value: Any, mask: Any = None) -> Any:
    scores = torch.einsum("...qd,...sd->...qs", query * query.size(-1) ** -0.5, key)
    if mask is not None:
        scores = torch.where(mask, scores, torch.full_like(scores, -1e9))
    weights = torch.nn.functional.softmax(scores, dim=-1)
    if mask is not None:
        weights = weights * mask
    return torch.einsum("...qs,...sv->...qv", weights, value), weights


def _by_shifted_exponentials(query: Any, key: Any, value: Any, mask: Any = None) -> Any:
    # exp of the shifted scores, 0 where hidden, divided by what is left; an empty row is divided by 1
    scores = torch.matmul(query, key.mT).div(key.shape[-1] ** 0.5)
    e = (scores - scores.amax(-1, keepdim=True)) if mask is None else scores.masked_fill(mask == 0, -1e4)
    e = (e - e.amax(-1, keepdim=True).detach()).exp()
    if mask is not None:
        e = e * mask.to(e.dtype)
    total = e.sum(-1, keepdim=True)
    weights = e / torch.where(total > 0, total, torch.ones_like(total))
    return [weights @ value, weights]


def _by_added_infinities(query: Any, key: Any, value: Any, mask: Any = None) -> Any:
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if mask is not None:
        # a row without any key is opened before the softmax, and emptied after it
        nothing = ~mask.any(dim=-1, keepdim=True)
        scores = scores + torch.zeros_like(scores).masked_fill(~(mask | nothing), float("-inf"))
    weights = torch.softmax(scores, dim=-1)
    if mask is not None:
        weights = weights.masked_fill(nothing, 0)
    return weights @ value, weights


def _by_nan_to_num(query: Any, key: Any, value: Any, mask: Any = None) -> Any:
    # NaN in a row of only -inf, and 0 in its place; masked_fill lets no gradient through there
    scores = torch.matmul(query, key.transpose(-2, -1)) / torch.sqrt(torch.tensor(float(key.size(-1))))
    if mask is not None:
        scores = scores.masked_fill(torch.logical_not(mask), -torch.inf)
    weights = torch.nn.Softmax(dim=-1)(scores).nan_to_num(0.0)
    return torch.matmul(weights, value), weights


SDPA = Task(
    id="attention.scaled_dot_product_attention",
    signature="scaled_dot_product_attention(query, key, value, mask=None)",
    points=5,
    reference=attention.scaled_dot_product_attention,
    probes=_attention_probes,
    twin=_twin,
    forbidden=_ATTENTION,
    properties=[_attention_property],
    variants=[_by_loops, _by_einsum, _by_shifted_exponentials, _by_added_infinities, _by_nan_to_num],
    hints=(
        "Which axis of the scores belongs to the keys, and what must a row of weights sum to, with a mask and without?",
        "Scores Q K^T / sqrt(d), a very low number where the mask is False, softmax over the last axis, weighted sum of the values. "
        "A query that may attend to nothing gets weights of 0.",
        "scores = query @ key with its last two axes exchanged / sqrt(d)   # (..., L, S)\n"
        "if there is a mask: where it is False, scores = the lowest number of this dtype\n"
        "weights = softmax(scores) over the last axis\nif there is a mask: where it is False, weights = 0\n"
        "return weights @ value, weights",
    ),
    # The forms that stand as implementations are rarer: they are named by themselves, and not in pairs.
    mistakes=[
        *_scale_faults(["root of the keys"], by_heads=True, alone=True),
        Fault(
            "sdpa-softmax-wrong-axis",
            "Your weights do not sum to 1 over the keys, but over the queries, the heads or the batch.",
            "Normalise over the keys, the last axis of the scores: dim=-1.",
            ALL_QUERIES,
            settings=[{"softmax": "over the queries"}, {"softmax": "over the first axis"}],
            implementations=_alone(softmax="over the second axis"),
            sign=_sums_over_another_axis,
        ),
        Fault(
            "sdpa-feature-attention",
            "Your matrix compares the numbers inside the tokens, (d, d): features attend to features.",
            "Compare positions: Q K^T has shape (L, S).",
            ALL_QUERIES,
            implementations=[_of_features],
        ),
        Fault(
            "sdpa-no-softmax",
            "These scores were never turned into weights: some are negative, and rows do not sum to 1.",
            "Apply softmax over the keys, the last axis.",
            SOFTMAX,
            settings=[{"softmax": "none"}],
            sign=_negative_weights,
        ),
        Fault(
            "sdpa-other-normalisation",
            "The weights are no softmax of the scores: you cut the scores at 0.",
            "Use softmax over the keys: exp of each score, divided by the sum of all of them.",
            SOFTMAX,
            implementations=_alone(softmax="relu"),
        ),
        Fault(
            "softmax-no-max-shift",
            "exp overflows for scores above 88.",
            "Use torch.softmax, or subtract the largest score of each row first.",
            SOFTMAX,
            settings=[{"softmax": "without a shift"}],
        ),
        Fault(
            "mask-minus-1e-9",
            "You hide a key with 1e-9 or -1e-9. That is almost 0, and exp(0) is 1: hidden keys keep their weight.",
            "Write -1e9, -inf or the lowest number of the dtype.",
            CAUSAL,
            settings=[{"masked": "plus -1e-9"}, {"masked": "filled with -1e-9"}],
            implementations=[partial(_twin, masked="filled with 1e-9")],
        ),
        Fault(
            "mask-never-applied",
            "Your function ignores its mask: hidden keys keep their weight.",
            "Where the mask is False, set the score to a very low number before the softmax.",
            CAUSAL,
            settings=[{"masked": "not"}],
        ),
        Fault(
            "mask-scores-set-to-zero",
            "You multiply the scores with the mask, or add it to them. A score of 0 is no weight of 0, since exp(0) is 1.",
            "Where the mask is False, set the score to a very low number before the softmax.",
            CAUSAL,
            settings=[{"masked": "scores times mask"}],
            implementations=[partial(_twin, masked="plus mask")],
        ),
        Fault(
            "mask-fill-not-low",
            "You hide keys with a number such as -100. Real scores can be lower, and then the hidden keys win.",
            "Write -1e9, -inf or the lowest number of the dtype.",
            CAUSAL,
            implementations=[
                partial(_twin, masked="filled with -100", empty=empty) for empty in ("zeros", "uniform")
            ],
        ),
        Fault(
            "mask-polarity",
            "You attend only to what is hidden: the mask is read the other way round, or the fill has the wrong sign.",
            "In this course True means that a query may attend: fill the scores where the mask is False, with a very low number.",
            CAUSAL,
            settings=[{"masked": "inverted"}],
            implementations=[partial(_twin, masked="filled with 1e9")],
        ),
        Fault(
            "mask-after-softmax",
            "You remove weights after the softmax, so that those which stay sum to less than 1.",
            "Mask first, normalise after.",
            CAUSAL,
            settings=[{"masked": "after"}],
        ),
        Fault(
            "mask-tensor-truthiness",
            "The line `if mask:` asks a tensor whether it is true, which torch refuses for more than one element.",
            "Write `if mask is not None:`.",
            CAUSAL,
            implementations=[partial(_twin, masked="asked whether true")],
        ),
        Fault(
            "mask-all-masked-row",
            "A query that may attend to nothing gets NaN, equal weights, or the weights without a mask.",
            "Decide: its weights are 0. Set the weights to 0 where the mask is False, after a softmax over finite numbers.",
            EMPTY,
            settings=[{"empty": "uniform"}, {"empty": "nan"}, {"empty": "as without a mask"}],
            sign=_only_empty_rows_differ,
        ),
        Fault(
            "mask-empty-row-nan-gradient",
            "The values are right, but a row of only -inf made NaN on the way. You wrote 0 over it; its gradient is still NaN.",
            "Use masked_fill, or a finite low number, in place of adding -inf.",
            EMPTY,
            settings=[{"empty": "nan in the gradient only"}],
        ),
        Fault(
            "attn-keys-for-values",
            "You add up the keys; what is collected are the values.",
            "Return weights @ value.",
            ONE_QUERY,
            settings=[{"output": "weighted keys"}],
        ),
        Fault(
            "attn-weights-transposed",
            "You multiply the values with the weights turned over, so columns are read as rows.",
            "Output i is the sum over j of weights[i, j] times value j: weights @ value.",
            ALL_QUERIES,
            implementations=_alone(output="transposed weights"),
        ),
        Fault(
            "attn-best-value-only",
            "Your output is the value with the largest weight alone.",
            "Each value counts with its own weight: weights @ value.",
            ONE_QUERY,
            settings=[{"output": "best value"}],
        ),
        Fault(
            "attn-returned-order",
            "You return the weights first, one of the two alone, or scores in place of the weights.",
            "Return the output, then the weights after the softmax.",
            ALL_QUERIES,
            implementations=[
                partial(_twin, returned=what) for what in ("weights, output", "output", "output, scores")
            ],
        ),
        Fault("sdpa-detached", *DETACHED, ALL_QUERIES, settings=[{"cut": True}], sign=without_gradient),
    ],
)


# ----- causal_mask ---------------------------------------------------------------------------------------------


def _causal_probes(generator: torch.Generator) -> list[Probe]:
    def probe(name: str, *args: int, core: bool = False) -> Probe:
        return Probe(name, dict(zip(("n_queries", "n_keys"), args, strict=False)), core=core)

    n = int(torch.randint(4, 9, (), generator=generator))
    more = int(torch.randint(1, 5, (), generator=generator))
    return [
        probe("three tokens", 3, core=True),
        probe(f"{n} tokens", n, core=True),
        probe("two new queries after three cached keys", 2, 5),
        probe(f"{n} queries, {n + more} keys", n, n + more),
        probe("as many keys as queries, said twice", 4, 4),
        probe("one query and a cache of six keys", 1, 6),
        probe("a single token", 1),
    ]


def _causal_twin(
    n_queries: int,
    n_keys: int | None = None,
    *,
    seen: str = "before and itself",
    aligned: str = "end",
    kind: str = "bool",
) -> Tensor:
    n_keys = n_queries if n_keys is None or aligned == "square" else n_keys
    shift = n_keys - n_queries if aligned == "end" else 0
    ones = torch.ones(n_queries, n_keys, dtype=torch.bool)
    mask = {
        "before and itself": lambda: ones.tril(shift),
        "before only": lambda: ones.tril(shift - 1),
        "one ahead": lambda: ones.tril(shift + 1),
        "after only": lambda: ones.triu(shift + 1),
        "after and itself": lambda: ones.triu(shift),
        "all": lambda: ones,
    }[seen]()
    if kind == "0 and -inf":
        return torch.zeros(n_queries, n_keys).masked_fill(~mask, -torch.inf)
    return mask if kind == "bool" else mask.float() if kind == "float" else mask.long()


def _causal_by_places(n_queries: int, n_keys: Any = None) -> Any:
    n_keys = n_keys or n_queries
    return torch.arange(n_keys)[None, :] <= torch.arange(n_keys - n_queries, n_keys)[:, None]


def _causal_by_loops(n_queries: int, n_keys: Any = None) -> Any:
    total = n_queries if n_keys is None else n_keys
    return torch.tensor([[j <= i + total - n_queries for j in range(total)] for i in range(n_queries)])


def _causal_by_last_rows(n_queries: int, n_keys: Any = None) -> Any:
    total = n_keys if n_keys is not None else n_queries
    hidden = torch.triu(torch.ones(total, total), diagonal=1).bool()
    return ~hidden[total - n_queries :]


CAUSAL_MASK = Task(
    id="attention.causal_mask",
    signature="causal_mask(n_queries, n_keys=None)",
    points=2,
    reference=attention.causal_mask,
    probes=_causal_probes,
    twin=_causal_twin,
    forbidden=frozenset({"generate_square_subsequent_mask", "causal_lower_right", "causal_upper_left"}),
    variants=[_causal_by_places, _causal_by_loops, _causal_by_last_rows],
    hints=(
        "What may the very first token look at? And what may the last query see of 5 keys?",
        "Query i stands at place i + n_keys - n_queries among the keys, and may attend to the keys up to its own place.",
        "n_keys = n_queries if it is None\nplace of query i = i + n_keys - n_queries\nTrue where the place of the key <= the place of the query",
    ),
    mistakes=[
        Fault(
            "mask-causal-inverted",
            "Your mask is upside down: it is True at the future.",
            "Row i is query i. It may attend to keys up to itself, the lower left triangle.",
            CAUSAL,
            settings=[{"seen": "after only"}, {"seen": "after and itself"}],
        ),
        Fault(
            "mask-causal-diagonal",
            "The diagonal is off by one: a token does not see itself, or sees its successor.",
            "A token may attend to itself and to all before it.",
            CAUSAL,
            settings=[{"seen": "before only"}, {"seen": "one ahead"}],
        ),
        Fault(
            "mask-never-applied",
            "Your mask is True everywhere, so nothing is hidden.",
            "Hide what comes after the query: True only where the key's place is at most the query's.",
            CAUSAL,
            settings=[{"seen": "all"}],
        ),
        Fault(
            "mask-causal-top-left",
            "With more keys than queries you let the queries begin at the first key. They are the last ones: the keys before come from a cache.",
            "Shift the triangle by n_keys - n_queries.",
            CAUSAL,
            settings=[{"aligned": "start"}],
        ),
        Fault(
            "mask-causal-square",
            "You ignore n_keys: the mask is square.",
            "Return n_queries rows and n_keys columns.",
            CAUSAL,
            settings=[{"aligned": "square"}],
        ),
        Fault(
            "mask-not-boolean",
            "The mask holds numbers, or 0 and -inf. A reader of your mask cannot tell what they mean.",
            "Return a tensor of dtype bool, True where a query may attend.",
            CAUSAL,
            settings=[{"kind": "int"}, {"kind": "float"}, {"kind": "0 and -inf"}],
        ),
    ],
)


# ----- padding_mask ------------------------------------------------------------------------------------------


def _padding_probes(generator: torch.Generator) -> list[Probe]:
    def probe(name: str, lengths: list[int], width: int, core: bool = False) -> Probe:
        return Probe(name, {"lengths": torch.tensor(lengths), "max_length": width}, core=core)

    drawn = torch.randint(1, 8, (4,), generator=generator).tolist()
    return [
        probe("two sequences of 2 and 4 tokens", [2, 4], 4, core=True),
        probe("three sequences of 5, 1 and 3 tokens", [5, 1, 3], 5, core=True),
        probe(f"lengths {drawn}, all shorter than max_length", drawn, 9),
        probe("an empty sequence", [3, 0, 4], 4),
        probe("a single sequence", [2], 3),
    ]


def _padding_twin(
    lengths: Tensor,
    max_length: int,
    *,
    real: str = "before the length",
    shape: str = "(B, 1, 1, S)",
    width: str = "max_length",
    kind: str = "bool",
) -> Tensor:
    places = torch.arange(max_length if width == "max_length" else int(lengths.max()))
    column = lengths.unsqueeze(1)
    mask = {
        "before the length": lambda: places < column,
        "up to the length": lambda: places <= column,
        "one too few": lambda: places < column - 1,
        "padding": lambda: places >= column,
        "at the end": lambda: places >= len(places) - column,
    }[real]()
    mask = {
        "(B, 1, 1, S)": lambda: mask[:, None, None, :],
        "(B, S)": lambda: mask,
        "(B, 1, S)": lambda: mask[:, None, :],
        "(B, 1, S, 1)": lambda: mask[:, None, :, None],
        "(B, 1, S, S)": lambda: mask[:, None, None, :].expand(-1, 1, len(places), -1),
    }[shape]()
    return mask if kind == "bool" else mask.long()


def _padding_by_loops(lengths: Any, max_length: int) -> Any:
    rows = [[[[place < int(n) for place in range(max_length)]]] for n in lengths]
    return torch.tensor(rows)


def _padding_by_sum(lengths: Any, max_length: int) -> Any:
    ones = torch.ones(len(lengths), max_length, dtype=torch.long)
    return (ones.cumsum(dim=1) <= lengths.view(-1, 1)).unsqueeze(1).unsqueeze(2)


def _padding_in_place(lengths: Any, max_length: int) -> Any:
    mask = torch.zeros(len(lengths), 1, 1, max_length, dtype=torch.bool)
    for row, n in enumerate(lengths.tolist()):
        mask[row, ..., :n] = True
    return mask


PADDING_MASK = Task(
    id="attention.padding_mask",
    signature="padding_mask(lengths, max_length)",
    points=2,
    reference=attention.padding_mask,
    probes=_padding_probes,
    twin=_padding_twin,
    forbidden=frozenset({"padding_mask"}),
    variants=[_padding_by_loops, _padding_by_sum, _padding_in_place],
    hints=(
        "Padding hides keys. Does it matter which query asks, and in which head?",
        "Place j of sequence b is real where j < lengths[b]. The axes of heads and of queries have length 1, so that all of them see the same.",
        "places = 0, 1, ..., max_length - 1\nreal = places < lengths, compared row by row   # (B, S)\nreturn real with two axes of length 1 after the first",
    ),
    mistakes=[
        Fault(
            "mask-polarity",
            "The mask is True at the padding.",
            "In this course True means a real token, where attention is allowed.",
            PADDING,
            settings=[{"real": "padding"}],
        ),
        Fault(
            "mask-length-off-by-one",
            "Your mask has one real token too many, or one too few.",
            "Places start at 0: place j is real where j < length.",
            PADDING,
            settings=[{"real": "up to the length"}, {"real": "one too few"}],
        ),
        Fault(
            "mask-wrong-end",
            "Your real tokens stand at the end; here the padding does.",
            "The first lengths[b] places of row b are real.",
            PADDING,
            settings=[{"real": "at the end"}],
        ),
        Fault(
            "mask-shape",
            "The shape is not (B, 1, 1, S). The mask would not broadcast to weights of shape (B, H, L, S), or hide queries in place of keys.",
            "Put two axes of length 1 between the batch and the keys.",
            PADDING,
            settings=[
                {"shape": "(B, S)"},
                {"shape": "(B, 1, S)"},
                {"shape": "(B, 1, S, 1)"},
                {"shape": "(B, 1, S, S)"},
            ],
        ),
        Fault(
            "mask-width-of-the-longest",
            "Your mask is as wide as the longest sequence, not max_length.",
            "Use max_length places: the batch may be padded further.",
            PADDING,
            settings=[{"width": "longest"}],
        ),
        Fault(
            "mask-not-boolean",
            "The mask holds numbers, 0 and 1. With whole numbers ~mask gives -1 and -2.",
            "Return a tensor of dtype bool.",
            PADDING,
            settings=[{"kind": "int"}],
        ),
    ],
)


# ----- translator_masks --------------------------------------------------------------------------------------


def _translator_masks(
    source_lengths: Tensor, target_lengths: Tensor, n_source: int, n_target: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the masks of a translator: for the source itself, for the target itself, and for target to source."""
    of_source = attention.padding_mask(source_lengths, n_source)
    of_target = attention.padding_mask(target_lengths, n_target) & attention.causal_mask(n_target)
    return of_source, of_target, of_source


def _translator_probes(generator: torch.Generator) -> list[Probe]:
    def probe(name: str, source: list[int], target: list[int], s: int, t: int, core: bool = False) -> Probe:
        args = {
            "source_lengths": torch.tensor(source),
            "target_lengths": torch.tensor(target),
            "n_source": s,
            "n_target": t,
        }
        return Probe(name, args, core=core)

    source, target = (torch.randint(1, 7, (3,), generator=generator).tolist() for _ in range(2))
    return [
        probe("a source of 2 of 3 tokens, a target of 3 of 4", [2], [3], 3, 4, core=True),
        probe("three pairs of sequences", [5, 2, 3], [2, 4, 3], 5, 4, core=True),
        probe("source and target of the same width", [4, 2], [1, 4], 4, 4),
        probe(f"lengths {source} and {target}", source, target, 8, 7),
    ]


def _translator_twin(
    source_lengths: Tensor,
    target_lengths: Tensor,
    n_source: int,
    n_target: int,
    *,
    target: str = "both",
    cross: str = "padding of the source",
    source: str = "padding",
    polarity: str = "may attend",
    queries: str = "all",
    order: str = "source, target, cross",
) -> Any:
    real_source = _mask_of(source_lengths.tolist(), n_source)[:, None, None, :]
    real_target = _mask_of(target_lengths.tolist(), n_target)[:, None, None, :]
    past = torch.ones(n_target, n_target, dtype=torch.bool).tril()
    of_target = {
        "both": lambda: real_target & past,
        "either": lambda: real_target | past,
        "the past only": lambda: past.expand(len(target_lengths), 1, -1, -1),
        "padding only": lambda: real_target.expand(-1, 1, n_target, -1),
        "the future": lambda: real_target & ~past,
    }[target]()
    if queries == "real ones":
        of_target = of_target & real_target.transpose(-2, -1)
    of_cross = {
        "padding of the source": lambda: real_source,
        "padding of the target": lambda: real_target,
        "the target's own": lambda: of_target,
        "causal": lambda: real_source & torch.ones(n_target, n_source, dtype=torch.bool).tril(),
        "nothing hidden": lambda: torch.ones_like(real_source),
    }[cross]()
    of_source = {
        "padding": lambda: real_source,
        "causal": lambda: real_source & torch.ones(n_source, n_source, dtype=torch.bool).tril(),
        "nothing hidden": lambda: torch.ones_like(real_source),
    }[source]()
    if polarity == "hidden":
        of_source, of_target, of_cross = ~of_source, ~of_target, ~of_cross
    if order == "source, cross, target":
        return of_source, of_cross, of_target
    return of_source, of_target, of_cross


def _translator_by_loops(source_lengths: Any, target_lengths: Any, n_source: int, n_target: int) -> Any:
    of_source = torch.tensor([[[[j < n for j in range(n_source)]]] for n in source_lengths.tolist()])
    of_target = torch.tensor(
        [
            [[[j <= i and j < n for j in range(n_target)] for i in range(n_target)]]
            for n in target_lengths.tolist()
        ]
    )
    return [of_source, of_target, of_source.clone()]


def _translator_by_products(source_lengths: Any, target_lengths: Any, n_source: int, n_target: int) -> Any:
    def real(lengths: Any, width: int) -> Any:
        return (torch.arange(width) < lengths[:, None]).reshape(-1, 1, 1, width)

    i = torch.arange(n_target)
    of_target = real(target_lengths, n_target) * (i[None, :] <= i[:, None])
    return real(source_lengths, n_source), of_target, real(source_lengths, n_source)


TRANSLATOR_MASKS = Task(
    id="attention.translator_masks",
    signature="translator_masks(source_lengths, target_lengths, n_source, n_target)",
    points=3,
    reference=_translator_masks,
    probes=_translator_probes,
    twin=_translator_twin,
    forbidden=frozenset({"generate_square_subsequent_mask", "causal_lower_right", "causal_upper_left"}),
    variants=[_translator_by_loops, _translator_by_products],
    hints=(
        "For each of the three: who asks, and whose keys are asked?",
        "A mask hides keys. The source sees all of itself but padding; the target sees its own past but no padding; the target sees the whole "
        "source but its padding.",
        "of_source = padding_mask(source_lengths, n_source)\nof_target = padding_mask(target_lengths, n_target) and causal_mask(n_target)\n"
        "of_cross = the keys are the source: its padding mask\nreturn of_source, of_target, of_cross",
    ),
    mistakes=[
        Fault(
            "cross-mask-from-target",
            "The mask from target to source is made of the target's lengths; but the keys are the source.",
            "Hide the padding of the source.",
            WHICH,
            settings=[{"cross": "padding of the target"}, {"cross": "the target's own"}],
        ),
        Fault(
            "cross-causal-or-query-pad-beliefs",
            "You hide too much or too little: cross attention is not causal, its source padding is hidden, and a padded query need not be.",
            "A mask hides keys. In cross attention these are the source: hide its padding and nothing else.",
            WHICH,
            settings=[{"cross": "causal"}, {"cross": "nothing hidden"}, {"queries": "real ones"}],
        ),
        Fault(
            "mask-combined-by-or",
            "In the target a key is open that is padding, or that lies in the future: the two masks are joined by `or`, or one is missing.",
            "A key has to pass both: join the padding mask and the causal mask by `and` (&).",
            PADDING,
            settings=[{"target": "either"}, {"target": "the past only"}, {"target": "padding only"}],
        ),
        Fault(
            "mask-causal-inverted",
            "The target sees its future and not its past.",
            "Use the lower left triangle, with the diagonal.",
            CAUSAL,
            settings=[{"target": "the future"}],
        ),
        Fault(
            "mask-source-wrong",
            "The source hides its own future, or does not hide its padding. It is known as a whole: only padding is hidden.",
            "Use the padding mask of the source alone.",
            WHICH,
            settings=[{"source": "causal"}, {"source": "nothing hidden"}],
        ),
        Fault(
            "mask-polarity",
            "All three masks are turned round: they are True at what is hidden.",
            "In this course True means that a query may attend.",
            CAUSAL,
            settings=[{"polarity": "hidden"}],
        ),
        Fault(
            "masks-order",
            "The second and the third mask are exchanged.",
            "Return the masks for source to source, target to target, target to source.",
            WHICH,
            settings=[{"order": "source, cross, target"}],
        ),
    ],
)


# ----- grade this: implementations of attention as source text ------------------------------------------------


def _right_in_matrices(query, key, value, mask=None):  # type: ignore[no-untyped-def]
    scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = torch.softmax(scores, dim=-1)
    return weights @ value, weights


def _right_query_by_query(query, key, value, mask=None):  # type: ignore[no-untyped-def]
    rows = []
    for i in range(query.shape[-2]):
        scores = (key * query[..., i : i + 1, :]).sum(-1) * query.size(-1) ** -0.5
        if mask is not None:
            scores = torch.where(mask[..., i, :], scores, torch.tensor(-1e9))
        rows.append(scores.softmax(-1))
    weights = torch.stack(rows, dim=-2)
    return torch.einsum("...qs,...sv->...qv", weights, value), weights


def _right_by_exponentials(query, key, value, mask=None):  # type: ignore[no-untyped-def]
    scores = torch.einsum("...qd,...sd->...qs", query, key) / query.shape[-1] ** 0.5
    e = (scores - scores.amax(-1, keepdim=True)).exp()
    if mask is not None:
        e = e * mask
    weights = e / e.sum(-1, keepdim=True)
    return torch.matmul(weights, value), weights


def _wrong_without_scale(query, key, value, mask=None):  # type: ignore[no-untyped-def]
    scores = query @ key.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e9)
    weights = scores.softmax(-1)
    return weights @ value, weights


def _wrong_scale_d(query, key, value, mask=None):  # type: ignore[no-untyped-def]
    scores = query @ key.transpose(-2, -1) / query.shape[-1]
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e9)
    weights = scores.softmax(-1)
    return weights @ value, weights


def _wrong_scale_of_keys(query, key, value, mask=None):  # type: ignore[no-untyped-def]
    scores = query @ key.transpose(-2, -1) / key.shape[-2] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e9)
    weights = scores.softmax(-1)
    return weights @ value, weights


def _wrong_axis(query, key, value, mask=None):  # type: ignore[no-untyped-def]
    scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e9)
    weights = scores.softmax(-2)
    return weights @ value, weights


def _wrong_no_softmax(query, key, value, mask=None):  # type: ignore[no-untyped-def]
    weights = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    if mask is not None:
        weights = weights.masked_fill(~mask, 0.0)
    return weights @ value, weights


def _wrong_mask_ignored(query, key, value, mask=None):  # type: ignore[no-untyped-def]
    weights = (query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5).softmax(-1)
    return weights @ value, weights


def _wrong_mask_inverted(query, key, value, mask=None):  # type: ignore[no-untyped-def]
    scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(mask, -1e9)
    weights = scores.softmax(-1)
    return weights @ value, weights


def _wrong_mask_afterwards(query, key, value, mask=None):  # type: ignore[no-untyped-def]
    weights = (query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5).softmax(-1)
    if mask is not None:
        weights = weights * mask
    return weights @ value, weights


def _wrong_tiny_number(query, key, value, mask=None):  # type: ignore[no-untyped-def]
    scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e-9)
    weights = scores.softmax(-1)
    return weights @ value, weights


def _wrong_best_value(query, key, value, mask=None):  # type: ignore[no-untyped-def]
    scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e9)
    weights = scores.softmax(-1)
    return value[weights.argmax(-1)], weights


def _wrong_keys_collected(query, key, value, mask=None):  # type: ignore[no-untyped-def]
    scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e9)
    weights = scores.softmax(-1)
    return weights @ key, weights


def _wrong_scores_returned(query, key, value, mask=None):  # type: ignore[no-untyped-def]
    scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e9)
    return scores.softmax(-1) @ value, scores


RIGHT_SPECIMENS = (_right_in_matrices, _right_query_by_query, _right_by_exponentials)
WRONG_SPECIMENS = (
    _wrong_without_scale,
    _wrong_scale_d,
    _wrong_scale_of_keys,
    _wrong_axis,
    _wrong_no_softmax,
    _wrong_mask_ignored,
    _wrong_mask_inverted,
    _wrong_mask_afterwards,
    _wrong_tiny_number,
    _wrong_best_value,
    _wrong_keys_collected,
    _wrong_scores_returned,
)


def _specimen_probes(generator: torch.Generator) -> list[Probe]:
    return specimen_probes("scaled_dot_product_attention", RIGHT_SPECIMENS, WRONG_SPECIMENS, generator)


def _example(n_queries: int, n_keys: int, d: int, equal: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    key = randn(generator, n_keys, d)
    mask = torch.ones(n_queries, n_keys, dtype=torch.bool).tril(n_keys - n_queries)
    return [randn(generator, n_queries, d), key, key if equal else randn(generator, n_keys, d), mask]


def _agrees(candidate: Any, args: list[Tensor], parts: tuple[int, ...] = (0, 1)) -> bool:
    query, key, value = args[:3]
    scores = query @ key.T / query.shape[-1] ** 0.5
    if len(args) > 3:
        scores = scores.masked_fill(~args[3], -torch.inf)
    weights = scores.softmax(-1)
    wanted, got = (weights @ value, weights), candidate(*args)
    return all(torch.allclose(got[part], wanted[part], atol=1e-4) for part in parts)


def _examine(scaled_dot_product_attention: Any) -> bool:
    """Accept an implementation whose output and weights are right on unequal sizes, with a mask."""
    return _agrees(scaled_dot_product_attention, _example(3, 5, 2))


def _examine_without_mask(scaled_dot_product_attention: Any) -> bool:
    return _agrees(scaled_dot_product_attention, _example(3, 5, 2)[:3])


def _examine_as_many_keys_as_numbers(scaled_dot_product_attention: Any) -> bool:
    return _agrees(scaled_dot_product_attention, _example(3, 4, 4))


def _examine_width_one(scaled_dot_product_attention: Any) -> bool:
    return _agrees(scaled_dot_product_attention, _example(3, 5, 1))


def _examine_sums(scaled_dot_product_attention: Any) -> bool:
    sums = scaled_dot_product_attention(*_example(3, 5, 2))[1].sum(-1)
    return torch.allclose(sums, torch.ones_like(sums), atol=1e-4)


def _examine_weights_only(scaled_dot_product_attention: Any) -> bool:
    return _agrees(scaled_dot_product_attention, _example(3, 5, 2), (1,))


def _examine_output_only(scaled_dot_product_attention: Any) -> bool:
    return _agrees(scaled_dot_product_attention, _example(3, 5, 2), (0,))


def _examine_values_like_keys(scaled_dot_product_attention: Any) -> bool:
    return _agrees(scaled_dot_product_attention, _example(3, 5, 2, equal=True))


def _examine_by_hand(scaled_dot_product_attention: Any) -> None:
    # d = 4, so the scores 4, 0 and 2 are divided by 2; the third key is hidden from the second query
    query = torch.tensor([[2.0, 0, 0, 0], [2.0, 0, 0, 0]])
    key = torch.tensor([[2.0, 0, 0, 0], [0, 3.0, 0, 0], [1.0, 0, 5.0, 0]])
    value = torch.tensor([[1.0], [10], [100]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    output, weights = scaled_dot_product_attention(query, key, value, mask)
    first, second = torch.tensor([2.0, 0, 1]).softmax(0), torch.tensor([2.0, 0]).softmax(0)
    assert torch.allclose(weights[0], first, atol=1e-4)
    assert torch.allclose(weights[1], torch.cat([second, torch.zeros(1)]), atol=1e-4)
    assert torch.allclose(output[:, 0], torch.stack([first @ value[:, 0], second @ value[:2, 0]]), atol=1e-3)


GRADE_THIS = Task(
    id="attention.grade_this",
    signature="examine(scaled_dot_product_attention)",
    points=3,
    reference=_examine,
    probes=_specimen_probes,
    variants=[_examine_by_hand],
    hints=(
        "Which sizes would a wrong divisor confuse, and which numbers must be seen to know that a mask works?",
        "Use unequal numbers of queries, of keys and of columns, unequal keys and values, and a mask; compare output and weights with numbers "
        "that you worked out.",
        "query, key, value with sizes that all differ, and a mask with a True in each row\n"
        "work out scores, weights and output query by query, with loops\nif output or weights differ: return False\nreturn True",
    ),
    mistakes=[
        Fault(
            "test-without-a-mask",
            "Your test never passes a mask, so whatever happens to it goes unseen.",
            "Add a mask that hides some keys from some queries.",
            CAUSAL,
            implementations=[_examine_without_mask],
        ),
        Fault(
            "test-with-equal-sizes",
            "In your test there are as many keys as numbers in a key, so a division by the wrong root goes unseen.",
            "Let the number of queries, the number of keys and the width all differ.",
            SCALE,
            implementations=[_examine_as_many_keys_as_numbers],
        ),
        Fault(
            "test-with-width-one",
            "Your queries have width 1, and the root of 1 is 1: a missing division goes unseen.",
            "Use a width of two or more.",
            SCALE,
            implementations=[_examine_width_one],
        ),
        Fault(
            "test-of-row-sums-only",
            "Weights that sum to 1 are necessary, but many wrong implementations have them.",
            "Compare with weights and an output that you worked out.",
            ALL_QUERIES,
            implementations=[_examine_sums],
        ),
        Fault(
            "test-of-the-weights-only",
            "Your test looks at the weights and not at the output.",
            "Compare the output as well.",
            ALL_QUERIES,
            implementations=[_examine_weights_only],
        ),
        Fault(
            "test-of-the-output-only",
            "Your test looks at the output and not at the weights.",
            "Compare the weights as well: heat maps are drawn from them.",
            ALL_QUERIES,
            implementations=[_examine_output_only],
        ),
        Fault(
            "test-with-values-like-keys",
            "Keys and values are the same in your test, so whoever collects the keys goes unseen.",
            "Use values that differ from the keys.",
            ONE_QUERY,
            implementations=[_examine_values_like_keys],
        ),
        *verdict_faults(ALL_QUERIES),
    ],
)


# ----- read a heat map ----------------------------------------------------------------------------------------


_ANSWERS = {
    "standard deviation": 8.0,
    "divisor": 16.0,
    "mean row sum": 0.75,
    "hidden weight": 0.25,
    "open places": 18,
}


READ_A_HEAT_MAP = Task(
    id="attention.read_a_heat_map",
    signature="answers: a dictionary",
    points=3,
    reference=_ANSWERS.get,
    probes=answer_probes(
        {
            "standard deviation": "the standard deviation of a score before the division, for d = 64",
            "divisor": "the number by which the learner divided the scores",
            "mean row sum": "the mean of the row sums of a map whose columns sum to 1",
            "hidden weight": "the weight of the hidden keys together, filled with -1e-9",
            "open places": "the number of True in the causal mask of 3 new queries and 7 keys",
        }
    ),
    is_value=True,
    hints=(
        "Which sums stay the same, whatever axis you look along? And what is the logarithm of a ratio of two weights?",
        "The variances of independent products add up. log(w_i / w_j) is the difference of the two divided scores. The sum of all weights is "
        "the number of rows, or of columns, that sum to 1. Equal scores share the weight equally. The queries are the last of the keys.",
        "deviation: root of d\ndivisor: difference of the products / difference of the divided scores\n"
        "row sum: number of columns / number of rows\nhidden: hidden keys / keys\nplaces: 5 + 6 + 7",
    ),
    mistakes=[
        known_answer(
            _ANSWERS,
            "standard deviation",
            64.0,
            "sdpa-scale-by-d",
            "64 is the variance.",
            "The standard deviation is its root.",
            SCALE,
        ),
        known_answer(
            _ANSWERS,
            "divisor",
            8.0,
            "divisor-expected-not-read",
            "8 is the divisor that this learner should have used, the root of d = 64.",
            "Read it off the map: the difference of the products, divided by the logarithm of the ratio of the weights.",
            SCALE,
        ),
        known_answer(
            _ANSWERS,
            "divisor",
            1 / 16,
            "divisor-turned-round",
            "This is the factor, not the divisor.",
            "The learner divided the difference of 32 by this number and got 2.",
            SCALE,
        ),
        known_answer(
            _ANSWERS,
            "mean row sum",
            1.0,
            "sdpa-softmax-wrong-axis",
            "Rows would sum to 1 if the softmax ran over the keys. Here the columns do.",
            "Add up the whole map column by column, then share the sum among the rows.",
            ALL_QUERIES,
        ),
        known_answer(
            _ANSWERS,
            "mean row sum",
            8 / 6,
            "row-sum-turned-round",
            "You divided the number of rows by the number of columns.",
            "The whole map sums to the number of columns, 6; there are 8 rows.",
            ALL_QUERIES,
        ),
        known_answer(
            _ANSWERS,
            "hidden weight",
            0.0,
            "mask-minus-1e-9",
            "A key is hidden only by a very low score. -1e-9 is almost 0, the score of all others.",
            "Equal scores share the weight equally: count the hidden keys.",
            CAUSAL,
        ),
        known_answer(
            _ANSWERS,
            "hidden weight",
            0.125,
            "weight-of-one-key",
            "This is the weight of one hidden key.",
            "There are two of them.",
            CAUSAL,
        ),
        known_answer(
            _ANSWERS,
            "open places",
            6,
            "mask-causal-top-left",
            "You let the three queries begin at the first key. They are the last of the seven.",
            "The first of them may see 5 keys.",
            CAUSAL,
        ),
        known_answer(
            _ANSWERS,
            "open places",
            15,
            "mask-causal-diagonal",
            "You left out the diagonal: each query sees itself as well.",
            "Add one for each query.",
            CAUSAL,
        ),
        known_answer(
            _ANSWERS,
            "open places",
            21,
            "mask-never-applied",
            "21 are all places.",
            "Leave out the keys that come after each query.",
            CAUSAL,
        ),
    ],
)

TASKS = [
    ATTENTION_ONE_QUERY,
    SELF_ATTENTION,
    SDPA,
    CAUSAL_MASK,
    PADDING_MASK,
    TRANSLATOR_MASKS,
    GRADE_THIS,
    READ_A_HEAT_MAP,
]
