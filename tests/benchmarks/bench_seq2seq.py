"""Seconds for one pass forward and back: the encoder beside torch's GRU, the decoder beside its own loop.

Both sides have the same weights.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from in_turn import in_turn
from torch import Tensor, nn

from dianlib.seq2seq import Decoder, Encoder

BATCH, LENGTH, HIDDEN, VOCABULARY = 64, 15, 64, 500
# How many times the other's seconds ours may take. The encoder does the same as torch's layer, plus packing.
LIMITS = {"encoder": 1 / 0.6, "decoder": 1.0}


def compare(
    benchmark: Any, capsys: pytest.CaptureFixture[str], part: str, works: dict[str, Callable[[], Tensor]]
) -> None:
    ours, theirs = (work() for work in works.values())
    torch.testing.assert_close(ours, theirs)

    def one_pass(work: Callable[[], Tensor]) -> None:
        work().sum().backward()

    trials = {name: partial(one_pass, work) for name, work in works.items()}
    (ratio,) = in_turn(benchmark, capsys, part, trials, rounds=15, calls=5).values()
    assert ratio <= LIMITS[part]


def test_encoder(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    encoder = Encoder(VOCABULARY, HIDDEN)
    embedding = nn.Embedding(VOCABULARY, HIDDEN)
    gru = nn.GRU(HIDDEN, HIDDEN // 2, batch_first=True, bidirectional=True)
    embedding.load_state_dict(encoder.embedding.state_dict())
    gru.load_state_dict(encoder.rnn.state_dict())
    source = torch.randint(VOCABULARY, (BATCH, LENGTH))
    lengths = torch.full((BATCH,), LENGTH)
    works = {"dianlib": lambda: encoder(source, lengths)[0], "nn.GRU": lambda: gru(embedding(source))[0]}
    compare(benchmark, capsys, "encoder", works)


def test_decoder(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    decoder = Decoder(VOCABULARY, HIDDEN)
    inputs = torch.randint(VOCABULARY, (BATCH, LENGTH))
    state, keys = torch.randn(BATCH, HIDDEN), torch.randn(BATCH, LENGTH, HIDDEN)
    mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)

    def step_by_step() -> Tensor:
        now, scores = state, []
        for token in inputs.unbind(dim=1):
            logits, now, _ = decoder.step(token, now, keys, mask)
            scores.append(logits)
        return torch.stack(scores, dim=1)

    works = {"dianlib": lambda: decoder(inputs, state, keys, mask)[0], "step by step": step_by_step}
    compare(benchmark, capsys, "decoder", works)
