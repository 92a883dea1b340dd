"""The report on a class: invented students, real mistakes, and the sentences that the judge really says."""

import csv
import json
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from assignment import answer_cells, define, items, read
from booksite import browser as chromium_tools
from bs4 import BeautifulSoup
from playwright.sync_api import Browser

from dianlib.checks import grade, tasks
from dianlib.checks.judging import where
from dianlib.cli import main
from dianlib.grading.records import Flag, Record, TaskRecord, write
from dianlib.grading.report import ClassView, write_report

Captured = pytest.CaptureFixture[str]

# ----- a class ---------------------------------------------------------------------------------------------

# What students hand in besides right answers and stubs, the most frequent first. Most of the mistakes are
# known to the checks; some are not.
WRONG = {
    "mlp.linear": [
        """
def linear(x, weight, bias):
    return x @ weight + bias
""",
        """
def linear(x, weight, bias):
    return torch.matmul(x, weight) + bias  # matrix times matrix
""",
        """
def linear(x, weight, bias):
    return x @ weight.T
""",
        """
def linear(x, weight, bias):
    return (x @ weight.T + bias).detach()
""",
    ],
    "mlp.relu": [
        """
def relu(x):
    return torch.relu(x)
""",
        """
def relu(x):
    x[x < 0] = 0
    return x
""",
        """
def relu(x):
    return x.abs()
""",
        """
def relu(x):
    return torch.where(x > 0, x, 0.01 * x)
""",
        """
def relu(x):
    return torch.clamp(x, 0, 6)
""",
    ],
    "mlp.softmax": [
        """
def softmax(logits):
    return logits.exp() / logits.exp().sum(dim=1, keepdim=True)
""",
        """
def softmax(logits):
    e = torch.exp(logits)
    return e / torch.sum(e, dim=1, keepdim=True)
""",
        """
def softmax(logits):
    shifted = logits - logits.max()
    e = shifted.exp()
    return e / e.sum(dim=1, keepdim=True)
""",
        """
def softmax(logits):
    e = (logits - logits.max(dim=0).values).exp()
    return e / e.sum(dim=0)
""",
        """
def softmax(logits):
    e = (logits - logits.max(dim=1, keepdim=True).values).exp()
    return e / e.max()
""",
    ],
    "mlp.cross_entropy": [
        """
def cross_entropy(logits, targets):
    p = softmax(logits)
    return -torch.log(p[torch.arange(len(targets)), targets]).mean()
""",
        """
def cross_entropy(logits, targets):
    probabilities = softmax(logits)
    total = 0
    for row, target in zip(probabilities, targets):
        total = total - torch.log(row[target])
    return total / len(targets)
""",
        """
def cross_entropy(logits, targets):
    shifted = logits - logits.max(dim=1, keepdim=True).values
    logs = shifted - shifted.exp().sum(dim=1, keepdim=True).log()
    return -logs[torch.arange(len(targets)), targets].sum()
""",
        """
def cross_entropy(logits, targets):
    shifted = logits - logits.max(dim=1, keepdim=True).values
    logs = shifted - shifted.exp().sum(dim=1, keepdim=True).log()
    return logs[torch.arange(len(targets)), targets].mean()
""",
        """
def cross_entropy(logits, targets):
    shifted = logits - logits.max(dim=1, keepdim=True).values
    logs = shifted - shifted.exp().sum(dim=1, keepdim=True).log()
    return -logs[:, targets].mean()
""",
    ],
    "mlp.cross_entropy_gradient": [
        """
def cross_entropy_gradient(logits, targets):
    gradient = softmax(logits)
    gradient[torch.arange(len(targets)), targets] -= 1
    return gradient
""",
        """
def cross_entropy_gradient(logits, targets):
    one_hot = torch.zeros_like(logits)
    one_hot[torch.arange(len(targets)), targets] = 1
    return softmax(logits) - one_hot
""",
        """
def cross_entropy_gradient(logits, targets):
    one_hot = torch.zeros_like(logits)
    one_hot[torch.arange(len(targets)), targets] = 1
    return (one_hot - softmax(logits)) / len(targets)
""",
        """
def cross_entropy_gradient(logits, targets):
    return softmax(logits) / len(targets)
""",
    ],
    "mlp.MLP": [
        """
class MLP(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, x):
        for layer in self.layers:
            x = relu(layer(x))
        return x
""",
        """
class MLP(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = relu(layer(x))
        return softmax(self.layers[-1](x))
""",
        """
class MLP(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = relu(layer(x))
        return self.layers[-1](x)
""",
        """
class MLP(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.net = nn.Sequential(*[nn.Linear(a, b) for a, b in pairwise(sizes)])

    def forward(self, x):
        return self.net(x)
""",
    ],
    "mlp.sgd_step": [
        """
def sgd_step(parameters, lr):
    for p in parameters:
        p = p - lr * p.grad
""",
        """
def sgd_step(parameters, lr):
    with torch.no_grad():
        for p in parameters:
            p -= lr * p.grad
""",
        """
def sgd_step(parameters, lr):
    for p in parameters:
        p -= lr * p.grad
""",
        """
def sgd_step(parameters, lr):
    with torch.no_grad():
        for p in parameters:
            if p.grad is not None:
                p += lr * p.grad
""",
    ],
    "mlp.train_epoch": [
        """
def train_epoch(model, batches, optimizer, loss_fn):
    model.train()
    losses = []
    for inputs, targets in batches:
        optimizer.zero_grad()
        loss = loss_fn(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)
""",
        """
def train_epoch(model, batches, optimizer, loss_fn):
    model.train()
    total, n = 0.0, 0
    for inputs, targets in batches:
        loss = loss_fn(model(inputs), targets)
        loss.backward()
        optimizer.step()
        total += loss.item() * len(inputs)
        n += len(inputs)
    return total / n
""",
        """
def train_epoch(model, batches, optimizer, loss_fn):
    model.train()
    for inputs, targets in batches:
        optimizer.zero_grad()
        loss = loss_fn(model(inputs), targets)
        loss.backward()
        optimizer.step()
    return loss.item()
""",
    ],
    "mlp.grade_this": [
        """
def examine(softmax):
    p = softmax(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    return bool(torch.allclose(p.sum(dim=1), torch.ones(2)))
""",
        """
def examine(softmax):
    wanted = torch.tensor([0.0900, 0.2447, 0.6652])
    return torch.allclose(softmax(torch.tensor([1.0, 2.0, 3.0])), wanted, atol=1e-3)
""",
        """
def examine(softmax):
    return True
""",
    ],
    "mlp.read_logs": [
        """
answers = {'constant answer': 0.1135, 'nan on mnist': 0.098, 'floor for 100 classes': 3.6217,
           'first loss': math.log2(10), 'steps': 93_800, 'parameters': 135_680}
""",
        """
answers = {'constant answer': 0.1, 'nan on mnist': 0.1, 'floor for 100 classes': 1.4612,
           'first loss': 2.3026, 'steps': 93_750, 'parameters': 136_074}
""",
        """
answers = {'constant answer': 0.1135, 'nan on mnist': 0.098, 'floor for 100 classes': 3.6217,
           'first loss': 2.3026, 'steps': 93_700, 'parameters': 136_074}
""",
    ],
}

