"""What a student reads after a plausible wrong answer: the sentence has to fit what they did."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dianlib.checks import grade, tasks


def solved(task: str) -> dict[str, Any]:
    """Return the right dictionary of answers of a task whose answer is one."""
    questions = [probe.args["question"] for probe in tasks()[task].probes(torch.Generator())]
    return {question: tasks()[task].reference(question) for question in questions}


def test_a_count_is_right_or_wrong() -> None:
    """The tolerance of floating-point numbers would take 10,049 for 10,048."""
    right = solved("metrics.read_a_table")
    assert grade("metrics.read_a_table", right).passed
    assert grade("metrics.read_a_table", right | {"denominator": 10_048.0, "weight": 4.0}).passed
    for near in (10_047, 10_049):
        assert not grade("metrics.read_a_table", right | {"denominator": near}).passed
    steps = solved("mlp.read_logs") | {"steps": 93_801}
    assert not grade("mlp.read_logs", steps).passed


@pytest.mark.parametrize("huge", [10**400, -(10**5000)], ids=["long", "longer"])
def test_a_number_longer_than_any_float_gets_a_report(huge: int) -> None:
    assert "infinite" in grade("metrics.accuracy", lambda _: huge).message
    report = grade("mlp.read_logs", solved("mlp.read_logs") | {"steps": huge})
    assert report.score == pytest.approx(5 / 6)


def test_an_answer_that_is_missing_is_named() -> None:
    answers = solved("mlp.read_logs") | {"steps": None}
    report = grade("mlp.read_logs", answers)
    assert "There is no answer to this question yet: write a number for the key 'steps'." in report.message
    assert "Cause not recognised" not in report.message
    del answers["steps"]
    assert grade("mlp.read_logs", answers).message == report.message
    nothing = grade("mlp.read_logs", dict.fromkeys(answers))
    assert "This is still the stub: write your answers in place of None." in nothing.message


def test_mistakes_in_different_answers_are_all_named() -> None:
    answers = solved("mlp.read_logs") | {"first loss": math.log2(10), "parameters": 135_680}
    report = grade("mlp.read_logs", answers)
    assert report.diagnosis == ("ce-log-base", "log-biases-forgotten")
    assert "These mistakes are known:" in report.message
    assert "cannot tell them apart" not in report.message


def test_the_stub_of_a_test_is_no_verdict() -> None:
    def examine(_: Any) -> bool:
        raise NotImplementedError

    report = grade("mlp.grade_this", examine)
    assert (report.score, report.diagnosis) == (0.0, ())
    assert "This is still the stub" in report.message


def test_a_test_that_stops_with_an_error_hears_which() -> None:
    def examine(softmax: Any) -> bool:
        return bool(torch.allclose(softmax(torch.tensor([[1.0, 2.0]])), expected))  # type: ignore[name-defined]  # noqa: F821

    report = grade("mlp.grade_this", examine)
    assert report.score == 0.0
    assert (
        "rejects a right implementation. It raised NameError: name 'expected' is not defined"
        in report.message
    )


def test_what_takes_all_points_is_shown_first() -> None:
    """A test of one row without a batch axis rejects right implementations: that is what to mend first."""

    def examine(softmax: Any) -> bool:
        wanted = torch.tensor([0.0900, 0.2447, 0.6652])
        return torch.allclose(softmax(torch.tensor([1.0, 2.0, 3.0])), wanted, atol=1e-3)

    for seed in range(3):
        report = grade("mlp.grade_this", examine, seed)
        assert report.score == 0.0
        assert 'Failed: "a right implementation' in report.message


def test_a_cut_graph_is_explained() -> None:
    def softmax(logits: Tensor) -> Tensor:
        powers = torch.tensor((logits - logits.max(dim=1, keepdim=True).values).exp().tolist())
        return powers / powers.sum(dim=1, keepdim=True)

    report = grade("mlp.softmax", softmax)
    assert report.diagnosis == ("backward-detached",)
    assert "No gradient reaches the input" in report.message


@pytest.mark.parametrize(
    "write_zeros", [lambda x: x.clamp_(min=0), lambda x: x.relu_(), lambda x: x.mul_(x > 0)]
)
def test_changing_x_in_place_is_named(write_zeros: Any) -> None:
    assert grade("mlp.relu", write_zeros).diagnosis == ("relu-in-place",)


@pytest.mark.parametrize("digits", [1, 2])
def test_a_rounded_accuracy_is_named(digits: int) -> None:
    def accuracy(confusion: Tensor) -> float:
        return round(confusion.diagonal().sum().item() / confusion.sum().item(), digits)

    report = grade("metrics.accuracy", accuracy)
    assert not report.passed
    assert report.diagnosis == (("metrics-integer-truncation",) if digits == 2 else ())


def test_a_list_hears_what_to_return() -> None:
    report = grade(
        "metrics.recall", lambda c: [row[i] / max(sum(row), 1) for i, row in enumerate(c.tolist())]
    )
    assert (
        "It returned a list, tuple or dictionary with 2 parts; return a tensor of shape (2,)."
        in report.message
    )


def test_a_step_shows_what_the_parameters_were_and_are() -> None:
    def sgd_step(parameters: Any, lr: float) -> None:
        for parameter in parameters:
            parameter = parameter - lr * (0 if parameter.grad is None else parameter.grad)

    report = grade("mlp.sgd_step", sgd_step)
    assert report.diagnosis == ("sgd-not-in-place",)
    assert "    parameters = [" in report.message
    assert " with gradient [" in report.message
    assert "    your parameters[0] afterwards = [" in report.message


def test_an_interval_beyond_a_share_is_told() -> None:
    report = grade("metrics.wilson_interval", lambda n_correct, n_total, z=1.96: (n_correct, n_total))
    assert "success rates lie between 0 and 1" in report.message
