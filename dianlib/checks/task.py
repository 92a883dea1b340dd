"""What a task is: a reference, probes, and the mistakes that are known for it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch

from dianlib.checks.running import Outcome, Probe

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
    (self-contained: they are read as source text, like a learner's). ``forbidden`` names the torch functions
    that are the answer; where it is not empty, other libraries' functions and dianlib's own are refused as well.
    ``often_together`` names pairs of mistakes that come so often together that a third is looked
    for beside them. ``hints`` are a question, the
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
    often_together: Sequence[frozenset[str]] = ()
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

    @cached_property  # the same objects every time, so that a bench knows what each of them did
    def singles(self) -> list[tuple[Fault, Candidate]]:
        """All wrong implementations of one mistake each."""
        return [(fault, form) for fault in self.mistakes for form in self.forms(fault)]

    @cached_property  # there may be hundreds, and a grader needs them for each wrong answer
    def combinations(self) -> list[tuple[tuple[Fault, ...], Candidate]]:
        """All pairs of mistakes on different settings, and a pair that comes often with every third one."""
        single = [(fault, setting) for fault in self.mistakes for setting in fault.settings]
        found: list[tuple[tuple[Fault, ...], dict[str, Any]]] = []
        for number, (first, a) in enumerate(single):
            for second, b in single[number + 1 :]:
                if first is not second and not a.keys() & b.keys():
                    found.append(((first, second), {**a, **b}))
        for pair, settings in list(found):
            if {fault.id for fault in pair} in self.often_together:
                for third, c in single:
                    if third not in pair and not settings.keys() & c.keys():
                        found.append(((*pair, third), {**settings, **c}))
        return [(faults, partial(self.twin, **settings)) for faults, settings in found if self.twin]
