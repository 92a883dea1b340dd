"""Chinese to English on real sentences, with one fixed vector and with attention: chapter seq2seq."""

import argparse
import copy
import math
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from random import Random
from statistics import mean, stdev

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dianlib.data import BOS, EOS, PAD, Batches, Vocabulary, english_tokens, pad_sequences, translations
from dianlib.reproduce.tables import write_csv
from dianlib.seq2seq import Translator, sequence_loss, shift_right
from dianlib.training import is_watched, seed_everything

Tokens = tuple[str, ...]
Pair = tuple[Tokens, Tokens]  # Chinese characters, English words in lower case

MODELS = {"one fixed vector": False, "attention": True}
HELD_OUT = 0.05  # the share of the pairs that validates, and the share that tests
LENGTHS = {"up to 6": range(1, 7), "7 to 10": range(7, 11), "11 and more": range(11, 10_000)}
RARE = 3  # a token that occurs less often in the training part is unknown


@dataclass(frozen=True)
class Result:
    """One trained translator on the test sentences; ``exact`` counts hits of any reference."""

    model: str
    seed: int
    epochs: int
    loss: float
    exact: float
    words: float
    words_up_to_6: float
    words_7_to_10: float
    words_11_and_more: float
    seconds: float


@dataclass(frozen=True)
class Corpus:
    """Pairs in three parts that share no sentence in either language, and their vocabularies."""

    train: list[Pair]
    validation: list[Pair]
    test: list[Pair]
    chinese: Vocabulary
    english: Vocabulary


def split(pairs: Sequence[Pair], seed: int = 0) -> tuple[list[Pair], list[Pair], list[Pair]]:
    """Split into train, validation and test: pairs that share a sentence stay together.

    The shared sentence may be Chinese or English, and pairs may hang together through others: 你好 - hi,
    hi - 嗨, 嗨 - hello are one group. Groups are dealt out at random. Raises ValueError below 20 pairs.
    """
    if len(pairs) < 20:
        raise ValueError(f"20 pairs are needed for three parts, not {len(pairs)}.")
    leader: dict[tuple[int, Tokens], tuple[int, Tokens]] = {}

    def group(sentence: tuple[int, Tokens]) -> tuple[int, Tokens]:
        while (above := leader.setdefault(sentence, sentence)) != sentence:
            leader[sentence] = leader[above]
            sentence = above
        return sentence

    for chinese, english in pairs:
        leader[group((0, chinese))] = group((1, english))
    groups: defaultdict[tuple[int, Tokens], list[Pair]] = defaultdict(list)
    for pair in dict.fromkeys(pairs):
        groups[group((0, pair[0]))].append(pair)
    order = list(groups.values())
    Random(seed).shuffle(order)
    parts: tuple[list[Pair], list[Pair], list[Pair]] = ([], [], [])
    size = round(HELD_OUT * len(pairs))
    for members in order:
        # The test part is filled first, then the validation part; all others train.
        part = parts[2] if len(parts[2]) < size else parts[1] if len(parts[1]) < size else parts[0]
        part.extend(members)
    return parts


def prepare(sentences: Sequence[tuple[str, str]], longest: int) -> Corpus:
    """Cut (English, Chinese) into tokens, drop pairs longer than ``longest`` in a language, and split."""
    pairs = [
        (tuple(chinese.replace(" ", "")), tuple(english_tokens(english.lower())))
        for english, chinese in sentences
    ]
    train, validation, test = split([pair for pair in pairs if 0 < max(map(len, pair)) <= longest])
    chinese = Vocabulary((source for source, _ in train), RARE)
    english = Vocabulary((target for _, target in train), RARE)
    return Corpus(train, validation, test, chinese, english)


