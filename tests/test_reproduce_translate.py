import csv
import math
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from dianlib.cli import main
from dianlib.data import BOS, EOS, PAD, date_pairs
from dianlib.reproduce.translate import (
    Result,
    difference_table,
    markdown_table,
    prepare,
    reproduce_translate,
    rows_of_like_length,
    split,
    word_score,
)

Captured = pytest.CaptureFixture[str]
SENTENCES = [(english, chinese) for chinese, english in date_pairs(400)]


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# ----- the split -----------------------------------------------------------------------------------------


def test_no_sentence_of_either_language_is_in_two_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(250, (2, 400), generator=generator).tolist()
    pairs = [((f"c{a}",), (f"e{b}",)) for a, b in zip(*numbers, strict=True)]
    parts = split(pairs)
    for side in (0, 1):
        sets = [{pair[side] for pair in part} for part in parts]
        assert not sets[0] & sets[1] | sets[0] & sets[2] | sets[1] & sets[2]
    assert Counter(pair for part in parts for pair in part) == Counter(dict.fromkeys(pairs, 1))


def test_pairs_that_hang_together_through_others_stay_together() -> None:
    chain = [(("你好",), ("hi",)), (("嗨",), ("hi",)), (("嗨",), ("hello",))]
    others = [((f"c{n}",), (f"e{n}",)) for n in range(40)]
    for seed in range(5):
        parts = split([*others[:20], *chain, *others[20:]], seed)
        assert sorted(len(set(part) & set(chain)) for part in parts) == [0, 0, 3]
        assert [len(part) > 0 for part in parts] == [True] * 3
    assert split(others, 1) != split(others, 2)


def test_long_sentences_are_dropped_and_english_is_put_in_lower_case() -> None:
    corpus = prepare([*SENTENCES, ("A B C D E F G H I J K L", "长"), ("Hi", "一 二")], longest=11)
    pairs = corpus.train + corpus.validation + corpus.test
    assert max(len(tokens) for pair in pairs for tokens in pair) <= 11
    assert ((("一", "二"), ("hi",))) in pairs
    assert not any("A" in english or "a" in english for _, english in pairs)
    held_out = {token for source, _ in corpus.test for token in source}
    counts = Counter(token for source, _ in corpus.train for token in source)
    assert set(corpus.chinese.tokens[4:]) == {token for token, count in counts.items() if count >= 3}
    assert held_out


# ----- training and measuring ----------------------------------------------------------------------------


def test_batches_hold_every_row_once_and_like_lengths_together() -> None:
    lengths = torch.randint(1, 20, (1000,), generator=torch.Generator().manual_seed(0))
    targets = (torch.arange(20) < lengths.unsqueeze(1)).long() * 5
    batches = rows_of_like_length(targets, torch.Generator().manual_seed(1))
    assert sorted(torch.cat(batches).tolist()) == list(range(1000))
    assert max(len(rows) for rows in batches) == 64
    spread = [int(lengths[rows].max() - lengths[rows].min()) for rows in batches]
    assert max(spread) <= 3
    order = [int(lengths[rows].max()) for rows in batches]
    assert order != sorted(order)


def test_words_are_scored_against_the_reference_that_fits_best() -> None:
    references = [words("i am here"), words("here i am now")]
    assert word_score(words("i am here"), references) == 1
    assert word_score(words("here am i"), references) == 1  # the order does not count
    assert word_score(words("he he he"), references) == 0
    assert word_score(words("i i am"), references) == pytest.approx(4 / 6)
    assert word_score((), references) == 0