FLAGS = [
    Flag("timeout", "Task mlp.train_epoch was stopped after 10 seconds."),
    Flag("locked-cell-edited", "The check of mlp.softmax was edited; the one of the release was used."),
    Flag("order", "The cells stand in another order than in the release."),
]


@cache
def right_answers() -> dict[str, str]:
    """The solution of each task, as students would have written it."""
    marks = re.compile(r"^ *### (BEGIN|END) SOLUTION\n?", re.MULTILINE)
    return {item.task: marks.sub("", item.answer.source) for item in items(read("solutions", "mlp"))}


@cache
def graded(task: str, answer: str) -> TaskRecord:
    """Judge an answer as it is, among the right answers to the other tasks."""
    candidate = next(item.candidate for item in items(read("solutions", "mlp")) if item.task == task)
    sources = [cell.source for cell in answer_cells(read("solutions", "mlp"))]
    report = grade(task, define([*sources, answer])[candidate])
    states = {"does the work": "refused", "still the stub": "stub", "right, ": "right"}
    state = next((state for words, state in states.items() if words in report.message), "wrong")
    return TaskRecord(
        cell=f"{task}-check",
        task=task,
        notebook="mlp",
        points=report.points,
        max_points=report.max_points,
        score=report.score,
        diagnosis=report.diagnosis,
        message=report.message,
        answer=answer,
        state=state,
    )


def record(student: str, *answers: TaskRecord, **changed: Any) -> Record:
    finished = "2026-03-05T07:41:09+00:00"
    made = Record("mlp", student, "graded", "", "0" * 64, "00", finished, 1.2, (), answers)
    return replace(made, **changed)


def failed(student: str) -> Record:
    reason = "mlp.ipynb is not valid JSON; ask for it again."
    return record(student, status="failed", reason=reason, flags=(Flag("unreadable", reason),))


