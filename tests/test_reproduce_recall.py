"""`dianlib reproduce recall`, small: a short memory, with few steps."""

import csv
from pathlib import Path

import pytest

from dianlib.reproduce import main
from dianlib.reproduce.recall import NETWORKS, measure


def test_the_table_has_a_row_for_each_network_distance_and_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--distances", "1", "3", "--steps", "2", "--seeds", "2", "--output", str(tmp_path)]
    assert main(["recall", *options]) == 0
    rows = list(csv.DictReader((tmp_path / "recall.csv").open()))
    assert len(rows) == len(NETWORKS) * 2 * 2
    assert {row["network"] for row in rows} == set(NETWORKS)
    assert {row["steps"] for row in rows} == {"2"}
    assert all(0 <= float(row["accuracy"]) <= 1 for row in rows)
    assert capsys.readouterr().out.count("distance") >= len(NETWORKS) * 2


def test_a_short_distance_is_learnt_and_training_then_stops() -> None:
    row = measure("LSTM, set for the distance", distance=3, seed=0, steps=400)
    assert row.accuracy > 0.95
    assert row.steps < 400


def test_a_run_can_be_repeated() -> None:
    first, second = (measure("GRU", distance=4, seed=1, steps=20) for _ in range(2))
    assert (first.accuracy, first.steps) == (second.accuracy, second.steps)


@pytest.mark.parametrize("wrong", [["--distances", "0"], ["--steps", "0"], ["--seeds", "0"]])
def test_numbers_below_one_get_a_sentence(
    wrong: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recall", *wrong, "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "distances, steps and seeds must be at least 1.\n"
