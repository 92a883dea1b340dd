"""What tasks of several chapters share: "grade this", questions with numbers for answers, missing gradients."""

import math
from collections.abc import Callable, Mapping, Sequence
from inspect import getsource

import torch
from torch import Tensor

from dianlib.checks.judging import close
from dianlib.checks.running import Outcome, Probe, Source
from dianlib.checks.task import Candidate, Fault


def randn(generator: torch.Generator, *shape: int) -> Tensor:
    """Draw numbers from the standard normal distribution."""
    return torch.randn(shape, generator=generator)


# ----- a gradient that is missing -------------------------------------------------------------------------

DETACHED = (
    "No gradient reaches the input: the result has left autograd.",
    "Stay with torch operations on tensors; avoid .detach(), .data, .item(), .numpy() and torch.tensor(...) on the way.",
)


def without_gradient(probe: Probe, got: Outcome, wanted: Outcome) -> bool:
    """Recognise right results, of a network of the right size, from which some gradient is missing."""
    names = [name for name in wanted.values if name.startswith("result") or name == "number of parameters"]
    return got.detached and all(close(got.values.get(name), wanted.values[name]) for name in names)


# ----- a test to be written, and numbers to be read ---------------------------------------------------------


def specimen_probes(
    name: str, right: Sequence[Candidate], wrong: Sequence[Candidate], generator: torch.Generator
) -> list[Probe]:
    """Make the probes of a "grade this" task: implementations, as source text, for the learner's test to judge.

    A test that rejects a right implementation is worth nothing; each wrong one that it catches counts.
    """

    def probe(function: Candidate, number: int, is_right: bool) -> Probe:
        title = f"{'a right' if is_right else 'a wrong'} implementation, number {number}"
        # Under the name that the task gives it: its own name tells whether it is right.
        text = getsource(function).replace(f"def {function.__name__}(", f"def {name}(")
        args = {name: Source(text, name)}
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


def known_answer(
    answers: Mapping[str, float],
    question: str,
    value: float,
    fault_id: str,
    does: str,
    todo: str,
    reread: str,
) -> Fault:
    """Make the fault of one wrong value among otherwise right answers; recognise it whatever the others are."""
    form = {**answers, question: value}.get
    return Fault(fault_id, does, todo, reread, implementations=[form], sign=wrong_answer(question, value))


def verdict_faults(reread: str) -> list[Fault]:
    """Return the two mistakes of a test that does not look at all: it accepts, or rejects, everything."""
    return [
        Fault(
            "test-accepts-everything",
            "Your test accepts every implementation, the wrong ones too.",
            "Return False, or raise AssertionError, when a value is not the one that you worked out by hand.",
            reread,
            implementations=[lambda implementation: True],
        ),
        Fault(
            "test-rejects-everything",
            "Your test rejects every implementation, the right ones too.",
            "Check the value that you expect on paper, allow a difference of about 1e-5, and return True at the end.",
            reread,
            implementations=[lambda implementation: False],
        ),
    ]