def a_class(size: int) -> list[Record]:
    """Invent students: some know more than others, some give up, a few submissions cannot be read."""
    draw = random.Random(0)
    students = []
    for number in range(size):
        name = f"surname{number:03}"
        ability, gives_up_at = draw.betavariate(1.5, 0.7), draw.choice([10, 10, 10, 10, 9, 8, 6])
        answers = []
        for position, item in enumerate(items(read("solutions", "mlp"))):
            if position >= gives_up_at:
                answer = f"{item.candidate} = {{}}"
                if item.candidate != "answers":
                    answer = f"def {item.candidate}(*_):\n    raise NotImplementedError"
            elif draw.random() < ability - 0.035 * position:
                answer = right_answers()[item.task]
            else:
                wrong = WRONG[item.task]
                answer = draw.choices(wrong, weights=range(len(wrong), 0, -1))[0]
            answers.append(graded(item.task, answer))
        flags = (draw.choice(FLAGS),) if draw.random() < 0.12 else ()
        students.append(failed(name) if draw.random() < 0.05 else record(name, *answers, flags=flags))
    return students


@pytest.fixture(scope="module")
def students() -> list[Record]:
    return a_class(40)


@pytest.fixture(scope="module")
def reported(students: list[Record], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the report on the class."""
    return write_report(students, tmp_path_factory.mktemp("report"), book="https://example.org/dian/").parent


def soup(folder: Path) -> BeautifulSoup:
    return BeautifulSoup((folder / "index.html").read_text("utf8"), "html.parser")


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf8", newline="") as stream:
        return list(csv.DictReader(stream))


def words(tag: Any) -> str:
    return " ".join(tag.get_text(" ").split())


# ----- what is counted -------------------------------------------------------------------------------------


def test_the_headline_counts_the_class(students: list[Record], reported: Path) -> None:
    counted = {dt.string: int(dt.find_next("dd").string) for dt in soup(reported).select(".counts dt")}
    assert counted == {
        "graded": sum(student.status == "graded" for student in students),
        "flagged": sum(bool(student.flags) for student in students),
        "failed": sum(student.status == "failed" for student in students),
    }
    points = [sum(task.points for task in student.tasks) for student in students if student.tasks]
    low, middle, high = (f"{q:.1f}".removesuffix(".0") for q in np.percentile(points, [25, 50, 75]))
    text = words(soup(reported).main)
    assert f"Median {middle} of 26 points. The middle half of the class has {low} to {high}." in text


def test_the_histogram_and_its_table_hold_everybody(students: list[Record], reported: Path) -> None:
    figure = soup(reported).figure
    n_graded = sum(student.status == "graded" for student in students)
    shown = [int(cell.string) for cell in figure.select("td[data-label=Students]")]
    assert sum(shown) == n_graded
    assert [int(label.string) for label in figure.select("text.count")] == [n for n in shown if n]
    image = figure.svg
    assert image["role"] == "img"
    assert all(figure.find(id=name).string.strip() for name in image["aria-labelledby"].split())


@pytest.mark.parametrize("maximum", [0.3, 1, 7, 26, 100, 1234.5])
def test_full_marks_stand_in_the_last_bar_and_none_in_the_first(maximum: float) -> None:
    task = replace(graded("mlp.relu", right_answers()["mlp.relu"]), points=maximum, max_points=maximum)
    view = ClassView([record("a", task), record("b", replace(task, points=0.0, score=0.0))])
    assert 5 <= len(view.histogram) <= 15
    assert [bar.students for bar in view.histogram if bar.students] == [1, 1]
    assert (view.histogram[0].students, view.histogram[-1].students) == (1, 1)
    assert (view.histogram[0].low, view.histogram[-1].high) == (0, maximum)


def test_mistakes_are_counted_by_student_and_sorted(students: list[Record]) -> None:
    expected = Counter(
        chain.from_iterable(
            {name for task in student.tasks for name in task.diagnosis} for student in students
        )
    )
    view = ClassView(students)
    assert {mistake.id: mistake.students for mistake in view.mistakes} == expected
    counts = [mistake.students for mistake in view.mistakes]
    assert counts == sorted(counts, reverse=True)
    assert max(counts) > 5
    twice = next(mistake for mistake in view.mistakes if mistake.id == "softmax-no-max-shift")
    assert set(twice.tasks) == {"mlp.softmax", "mlp.cross_entropy"}
    assert sum(twice.tasks.values()) > twice.students


def test_every_mistake_of_the_bank_is_shown_with_its_own_sentences() -> None:
    """The sentences are read out of the reports, so the two have to keep to one format."""
    for task in tasks().values():
        for fault in task.mistakes:
            report = grade(task.id, task.forms(fault)[0])
            found = TaskRecord("", task.id, "", 0.0, 1.0, 0.0, report.diagnosis, report.message, "", "wrong")
            (mistake,) = ClassView([record("a", found)]).mistakes
            (form,) = mistake.forms
            assert (mistake.id, form.does, form.todo) == (fault.id, fault.does, fault.todo)
            assert f'"{form.heading}", {form.address}' == where(fault)


def test_words_of_an_answer_do_not_pass_for_the_judges() -> None:
    """An exception's text stands in the report, before what the judge says."""
    found = graded("mlp.relu", WRONG["mlp.relu"][1])
    (name,) = found.diagnosis
    forged = f'  [{name}] Lies.\n  What to do: Lie.\n  Reread: "Lies", book/lies.html#lies\n'
    first, rest = found.message.split("\n", 1)
    (mistake,) = ClassView([record("a", replace(found, message=f"{first}\n{forged}{rest}"))]).mistakes
    assert mistake.forms[0].does == next(f.does for f in tasks()["mlp.relu"].mistakes if f.id == name)


def test_links_lead_into_the_book(reported: Path) -> None:
    links = [a["href"] for a in soup(reported).find_all("a") if not a["href"].startswith("#")]
    assert links
    assert all(re.fullmatch(r"https://example\.org/dian/book/mlp\.html#[a-z0-9-]+", link) for link in links)


def test_tasks_are_counted_by_outcome(students: list[Record], reported: Path) -> None:
    names = [item.task for item in items(read("solutions", "mlp"))]
    view = ClassView(students)
    assert [task.task for task in view.tasks] == names
    for task in view.tasks:
        found = [t for student in students for t in student.tasks if t.task == task.task]
        assert task.mean == pytest.approx(np.mean([t.score for t in found]))
        assert task.answers == len(found)
        for state, outcome in (("right", "right"), ("stub", "not begun"), ("refused", "refused")):
            assert task.outcomes.get(outcome, 0) == sum(t.state == state for t in found)
        assert sum(width for _, _, width in task.segments) == pytest.approx(100)
    assert {"right", "partly right", "wrong", "not begun", "refused"} <= set(view.outcomes)
    n_right, n_answers = view.tasks[0].outcomes["right"], view.tasks[0].answers
    assert f"{n_right} right ({n_right / n_answers:.0%})" in words(soup(reported).find(id="tasks").parent)


def test_an_undefined_name_is_not_begun_and_a_limit_is_named() -> None:
    answer = replace(graded("mlp.relu", WRONG["mlp.relu"][1]), diagnosis=())
    view = ClassView(
        [record("a", replace(answer, state="missing")), record("b", replace(answer, state="limit"))]
    )
    assert view.tasks[0].outcomes == {"not begun": 1, "over a limit": 1}
    assert view.unrecognised == []


def test_discrimination_is_the_correlation_with_the_rest(students: list[Record]) -> None:
    found = [student for student in students if student.tasks]
    points = np.array([[task.points for task in student.tasks] for student in found])
    scores = np.array([[task.score for task in student.tasks] for student in found])
    for number, task in enumerate(ClassView(students).tasks):
        rest = points.sum(axis=1) - points[:, number]
        assert task.correlation == pytest.approx(np.corrcoef(scores[:, number], rest)[0, 1])


@pytest.mark.parametrize(
    ("solved_by", "concern"),
    [
        (lambda rank: rank != 12, "too easy"),
        (lambda rank: rank == 16, "too hard"),
        (lambda rank: rank < 15, "do worse here"),
        (lambda rank: rank % 2, "little to do"),
        (lambda rank: rank >= 15, ""),
    ],
)
def test_a_task_that_discriminates_badly_is_listed_with_the_reason(
    solved_by: Callable[[int], bool], concern: str, tmp_path: Path
) -> None:
    """Thirty students, whose rank is their number of points in the other task."""
    answer = graded("mlp.relu", right_answers()["mlp.relu"])
    class_ = [
        record(
            f"student {rank}",
            replace(answer, score=float(solved_by(rank)), points=float(solved_by(rank))),
            replace(answer, task="another", points=float(rank)),
        )
        for rank in range(30)
    ]
    found = ClassView(class_).tasks[0].concern
    assert concern in found
    assert bool(concern) == bool(found)
    text = words(soup(write_report(class_, tmp_path).parent))
    assert ("Tasks that tell little" in text) == bool(concern)


def test_few_students_or_equal_scores_show_no_discrimination(students: list[Record], tmp_path: Path) -> None:
    few = [student for student in students if student.tasks][:14]
    assert {task.correlation for task in ClassView(few).tasks} == {None}
    text = words(soup(write_report(few, tmp_path).parent))
    assert "It needs at least 15 graded submissions; there are 14." in text
    alike = ClassView([replace(few[0], student=str(number)) for number in range(20)])
    assert {task.correlation for task in alike.tasks} == {None}


def test_mistakes_that_come_together() -> None:
    """Six of twenty make both; one more makes only one of them, and everybody makes the third."""
    both = [graded("mlp.linear", WRONG["mlp.linear"][2]), graded("mlp.sgd_step", WRONG["mlp.sgd_step"][3])]
    everybodys = graded("mlp.MLP", WRONG["mlp.MLP"][0])
    class_ = [record(f"a{n}", *both, everybodys) for n in range(6)]
    class_ += [record("b", both[0], everybodys), *(record(f"c{n}", everybodys) for n in range(13))]
    (pair,) = ClassView(class_).together
    assert {pair.first.id, pair.second.id} == {"linear-bias-missing", "sgd-uphill"}
    assert (pair.students, pair.by_chance) == (6, pytest.approx(7 * 6 / 20))


# ----- examples and exports --------------------------------------------------------------------------------


def shown_answers(answers: list[str], task: str = "mlp.relu", students: list[str] | None = None) -> list[str]:
    """Return the examples of a class in which everybody makes the same mistake."""
    found = graded("mlp.relu", WRONG["mlp.relu"][1])
    names = students or [f"surname{number:03}" for number in range(len(answers))]
    class_ = [record(name, replace(found, answer=a)) for name, a in zip(names, answers, strict=True)]
    (mistake,) = ClassView(class_).mistakes
    return list(mistake.examples)


def test_the_two_shortest_different_answers_are_shown() -> None:
    answers = ["x = 1  # long, for its comment", "x =  1", "long_name = 2", "longer_name = 3"]
    assert shown_answers(answers) == ["x = 1", "long_name = 2"]
    assert shown_answers(["x=1", "x = 1"]) == ["x=1"]
    assert shown_answers(["", "# nothing"]) == []


def test_an_answer_with_one_mistake_goes_before_one_with_two() -> None:
    found = graded("mlp.relu", WRONG["mlp.relu"][1])
    two = replace(found, answer="x = 1", diagnosis=(*found.diagnosis, "another"))
    one = [record(f"s{n}", replace(found, answer=f"longer = {n}")) for n in range(2)]
    mistakes = ClassView([record("a", two), *one]).mistakes
    assert mistakes[0].examples == ("longer = 0", "longer = 1")
    assert mistakes[1].examples == ("x = 1",)


def test_nothing_in_an_example_tells_who_wrote_it() -> None:
    private = '''
def relu(x):  # by Maria
    """Maria's own docstring,
    over two lines."""
    "and one more"
    # print("maria")
    key = "public"; print("I, Maria Musterfrau", f'{x} of Maria')
    musterfrau_helper = 'it\\'s # no comment'
    return x.long() + 20261234 - 1000
'''
    other = "def relu(x):\n    return x.long() - 1000 + {'public': 1}['public']"
    first, second = shown_answers([private, other, other], students=["Musterfrau.Long", "s20261234", "1000"])
    # What several students write, "public" and "long" and 1000, tells nothing.
    assert first == other
    assert second.splitlines() == [
        "def relu(x):",
        '    key = "public"; print("…", f\'…\')',
        "    name_helper = '…'",
        "    return x.long() + name - 1000",
    ]


def test_long_answers_and_long_lines_are_cut() -> None:
    (example,) = shown_answers(["\n".join(f"x{n} = {n}" for n in range(20)) + "\ny = '" + 500 * "y" + "'"])
    lines = example.splitlines()
    assert (len(lines), lines[11], lines[12]) == (13, "x11 = 11", "… 9 more lines")
    (example,) = shown_answers(["x = " + "+".join(500 * "y")])
    assert len(example) == 101
    assert example.endswith("…")
    assert shown_answers(["x = 1\n" * 10_000]) == []


HOSTILE = (
    "</code></pre><script>document.title = 'seized'</script><img src=x onerror=alert(1)>{{ 7 * 7 }}"
    "\u202e\u2066reversed\u200b\ufeff\x1b[31mred\x07\x00\ud800\u2028" + 3000 * "w"
)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a report in which every text that a student can choose is hostile."""
    known = graded("mlp.relu", WRONG["mlp.relu"][1])
    message = f'mlp.relu: not right yet.\nFailed: "x". It raised {HOSTILE}\n    in the line "{HOSTILE}"'
    unknown = replace(known, task="another", diagnosis=(), message=message, answer=f"y = 1\n{HOSTILE}")
    answers = (replace(known, answer=f"def relu(x):\n    {HOSTILE}"), unknown)
    flags = tuple(Flag(HOSTILE, HOSTILE) for _ in range(50))
    student = "<b>\u202e\x1b[1m=1"
    class_ = [record(student, *answers, flags=flags), record("c", status="failed", reason=HOSTILE)]
    return write_report(class_, tmp_path_factory.mktemp("hostile")).parent


def test_hostile_text_is_shown_and_does_nothing(hostile: Path) -> None:
    source = (hostile / "index.html").read_text("utf8")
    assert all(letter.isprintable() or letter == "\n" for letter in source)
    assert "7 * 7" in source
    page = soup(hostile)
    assert page.find_all(["script", "img", "iframe", "object", "embed", "link", "base", "form"]) == []
    for tag in page.find_all():
        assert not any(name.startswith("on") for name in tag.attrs), tag
    example = page.find("pre").get_text()
    assert "<script>" in example
    assert r"\u202e\u2066reversed\u200b\ufeff\u001b[31mred\u0007\u0000\ud800" in words(page.main)
    assert len(source) < 100_000


def test_the_page_forbids_everything_but_its_own_style(reported: Path) -> None:
    policy = soup(reported).find("meta", attrs={"http-equiv": "Content-Security-Policy"})["content"]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline';")
    for name in ("src", "srcset", "data", "action", "background"):
        assert soup(reported).find_all(attrs={name: True}) == []
    assert not re.search(r"url\((?!#)|@import", (reported / "index.html").read_text("utf8"))


def test_ids_stand_in_one_place_only(students: list[Record], reported: Path) -> None:
    page = soup(reported)
    names = page.find("details", class_="names")
    shown = {name.get_text() for name in names.find_all("bdi")}
    assert shown == {student.student for student in students if student.flags}
    names.decompose()
    files = [str(page), *(file.read_text("utf8") for file in reported.rglob("*.[cj]s*"))]
    assert len(files) >= 4  # the page, two tables, some answers
    assert not [text for text in files if "surname" in text]


def test_the_names_come_with_what_was_noticed(students: list[Record], reported: Path) -> None:
    names = soup(reported).find("details", class_="names")
    assert "open" not in names.attrs
    shown = {words(row) for row in names.find_all("tr")}
    kinds = Counter()
    for student in students:
        if student.flags:
            (flag,) = student.flags
            assert f"{student.student} {flag.kind} {flag.text}" in shown
            kinds[flag.kind] += 1
        if student.status == "failed":
            assert f"{student.student} {student.reason}" in shown
            kinds["could not be graded"] += 1
    overview = [words(item) for item in names.find_previous("ul").find_all("li")]
    assert sorted(overview) == sorted(f"{count} {kind}" for kind, count in kinds.items())


def test_pseudonyms_are_drawn_anew(students: list[Record], tmp_path: Path) -> None:
    """The same students come in another order each time, so that nothing in the file leads back."""
    orders = []
    for number in range(2):
        written = rows(write_report(students, tmp_path / str(number)).with_name("scores.csv"))
        assert [row["student"] for row in written] == [f"student-{n:02}" for n in range(1, 41)]
        orders.append([row["points"] for row in written])
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_scores_of_everybody(students: list[Record], reported: Path) -> None:
    written = rows(reported / "scores.csv")
    names = [item.task for item in items(read("solutions", "mlp"))]
    assert list(written[0]) == ["student", "status", "flags", "points", "max_points", *names]
    expected = sorted(
        (student.status, *(str(task.points) for task in student.tasks))
        for student in students
        if student.tasks
    )
    found = [(row["status"], *(row[name] for name in names)) for row in written if row["points"]]
    assert sorted(found) == expected
    for row in written:
        if row["status"] == "failed":
            assert {row[name] for name in ("points", "max_points", *names)} == {""}
        else:
            assert float(row["points"]) == pytest.approx(sum(float(row[name]) for name in names))
            assert row["max_points"] == "26.0"


def test_mistakes_as_a_table(students: list[Record], reported: Path) -> None:
    written = rows(reported / "mistakes.csv")
    view = ClassView(students)
    assert len(written) == sum(len(mistake.forms) for mistake in view.mistakes)
    first = view.mistakes[0].forms[0]
    assert list(written[0].values()) == [
        view.mistakes[0].id,
        first.task,
        str(first.students),
        str(round(first.students / view.n_graded, 4)),
        first.does,
        first.todo,
        first.address,
    ]


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t=", "\r=", " ="])
def test_no_cell_is_a_formula(start: str, tmp_path: Path) -> None:
    formula = f'{start}HYPERLINK("https://example.org", 1)'
    known = graded("mlp.relu", WRONG["mlp.relu"][1])
    answer = replace(known, task=formula, diagnosis=(formula,))
    folder = write_report([record("a", answer, status="graded")], tmp_path).parent
    for name in ("mistakes.csv", "scores.csv"):
        cells = [cell for row in csv.reader((folder / name).open(newline="")) for cell in row]
        assert any("HYPERLINK" in cell for cell in cells)
        assert not [cell for cell in cells if cell.lstrip()[:1] in tuple("=+-@") or "\t" in cell]


def test_unrecognised_answers_are_grouped_by_what_fails(tmp_path: Path) -> None:
    """Two students with other decimals fail alike; the words of an own exception do not make a group."""
    reports = [
        'Failed: "two rows". Row 0 of the result sums to 1.269, not to 1.\n    x = [1.0]',
        'Failed: "two rows". Row 0 of the result sums to 0.31, not to 1.\n    x = [2.0]',
        'Failed: "two rows". It raised ValueError: by Maria\n    in the line "raise ValueError(by Maria)"',
        'Failed: "two rows". It raised ValueError: by Paul\n    in the line "raise ValueError(by Paul)"',
        'Failed: "two rows". It raised ValueError: math domain error\n    x = [1.0]',
        "The same call gives another answer later: something is kept from an earlier call.",
    ]
    answers = [f"x = {number}" for number in range(6)]
    answers[2:4] = ["x = 2  # by Maria", "x = 3  # by Paul"]
    found = replace(graded("mlp.relu", WRONG["mlp.relu"][1]), diagnosis=())
    class_ = [
        record(answer[4], replace(found, message=f"mlp.relu: not right yet.\n{report}", answer=answer))
        for report, answer in zip(reports, answers, strict=True)
    ]
    (clusters,) = ClassView(class_).unexplained.values()
    assert {cluster.sentence: cluster.students for cluster in clusters} == {
        '"two rows". Row 0 of the result sums to 1.269, not to 1.': 2,
        '"two rows". It raised ValueError': 2,
        '"two rows". It raised ValueError: math domain error': 1,
        reports[5]: 1,
    }
    assert clusters[0].example == "x = 0"
    page = write_report(class_, tmp_path)
    assert "6 wrong answers" in words(soup(tmp_path).find(id="unrecognised").parent)
    lines = (page.parent / "unrecognised" / "mlp.relu.jsonl").read_text("ascii").splitlines()
    exported = [json.loads(line) for line in lines]
    assert [list(line) for line in exported] == 6 * [["task", "message", "answer", "pseudonym"]]
    assert [line["pseudonym"] for line in exported] == [f"student-{n}" for n in range(1, 7)]
    assert {line["answer"] for line in exported} == {f"x = {number}" for number in range(6)}
    assert not [line for line in lines if "Maria" in line or "Paul" in line]


def test_the_export_holds_wrong_answers_without_a_name_for_their_mistake(
    students: list[Record], reported: Path
) -> None:
    expected = Counter(
        task.task
        for student in students
        for task in student.tasks
        if task.state == "wrong" and not task.diagnosis
    )
    assert expected
    found = {
        file.stem: len(file.read_text("utf8").splitlines()) for file in (reported / "unrecognised").iterdir()
    }
    assert found == expected


# ----- the command -----------------------------------------------------------------------------------------


def course(folder: Path, class_: list[Record]) -> str:
    for student in class_:
        write(folder / "records", student)
    return str(folder)


def test_the_command_writes_into_the_course(students: list[Record], tmp_path: Path, capsys: Captured) -> None:
    folder = course(tmp_path, students)
    for number in range(38, 43):  # of whom two have a record
        (tmp_path / "submitted" / f"surname{number:03}" / "mlp").mkdir(parents=True)
    (tmp_path / "submitted" / "surname050" / "metrics").mkdir(parents=True)
    assert main(["report", "mlp", "--course", folder]) == 0
    written = tmp_path / "reports" / "mlp"
    assert capsys.readouterr().out == f"The report is written: {written / 'index.html'}\n"
    assert {file.name for file in written.iterdir()} == {
        "index.html",
        "mistakes.csv",
        "scores.csv",
        "unrecognised",
    }
    assert "not graded yet 3" in words(soup(written).find(class_="counts"))


def test_another_run_leaves_nothing_of_the_one_before(students: list[Record], tmp_path: Path) -> None:
    folder = course(tmp_path, students)
    arguments = ["report", "mlp", "--course", folder, "--output", str(tmp_path / "elsewhere")]
    assert main(arguments) == 0
    assert any((tmp_path / "elsewhere" / "unrecognised").iterdir())
    for student in students:
        write(tmp_path / "records", replace(student, status="failed", reason="No reason.", tasks=()))
    assert main(arguments) == 0
    assert not any((tmp_path / "elsewhere" / "unrecognised").iterdir())
    assert not (tmp_path / "reports").exists()


def test_what_goes_wrong_is_one_sentence(students: list[Record], tmp_path: Path, capsys: Captured) -> None:
    folder = course(tmp_path, students[:1])
    (tmp_path / "file").touch()
    for arguments, expected in [
        (["metrics", "--course", folder], "no records of 'metrics'"),
        (["../mlp", "--course", folder], "no records of '../mlp'"),
        (["mlp", "--course", str(tmp_path / "nowhere")], "no records of 'mlp'"),
        (["mlp", "--course", folder, "--output", str(tmp_path / "file")], "cannot be written"),
        (["mlp", "--course", folder, "--book", "javascript:alert(1)"], "--book takes an address"),
    ]:
        assert main(["report", *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert expected in captured.err
        assert len(captured.err.splitlines()) == 1


def test_one_submission(tmp_path: Path) -> None:
    answers = [graded(task, right_answers()[task]) for task in right_answers()]
    text = words(soup(write_report([record("a", *answers)], tmp_path).parent))
    assert "26 of 26 points for the only graded submission." in text
    assert "No known mistake was recognised" in text
    assert "Every wrong answer has a known cause." in text
    assert "Nothing was flagged, and nothing failed." in text


def test_nothing_could_be_graded(tmp_path: Path) -> None:
    text = words(soup(write_report([failed("a"), failed("b")], tmp_path).parent))
    assert "No submission could be graded" in text
    assert "Mistakes by frequency" not in text
    assert "2 could not be graded" in text
    assert {row["status"] for row in rows(tmp_path / "scores.csv")} == {"failed"}
    assert rows(tmp_path / "mistakes.csv") == []


def test_an_assignment_without_automatic_checks(tmp_path: Path) -> None:
    text = words(soup(write_report([record("a"), record("b")], tmp_path).parent))
    assert "Median 0 of 0 points." in text


def test_a_large_class_is_reported_fast_and_small(tmp_path: Path) -> None:
    """500 students, each with code of their own; the time is that of the processor, whatever else runs."""
    draw = random.Random(0)
    for number, student in enumerate(a_class(500)):
        own = "".join(f"    x{draw.random()} = '{draw.random()}'  # {number}\n" for _ in range(20))
        answers = [replace(task, answer=f"{task.answer}\n{own}") for task in student.tasks]
        write(tmp_path / "records", replace(student, student=f"surname{number:03}", tasks=tuple(answers)))
    code = (
        "import resource, sys; from dianlib.cli import main; main(sys.argv[1:]);"
        "used = resource.getrusage(resource.RUSAGE_SELF); print(used.ru_utime + used.ru_stime, *sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "report", "mlp", "--course", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, *modules = done.stdout.splitlines()[-1].split()
    assert float(seconds) < 2
    assert not {"torch", "numpy", "nbformat"} & {*modules}
    assert (tmp_path / "reports" / "mlp" / "index.html").stat().st_size < 1_000_000


# ----- in a browser ----------------------------------------------------------------------------------------


UNFOLD = "document.querySelectorAll('details').forEach(details => details.open = true)"


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("folder", ["reported", "hostile"])
def test_everybody_can_read_the_page(
    browser: Browser, request: pytest.FixtureRequest, folder: str, scheme: str, width: int
) -> None:
    visit = chromium_tools.Visit(browser, colour_scheme=scheme, width=width)
    said: list[str] = []
    visit.page.on("console", lambda message: said.append(message.text))
    page = visit.open(f"{request.getfixturevalue(folder).as_uri()}/index.html")
    page.evaluate(UNFOLD)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert chromium_tools.axe_violations(page, chromium_tools.ALL_RULES) == []
    assert "what the class gets wrong" in page.title()
    assert visit.left == visit.failed == visit.errors == said == []
    visit.close()


def test_the_page_obeys_the_keyboard(browser: Browser, reported: Path) -> None:
    visit = chromium_tools.Visit(browser)
    page = visit.open(f"{reported.as_uri()}/index.html")
    for _ in range(6):  # four links, the most frequent mistake, the table of points
        page.keyboard.press("Tab")
    focused = "document.activeElement.textContent"
    assert page.evaluate(focused) == "The same as a table"
    assert page.evaluate("document.activeElement.parentElement.open") is False
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.parentElement.open") is True
    visit.close()


def test_a_link_to_a_folded_mistake_unfolds_it(
    browser: Browser, students: list[Record], reported: Path
) -> None:
    visit = chromium_tools.Visit(browser)
    rare = ClassView(students).mistakes[-1]
    page = visit.open(f"{reported.as_uri()}/index.html#mistake-{rare.id}")
    assert page.locator(f"#mistake-{rare.id}").is_visible()
    visit.close()


def test_on_paper_examples_are_shown_and_ids_are_not(browser: Browser, reported: Path) -> None:
    visit = chromium_tools.Visit(browser, colour_scheme="dark")
    page = visit.open(f"{reported.as_uri()}/index.html")
    example, name = page.locator("pre").first, page.locator("bdi").first
    visible = "element => element.checkVisibility({contentVisibilityAuto: true})"
    assert (example.evaluate(visible), name.evaluate(visible)) == (False, False)
    page.emulate_media(media="print", color_scheme="dark")
    assert (example.evaluate(visible), name.evaluate(visible)) == (True, False)
    assert example.bounding_box()["height"] > 20
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    visit.close()
