"""Check an answer and say which mistake it is.

>>> check("mlp.relu", my_relu)              # prints a report, returns the points
>>> report = grade("mlp.relu", my_relu)     # the same without printing
>>> hint("mlp.relu")                        # a question, then the property, then the pseudocode

Nothing but these functions is imported here, and they import the references and the known mistakes
only when they are called: ``dianlib.checks.running`` has to stay free of them.
"""

import functools
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dianlib.checks.judging import Bench, Report
    from dianlib.checks.task import Task

__all__ = ["check", "grade", "hint", "tasks"]


def tasks() -> "Mapping[str, Task]":
    """Return every task by its id; a task has a ``reference`` and ``faults``, id -> wrong implementation."""
    from dianlib.checks import registry

    return registry.tasks()


def _task(task_id: str) -> "Task":
    known = tasks()
    if task_id not in known:
        import difflib

        near = difflib.get_close_matches(task_id, known, n=1)
        advice = f"did you mean {near[0]!r}?" if near else f"the tasks are {', '.join(known)}."
        raise LookupError(f"There is no task {task_id!r}; {advice}")
    return known[task_id]


@functools.lru_cache(maxsize=256)
def _bench(task_id: str, seed: int) -> "Bench":
    """Keep the probes of a task and seed: a second check of the same task costs the candidate's time only."""
    from dianlib.checks.judging import Bench

    return Bench(_task(task_id), seed)


def grade(task_id: str, candidate: Any, seed: int = 0) -> "Report":
    """Judge a candidate without printing. The seed chooses the probes.

    ``candidate`` is the function, the class or the value that the task asks for. Whatever it
    does (raise, hang, return something else), the answer is a Report.
    """
    from dianlib.checks.judging import judge, unusable
    from dianlib.checks.running import run_all

    task = _task(task_id)
    bench = _bench(task_id, seed)
    call = candidate.get if task.is_value and isinstance(candidate, dict) else candidate
    if not callable(call):
        return unusable(task, type(candidate).__name__)
    # The task's own right answers are trusted; anybody else's call of them is a shortcut.
    trusted = any(candidate is own for own in (task.reference, *task.accepts))
    outcomes = run_all(call, bench.probes, frozenset() if trusted else task.forbidden, task.limit)
    return judge(bench, outcomes)


def check(task_id: str, candidate: Any, seed: int = 0) -> float:
    """Judge a candidate, print the report and return the points. Progress is kept for `dianlib status`."""
    from dianlib import progress

    try:
        report = grade(task_id, candidate, seed)
    except LookupError as error:
        print(error.args[0])
        return 0.0
    print(report.message)
    sys.stdout.flush()
    progress.record(
        {
            "task": report.task,
            "score": report.score,
            "points": report.points,
            "max_points": report.max_points,
            "passed": report.passed,
            "diagnosis": list(report.diagnosis),
            "message": report.message,
        }
    )
    return report.points


def hint(task_id: str, step: int = 1) -> None:
    """Print a hint: step 1 asks a question, step 2 names the property, step 3 gives the pseudocode."""
    try:
        task = _task(task_id)
    except LookupError as error:
        print(error.args[0])
        return
    if step not in (1, 2, 3):
        print(f"There are three hints, 1 to 3; {step} is not one of them.")
        return
    print(f"Hint {step} of 3 for {task_id}\n{task.hints[step - 1]}")
    if step < 3:
        print(f'Next: hint("{task_id}", {step + 1})')
