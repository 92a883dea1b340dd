"""Seconds for one pass forward and back: the encoder beside torch's GRU, the decoder beside its own loop.

Both sides do the same work in turn, in one process and one thread, and seconds are those of the
processor. The ratio of each round is taken by itself; the median over the rounds is compared with the target.
"""

from collections.abc import Callable
from statistics import median
from time import process_time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dianlib.seq2seq import Decoder, Encoder

BATCH, LENGTH, HIDDEN, VOCABULARY = 64, 15, 64, 500
ROUNDS = 15
# How many times the other's speed ours must reach. The encoder does the same as torch's layer, plus packing.
TARGETS = {"encoder / nn.GRU": 0.6, "decoder / step by step": 1.0}


@pytest.fixture
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more of them would wait for each other, and for other work on the computer
    yield
    torch.set_num_threads(threads)


def measured(benchmark: Any, ours: Callable[[], Tensor], theirs: Callable[[], Tensor]) -> float:
    """Return how many times as fast ours is, as the median over the rounds."""
    ratios: list[float] = []

    def seconds(work: Callable[[], Tensor]) -> float:
        started = process_time()
        for _ in range(5):
            work().sum().backward()
        return process_time() - started

    def one_round() -> None:
        # The order turns, so that nobody always comes second.
        if len(ratios) % 2:
            own = seconds(ours)
            ratios.append(seconds(theirs) / own)
        else:
            other = seconds(theirs)
            ratios.append(other / seconds(ours))

    benchmark.pedantic(one_round, rounds=ROUNDS, warmup_rounds=1)
    return median(ratios[1:])


def report(benchmark: Any, capsys: pytest.CaptureFixture[str], name: str, ratio: float) -> None:
    benchmark.extra_info[name] = round(ratio, 3)
    with capsys.disabled():
        print(f"\n{name}: {ratio:.2f} x, target {TARGETS[name]}")
    assert ratio >= TARGETS[name]


def test_encoder(benchmark: Any, one_thread: None, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    encoder = Encoder(VOCABULARY, HIDDEN)
    embedding = nn.Embedding(VOCABULARY, HIDDEN)
    gru = nn.GRU(HIDDEN, HIDDEN // 2, batch_first=True, bidirectional=True)
    source = torch.randint(VOCABULARY, (BATCH, LENGTH))
    lengths = torch.full((BATCH,), LENGTH)
    ratio = measured(benchmark, lambda: encoder(source, lengths)[0], lambda: gru(embedding(source))[0])
    report(benchmark, capsys, "encoder / nn.GRU", ratio)


def test_decoder(benchmark: Any, one_thread: None, capsys: pytest.CaptureFixture[str]) -> None:
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

    torch.testing.assert_close(decoder(inputs, state, keys, mask)[0], step_by_step())
    ratio = measured(benchmark, lambda: decoder(inputs, state, keys, mask)[0], step_by_step)
    report(benchmark, capsys, "decoder / step by step", ratio)