def test_both_models_are_trained_measured_and_written_down(tmp_path: Path, capsys: Captured) -> None:
    results = reproduce_translate(
        epochs=3, seeds=2, hidden_size=32, output=tmp_path / "new", sentences=SENTENCES
    )
    assert [(result.model, result.seed) for result in results] == [
        ("one fixed vector", 0),
        ("attention", 0),
        ("one fixed vector", 1),
        ("attention", 1),
    ]
    vocabulary = len(prepare(SENTENCES, 20).english)
    for result in results:
        assert 0.3 < result.loss < math.log(vocabulary)
        assert 0 <= result.exact <= result.words <= 1
        assert result.words > 0.1
        assert result.epochs == 3
    assert results[0].loss != results[2].loss

    printed = capsys.readouterr().out
    assert printed.startswith("pairs to train, validate, test: 3")
    assert (tmp_path / "new" / "translate.md").read_text(encoding="utf-8") in printed
    with (tmp_path / "new" / "translate.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == [result.loss for result in results]
    with (tmp_path / "new" / "translate-sentences.csv").open(encoding="utf-8") as file:
        sentences = list(csv.DictReader(file))
    assert list(sentences[0]) == ["chinese", "references", "one fixed vector", "attention"]
    truth = {chinese: english.lower() for english, chinese in SENTENCES}
    assert len(sentences) == len({row["chinese"] for row in sentences}) >= 15
    for row in sentences:
        assert row["references"].replace(" ", "") == truth[row["chinese"]].replace(" ", "")
    exact = sum(row["attention"] == row["references"] for row in sentences) / len(sentences)
    assert exact == pytest.approx(results[1].exact)


def test_the_same_seeds_give_the_same_figures(tmp_path: Path) -> None:
    first, again = (
        reproduce_translate(epochs=1, seeds=1, hidden_size=8, output=tmp_path, sentences=SENTENCES[:60])
        for _ in range(2)
    )
    assert [repr(replace(result, seconds=0)) for result in first] == [
        repr(replace(result, seconds=0)) for result in again
    ]


def test_the_table_ends_each_model_with_its_mean() -> None:
    def result(model: str, seed: int, exact: float) -> Result:
        return Result(model, seed, 5, math.log(8), exact, 0.5, 0.6, 0.5, 0.4, 60.0)

    table = markdown_table(
        [result(m, s, 0.1 + s / 10) for s in (0, 1) for m in ("one fixed vector", "attention")]
    )
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert {len(line) for line in cells} == {11}
    assert [line[:2] for line in cells[2:]] == [
        ["one fixed vector", "0"],
        ["one fixed vector", "1"],
        ["one fixed vector", "mean"],
        ["attention", "0"],
        ["attention", "1"],
        ["attention", "mean"],
    ]
    assert cells[4] == [
        *("one fixed vector", "mean", "5", "2.079", "8.0", "0.150"),
        *("0.500", "0.600", "0.500", "0.400", "60"),
    ]
    assert [field.name for field in fields(Result)][3:6] == ["loss", "exact", "words"]


def test_the_gain_is_a_paired_difference_with_its_interval() -> None:
    references = {
        tuple("ab"): [words("x y")],
        tuple("abc"): [words("x z")],
        tuple("abcdefgh"): [words("u v")],
    }
    fixed = [words("x y"), words("q"), words("u q")]
    attentive = [words("x y"), words("x z"), words("u v")]
    lines = difference_table(references, fixed, attentive).splitlines()
    # Gains 0, 1 and 0.5: mean 0.5, standard deviation 0.5.
    half = 1.96 * 0.5 / math.sqrt(3)
    assert lines[2] == f"| any | 3 | +0.500 | {0.5 - half:+.3f} to {0.5 + half:+.3f} |"
    assert lines[3].startswith("| up to 6 | 2 | +0.500 | -0.4")
    assert len(lines) == 4  # of a single sentence no interval can be told


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"seeds": 0}, {"hidden_size": 7}, {"longest": 0}])
def test_bad_requests_are_refused_in_one_sentence(wrong: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be at least 1, and the hidden size even"):
        reproduce_translate(**wrong, output=tmp_path / "untouched", sentences=SENTENCES)
    with pytest.raises(ValueError, match="20 pairs are needed"):
        reproduce_translate(output=tmp_path / "untouched", sentences=SENTENCES[:5])
    assert not (tmp_path / "untouched").exists()


def test_the_command(tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIANLIB_DATA", str(tmp_path))
    output = ["--output", str(tmp_path / "tables")]
    assert main(["reproduce", "translate", *output]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"the English-Chinese sentences are not at {tmp_path}")
    assert shown.err.count("\n") == 1
    assert shown.out == ""
    (tmp_path / "text").mkdir()
    lines = [f"{english}\t{chinese}" for english, chinese in SENTENCES[:80]]
    (tmp_path / "text" / "cmn.txt").write_text("\n".join(lines), encoding="utf-8")
    options = ["--epochs", "1", "--seeds", "1", "--hidden-size", "8", "--longest", "12"]
    assert main(["reproduce", "translate", *options, *output]) == 0
    assert "| attention | mean |" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "tables").iterdir()) == [
        "translate-sentences.csv",
        "translate.csv",
        "translate.md",
    ]


def test_the_special_numbers_are_those_of_the_vocabulary() -> None:
    assert prepare(SENTENCES, 20).english.tokens[:3] == ["<pad>", "<bos>", "<eos>"]
    assert (PAD, BOS, EOS) == (0, 1, 2)
