"""What a task is: a reference, probes, and the mistakes that are known for it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import getsource
from typing import Any

import torch

from dianlib.checks.running import Outcome, Probe, Source

Candidate = Callable[..., Any]


@dataclass(frozen=True)
class Fault:
    """A known mistake.

    ``does`` says in one sentence what the code does, ``todo`` what to do about it, ``reread`` names
    the chapter and the heading ("metrics: What if a class is never predicted?"). ``settings``
    are settings of the task's faulty twin, each of them a form of this mistake; where a mistake is no
    setting, ``implementations`` are its forms. ``sign`` recognises it in an outcome
    where the numbers depend on something the judge cannot know, such as a learner's constant.
    """

    id: str
    does: str
    todo: str
    reread: str
    settings: Sequence[Mapping[str, Any]] = ()
    implementations: Sequence[Candidate] = ()
    sign: Callable[[Probe, Outcome, Outcome], bool] | None = None


@dataclass(frozen=True)
class Task:
    """One gradable thing.

    ``probes`` makes the questions from a seeded generator, the smallest first. ``twin`` is the
    reference with keyword settings, one for each independent way to go wrong. ``accepts`` are right
    answers with other numbers; ``variants`` are right answers written in another way, which must never be flagged
    (self-contained: they are read as source text, like a learner's). ``forbidden`` names the torch functions that are the answer; where it is not empty,
    other libraries' functions and dianlib's own are refused as well. ``hints`` are a question, the
    property and the pseudocode. ``properties`` look at (probe, outcome, expected) and return a
    sentence about the first thing that is wrong, or "".
    """

    id: str
    signature: str
    points: int
    reference: Candidate
    probes: Callable[[torch.Generator], list[Probe]]
    hints: tuple[str, str, str]
    mistakes: Sequence[Fault] = ()
    twin: Candidate | None = None
    accepts: Sequence[Candidate] = ()
    variants: Sequence[Candidate] = ()
    forbidden: frozenset[str] = frozenset()
    properties: Sequence[Callable[[Probe, Outcome, Outcome], str]] = ()
    is_value: bool = False
    limit: float = 5.0

    def __post_init__(self) -> None:
        # A wrapper of its own, so that the judge can trust this object and still notice a learner
        # who hands in dianlib's function.
        object.__setattr__(self, "reference", partial(self.reference))

    @property
    def chapter(self) -> str:
        return self.id.partition(".")[0]

    @property
    def faults(self) -> Mapping[str, Candidate]:
        """The known mistakes: id -> a wrong implementation."""
        return {fault.id: self.forms(fault)[0] for fault in reversed(self.mistakes)}

    def forms(self, fault: Fault) -> list[Candidate]:
        """All wrong implementations of one mistake."""
        if fault.settings and self.twin is None:
            raise ValueError(f"{self.id}: the mistake {fault.id} has settings, but the task has no twin.")
        return [partial(self.twin, **setting) for setting in fault.settings if self.twin] + list(
            fault.implementations
        )

    def pairs(self) -> list[tuple[Fault, Fault, Candidate]]:
        """All pairs of mistakes on different settings, with the twin that makes both."""
        found: list[tuple[Fault, Fault, Candidate]] = []
        for number, first in enumerate(self.mistakes):
            for second in self.mistakes[number + 1 :]:
                for a in first.settings:
                    for b in second.settings:
                        if self.twin and not a.keys() & b.keys():
                            found.append((first, second, partial(self.twin, **a, **b)))
        return found


def specimen_probes(
    name: str, right: Sequence[Candidate], wrong: Sequence[Candidate], generator: torch.Generator
) -> list[Probe]:
    """Make the probes of a "grade this" task: implementations, as source text, for the learner's test to judge.

    A test that rejects a right implementation is worth nothing; each wrong one that it catches counts.
    """

    def probe(function: Candidate, number: int, is_right: bool) -> Probe:
        title = f"{'a right' if is_right else 'a wrong'} implementation, number {number}"
        args = {name: Source(getsource(function), function.__name__)}
        return Probe(title, args, verdict=True, core=is_right, weight=0.0 if is_right else 1.0)

    probes = [probe(function, number, True) for number, function in enumerate(right, 1)]
    probes += [probe(function, number, False) for number, function in enumerate(wrong, 1)]
    # In another order for every seed: the answer cannot be given by counting the calls.
    return [probes[index] for index in torch.randperm(len(probes), generator=generator).tolist()]


def answer_probes(questions: Mapping[str, str]) -> Callable[[torch.Generator], list[Probe]]:
    """Make the probes of a task whose answer is a dictionary: one for each question, key -> description."""

    def probes(generator: torch.Generator) -> list[Probe]:
        return [Probe(text, {"question": key}) for key, text in questions.items()]

    return probes


def wrong_answer(question: str, value: float) -> Callable[[Probe, Outcome, Outcome], bool]:
    """Make the sign of one wrong value in a dictionary of answers, whatever the other answers are."""

    def sign(probe: Probe, got: Outcome, wanted: Outcome) -> bool:
        answer = got.values.get("result")
        given = isinstance(answer, int | float) and math.isclose(answer, value, rel_tol=1e-4)
        return given and probe.args["question"] == question

    return sign