def reproduce_translate(
    *,
    epochs: int = 10,
    seeds: int = 3,
    hidden_size: int = 128,
    longest: int = 20,
    output: Path = Path("reproduced"),
    sentences: Sequence[tuple[str, str]] | None = None,
) -> list[Result]:
    """Train both translators from the seeds 0 .. ``seeds`` - 1 on real sentences and print a table.

    ``sentences`` are pairs (English, Chinese), those of dianlib.data.translations by default. Training
    stops early when two epochs bring no lower validation loss, and takes the weights of the best epoch.
    The folder ``output`` gets translate.md and .csv with the tables and translate-sentences.csv with the
    test sentences of seed 0. Raises ValueError for a count below 1 and dianlib.data.DataError
    when the sentences are not on this machine.
    """
    if min(epochs, seeds, longest) < 1 or hidden_size < 2 or hidden_size % 2:
        raise ValueError("epochs, seeds and longest must be at least 1, and the hidden size even.")
    corpus = prepare(translations() if sentences is None else sentences, longest)
    output.mkdir(parents=True, exist_ok=True)
    sizes = ", ".join(f"{len(part):,}" for part in (corpus.train, corpus.validation, corpus.test))
    print(
        f"pairs to train, validate, test: {sizes}; "
        f"{len(corpus.chinese):,} Chinese and {len(corpus.english):,} English tokens\n"
    )
    results: list[Result] = []
    examples: dict[str, list[Tokens]] = {}
    for seed in range(seeds):
        for name, attention in MODELS.items():
            seed_everything(seed)
            model = Translator(len(corpus.chinese), len(corpus.english), hidden_size, attention=attention)
            started = time.perf_counter()
            n_epochs = train(model, corpus, epochs, seed)
            seconds = time.perf_counter() - started
            said = translate(model, corpus, sources(corpus.test))
            results.append(measure(name, seed, n_epochs, model, corpus, said, seconds))
            if seed == 0:
                examples[name] = said
    references = gather(corpus.test)
    table = f"{markdown_table(results)}\n\n{difference_table(references, *examples.values())}"
    print(table)
    (output / "translate.md").write_text(table + "\n", encoding="utf-8")
    write_csv(output / "translate.csv", [field.name for field in fields(Result)], map(astuple, results))
    rows = [
        ["".join(source), " / ".join(" ".join(r) for r in references[source]), *(" ".join(t) for t in said)]
        for source, *said in zip(sources(corpus.test), *examples.values(), strict=True)
    ]
    write_csv(output / "translate-sentences.csv", ["chinese", "references", *examples], rows)
    return results


def gather(pairs: Sequence[Pair]) -> dict[Tokens, list[Tokens]]:
    """Return all translations of each source, in the order of the pairs."""
    found: defaultdict[Tokens, list[Tokens]] = defaultdict(list)
    for source, target in pairs:
        found[source].append(target)
    return found


def sources(pairs: Sequence[Pair]) -> list[Tokens]:
    """Return each source once, in the order of the pairs."""
    return list(gather(pairs))


def encoded(pairs: Sequence[Pair], corpus: Corpus) -> tuple[Tensor, Tensor]:
    """Return the sources (N, S) and the targets (N, L) as numbers."""
    return (
        pad_sequences([corpus.chinese.encode(source) for source, _ in pairs]),
        pad_sequences([corpus.english.encode(target) for _, target in pairs]),
    )


def trimmed(tokens: Tensor) -> Tensor:
    """Drop the columns that hold padding only."""
    return tokens[:, : int((tokens != PAD).sum(dim=1).max())]


def rows_of_like_length(targets: Tensor, generator: torch.Generator, batch_size: int = 64) -> list[Tensor]:
    """Deal all rows into batches of targets of nearly one length, in random order.

    Otherwise half of the decoder's work would be padding.
    """
    lengths = (targets != PAD).sum(dim=1)
    batches: list[Tensor] = []
    for pool in torch.randperm(len(targets), generator=generator).split(50 * batch_size):
        batches += pool[lengths[pool].argsort()].split(batch_size)
    order = torch.randperm(len(batches), generator=generator)
    return [batches[number] for number in order]


