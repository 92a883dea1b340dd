import csv
import math
import os
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from dianlib.cli import main
from dianlib.data import digits
from dianlib.metrics import wilson_interval
from dianlib.reproduce.rnn import (
    OURS,
    RECIPES,
    KeptState,
    OutputFromCombined,
    Result,
    markdown_table,
    predict,
    reproduce_rnn,
    rotated,
)

Captured = pytest.CaptureFixture[str]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_all_recipes_are_trained_measured_and_written_down(tmp_path: Path, capsys: Captured) -> None:
    results = reproduce_rnn("digits", epochs=5, seeds=2, output=tmp_path / "new" / "folder")
    assert [(result.recipe, result.seed) for result in results] == [
        (recipe, seed) for recipe in RECIPES for seed in (0, 1)
    ]
    for result in results:
        n_right = round(result.accuracy * 397)
        assert result.accuracy == n_right / 397
        assert (result.low, result.high) == wilson_interval(n_right, 397)
        assert result.epochs == (5 if "ReLU" in result.recipe else 2)
        assert 0 <= result.lowest_after_best <= result.best_validation <= 1
        assert result.largest_norm > 0
        assert result.seconds > 0
        # Only the network that keeps its state gives answers that depend on the order of the test.
        assert (result.changed > 0) == (result.recipe == "one step, state kept")

    folder = tmp_path / "new" / "folder"
    assert capsys.readouterr().out == (folder / "rnn-digits.md").read_text(encoding="utf-8")
    rows = read(folder / "rnn-digits.csv")
    assert [list(row) for row in rows] == [[field.name for field in fields(Result)]] * 12
    assert [float(row["accuracy"]) for row in rows] == [result.accuracy for result in results]
    curves = read(folder / "rnn-digits-curves.csv")
    assert len(curves) == 2 * (4 * 2 + 2 * 5)
    largest = max(float(row["largest_norm"]) for row in curves if (row["recipe"], row["seed"]) == (OURS, "1"))
    assert largest == next(r.largest_norm for r in results if (r.recipe, r.seed) == (OURS, 1))
    confusion = read(folder / "rnn-digits-confusion.csv")
    counts = [[int(row[str(c)]) for c in range(10)] for row in confusion]
    assert sum(map(sum, counts)) == 2 * 397
    right = sum(counts[c][c] for c in range(10))
    assert right == sum(round(r.accuracy * 397) for r in results if r.recipe == OURS)


def test_the_networks_of_the_logs_are_what_their_names_say() -> None:
    images = torch.rand(5, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    kept = KeptState(16, 3)
    assert not torch.equal(kept(images), kept(images))
    combined = OutputFromCombined(4, 3)
    assert torch.equal(combined(images), combined(images))
    other, middle = images.clone(), images.clone()
    other[:, -1] += 1
    middle[:, -1] += 0.5
    # The last row enters the logits by a linear map only.
    torch.testing.assert_close(combined(middle), (combined(images) + combined(other)) / 2)
    weight = rotated(digits()).rnn.weight_hh_l0.detach()
    torch.testing.assert_close(weight.T @ weight, torch.eye(len(weight)), atol=1e-5, rtol=0)


def test_predictions_keep_the_order_of_the_images() -> None:
    model = rotated(digits())
    images = digits().test_images[:130]
    order = torch.randperm(130, generator=torch.Generator().manual_seed(0))
    assert torch.equal(predict(model, images)[order], predict(model, images[order]))


def test_the_table_ends_each_recipe_with_its_mean() -> None:
    def result(recipe: str, seed: int, accuracy: float) -> Result:
        return Result("mnist", recipe, seed, 9, accuracy, 0.1, 0.9, 0.8, 0.2, math.inf, 0.0, 2.0)

    table = markdown_table([result("one", 0, 0.9), result("one", 1, 0.8), result("two", 0, 0.7)])
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert {len(line) for line in cells} == {10}
    assert [line[:4] for line in cells[2:]] == [
        ["one", "0", "9", "0.9000"],
        ["one", "1", "9", "0.8000"],
        ["one", "mean", "9", "0.8500"],
        ["two", "0", "9", "0.7000"],
        ["two", "mean", "9", "0.7000"],
    ]
    assert cells[2][4:] == ["0.1000 to 0.9000", "0.8000", "0.2000", "inf", "0.0000", "2.0"]


@pytest.mark.parametrize(
    ("dataset", "epochs", "seeds", "sentence"),
    [
        ("cifar10", 1, 1, "no data set 'cifar10'"),
        ("digits", 0, 1, "at least 1"),
        ("digits", 1, 0, "at least 1"),
    ],
)
def test_bad_requests_are_refused_in_one_sentence(
    dataset: str, epochs: int, seeds: int, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=sentence):
        reproduce_rnn(dataset, epochs=epochs, seeds=seeds, output=tmp_path / "untouched")
    assert not (tmp_path / "untouched").exists()


def test_the_command(tmp_path: Path, capsys: Captured) -> None:
    options = ["--dataset", "digits", "--epochs", "1", "--seeds", "1", "--output", str(tmp_path)]
    assert main(["reproduce", "rnn", *options]) == 0
    assert OURS in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "rnn-digits-confusion.csv",
        "rnn-digits-curves.csv",
        "rnn-digits.csv",
        "rnn-digits.md",
    ]


def test_the_command_says_what_is_missing(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIANLIB_DATA", str(tmp_path))
    assert main(["reproduce", "rnn", "--output", str(tmp_path / "tables")]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"fashion_mnist is not in {tmp_path}; run `dianlib data download`")
    assert shown.out == ""
    assert not (tmp_path / "tables").exists()


@pytest.mark.skipif("DIANLIB_DATA" not in os.environ, reason="reads Fashion-MNIST; set DIANLIB_DATA")
def test_one_epoch_of_fashion_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick recipe at full size: the state that is kept shows in the answers."""
    name = "one step, state kept"
    monkeypatch.setattr("dianlib.reproduce.rnn.RECIPES", {name: RECIPES[name]})
    (result,) = reproduce_rnn(epochs=1, seeds=1, output=tmp_path)
    assert result.accuracy > 0.75
    assert result.changed > 0.01
