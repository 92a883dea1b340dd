"""Decide from outcomes alone: is it right, which known mistake is it, and what fails first.

The judge compares plain tensors and numbers. It never calls the candidate, and it never guesses: a
mistake is named only when its own wrong implementation gives exactly the candidate's numbers on
every probe, or when its sign is there.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import isclose
from typing import Any

import torch
from torch import Tensor, allclose

from dianlib.checks.running import (
    Data,
    Foreign,
    Outcome,
    Parameters,
    Probe,
    Tensors,
    run,
    run_all,
    usual_surroundings,
)
from dianlib.checks.task import Candidate, Fault, Task

RELATIVE, ABSOLUTE = 1e-4, 1e-5


@dataclass(frozen=True)
class Report:
    """What a check found. ``diagnosis`` holds the ids of the recognised mistakes, () when there is none."""

    task: str
    score: float
    points: float
    max_points: int
    diagnosis: tuple[str, ...]
    message: str

    @property
    def passed(self) -> bool:
        return self.score == 1.0


# ----- comparing ---------------------------------------------------------------------------------------


def _number(value: Any) -> float | None:
    """Read a number or a tensor of one number as a float."""
    if isinstance(value, Tensor) and value.dim() == 0 and not value.is_complex():
        return float(value)
    return float(value) if isinstance(value, bool | int | float) else None


def close(got: Any, wanted: Any) -> bool:
    """Compare two leaves by value. Not-a-number equals not-a-number: a mistake may consist of it."""
    if isinstance(got, Foreign) or isinstance(wanted, Foreign):
        return bool(got == wanted)
    a, b = _number(got), _number(wanted)
    if a is not None and b is not None:
        same_special = math.isnan(a) and math.isnan(b)
        if isinstance(wanted, int):  # a count is right or wrong: 10,049 is not 10,048
            return isclose(a, b, rel_tol=1e-9)
        return same_special or isclose(a, b, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
    if not isinstance(got, Tensor) or not isinstance(wanted, Tensor) or got.shape != wanted.shape:
        return False
    if got.is_complex() or wanted.is_complex():
        return bool(torch.equal(got, wanted))
    return allclose(got.double(), wanted.double(), rtol=RELATIVE, atol=ABSOLUTE, equal_nan=True)


def same(got: Outcome, wanted: Outcome) -> bool:
    """Tell whether two calls did the same, whatever it was: numbers, an exception, a cut graph."""
    return (
        got.error == wanted.error
        and got.detached == wanted.detached
        and got.changed == wanted.changed
        and got.values.keys() >= wanted.values.keys()
        and all(close(got.values[name], wanted.values[name]) for name in wanted.values)
    )


def _kind_problem(name: str, got: Any, wanted: Any) -> str:
    """Say what is wrong with the type, the shape or the dtype of a leaf, or "" when nothing is."""
    if isinstance(got, Foreign):
        return f"{name} is of type {got.type_name}; return {_kind(wanted)}."
    if isinstance(wanted, Tensor) and wanted.dim() > 0:
        if not isinstance(got, Tensor):
            return f"{name} is of type {type(got).__name__}; return {_kind(wanted)}."
        if got.shape != wanted.shape:
            return f"{name} has shape {tuple(got.shape)}; it must have shape {tuple(wanted.shape)}."
        if not wanted.is_floating_point() and got.dtype != wanted.dtype:
            return f"{name} has dtype {got.dtype}; it must have {wanted.dtype}."
        if wanted.is_floating_point() and not got.is_floating_point():
            return f"{name} has dtype {got.dtype}; it must hold floating-point numbers."
        return ""
    if _number(got) is None:
        shape = f" of shape {tuple(got.shape)}" if isinstance(got, Tensor) else ""
        return f"{name} is of type {type(got).__name__}{shape}; return {_kind(wanted)}."
    return ""


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}" if value.dim() else "a tensor with one number"
    return {bool: "True or False", int: "a number", float: "a number"}.get(type(value), type(value).__name__)


def problem(probe: Probe, got: Outcome, wanted: Outcome) -> str:
    """Say the first thing that is wrong in an outcome, or "" when the outcome is right."""
    if got.error == "NotImplementedError":
        return "This is still the stub: write your code in place of `raise NotImplementedError`."
    if got.error == "TimeLimit":
        return "It did not finish in time. Look for a loop that never ends."
    if got.error == "Died":
        return "Its process ended before it returned. Look for exit(), or for far too much memory."
    if got.error:
        return f"It raised {got.error_text}"
    for name, expected in wanted.values.items():
        if name.startswith("gradient of ") and got.detached:
            continue  # said below, with the reason
        if name not in got.values:
            return _missing(name, got, expected)
        kind = _kind_problem(name, got.values[name], expected)
        if kind:
            return kind
    for name, expected in wanted.values.items():
        if name in got.values and not close(got.values[name], expected):
            found = _difference(name, got.values[name], expected, probe)
            return f"{found} It raised {got.error_text}" if probe.verdict and got.error_text else found
    # Said of a right result only: a bias that was not added has no gradient either.
    if got.detached and not wanted.detached:
        return (
            "No gradient reaches the input: the result was cut from autograd's graph "
            "(by .detach(), .data, .item(), .numpy() or torch.tensor(...))."
        )
    if got.changed:
        return f"It changed its argument {got.changed[0]} in place; the caller still needs that tensor."
    return ""


def _missing(name: str, got: Outcome, expected: Any) -> str:
    parts = got.values.get("result (number of parts)")
    if name == "result" and parts is not None:
        return f"It returned a list, tuple or dictionary with {parts} parts; return {_kind(expected)}."
    found = got.values.get("result")
    if name == "result" and parts is None:
        return "It returned nothing. Is a return missing?"
    if name.startswith("result") and found is not None:
        kind = found.type_name if isinstance(found, Foreign) else type(found).__name__
        if name.endswith("(number of parts)"):
            return f"It returned one {kind}; return {expected} separate values, for example (low, high)."
        return f"It returned one {kind}; {name} is missing."
    return f"{name} is missing."


def _difference(name: str, got: Any, expected: Any, probe: Probe) -> str:
    """Describe a wrong value by the first property that fails, without giving the right one away."""
    if probe.verdict:
        word = "rejects a right" if expected else "accepts a wrong"
        return f"Your test {word} implementation."
    a, b = _tensor(got), _tensor(expected)
    if a.shape != b.shape:  # a number where another kind of number stands: compared above
        return f"{name} is not right."
    if not torch.isfinite(a).all() and torch.isfinite(b).all():
        kind = "NaN (not a number)" if a.isnan().any() else "infinite"
        return f"{name} holds a value that is {kind}."
    ratio = _constant_ratio(a, b)
    if ratio is not None:
        return f"{name} is off by a constant factor: everything is {ratio} what it should be."
    if a.numel() > 1 and allclose(a.flatten().sort().values, b.flatten().sort().values, RELATIVE, ABSOLUTE):
        return f"{name} has the right numbers in another order."
    return f"{name} has wrong values."


def _tensor(value: Any) -> Tensor:
    return value.double() if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)


def _constant_ratio(got: Tensor, expected: Tensor) -> str | None:
    """Find c with got = c * expected, when there are at least two numbers to tell by."""
    significant = expected.abs() > 1e-3
    if significant.sum() < 2 or not torch.isfinite(got).all() or not torch.isfinite(expected).all():
        return None
    ratios = got[significant] / expected[significant]
    ratio = float(ratios.mean())
    if abs(ratio) < 1e-6 or abs(ratio - 1) < 1e-3 or not allclose(got, ratio * expected, 1e-3, 1e-5):
        return None
    divisor = 1 / ratio
    is_fraction = round(divisor) > 1 and isclose(divisor, round(divisor), rel_tol=1e-3)
    return f"1/{round(divisor)} of" if is_fraction else f"{ratio:.4g} times"


# ----- naming --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Diagnosis:
    """The mistakes that explain a candidate: one, a pair that acts together, several, or several rivals.

    Several mistakes are ``apart`` when each was seen in an answer of its own.
    """

    faults: tuple[Fault, ...] = ()
    together: bool = False
    apart: bool = False


class Bench:
    """A task with the probes of one seed, and what its right and its wrong implementations do on them."""

    def __init__(self, task: Task, seed: int) -> None:
        self.task = task
        with usual_surroundings():
            self.probes = task.probes(torch.Generator().manual_seed(seed))
        self._calls = [*self.probes, self.probes[0]]  # as run_all makes them
        self.right = run_all(task.reference, self.probes)
        self._kept: dict[Candidate, list[Outcome]] = {}

    @cached_property
    def _also_right(self) -> list[list[Outcome]]:
        return [run_all(answer, self.probes) for answer in self.task.accepts]

    def expected(self, outcomes: list[Outcome]) -> list[Outcome]:
        """Choose, of all right answers, the one that the outcomes agree with most often."""

        def agreement(right: list[Outcome]) -> int:
            return sum(same(got, wanted) for got, wanted in zip(outcomes, right, strict=True))

        if agreement(self.right) == len(outcomes):
            return self.right
        return max([self.right, *self._also_right], key=agreement)

    def diagnose(self, outcomes: list[Outcome], wanted: list[Outcome]) -> Diagnosis:
        """Name what explains the outcomes: one mistake, else several together, else a sign, else nothing."""
        # Calls that only raise are no evidence: there has to be a number somewhere.
        raises_only = all(got.error for got in outcomes)
        if not raises_only and (found := self._explanation(outcomes)):
            return found
        rows = list(zip(self._calls, outcomes, wanted, strict=True))
        signed = {f.id: f for f in self.task.mistakes if f.sign and any(_ask(f.sign, *row) for row in rows)}
        return Diagnosis(tuple(signed.values()), apart=True)

    def _explanation(self, outcomes: list[Outcome]) -> Diagnosis | None:
        single = [fault for fault, form in self.task.singles if self._explains(form, outcomes)]
        if single:
            return Diagnosis(tuple({fault.id: fault for fault in single}.values()))
        several = [
            {fault.id: fault for fault in faults}
            for faults, form in self.task.combinations
            if self._explains(form, outcomes)
        ]
        if not several:
            return None
        # Where several combinations fit, only what they have in common is certain.
        common = set.intersection(*(set(faults) for faults in several))
        return Diagnosis(tuple(several[0][name] for name in several[0] if name in common), len(common) > 1)

    def _explains(self, form: Candidate, outcomes: list[Outcome]) -> bool:
        """Tell whether a wrong implementation does the same on every probe; it runs only as far as needed."""
        kept = self._kept.setdefault(form, [])
        for number, (probe, got) in enumerate(zip(self._calls, outcomes, strict=True)):
            if number == len(kept):
                kept.append(run(form, probe))
            if not same(got, kept[number]):
                return False
        return True


def _ask(look: Callable[..., Any], *row: Any) -> Any:
    """Ask a sign or a property of a task. It knows what answers are made of; a stranger's may be of anything."""
    try:
        return look(*row)
    except Exception:
        return None


