"""The encoder-decoder against torch, against loops over single sentences, and by its properties."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dianlib import seq2seq
from dianlib.data import BOS, EOS, PAD, Vocabulary, date_pairs, english_tokens, pad_sequences

LENGTHS = torch.tensor([5, 2, 7, 1])
MASK = torch.arange(7) < LENGTHS.unsqueeze(1)


def randn(seed: int, *shape: int, requires_grad: bool = False) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.requires_grad_(requires_grad)


def tokens(seed: int, lengths: Tensor, width: int, vocab_size: int) -> Tensor:
    drawn = torch.randint(3, vocab_size, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    return drawn.masked_fill(torch.arange(width) >= lengths.unsqueeze(1), PAD)


def translator(*, attention: bool = True, seed: int = 0) -> seq2seq.Translator:
    torch.manual_seed(seed)
    return seq2seq.Translator(11, 9, 6, attention=attention).double()


# ----- shift, mask, loss ---------------------------------------------------------------------------------


def test_shift_right_by_hand() -> None:
    target = torch.tensor([[7, 8, 2], [9, 2, 0]])
    assert seq2seq.shift_right(target, 1).tolist() == [[1, 7, 8], [1, 9, 2]]
    assert target.tolist() == [[7, 8, 2], [9, 2, 0]]
    assert seq2seq.shift_right(target, 1).dtype == torch.int64


def test_padding_mask_is_true_at_real_tokens() -> None:
    assert torch.equal(seq2seq.padding_mask(tokens(0, LENGTHS, 7, 11)), MASK)
    assert seq2seq.padding_mask(torch.tensor([[0, 5]]), pad=5).tolist() == [[True, False]]


def test_sequence_loss_is_the_mean_over_real_tokens_values_and_gradients() -> None:
    logits, targets = randn(0, 4, 7, 9, requires_grad=True), tokens(1, LENGTHS, 7, 9)
    loss = seq2seq.sequence_loss(logits, targets)
    prices = [F.cross_entropy(logits[b, t], targets[b, t]) for b in range(4) for t in range(int(LENGTHS[b]))]
    by_hand = torch.stack(prices).mean()
    torch.testing.assert_close(loss, by_hand)
    ours, theirs = torch.autograd.grad(loss, logits)[0], torch.autograd.grad(by_hand, logits)[0]
    torch.testing.assert_close(ours, theirs)
    assert (ours[~MASK] == 0).all()


def test_more_padding_leaves_the_loss_alone_and_uniform_scores_cost_log_v() -> None:
    logits, targets = randn(0, 4, 7, 9), tokens(1, LENGTHS, 7, 9)
    longer = seq2seq.sequence_loss(F.pad(logits, (0, 0, 0, 5)), F.pad(targets, (0, 5)))
    torch.testing.assert_close(longer, seq2seq.sequence_loss(logits, targets))
    assert seq2seq.sequence_loss(0 * logits, targets).item() == pytest.approx(math.log(9))


# ----- attention -----------------------------------------------------------------------------------------


def attention_arguments() -> list[Tensor]:
    shapes = [(4, 6), (4, 7, 5), (6, 8), (5, 8), (8,)]  # query, keys, w_query, w_key, v: all sizes differ
    return [randn(seed, *shape, requires_grad=True) for seed, shape in enumerate(shapes)]


def by_scalars(args: list[Tensor], mask: Tensor) -> tuple[Tensor, Tensor]:
    """Write the formula out, one sentence, one key and one hidden unit at a time."""
    query, keys, w_query, w_key, v = args
    contexts, rows = [], []
    for b in range(len(query)):
        exponentials = []
        for j in range(keys.shape[1]):
            score = torch.zeros((), dtype=torch.float64)
            for a in range(len(v)):
                inside = (query[b] * w_query[:, a]).sum() + (keys[b, j] * w_key[:, a]).sum()
                score = score + v[a] * torch.tanh(inside)
            exponentials.append(score.exp() if mask[b, j] else torch.zeros_like(score))
        total = torch.stack(exponentials).sum()
        rows.append(torch.stack(exponentials) / total)
        contexts.append(sum(w * key for w, key in zip(rows[-1], keys[b], strict=True)))
    return torch.stack(contexts), torch.stack(rows)


def test_additive_attention_equals_scalars_values_and_gradients() -> None:
    args = attention_arguments()
    ours, theirs = seq2seq.additive_attention(*args, MASK), by_scalars(args, MASK)
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, wanted)

    def gradients(results: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        total = sum((result * randn(9, *result.shape)).sum() for result in results)
        return torch.autograd.grad(total, args)

    for got, wanted in zip(gradients(ours), gradients(theirs), strict=True):
        torch.testing.assert_close(got, wanted)


def test_weights_sum_to_one_and_padding_has_none() -> None:
    _, weights = seq2seq.additive_attention(*attention_arguments(), MASK)
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, dtype=torch.float64))
    assert (weights[~MASK] == 0).all()
    assert (weights[MASK] > 0).all()


def test_what_stands_at_padding_and_how_much_of_it_changes_nothing() -> None:
    query, keys, *weights = attention_arguments()
    context, _ = seq2seq.additive_attention(query, keys, *weights, MASK)
    other = torch.where(MASK.unsqueeze(-1), keys, randn(7, *keys.shape) * 100)
    torch.testing.assert_close(seq2seq.additive_attention(query, other, *weights, MASK)[0], context)
    longer, wider = F.pad(keys, (0, 0, 0, 3), value=5.0), F.pad(MASK, (0, 3))
    torch.testing.assert_close(seq2seq.additive_attention(query, longer, *weights, wider)[0], context)


def test_the_order_of_the_keys_changes_the_order_of_the_weights_only() -> None:
    query, keys, *weights = attention_arguments()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    context, row = seq2seq.additive_attention(query, keys, *weights, MASK)
    turned, other = seq2seq.additive_attention(query, keys[:, order], *weights, MASK[:, order])
    torch.testing.assert_close(turned, context)
    torch.testing.assert_close(other, row[:, order])


def test_zero_weights_look_at_all_real_keys_equally() -> None:
    query, keys, w_query, w_key, v = attention_arguments()
    context, weights = seq2seq.additive_attention(query, keys, 0 * w_query, 0 * w_key, v, MASK)
    torch.testing.assert_close(weights, MASK / LENGTHS.unsqueeze(1).double())
    torch.testing.assert_close(context[3], keys[3, 0])


def test_keys_projected_before_give_the_same() -> None:
    args = attention_arguments()
    ours = seq2seq.additive_attention(*args, MASK, projected=args[1] @ args[3])
    for got, wanted in zip(ours, seq2seq.additive_attention(*args, MASK), strict=True):
        torch.testing.assert_close(got, wanted)


# ----- encoder -------------------------------------------------------------------------------------------


def test_the_encoder_equals_torchs_gru_on_single_sentences_values_and_gradients() -> None:
    torch.manual_seed(0)
    encoder = seq2seq.Encoder(11, 6).double()
    source = tokens(0, LENGTHS, 9, 11)  # wider than the longest
    states, last = encoder(source, LENGTHS)
    assert states.shape == (4, 9, 6)
    rnn = nn.GRU(6, 3, batch_first=True, bidirectional=True).double()
    rnn.load_state_dict(encoder.rnn.state_dict())
    table = encoder.embedding.weight.detach().clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for row, length, state, end in zip(source, LENGTHS.tolist(), states, last, strict=True):
        alone, hidden = rnn(table[row[:length]].unsqueeze(0))
        torch.testing.assert_close(state[:length], alone[0])
        assert (state[length:] == 0).all()
        torch.testing.assert_close(end, hidden.flatten())
        # The forward direction ends at the last token, the backward one at the first.
        torch.testing.assert_close(end, torch.cat([alone[0, -1, :3], alone[0, 0, 3:]]))
        total = total + alone.square().sum() + hidden.sum()
    total.backward()
    (states.square().sum() + last.sum()).backward()
    torch.testing.assert_close(encoder.embedding.weight.grad, table.grad)
    for ours, theirs in zip(encoder.rnn.parameters(), rnn.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_encoder_refuses_an_odd_hidden_size() -> None:
    with pytest.raises(ValueError, match="must be even, not 5"):
        seq2seq.Encoder(11, 5)


# ----- decoder -------------------------------------------------------------------------------------------


def test_a_decoder_step_is_torchs_gru_cell_on_embedding_and_context() -> None:
    model = translator()
    decoder = model.decoder
    state, keys = randn(0, 4, 6), randn(1, 4, 7, 6)
    token = torch.tensor([3, 4, 5, 3])
    logits, new, weights = decoder.step(token, state, keys, MASK)
    cell = nn.GRUCell(12, 6).double()
    cell.load_state_dict(decoder.cell.state_dict())
    w_query, w_key, v = decoder.query.weight.T, decoder.key.weight.T, decoder.score.weight[0]
    context, wanted = seq2seq.additive_attention(state, keys, w_query, w_key, v, MASK)
    torch.testing.assert_close(weights, wanted)
    expected = cell(torch.cat([decoder.embedding.weight[token], context], 1), state)
    torch.testing.assert_close(new, expected)
    torch.testing.assert_close(logits, decoder.readout(torch.cat([expected, context], 1)))


@pytest.mark.parametrize("attention", [True, False])
def test_the_whole_target_at_once_equals_step_by_step(attention: bool) -> None:
    model = translator(attention=attention)
    source, inputs = tokens(0, LENGTHS, 7, 11), tokens(1, torch.tensor([4, 4, 4, 4]), 4, 9)
    logits, weights = model(source, inputs)
    state, keys, mask = model.encode(source)
    for t in range(4):
        scores, state, row = model.decoder.step(inputs[:, t], state, keys, mask)
        torch.testing.assert_close(logits[:, t], scores)
        torch.testing.assert_close(weights[:, t], row)


def test_the_future_of_the_target_cannot_be_seen() -> None:
    model = translator()
    source, inputs = tokens(0, LENGTHS, 7, 11), tokens(1, torch.tensor([5, 5, 5, 5]), 5, 9)
    changed = inputs.clone()
    changed[:, 3] = (changed[:, 3] - 2) % 6 + 3
    before, after = model(source, inputs)[0], model(source, changed)[0]
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3:], after[:, 3:])


@pytest.mark.parametrize("attention", [True, False])
def test_neighbours_and_padding_change_no_translation(attention: bool) -> None:
    model = translator(attention=attention)
    source, inputs = tokens(0, LENGTHS, 7, 11), tokens(1, torch.tensor([4, 4, 4, 4]), 4, 9)
    together = model(F.pad(source, (0, 4)), inputs)[0]
    for b, length in enumerate(LENGTHS.tolist()):
        alone = model(source[b : b + 1, :length], inputs[b : b + 1])[0]
        torch.testing.assert_close(together[b : b + 1], alone)


def test_one_fixed_vector_is_the_same_context_at_every_step() -> None:
    model = translator(attention=False)
    source = tokens(0, LENGTHS, 7, 11)
    state, keys, mask = model.encode(source)
    assert torch.equal(keys[:, 0], state)
    assert keys.shape[1] == 1
    _, weights = model(source, tokens(1, torch.tensor([4, 4, 4, 4]), 4, 9))
    assert torch.equal(weights, torch.ones(4, 4, 1, dtype=torch.float64))
    assert mask.all()


def test_every_parameter_gets_a_gradient() -> None:
    model = translator()
    source, target = tokens(0, LENGTHS, 7, 11), tokens(1, torch.tensor([4, 2, 3, 1]), 4, 9)
    seq2seq.sequence_loss(model(source, seq2seq.shift_right(target, BOS))[0], target).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


# ----- greedy decoding -----------------------------------------------------------------------------------


def counting(ends: list[int], vocab_size: int = 30) -> Callable[[Tensor], Tensor]:
    """A model that says the last token plus one, and in row b EOS after the token ends[b]."""

    def step(token: Tensor) -> Tensor:
        following = torch.where(token == torch.tensor(ends), EOS, token + 1)
        return F.one_hot(following, vocab_size).double()

    return step


def test_greedy_feeds_back_stops_and_stays_at_the_end() -> None:
    start = torch.tensor([10, 10, 10])
    found = seq2seq.greedy_decode(counting([12, 14, 11]), start, EOS, 20)
    assert found.tolist() == [[11, 12, 2, 2, 2], [11, 12, 13, 14, 2], [11, 2, 2, 2, 2]]


@pytest.mark.parametrize(("max_length", "calls"), [(0, 0), (2, 2), (4, 3), (9, 3)])
def test_greedy_makes_no_call_too_many(max_length: int, calls: int) -> None:
    made = []

    def step(token: Tensor) -> Tensor:
        made.append(token)
        return counting([12, 10])(token)

    found = seq2seq.greedy_decode(step, torch.tensor([10, 10]), EOS, max_length)
    assert (len(made), found.shape) == (calls, (2, calls))


def test_a_translation_is_what_a_loop_over_single_sentences_finds() -> None:
    model = translator(seed=3)
    source = tokens(0, LENGTHS, 7, 11)
    found = model.translate(source, BOS, EOS, 6)
    assert not found.requires_grad
    for b, length in enumerate(LENGTHS.tolist()):
        state, keys, mask = model.encode(source[b : b + 1, :length])
        words, token = [], torch.tensor([BOS])
        while len(words) < 6 and EOS not in words:
            scores, state, _ = model.decoder.step(token, state, keys, mask)
            token = scores.argmax(-1)
            words.append(token.item())
        assert found[b, : len(words)].tolist() == words


@pytest.mark.parametrize("way", ["Chinese to English", "English to Chinese"])
def test_it_learns_dates_both_ways_round(way: str) -> None:
    pairs = [(tuple(chinese), tuple(english_tokens(english))) for chinese, english in date_pairs(64)]
    sources, targets = zip(*pairs, strict=True)
    if way == "English to Chinese":
        sources, targets = targets, sources
    ours, theirs = Vocabulary(sources), Vocabulary(targets)
    source = pad_sequences([ours.encode(s) for s in sources])
    target = pad_sequences([theirs.encode(t) for t in targets])
    torch.manual_seed(0)
    model = seq2seq.Translator(len(ours), len(theirs), 48)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        loss = seq2seq.sequence_loss(model(source, seq2seq.shift_right(target, BOS))[0], target)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2.5
    assert losses[-1] < 0.25
