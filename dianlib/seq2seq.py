"""An encoder-decoder for sequences of tokens, with additive attention or with one fixed vector.

Letters: B sentences in a batch, S and L the lengths of the longest source and target, H the hidden
size, V the size of a vocabulary. Tokens are numbers, int64; 0 is padding. A mask is True at real
tokens. Sources: Sutskever, Vinyals and Le 2014 (encoder-decoder); Cho et al. 2014 (the GRU, and a
vector that is given to every step); Bahdanau, Cho and Bengio 2015 (attention).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


def padding_mask(tokens: Tensor, pad: int = 0) -> Tensor:
    """Tell real tokens from padding: (B, S) int64 -> (B, S) bool, True = real."""
    return tokens != pad


def shift_right(target: Tensor, bos: int) -> Tensor:
    """Return what the decoder reads while it predicts ``target``: (B, L) int64 -> (B, L).

    Column t holds the token before column t of the target: ``bos`` first, and the last column is dropped.
    """
    first = torch.full_like(target[:, :1], bos)
    return torch.cat([first, target[:, :-1]], dim=1)


def sequence_loss(logits: Tensor, targets: Tensor, pad: int = 0) -> Tensor:
    """Return the mean cross-entropy over all real tokens: (B, L, V), (B, L) int64 -> ().

    Every token that is not ``pad`` has the same weight, whatever the length of its sentence.
    """
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=pad)


def additive_attention(
    query: Tensor,
    keys: Tensor,
    w_query: Tensor,
    w_key: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    projected: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Look up the keys that fit the query: (B, H), (B, S, K) -> context (B, K), weights (B, S).

    The score of key j is tanh(query w_query + key_j w_key) . v, with w_query (H, A), w_key (K, A) and v (A,).
    Softmax over the keys where ``mask`` (B, S) is True gives the weights, and the context is the weighted
    sum of the keys. Each row of the mask needs a True. ``projected`` is keys @ w_key, for callers that
    ask the same keys again and again (Bahdanau, Cho and Bengio 2015, section 3.1 and A.1.2).
    """
    if projected is None:
        projected = keys @ w_key
    scores = torch.tanh((query @ w_query).unsqueeze(1) + projected) @ v
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(dim=-1)
    return (weights.unsqueeze(1) @ keys).squeeze(1), weights


@torch.no_grad()
def greedy_decode(step: Callable[[Tensor], Tensor], start: Tensor, eos: int, max_length: int) -> Tensor:
    """Choose the best token again and again: start (B,) int64 -> (B, T) int64 with T <= max_length.

    ``step`` takes the last token of each row, (B,), and returns scores for the next, (B, V); it keeps
    its state itself. A row that has chosen ``eos`` stays at ``eos``, and the loop ends when all rows have.
    """
    token, chosen = start, []
    ended = torch.zeros_like(start, dtype=torch.bool)
    for _ in range(max_length):
        token = step(token).argmax(dim=-1).masked_fill(ended, eos)
        chosen.append(token)
        ended = ended | (token == eos)
        if ended.all():
            break
    return torch.stack(chosen, dim=1) if chosen else start.new_empty(len(start), 0)