def train(model: Translator, corpus: Corpus, epochs: int, seed: int) -> int:
    """Train until the validation loss has not fallen for two epochs; return the epochs that were run."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, fused=True)
    generator = torch.Generator().manual_seed(seed)
    sources, targets = encoded(corpus.train, corpus)
    best_loss, best_epoch, best_weights = math.inf, 0, copy.deepcopy(model.state_dict())
    epoch = 0
    for epoch in range(1, epochs + 1):
        model.train()
        batches = rows_of_like_length(targets, generator)
        for rows in tqdm(batches, desc=f"epoch {epoch}", leave=False, disable=not is_watched()):
            source, target = trimmed(sources[rows]), trimmed(targets[rows])
            logits, _ = model(source, shift_right(target, BOS))
            optimizer.zero_grad()
            sequence_loss(logits, target, PAD).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        loss = loss_per_token(model, corpus, corpus.validation)
        if loss < best_loss:
            best_loss, best_epoch, best_weights = loss, epoch, copy.deepcopy(model.state_dict())
        elif epoch - best_epoch >= 2:
            break
    model.load_state_dict(best_weights)
    return epoch


@torch.no_grad()
def loss_per_token(model: Translator, corpus: Corpus, pairs: Sequence[Pair]) -> float:
    """Return the mean loss over all real tokens of the pairs, with teacher forcing."""
    model.eval()
    total, count = 0.0, 0
    for source, target in Batches(*encoded(pairs, corpus), batch_size=256):
        n_tokens = int((target != PAD).sum())
        logits, _ = model(trimmed(source), shift_right(target, BOS))
        total += float(sequence_loss(logits, target, PAD)) * n_tokens
        count += n_tokens
    return total / count


def translate(model: Translator, corpus: Corpus, sentences: Sequence[Tokens]) -> list[Tokens]:
    """Translate greedily, 256 sentences at a time."""
    model.eval()
    numbers = pad_sequences([corpus.chinese.encode(sentence) for sentence in sentences])
    return [
        tuple(corpus.english.decode(row))
        for (part,) in Batches(numbers, batch_size=256)
        for row in model.translate(trimmed(part), BOS, EOS, 30).tolist()
    ]


def word_score(said: Tokens, references: Sequence[Tokens]) -> float:
    """Return the F1 of the words, whatever their order, against the reference that fits best: 0 to 1."""

    def f1(reference: Tokens) -> float:
        hits = sum((Counter(said) & Counter(reference)).values())
        return 2 * hits / (len(said) + len(reference))

    return max(map(f1, references))


def measure(
    name: str,
    seed: int,
    epochs: int,
    model: Translator,
    corpus: Corpus,
    said: Sequence[Tokens],
    seconds: float,
) -> Result:
    """Measure a trained model on the test sentences, with one translation for each different source."""
    references = gather(corpus.test)
    scores = {
        source: word_score(text, references[source]) for source, text in zip(references, said, strict=True)
    }

    def over(lengths: range) -> float:
        """Return the mean over the sources of these lengths; NaN when there is none."""
        found = [score for source, score in scores.items() if len(source) in lengths]
        return mean(found) if found else math.nan

    short, middle, long = (over(lengths) for lengths in LENGTHS.values())
    return Result(
        name,
        seed,
        epochs,
        loss=loss_per_token(model, corpus, corpus.test),
        exact=mean(text in references[source] for source, text in zip(references, said, strict=True)),
        words=mean(scores.values()),
        words_up_to_6=short,
        words_7_to_10=middle,
        words_11_and_more=long,
        seconds=seconds,
    )


def markdown_table(results: Sequence[Result]) -> str:
    """Return a Markdown table: one line for each result, and the mean over the seeds of each model."""
    heads = ["model", "seed", "epochs", "loss", "perplexity", "exact", "words"]
    heads += [f"words, {name} characters" for name in LENGTHS] + ["seconds"]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for name in MODELS:
        runs = [result for result in results if result.model == name]
        lines += [_line(str(run.seed), [run]) for run in runs]
        lines.append(_line("mean", runs))
    return "\n".join(lines)


def difference_table(
    references: dict[Tokens, list[Tokens]], fixed: Sequence[Tokens], attentive: Sequence[Tokens]
) -> str:
    """Return a Markdown table: by how much attention's words are better, for each length of the source.

    Both models translate the same sentences, so the mean of the differences is taken, with its normal 95 %
    interval: 1.96 standard errors to each side. It tells how far the choice of test sentences matters, and
    nothing about other first weights.
    """
    gains = {
        source: word_score(b, found) - word_score(a, found)
        for (source, found), a, b in zip(references.items(), fixed, attentive, strict=True)
    }
    lines = [
        "| Chinese characters | sentences | gain in words by attention | 95 % interval |",
        "| --- | --- | --- | --- |",
    ]
    for name, lengths in {"any": range(10_000), **LENGTHS}.items():
        found = [gain for source, gain in gains.items() if len(source) in lengths]
        if len(found) > 1:
            half = 1.96 * stdev(found) / math.sqrt(len(found))
            low, high = mean(found) - half, mean(found) + half
            lines.append(f"| {name} | {len(found)} | {mean(found):+.3f} | {low:+.3f} to {high:+.3f} |")
    return "\n".join(lines)


def _line(seed: str, runs: Sequence[Result]) -> str:
    def over(name: str) -> float:
        values: list[float] = [getattr(run, name) for run in runs]
        return mean(values)

    perplexity = mean(math.exp(run.loss) for run in runs)
    by_length = (over(name) for name in ("words_up_to_6", "words_7_to_10", "words_11_and_more"))
    cells = [runs[0].model, seed, f"{over('epochs'):.0f}", f"{over('loss'):.3f}", f"{perplexity:.1f}"]
    cells += [f"{over('exact'):.3f}", f"{over('words'):.3f}", *(f"{score:.3f}" for score in by_length)]
    return "| " + " | ".join([*cells, f"{over('seconds'):.0f}"]) + " |"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what `dianlib reproduce translate` can be told."""
    parser.add_argument("--epochs", type=int, default=10, help="epochs at most (default: 10)")
    parser.add_argument("--seeds", type=int, default=3, help="networks of each kind (default: 3)")
    parser.add_argument("--hidden-size", type=int, default=128, help="width of the states (default: 128)")
    parser.add_argument("--longest", type=int, default=20, help="tokens of a sentence at most (default: 20)")


def run(options: argparse.Namespace) -> None:
    """Carry out `dianlib reproduce translate`."""
    reproduce_translate(
        epochs=options.epochs,
        seeds=options.seeds,
        hidden_size=options.hidden_size,
        longest=options.longest,
        output=options.output,
    )