def unusable(task: Task, type_name: str) -> Report:
    """Report a candidate that cannot be called, or a task of answers that did not get a dictionary."""
    wanted = "a dictionary of answers" if task.is_value else f"the function or class {task.signature}"
    message = (
        f"{task.id}: no points yet. This is of type {type_name}; "
        f"pass {wanted} itself, not a result of calling it."
    )
    return Report(task.id, 0.0, 0.0, task.points, (), message)


def judge(bench: Bench, outcomes: list[Outcome]) -> Report:
    """Turn the outcomes of a candidate on the bench's probes, the repetition last, into a report."""
    task, probes = bench.task, bench.probes
    wanted = bench.expected(outcomes)
    problems = [_problem(task, *row) for row in zip(probes, outcomes, wanted, strict=False)]
    repeated = same(outcomes[-1], outcomes[0])
    used = next((outcome.used[0] for outcome in outcomes if outcome.used), "")
    passed = [probe.weight for probe, found in zip(probes, problems, strict=True) if not found]
    core_failed = any(probe.core and found for probe, found in zip(probes, problems, strict=True))

    diagnosis = Diagnosis()
    if any(problems) or not repeated:
        diagnosis = bench.diagnose(outcomes, wanted)
        # What a learner got right beyond the core is worth its share; a wrong core is worth nothing.
        score = 0.0 if core_failed or used else sum(passed) / sum(probe.weight for probe in probes)
        message = _explain(bench, outcomes, problems, diagnosis, score)
        if used:
            message += f"\nAnd {used} does work in it. The point of this task is to write it yourself."
    elif used:
        score = 0.0
        message = (
            f"{task.id}: no points yet. The numbers are right, but {used} does the work. "
            "The point of this task is to write it yourself."
        )
    else:
        score = 1.0
        message = f"{task.id}: right, {task.points} of {task.points} points."
    if not repeated:
        score = min(score, 0.5)
    ids = tuple(dict.fromkeys(fault.id for fault in diagnosis.faults))
    return Report(task.id, score, round(task.points * score, 2), task.points, ids, message)


