import json
import subprocess
import sys
from pathlib import Path

import pytest

from dianlib import progress
from dianlib.progress import Report


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "folder" / "progress.json"
    monkeypatch.setenv("DIANLIB_PROGRESS", str(path))
    monkeypatch.delenv("NBGRADER_EXECUTION", raising=False)
    monkeypatch.delenv("DIANLIB_CHECK_LOG", raising=False)
    monkeypatch.setattr(progress, "_said", set())
    return path


GOOD = b'{"tasks": {"x": {"score": 1, "points": 1, "max_points": 1, "passed": true, "diagnosis": []}}}'


def report(task: str = "mlp.relu", score: float = 1.0, diagnosis: tuple[str, ...] = ()) -> Report:
    return {
        "task": task,
        "score": score,
        "points": 2 * score,
        "max_points": 2,
        "passed": score == 1.0,
        "diagnosis": diagnosis,
        "message": "what the student reads",
    }


def test_a_report_is_found_again(file: Path) -> None:
    progress.record(report("mlp.relu", 0.5, ("relu-on-the-wrong-side",)))
    progress.record(report("mlp.softmax"))
    assert progress.load() == {
        "mlp.relu": {
            "score": 0.5,
            "points": 1.0,
            "max_points": 2,
            "passed": False,
            "diagnosis": ["relu-on-the-wrong-side"],
        },
        "mlp.softmax": {"score": 1.0, "points": 2.0, "max_points": 2, "passed": True, "diagnosis": []},
    }


def test_a_file_from_another_day_is_read(file: Path) -> None:
    file.parent.mkdir()
    file.write_bytes(GOOD)
    assert progress.load()["x"]["passed"]


def test_nothing_was_recorded_yet(file: Path) -> None:
    assert progress.load() == {}
    assert not file.exists()


def test_the_best_score_and_the_last_diagnosis_stay(file: Path) -> None:
    for score, mistake in ((0.25, "first"), (0.75, "second"), (0.5, "third")):
        progress.record(report(score=score, diagnosis=(mistake,)))
    standing = progress.load()["mlp.relu"]
    assert (standing["score"], standing["points"], standing["diagnosis"]) == (0.75, 1.5, ["third"])
    progress.record(report())
    progress.record(report(score=0.0, diagnosis=("fourth",)))
    assert progress.load()["mlp.relu"]["passed"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"tasks": {"mlp.relu": ',
        b"\xff\xfe",
        b"[]",
        b"[" * 100_000,
        b'{"tasks": {"mlp.relu": 1}}',
        GOOD.replace(b'"score": 1', b'"score": "high"'),
        GOOD.replace(b"[]", b"[1]"),
    ],
    ids=["empty", "cut", "no-text", "list", "deep", "number", "score", "mistake"],
)
def test_a_damaged_file_is_kept_aside(file: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    file.parent.mkdir()
    file.write_bytes(content)
    assert progress.load() == {}
    assert file.read_bytes() == content, "reading alone must not move the file"
    progress.record(report())
    assert (file.parent / "progress.damaged.json").read_bytes() == content
    assert progress.load()["mlp.relu"]["passed"]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert "could be read" in said[0]
    assert "progress.damaged.json" in said[1]


def test_a_second_damaged_file_does_not_replace_the_first(file: Path) -> None:
    file.parent.mkdir()
    for content in ("one", "two"):
        file.write_text(content)
        progress.record(report())
    assert (file.parent / "progress.damaged.json").read_text() == "one"
    assert (file.parent / "progress.damaged-2.json").read_text() == "two"


def test_two_processes_lose_nothing(file: Path) -> None:
    code = (
        "import sys; from dianlib import progress\n"
        "for n in range(60):\n"
        "    progress.record({'task': f'{sys.argv[1]}.{n}', 'score': 1.0, 'points': 1.0, 'max_points': 1,\n"
        "                     'passed': True, 'diagnosis': [], 'message': ''})"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, name]) for name in ("a", "b", "c")]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert progress.load().keys() == {f"{name}.{n}" for name in "abc" for n in range(60)}


def test_a_file_that_cannot_be_written_is_said_once(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A file where the folder should be stops everybody, the superuser too.
    file.parent.write_text("")
    progress.record(report())
    progress.record(report())
    assert progress.load() == {}
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "could not be saved" in line] == said[:1]


def test_an_account_without_home_keeps_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("DIANLIB_PROGRESS")
    monkeypatch.setattr(Path, "home", no_home)
    progress.record(report())
    assert progress.load() == {}


def test_the_default_lies_in_the_home_folder(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("DIANLIB_PROGRESS")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    progress.record(report())
    assert (tmp_path / ".dianlib" / "progress.json").is_file()


def test_an_empty_variable_keeps_nothing(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DIANLIB_PROGRESS", "")
    monkeypatch.chdir(tmp_path)
    progress.record(report())
    assert progress.load() == {}
    assert list(tmp_path.iterdir()) == []


def test_nbgrader_leaves_no_progress(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NBGRADER_EXECUTION", "autograde")
    progress.record(report())
    assert not file.exists()


def test_the_log_gets_every_report(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    monkeypatch.setenv("DIANLIB_CHECK_LOG", str(log))
    monkeypatch.setenv("NBGRADER_EXECUTION", "validate")  # the log is asked for, so it is written even now
    progress.record(report(score=0.0, diagnosis=("a", "b")))
    progress.record(report())
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["passed"] for line in lines] == [False, True]
    assert lines[0]["diagnosis"] == ["a", "b"]


def test_a_log_that_cannot_be_written_does_not_stop_the_check(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DIANLIB_CHECK_LOG", str(tmp_path / "no" / "log.jsonl"))
    progress.record(report())
    assert progress.load()["mlp.relu"]["passed"]
    assert "could not be written" in capsys.readouterr().err
