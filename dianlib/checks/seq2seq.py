"""Tasks of the chapter "From sequence to sequence": right answers, and the wrong ones that are known."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dianlib import seq2seq
from dianlib.checks.kinds import answer_probes, known_answer, randn, specimen_probes, verdict_faults
from dianlib.checks.running import DecoderParts, NextToken, Outcome, Probe
from dianlib.checks.task import Fault, Task

CASE = "seq2seq: A case: another neighbour, another translation"
SHIFT = "seq2seq: What does the decoder read while it learns?"
LOSS = "seq2seq: The loss of a padded batch"
ENCODER = "seq2seq: One vector for a whole sentence"
LOOK = "seq2seq: Additive attention: look again at every step"
MASK = "seq2seq: Why must padding be masked twice?"
STEP = "seq2seq: One step of the decoder"
GREEDY = "seq2seq: Writing without a teacher: greedy decoding"
WRONG = "seq2seq: Tempting, but wrong"


def _ragged(
    generator: torch.Generator, lengths: list[int], width: int, vocab_size: int, pad: int = 0
) -> Tensor:
    """Draw rows of real tokens, 3 to vocab_size - 1, of these lengths, and fill up with padding."""
    tokens = torch.randint(3, vocab_size, (len(lengths), width), generator=generator)
    beyond = torch.arange(width) >= torch.tensor(lengths).unsqueeze(1)
    return tokens.masked_fill(beyond, pad)


def _mask_of(lengths: list[int], width: int) -> Tensor:
    return torch.arange(width) < torch.tensor(lengths).unsqueeze(1)


# ----- padding_mask -----------------------------------------------------------------------------------------


def _padding_probes(generator: torch.Generator) -> list[Probe]:
    def probe(name: str, lengths: list[int], width: int, pad: int, core: bool = False) -> Probe:
        return Probe(name, {"tokens": _ragged(generator, lengths, width, 8, pad), "pad": pad}, core=core)

    with_zeros = probe("padding is 9, and 0 is a word", [3, 5, 1], 5, 9)
    with_zeros.args["tokens"][0, 1] = 0
    with_zeros.args["tokens"][1, 3] = 0
    return [
        probe("two sentences, padding is 0", [2, 4], 4, 0, core=True),
        with_zeros,
        probe("padding is 1", [6, 2, 4], 7, 1),
        probe("no padding at all", [3, 3], 3, 0),
    ]


def _padding_twin(tokens: Tensor, pad: int, *, real: str = "not pad", kind: str = "bool") -> Tensor:
    mask = {
        "not pad": lambda: tokens != pad,
        "pad": lambda: tokens == pad,
        "not 0": lambda: tokens != 0,
        "0": lambda: tokens == 0,
        "above pad": lambda: tokens > pad,
    }[real]()
    return mask if kind == "bool" else mask.long()


def _mask_by_lengths(tokens: Tensor, pad: int) -> Tensor:
    rows = [[bool(token != pad) for token in row] for row in tokens]
    return torch.tensor(rows)


def _mask_by_ne(tokens: Tensor, pad: int) -> Tensor:
    return ~tokens.eq(pad)


PADDING_MASK = Task(
    id="seq2seq.padding_mask",
    signature="padding_mask(tokens, pad)",
    points=1,
    reference=seq2seq.padding_mask,
    probes=_padding_probes,
    twin=_padding_twin,
    forbidden=frozenset({"padding_mask"}),
    variants=[_mask_by_lengths, _mask_by_ne],
    hints=(
        "A mask says where attention is allowed. Is that at the words or at the padding?",
        "The result has the shape of tokens and dtype bool: True at real tokens, False where the token is pad.",
        "return tokens compared with pad: not equal",
    ),
    mistakes=[
        Fault(
            "mask-inverted",
            "The mask is turned round: it is True at the padding.",
            "In this course True means a real token, where attention is allowed.",
            MASK,
            settings=[{"real": "pad"}],
        ),
        Fault(
            "mask-pad-id-assumed",
            "You compare with a fixed number, or by size, and not with the given pad.",
            "Compare every token with the argument pad.",
            MASK,
            settings=[{"real": "not 0"}, {"real": "0"}, {"real": "above pad"}],
        ),
        Fault(
            "mask-not-boolean",
            "The mask holds numbers, 0 and 1. With whole numbers ~mask gives -1 and -2, and indexing picks rows 0 and 1.",
            "Return a tensor of dtype bool.",
            MASK,
            settings=[{"kind": "int"}],
        ),
    ],
)


# ----- shift_right --------------------------------------------------------------------------------------------


def _shift_probes(generator: torch.Generator) -> list[Probe]:
    def probe(name: str, lengths: list[int], width: int, bos: int, core: bool = False) -> Probe:
        target = _ragged(generator, [n - 1 for n in lengths], width, 20)
        for row, length in zip(target, lengths, strict=True):
            row[length - 1] = 2  # the end token
        return Probe(name, {"target": target, "bos": bos}, core=core)

    return [
        probe("two sentences, the begin token is 1", [4, 2], 4, 1, core=True),
        probe("three sentences, the begin token is 7", [3, 6, 5], 6, 7, core=True),
        probe("sentences that are shorter than the tensor", [3, 2, 4], 7, 1),
        probe("a single column", [1, 1, 1], 1, 5),
    ]


def _shift_twin(
    target: Tensor, bos: int, *, moved: str = "right", first: str = "bos", width: str = "same"
) -> Tensor:
    if moved == "not":
        return target.clone()
    column = {
        "bos": torch.full_like(target[:, :1], bos),
        "last": target[:, -1:],
        "first": target[:, :1],
        "0": torch.zeros_like(target[:, :1]),
        "1": torch.ones_like(target[:, :1]),
    }[first]
    if moved == "left":
        return torch.cat([target[:, 1:], column], dim=1)
    if moved == "replaced":
        return torch.cat([column, target[:, 1:]], dim=1)
    return torch.cat([column, target if width == "longer" else target[:, :-1]], dim=1)


def _shift_in_place(target: Tensor, bos: int) -> Tensor:
    target[:, 1:] = target[:, :-1].clone()
    target[:, 0] = bos
    return target


def _shift_by_roll(target: Tensor, bos: int) -> Tensor:
    inputs = target.roll(1, dims=1)
    inputs[:, 0] = bos
    return inputs


def _shift_by_loops(target: Tensor, bos: int) -> Tensor:
    return torch.tensor([[bos] + [int(token) for token in row[:-1]] for row in target])


def _shift_by_padding(target: Tensor, bos: int) -> Tensor:
    return torch.nn.functional.pad(target, (1, 0), value=bos)[:, :-1]


SHIFT_RIGHT = Task(
    id="seq2seq.shift_right",
    signature="shift_right(target, bos)",
    points=1,
    reference=seq2seq.shift_right,
    probes=_shift_probes,
    twin=_shift_twin,
    forbidden=frozenset({"shift_right"}),
    variants=[_shift_by_roll, _shift_by_loops, _shift_by_padding],
    hints=(
        "When the decoder predicts the third word, which words may it have read?",
        "Column t of the result is column t - 1 of the target; column 0 is bos. The shape stays, so the last column is dropped.",
        "join a column of bos and target without its last column, along axis 1",
    ),
    mistakes=[
        Fault(
            "tf-no-shift",
            "The target itself is returned: the decoder would read the very word that it should predict, and copy it.",
            "Put bos in front and drop the last column.",
            SHIFT,
            settings=[{"moved": "not"}],
        ),
        Fault(
            "tf-shift-left",
            "You shift to the left: the decoder would read the word after the one that it should predict.",
            "Column t of the input is column t - 1 of the target.",
            SHIFT,
            settings=[{"moved": "left"}],
        ),
        Fault(
            "tf-first-word-replaced",
            "The begin token replaces the first word, and nothing moves: from the second word on the decoder reads what it should predict.",
            "Put bos in front of the first word.",
            SHIFT,
            settings=[{"moved": "replaced", "first": "bos"}],
        ),
        Fault(
            "tf-input-one-longer",
            "The begin token is put in front, and nothing is dropped: the input has one column more than the target.",
            "Drop the last column of the target.",
            SHIFT,
            settings=[{"width": "longer"}],
        ),
        Fault(
            "tf-first-token-wrong",
            "The first column is not bos: it holds a fixed number, the last column that was rolled round, or the first word again.",
            "Fill the first column with the argument bos.",
            SHIFT,
            settings=[{"first": "last"}, {"first": "first"}, {"first": "0"}, {"first": "1"}],
        ),
        Fault(
            "tf-target-changed",
            "You write into target itself, which the loss still needs.",
            "Make a new tensor, for example with torch.cat.",
            SHIFT,
            implementations=[_shift_in_place],
            sign=lambda probe, got, wanted: "target" in got.changed,
        ),
    ],
)


# ----- sequence_loss --------------------------------------------------------------------------------------------


def _loss_probes(generator: torch.Generator) -> list[Probe]:
    def probe(
        name: str, lengths: list[int], width: int, vocab_size: int, pad: int = 0, core: bool = False
    ) -> Probe:
        targets = _ragged(generator, lengths, width, vocab_size, pad)
        logits = randn(generator, len(lengths), width, vocab_size) * 2
        return Probe(
            name, {"logits": logits, "targets": targets, "pad": pad}, gradients=("logits",), core=core
        )

    with_zeros = probe("padding is 1, and 0 is a word", [4, 2, 5], 6, 7, pad=1)
    with_zeros.args["targets"][0, 0] = 0
    with_zeros.args["targets"][2, 3] = 0
    return [
        probe("a sentence of two tokens and one of three", [2, 3], 3, 5, core=True),
        probe("four sentences of unequal length", [6, 1, 3, 4], 6, 9, core=True),
        with_zeros,
        probe("more padding than words", [1, 2, 1], 8, 6),
        probe("no padding", [3, 3, 3, 3], 3, 5),
    ]


def _loss_twin(
    logits: Tensor,
    targets: Tensor,
    pad: int,
    *,
    divisor: str = "real tokens",
    padding: str = "left out",
    softmaxes: int = 1,
    axis: int = -1,
    shift: int = 0,
    order: str = "right",
    cut: bool = False,
) -> Tensor:
    if shift:
        logits, targets = logits[:, :-shift], targets[:, shift:]
    if order == "mixed":
        logits = logits.transpose(1, 2).reshape(logits.shape)
    if softmaxes == 2:
        logits = logits.softmax(dim=axis)
    prices = -logits.log_softmax(dim=axis).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    real = (targets != (0 if padding == "left out if 0" else pad)).to(logits.dtype)
    kept = torch.ones_like(prices) if padding == "counted" else real
    total = (prices * kept).sum()
    result = {
        "real tokens": lambda: total / kept.sum(),
        "all positions": lambda: total / targets.numel(),
        "sentences": lambda: total / len(targets),
        "positions of a sentence": lambda: total / targets.shape[1],
        "none": lambda: total,
        "each sentence first": lambda: ((prices * kept).sum(1) / kept.sum(1)).mean(),
        "each column first": lambda: ((prices * kept).sum(0) / kept.sum(0).clamp(min=1)).mean(),
    }[divisor]()
    return result.detach() if cut else result


def _loss_by_boolean_index(logits: Tensor, targets: Tensor, pad: int) -> Tensor:
    real = targets != pad
    return torch.nn.functional.cross_entropy(logits[real], targets[real])


def _loss_by_loops(logits: Tensor, targets: Tensor, pad: int) -> Tensor:
    prices = []
    for row, words in zip(logits, targets, strict=True):
        for scores, word in zip(row, words, strict=True):
            if word != pad:
                prices.append(scores.logsumexp(0) - scores[word])
    return torch.stack(prices).mean()


def _loss_by_mask(logits: Tensor, targets: Tensor, pad: int) -> Tensor:
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    mask = (targets != pad).float()
    return (loss * mask).sum() / mask.sum()


def _loss_by_ignore_index(logits: Tensor, targets: Tensor, pad: int) -> Any:
    criterion = torch.nn.CrossEntropyLoss(ignore_index=pad)
    return criterion(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))


def _loss_of_log_probabilities(logits: Tensor, targets: Tensor, pad: int) -> Tensor:
    # log softmax twice is log softmax once
    return torch.nn.functional.cross_entropy(
        torch.log_softmax(logits, -1).permute(0, 2, 1), targets, ignore_index=pad
    )


SEQUENCE_LOSS = Task(
    id="seq2seq.sequence_loss",
    signature="sequence_loss(logits, targets, pad)",
    points=3,
    reference=seq2seq.sequence_loss,
    probes=_loss_probes,
    twin=_loss_twin,
    forbidden=frozenset({"sequence_loss"}),
    variants=[
        _loss_by_boolean_index,
        _loss_by_loops,
        _loss_by_mask,
        _loss_by_ignore_index,
        _loss_of_log_probabilities,
    ],
    hints=(
        "A batch has 3 real tokens and 9 places of padding. By what do you divide?",
        "Every real token counts once and padding not at all: the sum over real tokens divided by their number.",
        "prices = cross-entropy of each position, without a mean\nreal = targets != pad\nreturn sum of prices where real / number of real",
    ),
    mistakes=[
        Fault(
            "tf-loss-includes-pads",
            "Padding counts as a word: its easy predictions lower the loss, and adding padding changes it.",
            "Leave out the positions where the target is pad (ignore_index, or a mask).",
            LOSS,
            settings=[{"padding": "counted"}, {"padding": "left out if 0"}],
        ),
        Fault(
            "loss-mean-over-padded-length",
            "Padding costs nothing, but you divide by all positions: the loss is too small by the share of real tokens.",
            "Divide by the number of real tokens.",
            LOSS,
            settings=[{"divisor": "all positions"}],
        ),
        Fault(
            "loss-mean-of-sentence-means",
            "Each sentence (or each column) gets its own mean first, so a word in a short sentence counts more than one in a long.",
            "Add up over all real tokens of the batch, then divide once.",
            LOSS,
            settings=[{"divisor": "each sentence first"}, {"divisor": "each column first"}],
        ),
        Fault(
            "loss-not-per-token",
            "You divide by the number of sentences or of columns, or not at all.",
            "Divide by the number of real tokens.",
            LOSS,
            settings=[{"divisor": "sentences"}, {"divisor": "positions of a sentence"}, {"divisor": "none"}],
        ),
        Fault(
            "tf-shifted-twice",
            "You shift the targets here, although shift_right has shifted the inputs: each word is compared with the word after it.",
            "Compare logits[:, t] with targets[:, t].",
            SHIFT,
            settings=[{"shift": 1}],
        ),
        Fault(
            "loss-axes-mixed",
            "The logits are reshaped as if the vocabulary came before the positions: scores of different positions are mixed.",
            "Flatten (B, L, V) to (B * L, V), or transpose to (B, V, L) for cross_entropy; do not reshape to another order.",
            LOSS,
            settings=[{"order": "mixed"}],
        ),
        Fault(
            "loss-double-softmax",
            "Softmax is applied to the logits before the cross-entropy, which applies it again.",
            "Give the logits to the cross-entropy.",
            LOSS,
            settings=[{"softmaxes": 2}],
        ),
        Fault(
            "softmax-wrong-axis",
            "The softmax runs over the positions instead of over the vocabulary.",
            "Normalise over the last axis.",
            LOSS,
            settings=[{"axis": 1}],
        ),
        Fault(
            "backward-detached",
            "No gradient reaches the logits: the result has left autograd.",
            "Stay with torch operations; avoid .detach(), .item(), .numpy() and torch.tensor(...) on the way.",
            LOSS,
            settings=[{"cut": True}],
        ),
    ],
)


# ----- additive_attention -------------------------------------------------------------------------------------------


def _attention_probes(generator: torch.Generator) -> list[Probe]:
    def probe(
        name: str,
        lengths: list[int],
        width: int,
        hidden: int,
        mask: Tensor | None = None,
        scale: float = 1.0,
        core: bool = False,
        gradient: bool = True,
    ) -> Probe:
        args = {
            "query": randn(generator, len(lengths), hidden),
            "keys": randn(generator, len(lengths), width, hidden),
            "w_query": randn(generator, hidden, hidden) * 0.7,
            "w_key": randn(generator, hidden, hidden) * 0.7,
            "v": randn(generator, hidden) * scale + 0.3,
        }
        names = tuple(args)
        if mask is None and min(lengths) < width:
            mask = _mask_of(lengths, width)
        if mask is not None:
            args["mask"] = mask
        return Probe(name, args, gradients=names if gradient else (), core=core)

    holes = torch.tensor([[True, False, True, True, False], [False, False, True, False, True]])
    return [
        probe("two sentences of three tokens, no mask", [3, 3], 3, 2, core=True),
        probe("three sentences of 5, 2 and 7 tokens", [5, 2, 7], 7, 4, core=True),
        probe("four sentences, one of a single token", [4, 1, 3, 2], 6, 5, scale=2.0),
        probe("padding in the middle of a sentence", [5, 5], 5, 3, mask=holes),
        # exp overflows in float32 above 88, and there the gradients of softmax are all but 0.
        probe("scores of several hundred", [6, 4, 5], 6, 4, scale=300.0, gradient=False),
    ]


def _attention_twin(
    query: Tensor,
    keys: Tensor,
    w_query: Tensor,
    w_key: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    stored: str = "x @ W",
    asked: str = "query and keys",
    exchanged: bool = False,
    bend: str = "tanh",
    scale: bool = False,
    masked: str = "before softmax",
    softmax: str = "over the keys",
    context: str = "weighted keys",
    cut: bool = False,
) -> tuple[Tensor, Tensor]:
    if stored == "x @ W.T":
        w_query, w_key = w_query.T, w_key.T
    if exchanged:
        w_query, w_key = w_key, w_query
    of_query, of_keys = (query @ w_query).unsqueeze(1), keys @ w_key
    hidden = {
        "query and keys": lambda: of_query + of_keys,
        "query": lambda: of_query.expand_as(of_keys),
        "keys": lambda: of_keys,
    }[asked]()
    if bend == "outside":
        scores = torch.tanh(hidden @ v)
    else:
        bends: dict[str, Callable[[Tensor], Tensor]] = {
            "tanh": torch.tanh,
            "none": lambda x: x,
            "relu": torch.relu,
            "sigmoid": torch.sigmoid,
        }
        scores = bends[bend](hidden) @ v
    if scale:
        scores = scores / math.sqrt(len(v))
    allowed = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    if masked in ("before softmax", "inverted"):
        scores = scores.masked_fill(allowed if masked == "inverted" and mask is not None else ~allowed, -1e9)
    elif masked == "scores times mask":
        scores = scores * allowed
    weights = {
        "over the keys": lambda: scores.softmax(-1),
        "over the sentences": lambda: scores.softmax(0),
        "over everything": lambda: scores.flatten().softmax(0).reshape(scores.shape),
        "without a shift": lambda: scores.exp() / scores.exp().sum(-1, keepdim=True),
        "sigmoid": lambda: scores.sigmoid(),
        "none": lambda: scores,
    }[softmax]()
    if masked == "after softmax":
        weights = weights * allowed
    if context == "weighted keys":
        result = (weights.unsqueeze(-1) * keys).sum(1)
    elif context == "mean of the weighted keys":
        result = (weights.unsqueeze(-1) * keys).mean(1)
    elif context == "projected keys":
        result = (weights.unsqueeze(-1) * of_keys).sum(1)
    elif context == "best key":
        result = keys[torch.arange(len(keys)), weights.argmax(-1)]
    else:
        result = keys.mean(1)
    return (result.detach(), weights.detach()) if cut else (result, weights)


def _weights_of(probe: Probe, got: Outcome) -> Tensor | None:
    """Return the weights of an answer when they have the right shape and are numbers."""
    weights = got.values.get("result[1]")
    keys = probe.args["keys"]
    if not isinstance(weights, Tensor) or weights.shape != keys.shape[:2] or weights.is_complex():
        return None
    return weights.double()


def _pads_attended(probe: Probe, got: Outcome, wanted: Outcome) -> bool:
    """See weight on padding, and weight on words: then the mask is not turned round, it has no effect."""
    weights, mask = _weights_of(probe, got), probe.args.get("mask")
    if weights is None or mask is None or not bool(weights.isfinite().all()):
        return False
    return bool((weights[~mask] > 1e-6).any()) and bool((weights[mask] > 1e-6).any(-1).all())


def _attention_property(probe: Probe, got: Outcome, wanted: Outcome) -> str:
    weights, mask = _weights_of(probe, got), probe.args.get("mask")
    if weights is None or not bool(weights.isfinite().all()):
        return ""
    if mask is not None and bool((weights[~mask] > 1e-6).any()):
        place = ((weights > 1e-6) & ~mask).nonzero()[0].tolist()
        return f"The weight of padding is not 0: sentence {place[0]}, position {place[1]} has {weights[*place]:.4g}."
    sums = weights.sum(-1)
    row = int((sums - 1).abs().argmax())
    return (
        f"The weights of sentence {row} sum to {sums[row]:.4g}, not to 1."
        if abs(sums[row] - 1) > 1e-3
        else ""
    )


def _attention_by_loops(
    query: Tensor, keys: Tensor, w_query: Tensor, w_key: Tensor, v: Tensor, mask: Any = None
) -> tuple[Tensor, Tensor]:
    contexts, all_weights = [], []
    for b in range(len(query)):
        scores = []
        for j in range(keys.shape[1]):
            score = torch.dot(v, torch.tanh(query[b] @ w_query + keys[b, j] @ w_key))
            if mask is not None and not mask[b, j]:
                score = score - float("inf")
            scores.append(score)
        weights = torch.softmax(torch.stack(scores), dim=0)
        contexts.append(weights @ keys[b])
        all_weights.append(weights)
    return torch.stack(contexts), torch.stack(all_weights)


def _attention_by_einsum(
    query: Tensor, keys: Tensor, w_query: Tensor, w_key: Tensor, v: Tensor, mask: Any = None
) -> tuple[Tensor, Tensor]:
    hidden = torch.einsum("bh,ha->ba", query, w_query)[:, None] + torch.einsum("bsh,ha->bsa", keys, w_key)
    scores = torch.einsum("bsa,a->bs", hidden.tanh(), v)
    if mask is not None:
        scores = scores.masked_fill(mask == 0, -1e9)
    weights = torch.nn.functional.softmax(scores, dim=1)
    return torch.einsum("bs,bsh->bh", weights, keys), weights


def _attention_renormalised(
    query: Tensor, keys: Tensor, w_query: Tensor, w_key: Tensor, v: Tensor, mask: Any = None
) -> list[Tensor]:
    # exp of the shifted scores, 0 at padding, divided by what is left
    if mask is None:
        mask = torch.ones(keys.shape[:2], dtype=torch.bool)
    joined = torch.cat([query.unsqueeze(1).expand(-1, keys.shape[1], -1), keys], dim=-1)
    scores = torch.tanh(joined @ torch.cat([w_query, w_key])).matmul(v.unsqueeze(-1)).squeeze(-1)
    scores = torch.where(mask, scores, torch.full_like(scores, -1e4))
    e = (scores - scores.max(-1, keepdim=True).values).exp() * mask
    weights = e / e.sum(-1, keepdim=True)
    return [torch.bmm(weights.unsqueeze(1), keys)[:, 0], weights]


def _attention_as_nn_linear_stores_it(
    query: Tensor, keys: Tensor, w_query: Tensor, w_key: Tensor, v: Tensor, mask: Any = None
) -> tuple[Tensor, Tensor]:
    hidden = torch.nn.functional.linear(query, w_query).unsqueeze(1) + torch.nn.functional.linear(keys, w_key)
    scores = torch.tanh(hidden) @ v
    if mask is not None:
        scores = scores + torch.zeros_like(scores).masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1)
    return (weights[..., None] * keys).sum(1), weights


ADDITIVE_ATTENTION = Task(
    id="seq2seq.additive_attention",
    signature="additive_attention(query, keys, w_query, w_key, v, mask=None)",
    points=4,
    reference=seq2seq.additive_attention,
    probes=_attention_probes,
    twin=_attention_twin,
    # The statement says x @ W. Who reads the matrices as nn.Linear stores them has understood attention, too.
    accepts=[lambda *args: _attention_twin(*args, stored="x @ W.T")],
    forbidden=frozenset(
        {"additive_attention", "scaled_dot_product_attention", "multi_head_attention_forward"}
    ),
    properties=[_attention_property],
    variants=[
        _attention_by_loops,
        _attention_by_einsum,
        _attention_renormalised,
        _attention_as_nn_linear_stores_it,
    ],
    hints=(
        "What must the weight of a padded position be, and what must the weights of the real ones then sum to?",
        "Score each key against the query, put -infinity at padding, softmax over the S keys, then take the weighted sum of the keys.",
        "hidden = tanh(query @ w_query, with an axis for the keys, + keys @ w_key)   # (B, S, H)\nscores = hidden @ v   # (B, S)\n"
        "where the mask is False: scores = -infinity\nweights = softmax(scores) over the last axis\n"
        "context = sum over j of weights[:, j] * keys[:, j]\nreturn context, weights",
    ),
    mistakes=[
        Fault(
            "attn-pads-attended",
            "Padding gets weight: the mask is not used, or it makes the scores of padding 0, and exp(0) is 1. "
            "Two more pads change the result.",
            "Set the scores of padding to -infinity before the softmax.",
            MASK,
            settings=[{"masked": "not"}, {"masked": "scores times mask"}],
            sign=_pads_attended,
        ),
        Fault(
            "attn-mask-after-softmax",
            "The weights of padding are removed after the softmax, so those of the real tokens no longer sum to 1.",
            "Mask the scores before the softmax.",
            MASK,
            settings=[{"masked": "after softmax"}],
        ),
        Fault(
            "mask-inverted",
            "The mask is turned round: only padding gets weight.",
            "True in the mask means a real token: fill the scores where the mask is False.",
            MASK,
            settings=[{"masked": "inverted"}],
        ),
        Fault(
            "attn-ignores-encoder",
            "The scores come from the query alone, so all keys of a sentence get the same weight, whatever they hold.",
            "Score each key together with the query: query @ w_query + keys @ w_key.",
            LOOK,
            settings=[{"asked": "query"}],
        ),
        Fault(
            "attn-ignores-query",
            "The scores come from the keys alone: the decoder would look at the same place at every step.",
            "Score each key together with the query: query @ w_query + keys @ w_key.",
            LOOK,
            settings=[{"asked": "keys"}],
        ),
        Fault(
            "attn-weights-exchanged",
            "The matrices are exchanged: w_query is applied to the keys and w_key to the query.",
            "Use query @ w_query and keys @ w_key.",
            LOOK,
            settings=[{"exchanged": True}],
        ),
        Fault(
            "attn-no-tanh",
            "The tanh is missing or another function, or it is applied after v. Without a bend inside, the query cancels in the softmax.",
            "Apply tanh to the sum of the two projections, before the product with v.",
            LOOK,
            settings=[{"bend": "none"}, {"bend": "outside"}, {"bend": "relu"}, {"bend": "sigmoid"}],
        ),
        Fault(
            "attn-scaled",
            "The scores are divided by a square root. That belongs to dot products; additive scores are used as they are.",
            "Leave out the division.",
            LOOK,
            settings=[{"scale": True}],
        ),
        Fault(
            "softmax-wrong-axis",
            "The softmax runs over the sentences of the batch, or over everything: sentences compete with each other.",
            "Normalise over the S keys of each sentence, the last axis of the scores.",
            LOOK,
            settings=[{"softmax": "over the sentences"}, {"softmax": "over everything"}],
        ),
        Fault(
            "softmax-no-max-shift",
            "exp overflows for scores above 88.",
            "Use torch.softmax, or subtract the largest score of each row first.",
            LOOK,
            settings=[{"softmax": "without a shift"}],
        ),
        Fault(
            "attn-no-softmax",
            "The weights are no softmax of the scores, so they do not sum to 1.",
            "Apply softmax over the keys.",
            LOOK,
            settings=[{"softmax": "sigmoid"}, {"softmax": "none"}],
        ),
        Fault(
            "attn-context-wrong",
            "The weights are right, the context is not: it is a mean, the best key alone, or a sum of projected keys.",
            "Multiply each key itself with its weight and add them up over the S positions.",
            LOOK,
            settings=[
                {"context": "mean of the weighted keys"},
                {"context": "projected keys"},
                {"context": "best key"},
                {"context": "mean of the keys"},
            ],
        ),
        Fault(
            "backward-detached",
            "No gradient reaches the arguments: the result has left autograd.",
            "Stay with torch operations; avoid .detach(), .data, .numpy() and torch.tensor(...) on the way.",
            LOOK,
            settings=[{"cut": True}],
        ),
    ],
)


# ----- Encoder --------------------------------------------------------------------------------------------------------


def _encoder_probes(generator: torch.Generator) -> list[Probe]:
    def probe(
        name: str, lengths: list[int], width: int, vocab_size: int, hidden: int, core: bool = False
    ) -> Probe:
        h = hidden // 2
        shapes = [(3 * h, hidden), (3 * h, h), (3 * h,), (3 * h,)] * 2
        state = (
            randn(generator, vocab_size, hidden),
            *(randn(generator, *shape) * 0.6 for shape in shapes),
        )
        source = _ragged(generator, lengths, width, vocab_size)
        args = {"source": source, "lengths": torch.tensor(lengths)}
        return Probe(
            name, args, build=(vocab_size, hidden), state=state, gradients=("parameters",), core=core
        )

    return [
        probe("two sentences of equal length", [3, 3], 3, 7, 4, core=True),
        probe("sentences of 2, 5 and 4 tokens", [2, 5, 4], 5, 11, 6, core=True),
        probe("sentences of 6, 1, 3 and 6 tokens", [6, 1, 3, 6], 6, 10, 8),
        probe("every sentence is shorter than the tensor", [3, 1, 4], 7, 9, 4),
    ]


class _FaultyEncoder(nn.Module):
    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        padding: str = "skipped",
        last: str = "both ends",
        order: str = "restored",
        cut: bool = False,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.rnn = nn.GRU(hidden_size, hidden_size // 2, batch_first=True, bidirectional=True)
        self.padding, self.last, self.order, self.cut = padding, last, order, cut

    def forward(self, source: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        if self.order == "sorted":
            lengths, rows = lengths.sort(descending=True)
            source = source[rows]
        real = torch.arange(source.shape[1]) < lengths.unsqueeze(1)
        embedded = self.embedding(source)
        if self.padding == "embedding is 0":
            embedded = embedded * real.unsqueeze(-1)
        if self.padding in ("skipped", "cut off"):
            packed = nn.utils.rnn.pack_padded_sequence(embedded, lengths, True, enforce_sorted=False)
            states, ends = self.rnn(packed)
            total = None if self.padding == "cut off" else source.shape[1]
            states = nn.utils.rnn.pad_packed_sequence(states, True, total_length=total)[0]
        else:
            states, ends = self.rnn(embedded)
            if self.padding == "states are 0":
                states = states * real.unsqueeze(-1)
        if self.cut:
            states, ends = states.detach(), ends.detach()
        ways: dict[str, Callable[[], Tensor]] = {
            "both ends": lambda: torch.cat([ends[0], ends[1]], -1),
            "exchanged": lambda: torch.cat([ends[1], ends[0]], -1),
            "reshaped": lambda: ends.reshape(len(source), -1),
            "last column": lambda: states[:, -1],
            "last real column": lambda: states[torch.arange(len(source)), lengths - 1],
            "first column": lambda: states[:, 0],
            "one direction": lambda: ends[-1],
            "forward direction": lambda: ends[0],
            "mean": lambda: states.sum(1) / lengths.unsqueeze(1),
        }
        return states, ways[self.last]()


def _encoder_property(probe: Probe, got: Outcome, wanted: Outcome) -> str:
    count, right = got.values.get("number of parameters"), wanted.values.get("number of parameters")
    if count != right:
        return f"parameters() finds {count} numbers; this encoder has {right}."
    states = got.values.get("result[0]")
    mask = _mask_of(probe.args["lengths"].tolist(), probe.args["source"].shape[1])
    if isinstance(states, Tensor) and states.shape[:2] == mask.shape and bool(states[~mask].abs().sum() > 0):
        return "The states at padding are not 0."
    return ""


class _EncoderOfSingleSentences(torch.nn.Module):
    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(vocab_size, hidden_size, padding_idx=0)
        self.gru = torch.nn.GRU(hidden_size, hidden_size // 2, bidirectional=True)

    def forward(self, source: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        all_states, all_last = [], []
        for row, length in zip(source, lengths.tolist(), strict=True):
            states, ends = self.gru(self.table(row[:length]))
            rest = torch.zeros(len(row) - length, states.shape[-1])
            all_states.append(torch.cat([states, rest]))
            all_last.append(ends.flatten())
        return torch.stack(all_states), torch.stack(all_last)


class _EncoderSorted(torch.nn.Module):
    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.emb = torch.nn.Embedding(vocab_size, hidden_size)
        self.gru = torch.nn.GRU(
            hidden_size, hidden_size // 2, num_layers=1, bidirectional=True, batch_first=True
        )

    def forward(self, source: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        rnn = torch.nn.utils.rnn
        ordered, order = torch.sort(lengths, descending=True)
        packed = rnn.pack_padded_sequence(self.emb(source[order]), ordered, batch_first=True)
        states, ends = self.gru(packed)
        states = rnn.pad_packed_sequence(states, batch_first=True, total_length=source.shape[1])[0]
        back = torch.argsort(order)
        last = ends.transpose(0, 1).reshape(len(source), -1)
        return states[back], last[back]


class _EncoderOfTwoGRUs(torch.nn.Module):
    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab_size, hidden_size)
        self.forwards = torch.nn.GRU(hidden_size, hidden_size // 2, batch_first=True)
        self.backwards = torch.nn.GRU(hidden_size, hidden_size // 2, batch_first=True)

    def forward(self, source: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        steps = torch.arange(source.shape[1])
        real = (steps < lengths.unsqueeze(1)).unsqueeze(-1)
        # position j of the reversed sentence is position length - 1 - j; padding stays where it is
        turned = torch.where(real.squeeze(-1), lengths.unsqueeze(1) - 1 - steps, steps)
        x = self.embedding(source)
        ahead = self.forwards(x)[0] * real
        back = self.backwards(x.gather(1, turned.unsqueeze(-1).expand_as(x)))[0] * real
        rows = torch.arange(len(source))
        last = torch.cat([ahead[rows, lengths - 1], back[rows, lengths - 1]], dim=1)
        return torch.cat([ahead, back.gather(1, turned.unsqueeze(-1).expand_as(back))], dim=-1), last


ENCODER_TASK = Task(
    id="seq2seq.Encoder",
    signature="Encoder(vocab_size, hidden_size)",
    points=4,
    reference=seq2seq.Encoder,
    probes=_encoder_probes,
    twin=_FaultyEncoder,
    forbidden=frozenset({"Encoder"}),
    properties=[_encoder_property],
    variants=[_EncoderOfSingleSentences, _EncoderSorted, _EncoderOfTwoGRUs],
    hints=(
        "The backward direction begins at the end of the tensor. What does it read first in a short sentence?",
        "Pack the embedded sentences with their lengths, so that no direction reads padding, and join the final states of both directions.",
        "in __init__: an nn.Embedding(vocab_size, hidden_size) and a bidirectional nn.GRU(hidden_size, hidden_size // 2)\n"
        "packed = pack_padded_sequence(embedded source, lengths, batch_first, enforce_sorted=False)\n"
        "states, ends = gru(packed); unpack states with total_length = S\nreturn states, ends[0] and ends[1] side by side",
    ),
    mistakes=[
        Fault(
            "enc-reads-padding",
            "The GRU reads the padding: the backward direction begins with it, so two more pads change every state of a short sentence.",
            "Pack the batch with pack_padded_sequence, or stop each sentence at its length.",
            MASK,
            settings=[
                {"padding": "read"},
                {"padding": "embedding is 0"},
                {"padding": "states are 0"},
            ],
        ),
        Fault(
            "enc-columns-cut-off",
            "The states have as many columns as the longest sentence of the batch, not as the source: the mask no longer fits.",
            "Give total_length=source.shape[1] to pad_packed_sequence.",
            MASK,
            settings=[{"padding": "cut off"}],
        ),
        Fault(
            "bi-hidden-slice",
            "The final states are taken from the wrong place of the GRU's hidden tensor, which has shape (2, B, H/2): one direction "
            "only, in exchanged order, or reshaped so that sentences mix.",
            "Join hidden[0] (forward) and hidden[1] (backward) along the last axis.",
            ENCODER,
            settings=[
                {"last": "reshaped"},
                {"last": "exchanged"},
                {"last": "one direction"},
                {"last": "forward direction"},
            ],
        ),
        Fault(
            "enc-last-column",
            "You take a column of the states, or their mean, for the final state. In the last column the backward direction has "
            "read one token, or padding.",
            "Use the GRU's second result: the final state of each direction.",
            ENCODER,
            settings=[
                {"last": "last column"},
                {"last": "last real column"},
                {"last": "first column"},
                {"last": "mean"},
            ],
        ),
        Fault(
            "enc-order-not-restored",
            "The sentences were sorted by length and not put back: states and targets belong to different sentences.",
            "Use enforce_sorted=False, or undo the sorting at the end.",
            ENCODER,
            settings=[{"order": "sorted"}],
        ),
        Fault(
            "backward-detached",
            "No gradient reaches the weights: the states have left autograd.",
            "Avoid torch.no_grad(), .detach(), .data and .numpy() inside forward.",
            ENCODER,
            settings=[{"cut": True}],
        ),
    ],
)


# ----- decoder_step ---------------------------------------------------------------------------------------------------


def _step_probes(generator: torch.Generator) -> list[Probe]:
    def probe(
        name: str, lengths: list[int], width: int, vocab_size: int, hidden: int, core: bool = False
    ) -> Probe:
        shapes = [(3 * hidden, 2 * hidden), (3 * hidden, hidden), (3 * hidden,), (3 * hidden,)]
        parts = DecoderParts(
            randn(generator, vocab_size, hidden),
            tuple(randn(generator, *shape) * 0.6 for shape in shapes),
            (randn(generator, vocab_size, 2 * hidden), randn(generator, vocab_size)),
        )
        args: dict[str, Any] = {
            "decoder": parts,
            "token": torch.randint(vocab_size, (len(lengths),), generator=generator),
            "state": randn(generator, len(lengths), hidden),
            "keys": randn(generator, len(lengths), width, hidden),
            "mask": _mask_of(lengths, width),
        }
        return Probe(name, args, gradients=("state", "keys"), core=core)

    return [
        probe("two sentences of equal length", [3, 3], 3, 5, 2, core=True),
        probe("sentences of 2, 5 and 4 tokens", [2, 5, 4], 5, 9, 4, core=True),
        probe("a single token beside a long sentence", [1, 6], 6, 7, 3),
    ]


def _step_twin(
    decoder: Any,
    token: Tensor,
    state: Tensor,
    keys: Tensor,
    mask: Tensor,
    *,
    mask_passed: bool = True,
    query: str = "state",
    joined: str = "embedding, context",
    before: str = "state",
    read: str = "new state, context",
    output: str = "logits",
    returned: str = "new state",
    cut: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    embedded = decoder.embedding(token)
    context, weights = decoder.attend(
        embedded if query == "embedding" else state, keys, mask if mask_passed else None
    )
    if cut:
        context = context.detach()
    parts = {"embedding": embedded, "context": context, "mean": keys.mean(1), "first key": keys[:, 0]}
    first, second = joined.split(", ")
    x = torch.cat([parts[first], parts[second]], -1)
    new = decoder.cell(x, torch.zeros_like(state) if before == "zeros" else state)
    parts |= {"new state": new, "old state": state}
    first, second = read.split(", ")
    logits = decoder.readout(torch.cat([parts[first], parts[second]], -1))
    if output == "probabilities":
        logits = logits.softmax(-1)
    return logits, new if returned == "new state" else state, weights


def _step_by_hand(
    decoder: Any, token: Tensor, state: Tensor, keys: Tensor, mask: Tensor
) -> tuple[Tensor, ...]:
    context, weights = decoder.attend(state, keys, mask)
    e = decoder.embedding.weight[token]
    new_state = decoder.cell(torch.hstack((e, context)), state)
    logits = torch.hstack((new_state, context)) @ decoder.readout.weight.T + decoder.readout.bias
    return logits, new_state, weights


def _step_with_log_softmax(
    decoder: Any, token: Tensor, state: Tensor, keys: Tensor, mask: Tensor
) -> tuple[Tensor, ...]:
    # logarithms of probabilities are logits, too
    context, weights = decoder.attend(query=state, keys=keys, mask=mask)
    state = decoder.cell(torch.cat((decoder.embedding(token), context), dim=1), state)
    logits = decoder.readout(torch.cat((state, context), dim=1))
    return torch.log_softmax(logits, dim=-1), state, weights


def _step_log_softmax_accepted(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    logits, state, weights = _step_twin(*args)
    return logits.log_softmax(-1), state, weights


DECODER_STEP = Task(
    id="seq2seq.decoder_step",
    signature="decoder_step(decoder, token, state, keys, mask)",
    points=3,
    reference=seq2seq.Decoder.step,
    probes=_step_probes,
    twin=_step_twin,
    # Logarithms of probabilities are logits too: softmax and the loss give the same for them.
    accepts=[_step_log_softmax_accepted],
    forbidden=frozenset({"decoder_step"}),
    variants=[_step_by_hand, _step_with_log_softmax],
    hints=(
        "Which state can the decoder ask with, before it has read the token?",
        "Attend with the old state; the cell reads embedding and context; the readout reads the new state and the context.",
        "context, weights = decoder.attend(state, keys, mask)\nx = embedding of token and context, joined along the last axis\n"
        "state = decoder.cell(x, state)\nlogits = decoder.readout(state and context, joined)\nreturn logits, state, weights",
    ),
    mistakes=[
        Fault(
            "attn-pads-attended",
            "The mask never reaches decoder.attend: padding gets weight.",
            "Pass it on: decoder.attend(state, keys, mask).",
            MASK,
            settings=[{"mask_passed": False}],
        ),
        Fault(
            "dec-query-is-the-token",
            "You ask the source with the embedding of the token, not with the state.",
            "The query is the decoder's state before this step.",
            STEP,
            settings=[{"query": "embedding"}],
        ),
        Fault(
            "attn-ignores-encoder",
            "The context that was looked up is not used: the cell reads a fixed summary of the keys, or no key at all.",
            "Join the embedding with the context that decoder.attend returns.",
            STEP,
            settings=[
                {"joined": "embedding, mean"},
                {"joined": "embedding, first key"},
                {"joined": "embedding, embedding"},
            ],
        ),
        Fault(
            "dec-parts-exchanged",
            "The parts are joined in the other order, so the weights meet the wrong numbers.",
            "Join (embedding, context) for the cell and (new state, context) for the readout.",
            STEP,
            settings=[{"joined": "context, embedding"}, {"read": "context, new state"}],
        ),
        Fault(
            "dec-token-not-read",
            "The token is not read: the decoder cannot know what it has written.",
            "Give decoder.embedding(token) to the cell.",
            STEP,
            settings=[{"joined": "context, context"}],
        ),
        Fault(
            "dec-state-forgotten",
            "The cell starts from zeros at every step: what was written before is forgotten.",
            "Call decoder.cell(x, state).",
            STEP,
            settings=[{"before": "zeros"}],
        ),
        Fault(
            "dec-state-not-updated",
            "The old state is returned, or the readout uses it: the next step begins where this one began.",
            "Use the state that the cell returns, in the readout and as a result.",
            STEP,
            settings=[{"returned": "old state"}, {"read": "old state, context"}],
        ),
        Fault(
            "loss-double-softmax",
            "You return probabilities. The loss applies softmax again.",
            "Return the readout's scores as they are.",
            STEP,
            settings=[{"output": "probabilities"}],
        ),
        Fault(
            "backward-detached",
            "The context has left autograd: the encoder would never learn from it.",
            "Use what decoder.attend returns as it is, without .detach() or .data.",
            STEP,
            settings=[{"cut": True}],
        ),
    ],
)


# ----- greedy_decode --------------------------------------------------------------------------------------------------


def _greedy_probes(generator: torch.Generator) -> list[Probe]:
    def probe(
        name: str,
        lengths: list[int],
        vocab_size: int,
        start: int,
        eos: int,
        max_length: int,
        core: bool = False,
    ) -> Probe:
        """Let row b choose eos for the first time after lengths[b] other tokens; all choices depend on the last token."""
        n_calls = max_length + 2
        scores = randn(generator, n_calls, len(lengths), vocab_size, vocab_size)
        for b, length in enumerate(lengths):
            scores[:, b, :, eos] -= 100  # never, but for
            if length < n_calls:
                scores[length, b, :, eos] += 200
        args = {
            "step": NextToken(scores),
            "start": torch.full((len(lengths),), start),
            "eos": eos,
            "max_length": max_length,
        }
        return Probe(name, args, core=core)

    return [
        probe("one sentence of three tokens", [3], 6, 1, 2, 8, core=True),
        probe("sentences of 2, 5 and 4 tokens", [2, 5, 4], 7, 1, 2, 10, core=True),
        probe("one sentence never ends", [3, 99], 6, 1, 2, 6),
        probe("other numbers for begin and end", [4, 1, 3], 8, 5, 7, 9),
        probe("sentences that end at once", [0, 0], 5, 1, 2, 4),
        probe("sentences that need all the room", [4, 3], 6, 1, 3, 5),
    ]


def _greedy_twin(
    step: Callable[[Tensor], Tensor],
    start: Tensor,
    eos: int,
    max_length: int,
    *,
    fed: str = "own choice",
    first: str = "start",
    choice: str = "best",
    end: str = "eos",
    stop: str = "all have ended",
    tail: str = "eos",
    returned: str = "choices",
    limit: int = 0,
) -> Tensor:
    token = {"start": start, "0": torch.zeros_like(start), "1": torch.ones_like(start)}[first]
    begin, chosen = token, []
    last = {"eos": eos, "2": 2, "3": 3, "never": -1}[end]
    ended = torch.zeros_like(start, dtype=torch.bool)
    for _ in range(max_length + limit):
        scores = step(token)
        if choice == "best":
            token = scores.argmax(-1)
        elif choice == "worst":
            token = scores.argmin(-1)
        elif choice == "second":
            token = scores.topk(2, -1).indices[:, 1]
        else:
            token = torch.multinomial(scores.softmax(-1), 1).squeeze(1)
        now = token == last
        if tail == "eos":
            token = token.masked_fill(ended, last if last >= 0 else eos)
        elif tail == "0":
            token = token.masked_fill(ended, 0)
        ended = ended | now
        chosen.append(token)
        done = {
            "all have ended": bool(ended.all()),
            "any has ended": bool(ended.any()),
            "all at once": bool(now.all()),
            "first row": bool(ended[0]),
            "never": False,
        }[stop]
        if done:
            break
        if fed == "begin":
            token = begin
    if returned == "with start":
        chosen.insert(0, begin)
    elif returned == "without the end":
        chosen = chosen[:-1]
    return torch.stack(chosen, 1) if chosen else start.new_empty(len(start), 0)


def _greedy_property(probe: Probe, got: Outcome, wanted: Outcome) -> str:
    result, right = got.values.get("result"), wanted.values.get("result")
    if not isinstance(result, Tensor) or not isinstance(right, Tensor) or result.shape != right.shape:
        return ""
    eos = probe.args["eos"]
    after = ((result == eos).cumsum(1) > 0) & (result != eos)
    if bool(after.any()):
        row, column = after.nonzero()[0].tolist()
        return f"Row {row} goes on after its end token: column {column} holds {int(result[row, column])}, not eos."
    return ""


def _greedy_row_by_row(step: Any, start: Tensor, eos: int, max_length: int) -> Tensor:
    # written for each row: a list that grows until its end token
    rows: list[list[int]] = [[] for _ in start]
    token = start
    for _ in range(max_length):
        best = step(token).max(dim=1).indices.tolist()
        for row, word in zip(rows, best, strict=True):
            row.append(eos if row and row[-1] == eos else word)
        token = torch.tensor([row[-1] for row in rows])
        if all(row[-1] == eos for row in rows):
            break
    return torch.tensor(rows)


def _greedy_feeding_on(step: Any, start: Tensor, eos: int, max_length: int) -> Tensor:
    # a row that has ended keeps on choosing; what it chose after its end is overwritten at the close
    result = torch.full((len(start), max_length), eos)
    token = start
    for t in range(max_length):
        token = torch.argmax(step(token), dim=-1)
        result[:, t] = token
        if (result[:, : t + 1] == eos).any(1).all():
            result = result[:, : t + 1]
            break
    ended = (result == eos).long().cumsum(1) > 0
    return torch.where(ended, eos, result)


def _greedy_with_a_while(step: Any, start: Tensor, eos: int, max_length: int) -> Tensor:
    out = start.unsqueeze(1)
    active = torch.ones(len(start), dtype=torch.bool)
    while out.shape[1] <= max_length and active.any():
        nxt = torch.log_softmax(step(out[:, -1]), -1).topk(1).indices[:, 0]
        nxt = torch.where(active, nxt, torch.tensor(eos))
        active = active & (nxt != eos)
        out = torch.cat([out, nxt.unsqueeze(1)], 1)
    return out[:, 1:]


GREEDY_DECODE = Task(
    id="seq2seq.greedy_decode",
    signature="greedy_decode(step, start, eos, max_length)",
    points=4,
    reference=seq2seq.greedy_decode,
    probes=_greedy_probes,
    twin=_greedy_twin,
    forbidden=frozenset({"greedy_decode"}),
    properties=[_greedy_property],
    variants=[_greedy_row_by_row, _greedy_feeding_on, _greedy_with_a_while],
    hints=(
        "One sentence of the batch has ended and another has not. What is written for the first, and when does the loop stop?",
        "Each choice is the next input. A row that has chosen eos holds eos from there on; the loop ends when every row has, "
        "or after max_length tokens.",
        "token = start; ended = all False\nrepeat at most max_length times:\n    token = argmax of step(token), row by row\n"
        "    where ended: token = eos\n    keep token; ended = ended or token == eos\n    if all have ended: stop\n"
        "return what was kept, as columns",
    ),
    mistakes=[
        Fault(
            "greedy-without-feedback",
            "The chosen token is never fed back: every step reads the begin token again.",
            "Give the last choice to the next call of step.",
            GREEDY,
            settings=[{"fed": "begin"}],
        ),
        Fault(
            "decode-special-ids-inconsistent",
            "You begin or end with a fixed number (0, 1, 2 or 3) and not with the given start and eos.",
            "Begin with start, and compare with eos.",
            GREEDY,
            settings=[
                {"first": "0"},
                {"first": "1"},
                {"end": "2", "tail": "eos"},
                {"end": "3", "tail": "eos"},
            ],
        ),
        Fault(
            "decode-post-eos-kept",
            "A row goes on after its end token: what follows is kept, or filled with another number than eos.",
            "Remember which rows have ended, and write eos for them.",
            GREEDY,
            settings=[{"tail": "kept"}, {"tail": "0"}],
        ),
        Fault(
            "decode-stops-too-late",
            "The loop goes on when every row has ended: it waits until all choose eos in the same step, or for max_length.",
            "Remember which rows have ended, and stop as soon as all have.",
            GREEDY,
            settings=[
                {"stop": "never"},
                {"tail": "kept", "stop": "all at once"},
                {"tail": "kept", "stop": "never"},
            ],
        ),
        Fault(
            "decode-stops-too-early",
            "The loop stops when one row has ended, and cuts the longer sentences.",
            "Stop when all rows have ended.",
            GREEDY,
            settings=[{"stop": "any has ended"}, {"stop": "first row"}],
        ),
        Fault(
            "greedy-not-the-best",
            "Another token than the best one is chosen: drawn at random, the second best, or the worst.",
            "Take the argmax over the vocabulary, the last axis.",
            GREEDY,
            settings=[{"choice": "worst"}, {"choice": "second"}],
            sign=lambda probe, got, wanted: got.random,
        ),
        Fault(
            "decode-columns-wrong",
            "The result has a column too many or too few: start is returned as well, or the last column is dropped.",
            "Return exactly the chosen tokens, the end token among them.",
            GREEDY,
            settings=[{"returned": "with start"}, {"returned": "without the end"}],
        ),
        Fault(
            "decode-limit-off-by-one",
            "A sentence that does not end gets one token more or fewer than max_length.",
            "Choose at most max_length tokens; start is not one of them.",
            GREEDY,
            settings=[{"limit": 1}, {"limit": -1}],
        ),
    ],
)


# ----- grade this: implementations of additive attention as source text ------------------------------------------------


def _right_broadcast(query, keys, w_query, w_key, v, mask=None):  # type: ignore[no-untyped-def]
    energy = torch.tanh((query @ w_query)[:, None, :] + keys @ w_key)
    scores = (energy * v).sum(dim=2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = torch.softmax(scores, dim=1)
    return (weights[:, :, None] * keys).sum(dim=1), weights


def _right_large_negative(query, keys, w_query, w_key, v, mask=None):  # type: ignore[no-untyped-def]
    scores = torch.tanh((query @ w_query).unsqueeze(1) + keys @ w_key).matmul(v)
    if mask is not None:
        scores = torch.where(mask, scores, torch.tensor(-1e9))
    weights = scores.softmax(-1)
    return torch.bmm(weights.unsqueeze(1), keys).squeeze(1), weights


def _right_sentence_by_sentence(query, keys, w_query, w_key, v, mask=None):  # type: ignore[no-untyped-def]
    contexts, rows = [], []
    for b in range(len(keys)):
        scores = torch.tanh(query[b] @ w_query + keys[b] @ w_key) @ v
        real = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask[b]
        row = torch.zeros_like(scores)
        row[real] = scores[real].softmax(0)
        contexts.append(row @ keys[b])
        rows.append(row)
    return torch.stack(contexts), torch.stack(rows)


def _wrong_mask_ignored(query, keys, w_query, w_key, v, mask=None):  # type: ignore[no-untyped-def]
    weights = (torch.tanh((query @ w_query).unsqueeze(1) + keys @ w_key) @ v).softmax(-1)
    return (weights.unsqueeze(1) @ keys).squeeze(1), weights


def _wrong_mask_multiplied(query, keys, w_query, w_key, v, mask=None):  # type: ignore[no-untyped-def]
    scores = torch.tanh((query @ w_query).unsqueeze(1) + keys @ w_key) @ v
    if mask is not None:
        scores = scores * mask
    weights = scores.softmax(-1)
    return (weights.unsqueeze(1) @ keys).squeeze(1), weights


def _wrong_mask_afterwards(query, keys, w_query, w_key, v, mask=None):  # type: ignore[no-untyped-def]
    weights = (torch.tanh((query @ w_query).unsqueeze(1) + keys @ w_key) @ v).softmax(-1)
    if mask is not None:
        weights = weights * mask
    return (weights.unsqueeze(1) @ keys).squeeze(1), weights


def _wrong_mask_inverted(query, keys, w_query, w_key, v, mask=None):  # type: ignore[no-untyped-def]
    scores = torch.tanh((query @ w_query).unsqueeze(1) + keys @ w_key) @ v
    if mask is not None:
        scores = scores.masked_fill(mask, -1e9)
    weights = scores.softmax(-1)
    return (weights.unsqueeze(1) @ keys).squeeze(1), weights


def _wrong_first_row_of_mask(query, keys, w_query, w_key, v, mask=None):  # type: ignore[no-untyped-def]
    scores = torch.tanh((query @ w_query).unsqueeze(1) + keys @ w_key) @ v
    if mask is not None:
        scores = scores.masked_fill(~mask[0], -1e9)
    weights = scores.softmax(-1)
    return (weights.unsqueeze(1) @ keys).squeeze(1), weights


def _wrong_axis(query, keys, w_query, w_key, v, mask=None):  # type: ignore[no-untyped-def]
    scores = torch.tanh((query @ w_query).unsqueeze(1) + keys @ w_key) @ v
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e9)
    weights = scores.softmax(0)
    return (weights.unsqueeze(1) @ keys).squeeze(1), weights


def _wrong_first_query(query, keys, w_query, w_key, v, mask=None):  # type: ignore[no-untyped-def]
    scores = torch.tanh(query[:1] @ w_query + keys @ w_key) @ v
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e9)
    weights = scores.softmax(-1)
    return (weights.unsqueeze(1) @ keys).squeeze(1), weights


def _wrong_query_only(query, keys, w_query, w_key, v, mask=None):  # type: ignore[no-untyped-def]
    scores = (torch.tanh(query @ w_query) @ v).unsqueeze(1).expand(keys.shape[:2])
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e9)
    weights = scores.softmax(-1)
    return (weights.unsqueeze(1) @ keys).squeeze(1), weights


def _wrong_keys_only(query, keys, w_query, w_key, v, mask=None):  # type: ignore[no-untyped-def]
    scores = torch.tanh(keys @ w_key) @ v
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e9)
    weights = scores.softmax(-1)
    return (weights.unsqueeze(1) @ keys).squeeze(1), weights


def _wrong_no_tanh(query, keys, w_query, w_key, v, mask=None):  # type: ignore[no-untyped-def]
    scores = ((query @ w_query).unsqueeze(1) + keys @ w_key) @ v
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e9)
    weights = scores.softmax(-1)
    return (weights.unsqueeze(1) @ keys).squeeze(1), weights


def _wrong_exchanged(query, keys, w_query, w_key, v, mask=None):  # type: ignore[no-untyped-def]
    scores = torch.tanh((query @ w_key).unsqueeze(1) + keys @ w_query) @ v
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e9)
    weights = scores.softmax(-1)
    return (weights.unsqueeze(1) @ keys).squeeze(1), weights


def _wrong_context(query, keys, w_query, w_key, v, mask=None):  # type: ignore[no-untyped-def]
    scores = torch.tanh((query @ w_query).unsqueeze(1) + keys @ w_key) @ v
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e9)
    weights = scores.softmax(-1)
    return keys.mean(dim=1), weights


def _wrong_scores_returned(query, keys, w_query, w_key, v, mask=None):  # type: ignore[no-untyped-def]
    scores = torch.tanh((query @ w_query).unsqueeze(1) + keys @ w_key) @ v
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e9)
    context = (scores.softmax(-1).unsqueeze(1) @ keys).squeeze(1)
    return context, scores if mask is None else scores.masked_fill(~mask, 0.0)


RIGHT_SPECIMENS = (_right_broadcast, _right_large_negative, _right_sentence_by_sentence)
WRONG_SPECIMENS = (
    _wrong_mask_ignored,
    _wrong_mask_multiplied,
    _wrong_mask_afterwards,
    _wrong_mask_inverted,
    _wrong_first_row_of_mask,
    _wrong_axis,
    _wrong_first_query,
    _wrong_query_only,
    _wrong_keys_only,
    _wrong_no_tanh,
    _wrong_exchanged,
    _wrong_context,
    _wrong_scores_returned,
)


def _specimen_probes(generator: torch.Generator) -> list[Probe]:
    return specimen_probes("additive_attention", RIGHT_SPECIMENS, WRONG_SPECIMENS, generator)


def _example(lengths: list[int], width: int, equal: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    w_query, w_key = randn(generator, 4, 4), randn(generator, 4, 4)
    return [
        randn(generator, len(lengths), 4),
        randn(generator, len(lengths), width, 4),
        w_query,
        w_query if equal else w_key,
        randn(generator, 4),
        _mask_of(lengths, width),
    ]


def _agrees(additive_attention: Any, args: list[Tensor], parts: tuple[int, ...] = (0, 1)) -> bool:
    wanted = seq2seq.additive_attention(args[0], args[1], args[2], args[3], args[4], *args[5:])
    got = additive_attention(*args)
    return all(torch.allclose(got[part], wanted[part], atol=1e-4) for part in parts)


def _examine(additive_attention: Any) -> bool:
    """Accept an implementation of additive attention when context and weights of a ragged batch are right."""
    return _agrees(additive_attention, _example([3, 5, 2], 5))


def _examine_without_mask(additive_attention: Any) -> bool:
    return _agrees(additive_attention, _example([5, 5, 5], 5)[:5])


def _examine_equal_lengths(additive_attention: Any) -> bool:
    return _agrees(additive_attention, _example([3, 3, 3], 5))


def _examine_one_sentence(additive_attention: Any) -> bool:
    return _agrees(additive_attention, _example([3], 5))


def _examine_sums(additive_attention: Any) -> bool:
    sums = additive_attention(*_example([3, 5, 2], 5))[1].sum(-1)
    return torch.allclose(sums, torch.ones_like(sums), atol=1e-4)


def _examine_weights_only(additive_attention: Any) -> bool:
    return _agrees(additive_attention, _example([3, 5, 2], 5), (1,))


def _examine_context_only(additive_attention: Any) -> bool:
    return _agrees(additive_attention, _example([3, 5, 2], 5), (0,))


def _examine_equal_matrices(additive_attention: Any) -> bool:
    return _agrees(additive_attention, _example([3, 5, 2], 5, equal=True))


def _examine_by_hand(additive_attention: Any) -> None:
    # scores by hand: v = 1 and width 1, so the score of key k and query q is tanh(2 q + 3 k)
    query, keys = (
        torch.tensor([[0.1], [-0.2]]),
        torch.tensor([[[0.3], [-0.1], [5.0]], [[0.2], [0.0], [-0.4]]]),
    )
    mask = torch.tensor([[True, True, False], [True, True, True]])
    args = (query, keys, torch.tensor([[2.0]]), torch.tensor([[3.0]]), torch.tensor([1.0]), mask)
    context, weights = additive_attention(*args)
    first = torch.tensor([1.1, -0.1]).tanh().softmax(0)
    second = torch.tensor([0.2, -0.4, -1.6]).tanh().softmax(0)
    assert torch.allclose(weights[0, :2], first, atol=1e-4)
    assert weights[0, 2] == 0
    assert torch.allclose(weights[1], second, atol=1e-4)
    assert torch.allclose(context[0], first @ keys[0, :2], atol=1e-4)
    assert torch.allclose(context[1], second @ keys[1], atol=1e-4)


GRADE_THIS = Task(
    id="seq2seq.grade_this",
    signature="examine(additive_attention)",
    points=3,
    reference=_examine,
    probes=_specimen_probes,
    variants=[_examine_by_hand],
    hints=(
        "Which batch shows that padding gets weight, and which shows that sentences disturb each other?",
        "Use two or more sentences of different lengths with a mask, unequal matrices, and compare context and weights with known numbers.",
        "query, keys and matrices with a few unequal numbers; a mask with two rows that differ\n"
        "work out scores, weights and context sentence by sentence, with loops\n"
        "if a weight of padding is not 0, or context or weights differ: return False\nreturn True",
    ),
    mistakes=[
        Fault(
            "test-without-a-mask",
            "Your test never passes a mask, so attention to padding goes unseen.",
            "Add a batch with sentences of different lengths and its mask.",
            MASK,
            implementations=[_examine_without_mask],
        ),
        Fault(
            "test-with-equal-lengths",
            "All sentences of your batch have one length, so an implementation that uses the first row of the mask for all goes unseen.",
            "Use sentences of different lengths.",
            MASK,
            implementations=[_examine_equal_lengths],
        ),
        Fault(
            "test-on-one-sentence",
            "With a single sentence several wrong implementations are right, and one that normalises over the batch gives ones.",
            "Use at least two sentences of different lengths.",
            LOOK,
            implementations=[_examine_one_sentence],
        ),
        Fault(
            "test-of-row-sums-only",
            "Weights that sum to 1 are necessary, but many wrong implementations have them.",
            "Compare with weights and a context that you worked out.",
            LOOK,
            implementations=[_examine_sums],
        ),
        Fault(
            "test-of-the-weights-only",
            "Your test looks at the weights and not at the context.",
            "Compare the context as well: the sum of the weighted keys.",
            LOOK,
            implementations=[_examine_weights_only],
        ),
        Fault(
            "test-of-the-context-only",
            "Your test looks at the context and not at the weights.",
            "Compare the weights as well: heat maps are drawn from them.",
            LOOK,
            implementations=[_examine_context_only],
        ),
        Fault(
            "test-with-equal-matrices",
            "The matrices w_query and w_key are equal in your test, so exchanging them goes unseen.",
            "Use two different matrices.",
            LOOK,
            implementations=[_examine_equal_matrices],
        ),
        *verdict_faults(LOOK),
    ],
)


# ----- read a log ------------------------------------------------------------------------------------------------------


_ANSWERS = {
    "first loss": math.log(36),
    "loss per token": 0.84 * 64 * 20 / 512,
    "weight on padding": 14 / 20,
    "sentences right": 0.98**12,
    "decoder calls": 10,
}


READ_A_LOG = Task(
    id="seq2seq.read_a_log",
    signature="answers: a dictionary",
    points=3,
    reference=_ANSWERS.get,
    accepts=[{**_ANSWERS, "first loss": 3.584, "sentences right": 0.785}.get],  # rounded to three decimals
    probes=answer_probes(
        {
            "first loss": "the loss of a fresh decoder that gives each of 36 tokens the same probability",
            "loss per token": "the mean loss over the real tokens, from a log that divided by all positions",
            "weight on padding": "the share of attention on padding when all 20 scores are equal and no mask is used",
            "sentences right": "the share of sentences without a mistake, from the accuracy of single tokens",
            "decoder calls": "the calls of the decoder for a batch of sentences of 3, 5 and 9 tokens",
        }
    ),
    is_value=True,
    hints=(
        "Which counts does each number hang on: of real tokens, of positions, of tokens in a sentence?",
        "A sum of losses stays the same whatever you divide it by. Equal scores share the weight equally. A sentence is right when all "
        "of its tokens are. The end token is chosen by a call, too.",
        "first loss: -log(1/36)\nloss per token: 0.84 x 64 x 20 / 512\nweight: pads / positions\n"
        "sentences: 0.98 to the power of 12\ncalls: the longest sentence and its end token",
    ),
    mistakes=[
        known_answer(
            _ANSWERS,
            "first loss",
            math.log2(36),
            fault_id="ce-log-base",
            does="This is the logarithm to base 2.",
            todo="Cross-entropy uses the natural logarithm.",
            reread=LOSS,
        ),
        known_answer(
            _ANSWERS,
            "loss per token",
            0.84,
            fault_id="loss-mean-over-padded-length",
            does="You gave the number of the log, which is divided by all 64 x 20 positions.",
            todo="Multiply by the number of positions to get the sum, and divide by the 512 real tokens.",
            reread=LOSS,
        ),
        known_answer(
            _ANSWERS,
            "loss per token",
            0.84 * 512 / (64 * 20),
            fault_id="loss-share-turned-round",
            does="You multiplied by the share of real tokens; the log has done that already.",
            todo="Divide by this share.",
            reread=LOSS,
        ),
        known_answer(
            _ANSWERS,
            "weight on padding",
            0.0,
            fault_id="attn-pads-attended",
            does="Padding gets no weight only where a mask says so, and this program has none.",
            todo="Equal scores get equal weights: count the padded positions among the 20.",
            reread=MASK,
        ),
        known_answer(
            _ANSWERS,
            "weight on padding",
            6 / 20,
            fault_id="weight-of-the-words",
            does="This is the weight of the 6 words.",
            todo="The padding has the rest.",
            reread=MASK,
        ),
        known_answer(
            _ANSWERS,
            "sentences right",
            0.98,
            fault_id="token-accuracy-for-sentences",
            does="0.98 is the share of right tokens. A sentence is right only when all 12 are.",
            todo="Multiply the twelve probabilities.",
            reread=GREEDY,
        ),
        known_answer(
            _ANSWERS,
            "decoder calls",
            17,
            fault_id="decode-rows-one-by-one",
            does="You added up the three sentences. A batch is decoded together.",
            todo="Count the steps until the last row has ended.",
            reread=GREEDY,
        ),
        known_answer(
            _ANSWERS,
            "decoder calls",
            9,
            fault_id="decode-end-token-not-counted",
            does="You counted the words. The end token has to be chosen, too.",
            todo="Add one call for the end token of the longest sentence.",
            reread=GREEDY,
        ),
        known_answer(
            _ANSWERS,
            "decoder calls",
            20,
            fault_id="decode-rows-one-by-one",
            does="You added up the three sentences with their end tokens. A batch is decoded together.",
            todo="Count the steps until the last row has ended.",
            reread=GREEDY,
        ),
    ],
)

TASKS = [
    PADDING_MASK,
    SHIFT_RIGHT,
    SEQUENCE_LOSS,
    ENCODER_TASK,
    ADDITIVE_ATTENTION,
    DECODER_STEP,
    GREEDY_DECODE,
    GRADE_THIS,
    READ_A_LOG,
]