class Encoder(nn.Module):
    """Read a source in both directions: tokens (B, S), lengths (B,) -> states (B, S, H), last (B, H).

    State j knows the whole sentence and token j best: its first half comes from a GRU that has read up to
    token j, its second half from one that has read back to it. ``last`` joins the two final states.
    States at padding are 0. Raises ValueError for an odd hidden size.
    """

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        if hidden_size % 2:
            raise ValueError(
                f"the hidden size is shared by two directions and must be even, not {hidden_size}."
            )
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.rnn = nn.GRU(hidden_size, hidden_size // 2, batch_first=True, bidirectional=True)

    def forward(self, source: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        embedded = self.embedding(source)
        # Packed, no direction reads padding: the backward one would begin with it.
        packed = pack_padded_sequence(embedded, lengths.cpu(), batch_first=True, enforce_sorted=False)
        states, last = self.rnn(packed)
        states, _ = pad_packed_sequence(states, batch_first=True, total_length=source.shape[1])
        return states, torch.cat([last[0], last[1]], dim=-1)


class Decoder(nn.Module):
    """Write the target token by token, and look at the source before each."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        # nn.Linear stores the transpose of what additive_attention takes, with the right first numbers.
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.key = nn.Linear(hidden_size, hidden_size, bias=False)
        self.score = nn.Linear(hidden_size, 1, bias=False)
        self.cell = nn.GRUCell(2 * hidden_size, hidden_size)
        self.readout = nn.Linear(2 * hidden_size, vocab_size)

    def attend(
        self, state: Tensor, keys: Tensor, mask: Tensor | None = None, projected: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Ask the keys with the state: (B, H), (B, S, H) -> context (B, H), weights (B, S)."""
        w_query, w_key, v = self.query.weight.T, self.key.weight.T, self.score.weight[0]
        return additive_attention(state, keys, w_query, w_key, v, mask, projected=projected)

    def step(
        self,
        token: Tensor,
        state: Tensor,
        keys: Tensor,
        mask: Tensor | None = None,
        projected: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Read one token: (B,), (B, H), (B, S, H) -> logits (B, V), state (B, H), weights (B, S)."""
        context, weights = self.attend(state, keys, mask, projected)
        state = self.cell(torch.cat([self.embedding(token), context], dim=-1), state)
        return self.readout(torch.cat([state, context], dim=-1)), state, weights

    def forward(
        self, inputs: Tensor, state: Tensor, keys: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Read given tokens: (B, L), (B, H), (B, S, H) -> logits (B, L, V), weights (B, L, S).

        The same as L steps, with the work that does not depend on the state done once for all of them.
        """
        embedded, projected = self.embedding(inputs), self.key(keys)
        outputs, all_weights = [], []
        for token in embedded.unbind(dim=1):  # an index [:, t] makes backward quadratic in L
            context, weights = self.attend(state, keys, mask, projected)
            state = self.cell(torch.cat([token, context], dim=-1), state)
            outputs.append(torch.cat([state, context], dim=-1))
            all_weights.append(weights)
        return self.readout(torch.stack(outputs, dim=1)), torch.stack(all_weights, dim=1)


class Translator(nn.Module):
    """An encoder and a decoder. ``attention=False`` lets the decoder see the encoder's last state only."""

    def __init__(
        self, source_vocab_size: int, target_vocab_size: int, hidden_size: int, *, attention: bool = True
    ) -> None:
        super().__init__()
        self.encoder = Encoder(source_vocab_size, hidden_size)
        self.decoder = Decoder(target_vocab_size, hidden_size)
        self.attention = attention

    def encode(self, source: Tensor, pad: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the decoder needs: first state (B, H), keys (B, S, H), mask (B, S)."""
        mask = padding_mask(source, pad)
        keys, last = self.encoder(source, mask.sum(dim=1))
        if not self.attention:
            # One key only: it has the weight 1, and the context is the same vector at every step.
            return last, last.unsqueeze(1), mask[:, :1]
        return last, keys, mask

    def forward(self, source: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Teacher forcing: (B, S), (B, L) -> logits (B, L, V), weights (B, L, S)."""
        state, keys, mask = self.encode(source)
        logits, weights = self.decoder(inputs, state, keys, mask)
        return logits, weights

    @torch.no_grad()
    def translate(self, source: Tensor, bos: int, eos: int, max_length: int) -> Tensor:
        """Translate greedily: (B, S) -> (B, T), T <= max_length; rows end with ``eos``."""
        state, keys, mask = self.encode(source)
        projected = self.decoder.key(keys)

        def step(token: Tensor) -> Tensor:
            nonlocal state
            logits, state, _ = self.decoder.step(token, state, keys, mask, projected)
            return logits

        start = torch.full((len(source),), bos, device=source.device)
        return greedy_decode(step, start, eos, max_length)
