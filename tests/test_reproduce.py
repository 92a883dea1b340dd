import csv
import os
from dataclasses import fields, replace
from pathlib import Path

import pytest

from dianlib.cli import main
from dianlib.metrics import wilson_interval
from dianlib.reproduce.mlp import RECIPES, Result, markdown_table, reproduce_mlp

Captured = pytest.CaptureFixture[str]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_all_recipes_are_trained_measured_and_written_down(tmp_path: Path, capsys: Captured) -> None:
    results = reproduce_mlp("digits", epochs=4, seeds=2, output=tmp_path / "new" / "folder")
    assert [(result.recipe, result.seed) for result in results] == [
        (recipe, seed) for recipe in RECIPES for seed in (0, 1)
    ]
    slow, large, ours = results[0], results[2], results[4]
    assert ours.accuracy > 0.8 > large.accuracy > slow.accuracy
    for result in results:
        correct = round(result.accuracy * 397)
        assert result.accuracy == correct / 397
        assert (result.low, result.high) == wilson_interval(correct, 397)
        assert result.epochs == (1 if "tenth" in result.recipe else 4)
        assert result.seconds > 0
        assert all(0 <= score <= 1 for score in (result.precision, result.recall, result.f1))
    assert results[4].accuracy != results[5].accuracy or results[4].f1 != results[5].f1  # seeds differ

    folder = tmp_path / "new" / "folder"
    printed = capsys.readouterr().out
    assert printed == (folder / "mlp-digits.md").read_text(encoding="utf-8")
    rows = read(folder / "mlp-digits.csv")
    assert [list(row) for row in rows] == [[field.name for field in fields(Result)]] * 6
    written = [[row["recipe"], int(row["seed"]), float(row["accuracy"]), float(row["high"])] for row in rows]
    assert written == [[result.recipe, result.seed, result.accuracy, result.high] for result in results]
    curves = read(folder / "mlp-digits-curves.csv")
    assert len(curves) == 2 * (4 + 1 + 4)
    assert [int(row["epoch"]) for row in curves[:4]] == [1, 2, 3, 4]
    # The log's recipe watches the test images: its last point is the accuracy in the table.
    assert float(curves[3]["watched_accuracy"]) == pytest.approx(slow.accuracy)


def test_the_same_seeds_give_the_same_figures(tmp_path: Path) -> None:
    first, again = (reproduce_mlp("digits", epochs=1, seeds=1, output=tmp_path) for _ in range(2))
    assert [replace(result, seconds=0) for result in first] == [
        replace(result, seconds=0) for result in again
    ]


def test_the_table_ends_each_recipe_with_its_mean() -> None:
    def result(recipe: str, seed: int, accuracy: float) -> Result:
        return Result(
            "mnist", recipe, seed, 10, accuracy, accuracy - 0.01, accuracy + 0.01, 0.5, 0.6, 0.7, 2.0
        )

    table = markdown_table([result("one", 0, 0.9), result("one", 1, 0.8), result("two", 0, 0.7)])
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert {len(line) for line in cells} == {9}
    assert [line[:4] for line in cells[2:]] == [
        ["one", "0", "10", "0.9000"],
        ["one", "1", "10", "0.8000"],
        ["one", "mean", "10", "0.8500"],
        ["two", "0", "10", "0.7000"],
        ["two", "mean", "10", "0.7000"],
    ]
    assert cells[2][4] == "0.8900 to 0.9100"
    assert cells[4][4] == ""
    assert cells[4][5:] == ["0.5000", "0.6000", "0.7000", "2.0"]


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
        reproduce_mlp(dataset, epochs=epochs, seeds=seeds, output=tmp_path / "untouched")
    assert not (tmp_path / "untouched").exists()


def test_the_command(tmp_path: Path, capsys: Captured) -> None:
    options = ["--dataset", "digits", "--epochs", "1", "--seeds", "1", "--output", str(tmp_path)]
    assert main(["reproduce", "mlp", *options]) == 0
    assert "Adam 0.001, early stop" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "mlp-digits-curves.csv",
        "mlp-digits.csv",
        "mlp-digits.md",
    ]


def test_the_command_says_what_is_missing(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIANLIB_DATA", str(tmp_path))
    assert main(["reproduce", "mlp", "--output", str(tmp_path / "tables")]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"mnist is not in {tmp_path}; run `dianlib data download`")
    assert shown.out == ""
    assert not (tmp_path / "tables").exists()


def test_the_command_says_when_it_cannot_write(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "taken").write_text("a file")
    options = ["--dataset", "digits", "--epochs", "1", "--output", str(tmp_path / "taken")]
    assert main(["reproduce", "mlp", *options]) == 2
    assert f"cannot be written to {tmp_path / 'taken'}" in capsys.readouterr().err


@pytest.mark.skipif("DIANLIB_DATA" not in os.environ, reason="reads MNIST; set DIANLIB_DATA to its folder")
def test_one_epoch_of_mnist_shows_the_difference(tmp_path: Path) -> None:
    as_logged, with_larger_steps, with_adam = reproduce_mlp("mnist", epochs=1, seeds=1, output=tmp_path)
    assert as_logged.accuracy < 0.6
    assert with_larger_steps.accuracy > 0.92
    assert with_adam.accuracy > 0.93
    assert with_adam.high - with_adam.low < 0.01
