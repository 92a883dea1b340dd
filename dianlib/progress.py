"""Remember what a learner has passed, in one small JSON file on their own computer.

The file is ``~/.dianlib/progress.json``, or the one that the environment variable DIANLIB_PROGRESS
names; an empty DIANLIB_PROGRESS keeps nothing. DIANLIB_CHECK_LOG names a second file to which every
report is appended as a line of JSON: so a program that runs a notebook learns what its checks said.
Neither file is needed for a check to work, so trouble with them is said once and then ignored.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from filelock import FileLock, Timeout

LOG_VARIABLE = "DIANLIB_CHECK_LOG"
PROGRESS_VARIABLE = "DIANLIB_PROGRESS"


class Report(TypedDict):
    """What one check said. ``score`` runs from 0 to 1; ``points`` is its share of ``max_points``."""

    task: str
    score: float
    points: float
    max_points: float
    passed: bool
    diagnosis: Sequence[str]
    message: str


class Standing(TypedDict):
    """Where a learner stands with one task: the best result so far, and the mistakes named last."""

    score: float
    points: float
    max_points: float
    passed: bool
    diagnosis: list[str]


def record(report: Report) -> None:
    """Append a report to the log, if one is asked for, and keep it as progress. Never raises OSError.

    While nbgrader runs a notebook no progress is kept: it is not the learner who is at work.
    """
    log = os.environ.get(LOG_VARIABLE)
    if log:
        _append(Path(log), report)
    path = _progress_path()
    if path is None or "NBGRADER_EXECUTION" in os.environ:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Two notebooks may check at the same time, and each rewrites the whole file.
        with FileLock(f"{path}.lock", timeout=10):
            standings = _read(path, set_damaged_aside=True)
            standings[report["task"]] = _updated(standings.get(report["task"]), report)
            _replace(path, json.dumps({"version": 1, "tasks": standings}, indent=1, sort_keys=True) + "\n")
    except (OSError, NotImplementedError, Timeout) as error:
        _say_once(f"Your progress could not be saved in {path} ({_reason(error)}); the check itself is fine.")


def load() -> dict[str, Standing]:
    """Return the standing of every task that was ever checked: task id -> Standing."""
    path = _progress_path()
    if path is None:
        return {}
    try:
        # The file is only ever replaced as a whole, so it can be read without the lock.
        return _read(path, set_damaged_aside=False)
    except OSError as error:
        _say_once(f"Your progress in {path} could not be read ({_reason(error)}).")
        return {}


def _progress_path() -> Path | None:
    named = os.environ.get(PROGRESS_VARIABLE)
    if named == "":
        return None
    try:
        path = Path(named).expanduser() if named else Path.home() / ".dianlib" / "progress.json"
    except RuntimeError:  # an account without a home folder
        return None
    return path.resolve()  # a link stays a link: its target is replaced


def _updated(old: Standing | None, report: Report) -> Standing:
    """Take the better of the old and the new result, and in any case the new diagnosis."""
    diagnosis = list(report["diagnosis"])
    if old is not None and old["score"] > report["score"]:
        return {**old, "diagnosis": diagnosis}
    return {
        "score": report["score"],
        "points": report["points"],
        "max_points": report["max_points"],
        "passed": report["passed"],
        "diagnosis": diagnosis,
    }


def _read(path: Path, *, set_damaged_aside: bool) -> dict[str, Standing]:
    """Read the file; a damaged one counts as empty, and is kept under another name if asked for."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return {}
    try:
        return _standings(json.loads(content))
    except (ValueError, RecursionError):
        if not set_damaged_aside:
            _say_once(f"The progress file {path} is damaged, so nothing in it could be read.")
            return {}
    aside = path.with_name(f"{path.stem}.damaged{path.suffix}")
    number = 2
    while aside.exists():
        aside = path.with_name(f"{path.stem}.damaged-{number}{path.suffix}")
        number += 1
    path.replace(aside)
    _say_once(f"The progress file {path} was damaged. It is kept as {aside.name}, and a new one was begun.")
    return {}


def _standings(content: Any) -> dict[str, Standing]:
    """Return what a file of ours holds; raise ValueError when it is none."""
    if not isinstance(content, dict) or not isinstance(content.get("tasks"), dict):
        raise ValueError("this is no progress file")
    standings: dict[str, Standing] = {}
    for task, entry in content["tasks"].items():
        if not isinstance(entry, dict) or not isinstance(entry.get("passed"), bool):
            raise ValueError(f"the entry of {task} is damaged")
        if not all(isinstance(entry.get(name), int | float) for name in ("score", "points", "max_points")):
            raise ValueError(f"the entry of {task} is damaged")
        mistakes = entry.get("diagnosis")
        if not isinstance(mistakes, list) or not all(isinstance(mistake, str) for mistake in mistakes):
            raise ValueError(f"the entry of {task} is damaged")
        standings[task] = {
            "score": entry["score"],
            "points": entry["points"],
            "max_points": entry["max_points"],
            "passed": entry["passed"],
            "diagnosis": mistakes,
        }
    return standings


def _replace(path: Path, text: str) -> None:
    """Write a file so that others see the old one or the new one, and never a half of it."""
    unfinished = path.with_name(f"{path.name}.new")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def _append(log: Path, report: Mapping[str, Any]) -> None:
    try:
        with log.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(report) + "\n")
    except OSError as error:
        _say_once(f"The report could not be written to {log} ({_reason(error)}).")


def _reason(error: Exception) -> str:
    if isinstance(error, Timeout):
        return "another program holds its lock"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


_said: set[str] = set()


def _say_once(sentence: str) -> None:
    if sentence not in _said:
        _said.add(sentence)
        print(sentence, file=sys.stderr)