def _problem(task: Task, probe: Probe, got: Outcome, wanted: Outcome) -> str:
    """Say what is wrong on one probe; the task's own properties speak before the general sentence."""
    if task.is_value and not got.error and "result" not in got.values:
        return (
            f"There is no answer to this question yet: write a number for the key {probe.args['question']!r}."
        )
    general = problem(probe, got, wanted)
    if not general or got.error:
        return general
    return next((found for look in task.properties if (found := _ask(look, probe, got, wanted))), general)


# ----- what the learner reads ------------------------------------------------------------------------------


def _explain(
    bench: Bench, outcomes: list[Outcome], problems: list[str], diagnosis: Diagnosis, score: float
) -> str:
    task = bench.task
    passed = sum(not found for found in problems)
    lines = [
        f"{task.id}: not right yet, {task.points * score:.3g} of {task.points} points "
        f"({passed} of {len(problems)} probes passed)."
    ]
    failed = [index for index, found in enumerate(problems) if found]
    # A core probe that failed takes all points, so it is shown before the others.
    first = next((index for index in failed if bench.probes[index].core), failed[0] if failed else None)
    if task.is_value and not any(outcome.values or outcome.error for outcome in outcomes):
        lines.append("This is still the stub: write your answers in place of None.")
    elif first is None:
        lines.append("The same call gives another answer later: something is kept from an earlier call.")
    else:
        lines.append(f'Failed: "{bench.probes[first].name}". {problems[first]}')
        lines += _example(bench.probes[first], outcomes[first])
    if diagnosis.together:
        lines.append("These mistakes together give exactly these numbers:")
    elif len(diagnosis.faults) > 1 and diagnosis.apart:
        lines.append("These mistakes are known:")
    elif len(diagnosis.faults) > 1:
        lines.append("Each of these mistakes fits; the probes cannot tell them apart:")
    elif diagnosis.faults:
        lines.append("This mistake is known:")
    elif first is None or not _says_why(outcomes[first]):
        lines.append("Cause not recognised: no known mistake does exactly this.")
        lines.append(f'For a question that may help, run hint("{task.id}").')
    for fault in diagnosis.faults:
        lines += [f"  [{fault.id}] {fault.does}", f"  What to do: {fault.todo}", f"  Reread: {where(fault)}"]
    return "\n".join(lines)


