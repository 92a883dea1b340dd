import csv
import os
from dataclasses import fields, replace
from pathlib import Path

import optuna
import pytest

from dianlib.cli import main
from dianlib.data import digits
from dianlib.reproduce.search import Result, markdown_table, reproduce_search, run_study, train
from dianlib.search import n_parameters

Captured = pytest.CaptureFixture[str]
SMALL = {"trials": 4, "epochs": 2, "final_epochs": 3, "seeds": 2}


def test_all_parts_are_run_and_written_down(tmp_path: Path, capsys: Captured) -> None:
    results = reproduce_search("digits", **SMALL, output=tmp_path / "new" / "folder")
    by_part = {part: [r for r in results if r.part == part] for part in ("search", "depths", "batches")}
    assert [len(found) for found in by_part.values()] == [4, 12, 12]
    assert len(results) == 28
    # The test images are asked about what was chosen, and never in the comparison of batches.
    assert all(r.test is not None for r in by_part["search"] + by_part["depths"])
    assert all(r.test is None for r in by_part["batches"])
    assert all(0 <= r.validation <= 1 and r.seconds > 0 for r in results)
    assert len({r.name for r in by_part["depths"]}) == 6
    epochs = {r.name: r.epochs for r in by_part["batches"]}
    assert epochs["640, rate 0.1, equal updates"] == 16  # 2 epochs of 16 batches against 2 in an epoch
    assert epochs["640, rate 1, equal epochs"] == epochs["64, rate 0.1"] == 2

    folder = tmp_path / "new" / "folder"
    printed = capsys.readouterr().out
    assert printed.strip() == (folder / "search-digits.md").read_text(encoding="utf-8").strip()
    assert "4 trials, " in printed
    with (folder / "search-digits.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [list(row) for row in rows] == [[field.name for field in fields(Result)]] * 28
    assert [float(row["validation"]) for row in rows] == [r.validation for r in results]


def test_the_depths_have_equal_budgets(tmp_path: Path) -> None:
    results = reproduce_search("digits", parts=["depths"], epochs=1, seeds=1, output=tmp_path)
    budget = n_parameters([64, 128, 256, 10])
    for depth, result in enumerate(results, 1):
        layers, width = (int(part) for part in result.name.split(",")[0].split(" x "))
        assert layers == depth
        size = n_parameters([64, *[width] * layers, 10])
        assert 0.98 * budget < size <= budget


def test_the_same_seeds_give_the_same_figures(tmp_path: Path) -> None:
    first, again = (reproduce_search("digits", parts=["search"], **SMALL, output=tmp_path) for _ in range(2))
    assert [replace(r, seconds=0) for r in first] == [replace(r, seconds=0) for r in again]
    assert first[0].validation != first[1].validation or first[0].test != first[1].test


def test_the_study_learns_and_stops_bad_trials_early() -> None:
    study = run_study(digits(), trials=16, epochs=10, journal=None)
    states = [trial.state for trial in study.trials]
    assert len(states) == 16
    assert optuna.trial.TrialState.PRUNED in states
    for trial in study.trials:
        if trial.state is optuna.trial.TrialState.PRUNED:
            assert len(trial.intermediate_values) < 10
    # After eight random trials TPE's are nearly all better than the best of those.
    random_ones, chosen_ones = (
        [t.value or 0.0 for t in part] for part in (study.trials[:8], study.trials[8:])
    )
    assert sum(value > max(random_ones) for value in chosen_ones) >= 6
    assert study.best_value > 0.9


def test_a_journal_is_continued_and_not_begun_again(tmp_path: Path) -> None:
    journal = tmp_path / "study.log"
    first = run_study(digits(), trials=2, epochs=1, journal=journal)
    tried = [trial.params for trial in first.trials]
    second = run_study(digits(), trials=5, epochs=1, journal=journal)
    assert len(second.trials) == 5
    assert [trial.params for trial in second.trials[:2]] == tried


def test_shifted_images_train_another_network() -> None:
    images = digits()
    settings = {"lr": 0.01, "batch_size": 50, "epochs": 2, "seed": 0}
    plain, again, shifted = (train(images, [32], **settings, shift=shift) for shift in (0, 0, 1))
    weights = [model.layers[0].weight for model in (plain, again, shifted)]
    assert weights[0].equal(weights[1])
    assert not weights[0].equal(weights[2])


def test_the_table_gives_mean_spread_and_interval() -> None:
    results = [
        Result("depths", "one", 0, 4, 0.97, 0.98, 1.0),
        Result("depths", "one", 1, 4, 0.99, 0.96, 3.0),
        Result("depths", "two", 0, 4, 0.5, None, 2.0),
    ]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in markdown_table(results, 10_000).splitlines()
    ]
    assert {len(row) for row in rows} == {7}
    assert rows[2] == ["one", "2", "4", "0.9800 ± 0.0141", "0.9700 ± 0.0141", "0.9771 to 0.9826", "2.0"]
    assert rows[3] == ["two", "1", "4", "0.5000", "", "", "2.0"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"dataset": "cifar10"}, "no data set 'cifar10'"),
        ({"parts": ["width"]}, "no part 'width'"),
        ({"trials": 0}, "at least 1"),
        ({"seeds": 0}, "at least 1"),
    ],
)
def test_bad_requests_are_refused_in_one_sentence(
    arguments: dict[str, object], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=sentence):
        reproduce_search(**{"dataset": "digits", **arguments}, output=tmp_path / "untouched")
    assert not (tmp_path / "untouched").exists()


def test_the_command(tmp_path: Path, capsys: Captured) -> None:
    options = [
        "--dataset",
        "digits",
        "--part",
        "search",
        "--trials",
        "3",
        "--epochs",
        "1",
        "--final-epochs",
        "1",
        "--seeds",
        "1",
    ]
    options += ["--journal", str(tmp_path / "study.log"), "--output", str(tmp_path)]
    assert main(["reproduce", "search", *options]) == 0
    assert "chosen, images shifted" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir() if "lock" not in path.name) == [
        "search-digits.csv",
        "search-digits.md",
        "study.log",
    ]


@pytest.mark.skipif("DIANLIB_DATA" not in os.environ, reason="reads MNIST; set DIANLIB_DATA to its folder")
def test_a_short_search_on_mnist_finds_a_good_network(tmp_path: Path) -> None:
    results = reproduce_search(
        "mnist", parts=["search"], trials=3, epochs=1, final_epochs=2, seeds=1, output=tmp_path
    )
    assert results[-1].test is not None
    assert results[-1].test > 0.9
