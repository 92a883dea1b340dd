"""Hold the checks to what they promise, and print the table: `dianlib checks report`.

For every task: each form of each known mistake, each pair of mistakes, each right answer written
in another way and each trivial answer is graded like a learner's.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from inspect import getsource
from typing import Any, TextIO

import torch
from torch import Tensor, nn

from dianlib.checks import grade, tasks
from dianlib.checks.judging import Report
from dianlib.checks.running import Probe, Source, make, run
from dianlib.checks.task import Candidate, Task


@dataclass(frozen=True)
class Trial:
    """One graded answer: what it is, and whether the check did what it must."""

    task: str
    kind: str  # "mistake", "pair", "right answer", "trivial answer"
    name: str
    ok: bool
    report: Report


def as_learners_code(variant: Candidate) -> Any:
    """Read a function or class anew from its source, as if it stood in a learner's notebook."""
    return make(
        Source(
            "from typing import Any\nfrom collections.abc import Iterable, Sequence\n" + getsource(variant),
            variant.__name__,
        )
    )


def trivial_answers(task: Task) -> Mapping[str, Candidate]:
    """Make the answers that need no understanding: they must never get full marks."""

    def stub(*args: Any) -> Any:
        raise NotImplementedError

    def like_the_right_answer(fill: Any) -> Candidate:
        def answer(*args: Any) -> Any:
            return _filled(task.reference(*args), fill)

        return answer

    answers: dict[str, Candidate] = {
        "the stub": stub,
        "nothing": lambda *args: None,
        "the first argument": lambda *args: args[0],
        "the last argument": lambda *args: args[-1],
        "always 0": lambda *args: 0.0,
        "always 1": lambda *args: 1.0,
        "zeros of the right shape": like_the_right_answer(torch.zeros_like),
        "ones of the right shape": like_the_right_answer(torch.ones_like),
        "random numbers of the right shape": like_the_right_answer(
            lambda t: torch.rand_like(t, dtype=torch.float32)
        ),
        "the answers to other probes": _replay(task),
    }
    if task.is_value:  # the questions are always the same, so their right answers cannot be replayed
        del answers["the answers to other probes"]
    return answers


class _Filled(nn.Module):
    """A module whose output has the right shape and nothing else right."""

    def __init__(self, module: nn.Module, fill: Any) -> None:
        super().__init__()
        self.module, self.fill = module, fill

    def forward(self, *args: Any) -> Any:
        return _filled(self.module(*args), self.fill)


def _filled(right: Any, fill: Any) -> Any:
    match right:
        case Tensor():
            return fill(right)
        case nn.Module():
            return _Filled(right, fill)
        case dict():
            return {key: _filled(value, fill) for key, value in right.items()}
        case tuple() | list():
            return tuple(_filled(value, fill) for value in right)
        case bool() | int() | float():
            return float(fill(torch.tensor(float(right))))
        case _:
            return right


def _replay(task: Task) -> Candidate:
    """Answer every call with what was right for the probes of another seed, in their order."""
    probes = task.probes(torch.Generator().manual_seed(1))
    right = [run(task.reference, probe) for probe in probes]
    number = -1

    def answer(*args: Any) -> Any:
        nonlocal number
        number = (number + 1) % len(probes)
        return _returned(right[number].values, probes[number])

    return answer


def _returned(values: Mapping[str, Any], probe: Probe) -> Any:
    """Put a returned object together again from its named leaves."""
    if probe.build is not None:
        return nn.Identity()
    if "result" in values:
        return values["result"]
    parts = {name: value for name, value in values.items() if name.startswith("result[")}
    if any("'" in name for name in parts):
        return {name.split("'")[1]: value for name, value in parts.items()}
    return tuple(parts.values()) or None


def trials(task: Task, seed: int = 0) -> Iterator[Trial]:
    """Grade everything that is known about a task and yield how the check did."""
    for fault in task.mistakes:
        for number, form in enumerate(task.forms(fault), 1):
            report = grade(task.id, form, seed)
            ok = report.diagnosis == (fault.id,) and not report.passed
            yield Trial(task.id, "mistake", f"{fault.id}, form {number}", ok, report)
    for faults, form in task.combinations:
        report = grade(task.id, form, seed)
        # One mistake can hide the other: then the one that shows must be named, and no further one.
        names = {fault.id for fault in faults}
        ok = not report.passed and bool(report.diagnosis) and {*report.diagnosis} <= names
        yield Trial(task.id, "pair", " + ".join(fault.id for fault in faults), ok, report)
    for variant in task.variants:
        report = grade(task.id, as_learners_code(variant), seed)
        yield Trial(task.id, "right answer", variant.__name__.strip("_"), report.passed, report)
    for name, answer in trivial_answers(task).items():
        report = grade(task.id, answer, seed)
        yield Trial(task.id, "trivial answer", name, not report.passed, report)


KINDS = ("mistake", "pair", "right answer", "trivial answer")


def write_table(markdown: bool, stream: TextIO) -> bool:
    """Print one row for each task and return whether every check kept its promise."""
    return write_rows([list(trials(task)) for task in tasks().values()], markdown, stream)


def write_rows(measured: list[list[Trial]], markdown: bool, stream: TextIO) -> bool:
    """Print the trials of each task as one row, then every trial that failed."""
    heads = [
        "task",
        "mistakes",
        "forms named",
        "pairs named",
        "right answers kept",
        "trivial answers rejected",
    ]
    rows = []
    for found in measured:
        name = found[0].task
        counts = [
            f"{sum(t.ok for t in found if t.kind == kind)} of {sum(t.kind == kind for t in found)}"
            for kind in KINDS
        ]
        rows.append([f"`{name}`" if markdown else name, str(len(tasks()[name].faults)), *counts])
    if markdown:
        stream.write("| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads) + "\n")
        stream.writelines("| " + " | ".join(row) + " |\n" for row in rows)
    else:
        widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
        lines = ["  ".join(map(str.ljust, row, widths)) for row in [heads, *rows]]
        stream.writelines(line.rstrip() + "\n" for line in lines)
    failures = [trial for found in measured for trial in found if not trial.ok]
    stream.writelines(f"FAILED {t.task}: {t.kind} {t.name}: {t.report.message}\n" for t in failures)
    return not failures