def _says_why(outcome: Outcome) -> bool:
    """Tell whether what happened is its own explanation: the stub, no end, nothing returned."""
    own_explanation = outcome.error in ("NotImplementedError", "TimeLimit", "Died")
    return own_explanation or not (outcome.error or outcome.values)


def where(fault: Fault) -> str:
    """Name the paragraph to reread, with its address inside the book."""
    slug, heading = fault.reread.split(": ", 1)
    return f'"{heading}", book/{slug}.html#{anchor(heading)}'


def anchor(heading: str) -> str:
    """Return the id that the book gives to a heading: lower case, words joined by hyphens."""
    return re.sub("[^a-z0-9]+", "-", heading.lower()).strip("-")


def _example(probe: Probe, outcome: Outcome) -> list[str]:
    """Show the input of a probe and what came back; a large tensor is named by its shape."""
    lines = [f"    built with {', '.join(map(str, probe.build))}"] if probe.build is not None else []
    lines += [f"    {name} = {_show(value)}" for name, value in probe.args.items() if _show(value)]
    if not outcome.error and not probe.verdict:
        results = {name: value for name, value in outcome.values.items() if name.startswith("result")}
        # A task that returns nothing shows in what its arguments have become.
        results = results or {n: value for n, value in outcome.values.items() if n.endswith("afterwards")}
        parts = {name: value for name, value in results.items() if "number of parts" not in name}
        lines += [
            f"    your {name} = {_show(value)}" for name, value in list(parts.items())[:6] if _show(value)
        ]
    return lines


def _show(value: Any) -> str:
    if isinstance(value, Parameters):
        pairs = zip(value.values, value.gradients, strict=True)
        return "; ".join(f"{_show(v)} with gradient {None if g is None else _show(g)}" for v, g in pairs)
    if isinstance(value, Data):
        text = repr(value.value)
        return text if len(text) <= 400 else ""
    if isinstance(value, Tensors):
        return f"({', '.join(_show(part) for part in value.values)})"
    if isinstance(value, Tensor):
        if value.numel() > 30:
            return f"a tensor of shape {tuple(value.shape)}"
        return str(
            ((value.double() * 1e4).round() / 1e4).tolist() if value.is_floating_point() else value.tolist()
        )
    if isinstance(value, float):
        return f"{value:.6g}"
    return repr(value) if isinstance(value, bool | int | str) else ""
