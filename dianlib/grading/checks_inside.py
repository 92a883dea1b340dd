"""What students' notebooks find as dianlib.checks inside the sandbox: the names, and no judge.

The grader asks its questions from outside. A check that a notebook calls by itself prints one line.
"""

from typing import Any

__all__ = ["check", "grade", "hint", "tasks"]


def check(task_id: str, candidate: Any, seed: int = 0) -> float:
    """Say that the grader judges this; return no points."""
    print(f"{task_id}: the grader judges this task from outside.")
    return 0.0


def grade(task_id: str, candidate: Any, seed: int = 0) -> None:
    """Return nothing: there is no report here."""


def hint(task_id: str, step: int = 1) -> None:
    """Print nothing: whoever needs a hint is at home."""


def tasks() -> dict[str, Any]:
    """Return no tasks: they hold the references."""
    return {}
