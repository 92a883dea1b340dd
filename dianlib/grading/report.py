"""What the class gets wrong: a page for the instructor, two tables, and the answers that no mistake explains.

Everything comes from the records, the sentences about mistakes too: they stand in the reports that the
students have read. So nothing here needs torch, and the page says what the students were told.

Names stand in one place of the page only. Everything else, examples and files, is free of student ids, of
comments, of docstrings and of texts that one student alone has written.
"""

import csv
import json
import math
import random
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from dianlib.grading.records import Record, TaskRecord

# Below this number a correlation says more about chance than about a task.
ENOUGH_TO_CORRELATE = 15
LOW_CORRELATION = 0.2

# What became of an answer, the best first. "not begun" is a stub, or a name that was never defined.
OUTCOMES = ("right", "partly right", "wrong", "not begun", "refused", "over a limit")

EXAMPLE_LINES, EXAMPLE_WIDTH = 12, 100
LONGEST_EXAMPLE = 20_000  # characters; nobody discusses a longer answer in a lecture
LONGEST_SENTENCE = 300
MOST_SENTENCES = 8  # different failures of one task that the page shows


def write_report(
    records: Sequence[Record], folder: Path, handed_in: Collection[str] | None = None, book: str = ""
) -> Path:
    """Write the report on one assignment into a folder and return its page.

    ``handed_in`` names the students who handed something in, where that is known; ``book`` is the
    address of the published book, for the links to its paragraphs. There has to be a record.
    """
    view = ClassView(records, handed_in)
    pseudonyms = _pseudonyms(records)
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "index.html"
    page.write_text(_page(view, book), encoding="utf-8")
    _write_csv(folder / "mistakes.csv", _mistake_rows(view))
    _write_csv(folder / "scores.csv", _score_rows(view, pseudonyms))
    _export(view, pseudonyms, folder / "unrecognised")
    return page


# ----- what is counted -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """A mistake as the report of one task describes it, and how many students read that."""

    task: str
    does: str
    todo: str
    heading: str
    address: str
    students: int


@dataclass(frozen=True)
class Mistake:
    """A recognised mistake, with its forms, the most frequent first, and the code of two answers."""

    id: str
    students: int
    forms: tuple[Form, ...]
    examples: tuple[str, ...]

    @property
    def tasks(self) -> dict[str, int]:
        """How many students made it in each task."""
        students: Counter[str] = Counter()
        for form in self.forms:
            students[form.task] += form.students
        return dict(students.most_common())


@dataclass(frozen=True)
class TaskView:
    """How one task went: the mean score, how many answers had each outcome, and how it discriminates.

    ``correlation`` is that of the score with the points of all other tasks, None where it has no meaning.
    """

    task: str
    points: float
    mean: float
    outcomes: dict[str, int]
    correlation: float | None

    @property
    def answers(self) -> int:
        return sum(self.outcomes.values())

    @property
    def segments(self) -> Iterator[tuple[str, float, float]]:
        """Each outcome as a part of a bar: its name, where it begins and how wide it is, in percent."""
        start = 0.0
        for outcome, answers in self.outcomes.items():
            width = 100 * answers / self.answers
            yield outcome, start, width
            start += width

    @property
    def concern(self) -> str:
        """Say why the task does not tell strong from weak students, or "" where it does, or nobody knows."""
        if self.correlation is None or self.correlation >= LOW_CORRELATION:
            return ""
        if self.correlation <= -LOW_CORRELATION:
            return "students who do well in the other tasks do worse here; read the task and its check again."
        if self.mean > 0.9:
            return "too easy to tell: almost everybody has it right."
        if self.mean < 0.1:
            return "too hard to tell: almost nobody has it right."
        return "success here has little to do with success elsewhere; is the statement clear?"


@dataclass(frozen=True)
class Together:
    """Two mistakes in the work of one student: how many have both, and how many would by chance."""

    first: Mistake
    second: Mistake
    students: int
    by_chance: float


@dataclass(frozen=True)
class Unexplained:
    """Wrong answers to one task that fail with the same sentence, and the shortest of them."""

    sentence: str
    students: int
    example: str


@dataclass(frozen=True)
class Bin:
    """One bar of the histogram; the upper end belongs to the next one."""

    low: float
    high: float
    students: int


class ClassView:
    """What the page shows, counted from the records of one assignment."""

    def __init__(self, records: Sequence[Record], handed_in: Collection[str] | None = None) -> None:
        self.records = records
        self.assignment = records[0].assignment
        self.graded = [record for record in records if record.status == "graded"]
        self.failed = [record for record in records if record.status != "graded"]
        self.flagged = [record for record in records if record.flags]
        known = {record.student for record in records}
        self.waiting = None if handed_in is None else len(set(handed_in) - known)
        self.finished = max(record.finished for record in records)[:16].replace("T", " ")
        self._private = _Private(records)

    @property
    def n_graded(self) -> int:
        return len(self.graded)

    # --- points ---

    @cached_property
    def points(self) -> list[float]:
        return [_sum(task.points for task in record.tasks) for record in self.graded]

    @cached_property
    def max_points(self) -> float:
        return max((_sum(task.max_points for task in record.tasks) for record in self.graded), default=0.0)

    @cached_property
    def quartiles(self) -> tuple[float, float, float]:
        """The points that a quarter, a half and three quarters of the class stay at or below."""
        if len(self.points) == 1:
            return self.points[0], self.points[0], self.points[0]
        low, middle, high = statistics.quantiles(self.points, method="inclusive")
        return low, middle, high

    @cached_property
    def histogram(self) -> list[Bin]:
        if not self.max_points:
            return []
        steps = (digit * 10.0**exponent for exponent in range(-2, 9) for digit in (1, 2, 5))
        width = next(step for step in steps if self.max_points / step <= 15)
        n_bins = math.ceil(self.max_points / width - 1e-9)
        found = Counter(min(max(int(points / width + 1e-9), 0), n_bins - 1) for points in self.points)
        return [
            Bin(number * width, min((number + 1) * width, self.max_points), found[number])
            for number in range(n_bins)
        ]

    # --- tasks ---

    @cached_property
    def tasks(self) -> list[TaskView]:
        """All tasks, in the order of the assignment."""
        answers: dict[str, list[tuple[Record, TaskRecord]]] = defaultdict(list)
        # A record of an older release may lack tasks; the longest one knows the order.
        for record in sorted(self.graded, key=lambda record: -len(record.tasks)):
            for task in record.tasks:
                answers[task.task].append((record, task))
        return [self._task(task, found) for task, found in answers.items()]

    @property
    def outcomes(self) -> list[str]:
        """The outcomes that occur, for the legend."""
        return [outcome for outcome in OUTCOMES if any(outcome in task.outcomes for task in self.tasks)]

    def _task(self, name: str, found: list[tuple[Record, TaskRecord]]) -> TaskView:
        scores = [task.score for _, task in found]
        others = [sum(other.points for other in record.tasks) - task.points for record, task in found]
        correlation = None
        if len(found) >= ENOUGH_TO_CORRELATE and len(set(scores)) > 1 and len(set(others)) > 1:
            correlation = statistics.correlation(scores, others)
        outcomes = Counter(_outcome(task) for _, task in found)
        return TaskView(
            name,
            max(task.max_points for _, task in found),
            statistics.fmean(scores),
            {outcome: outcomes[outcome] for outcome in OUTCOMES if outcomes[outcome]},
            correlation,
        )

    # --- mistakes ---

    @cached_property
    def mistakes(self) -> list[Mistake]:
        """All recognised mistakes, the most frequent first."""
        made: dict[str, list[tuple[Record, TaskRecord]]] = defaultdict(list)
        for record in self.graded:
            for task in record.tasks:
                for mistake in task.diagnosis:
                    made[mistake].append((record, task))
        mistakes = [self._mistake(mistake, found) for mistake, found in made.items()]
        return sorted(mistakes, key=lambda mistake: (-mistake.students, mistake.id))

    def _mistake(self, name: str, found: list[tuple[Record, TaskRecord]]) -> Mistake:
        forms = Counter((task.task, *_explained(task.message, name)) for _, task in found)
        return Mistake(
            name,
            len({record.student for record, _ in found}),
            tuple(Form(*words, students) for words, students in forms.most_common()),
            tuple(self._private.examples((task for _, task in found), 2)),
        )

    @cached_property
    def together(self) -> list[Together]:
        """Pairs of mistakes that a tenth of the students make, and twice as many as by chance."""
        sets = [{name for task in record.tasks for name in task.diagnosis} for record in self.graded]
        pairs = Counter(pair for names in sets for pair in combinations(sorted(names), 2))
        known = {mistake.id: mistake for mistake in self.mistakes}
        found = []
        for (first, second), students in pairs.most_common():
            by_chance = known[first].students * known[second].students / self.n_graded
            if students >= max(3, 0.1 * self.n_graded) and students >= 2 * by_chance:
                found.append(Together(known[first], known[second], students, by_chance))
        return found

    @cached_property
    def unrecognised(self) -> list[tuple[Record, TaskRecord]]:
        """Wrong answers that no known mistake explains."""
        return [
            (record, task)
            for record in self.graded
            for task in record.tasks
            if _outcome(task) in ("wrong", "partly right") and not task.diagnosis
        ]

    @cached_property
    def unexplained(self) -> dict[str, list[Unexplained]]:
        """The same, by task and by the sentence that says what failed first."""
        clusters: dict[str, dict[str, list[TaskRecord]]] = {}
        order = [view.task for view in self.tasks]
        for _, task in sorted(self.unrecognised, key=lambda pair: order.index(pair[1].task)):
            sentence = self._private.first_failure(task)
            # Everybody has other inputs, so the same failure comes with other decimals.
            key = re.sub(r"\d+\.\d+(e[+-]?\d+)?", "#", sentence)
            clusters.setdefault(task.task, {}).setdefault(key, []).append(task)
        return {
            name: sorted(
                (
                    Unexplained(
                        self._private.first_failure(found[0]),
                        len(found),
                        "".join(self._private.examples(found, 1)),
                    )
                    for found in by_sentence.values()
                ),
                key=lambda cluster: -cluster.students,
            )
            for name, by_sentence in clusters.items()
        }

    @cached_property
    def flag_kinds(self) -> list[tuple[str, int]]:
        """How many students have each kind of flag."""
        return Counter(
            kind for record in self.records for kind in {flag.kind for flag in record.flags}
        ).most_common()

    def anonymous_answers(self) -> Iterator[tuple[str, str, str, str]]:
        """Yield the student and the task of each unrecognised answer, its message and code without names."""
        for record, task in self.unrecognised:
            yield record.student, task.task, self._private.message(task), self._private.code(task)


def _sum(points: Iterable[float]) -> float:
    return round(math.fsum(points), 2)


def _outcome(task: TaskRecord) -> str:
    match task.state:
        case "stub" | "missing":
            return "not begun"
        case "refused":
            return "refused"
        case "limit":
            return "over a limit"
        case _:
            return "right" if task.score >= 1 else "partly right" if task.score > 0 else "wrong"


# How a report names a mistake: dianlib.checks.judging writes these lines, after everything else.
KNOWN = re.compile(
    r"^  \[(?P<id>[^\]\n]+)\] (?P<does>.+)\n  What to do: (?P<todo>.+)\n"
    r'  Reread: "(?P<heading>.+)", (?P<address>book/[\w-]+\.html#[\w-]+)$',
    re.MULTILINE,
)


def _explained(message: str, mistake: str) -> tuple[str, str, str, str]:
    """Find what a report says about a mistake: what the code does, what to do, the heading, its address."""
    found = [match for match in KNOWN.finditer(message) if match["id"] == mistake]
    if not found:
        return "", "", "", ""
    # An answer can print such lines through the text of its exception, but only before the judge's own.
    return found[-1]["does"], found[-1]["todo"], found[-1]["heading"], found[-1]["address"]


# ----- what nobody else may read ---------------------------------------------------------------------------

# Texts first, so that a # inside of one begins no comment.
TEXT_OR_COMMENT = re.compile(
    r'"""(?P<a>[\s\S]*?)"""'
    r"|'''(?P<b>[\s\S]*?)'''"
    r'|"(?P<c>(?:\\.|[^"\\\n])*)"'
    r"|'(?P<d>(?:\\.|[^'\\\n])*)'"
    r"|#[^\n]*"
)
WORD = re.compile(r"[^\W_]+")
RAISED = re.compile(r"It raised \w+(?P<words>: (?P<first>.+)[\s\S]*?)(?=\n    |\Z)")


class _Private:
    """Takes out of an answer what could tell who wrote it, and keeps what it computes."""

    def __init__(self, records: Sequence[Record]) -> None:
        self._sources: dict[str, list[str]] = defaultdict(list)
        words: Counter[str] = Counter()
        for record in records:
            for task in record.tasks:
                self._sources[task.task].append(task.answer)
            words.update(set(WORD.findall("\n".join(task.answer for task in record.tasks).casefold())))
        parts = {
            part.casefold()
            for record in records
            for part in [*WORD.findall(record.student), *re.findall(r"\d+", record.student)]
        }
        # A word that several students write, such as "long", gives away none of them.
        self._names = {part for part in parts if len(part) > 3 and words[part] < 2}
        self._shared: dict[str, frozenset[str]] = {}

    def without_names(self, text: str) -> str:
        """Put a word in place of every part of a student id."""
        return WORD.sub(lambda word: "name" if word[0].casefold() in self._names else word[0], text)

    def code(self, task: TaskRecord) -> str:
        """Return an answer without anything that tells who wrote it."""
        return self.without_names(self._bare(task))

    def _bare(self, task: TaskRecord) -> str:
        """Return an answer without comments, empty lines, docstrings and texts of one student alone."""
        shared = self._shared_texts(task.task)

        def replace(match: re.Match[str]) -> str:
            if match.lastgroup is None:
                return ""  # a comment
            quote = match[0][0]
            return match[0] if match[match.lastgroup] in shared else f"{quote}…{quote}"

        text = TEXT_OR_COMMENT.sub(replace, task.answer[:LONGEST_EXAMPLE].expandtabs(4))
        lines = [line.rstrip() for line in text.splitlines()]
        kept = [line for line in lines if line and line.strip() not in ('"…"', "'…'")]
        return "\n".join(kept)

    def _shared_texts(self, task: str) -> frozenset[str]:
        """Texts that at least two students wrote: keys of a dictionary, a word of the task."""
        if task not in self._shared:
            count: Counter[str] = Counter()
            for source in self._sources[task]:
                found = TEXT_OR_COMMENT.finditer(source[:LONGEST_EXAMPLE])
                count.update({match[match.lastgroup] for match in found if match.lastgroup in ("c", "d")})
            self._shared[task] = frozenset(text for text, students in count.items() if students > 1)
        return self._shared[task]

    def examples(self, tasks: Iterable[TaskRecord], number: int) -> list[str]:
        """Return the code of the shortest different answers; one with a single mistake shows it best."""
        answers = [(task, self._bare(task)) for task in tasks if len(task.answer) <= LONGEST_EXAMPLE]
        answers.sort(key=lambda pair: (len(pair[0].diagnosis), len(pair[1])))
        different: dict[str, str] = {}
        for _, code in answers:
            different.setdefault(re.sub(r"\s", "", code), code)
        shortest = [code for code in different.values() if code][:number]
        return [_cut(self.without_names(code)) for code in shortest]

    def message(self, task: TaskRecord) -> str:
        """Return a report without the line of code that it quotes and without the student's own words."""
        lines = [line for line in task.message.splitlines() if not line.startswith("    in the line ")]
        text = "\n".join(lines)
        raised = RAISED.search(text)
        if raised and raised["first"] in task.answer:
            text = text[: raised.start("words")] + text[raised.end("words") :]
        return self.without_names(text)

    def first_failure(self, task: TaskRecord) -> str:
        lines = self.message(task).splitlines() or ["The report is empty."]
        failed = next((line for line in lines if line.startswith("Failed: ")), lines[min(1, len(lines) - 1)])
        return failed.removeprefix("Failed: ")[:LONGEST_SENTENCE]


def _cut(code: str) -> str:
    lines = code.splitlines()
    shown = [f"{line[:EXAMPLE_WIDTH]}…" if len(line) > EXAMPLE_WIDTH else line for line in lines]
    if len(lines) > EXAMPLE_LINES:
        shown[EXAMPLE_LINES:] = [f"… {len(lines) - EXAMPLE_LINES} more lines"]
    return "\n".join(shown)


# ----- the files -------------------------------------------------------------------------------------------


def _page(view: ClassView, book: str) -> str:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=_inert, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["count"] = lambda number, noun: f"{number:g} {noun}{'' if number == 1 else 's'}"
    environment.filters["number"] = lambda number: f"{round(number, 1 if number >= 10 else 2):g}"
    environment.filters["percent"] = lambda share: f"{100 * share:.0f}%"
    environment.filters["prose"] = _prose
    template = files("dianlib.grading").joinpath("report.html.j2").read_text("utf-8")
    return environment.from_string(template).render(
        view=view,
        book=book.rstrip("/"),
        enough=ENOUGH_TO_CORRELATE,
        low_correlation=LOW_CORRELATION,
        most_sentences=MOST_SENTENCES,
    )


def _inert(value: Any) -> Any:
    """Show control characters as what they are: some hide text, turn its direction or move a cursor."""
    if not isinstance(value, str) or isinstance(value, Markup) or value.isprintable():
        return value  # Markup is what the template itself has put together
    return "".join(
        letter if letter.isprintable() or letter == "\n" else f"\\u{ord(letter):04x}" for letter in value
    )


def _prose(sentence: str) -> Markup:
    """Set the code in a sentence as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(_inert(sentence)))))


def _cell(value: Any) -> Any:
    """Make a text safe for a spreadsheet, which runs a cell that begins like a formula."""
    text = _inert(value)
    if isinstance(text, str) and text.lstrip().startswith(("=", "+", "-", "@")):
        return f"'{text}"
    return text


def _write_csv(file: Path, rows: Iterable[Sequence[Any]]) -> None:
    with file.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([_cell(value) for value in row] for row in rows)


def _mistake_rows(view: ClassView) -> Iterator[Sequence[Any]]:
    yield "mistake", "task", "students", "share", "does", "todo", "reread"
    for mistake in view.mistakes:
        for form in mistake.forms:
            share = round(form.students / view.n_graded, 4)
            yield mistake.id, form.task, form.students, share, form.does, form.todo, form.address


def _score_rows(view: ClassView, pseudonyms: Mapping[str, str]) -> Iterator[Sequence[Any]]:
    tasks = [task.task for task in view.tasks]
    yield "student", "status", "flags", "points", "max_points", *tasks
    for record in sorted(view.records, key=lambda record: pseudonyms[record.student]):
        points: dict[str, float | str] = dict.fromkeys(["points", "max_points", *tasks], "")
        if record.status == "graded":  # a failed submission has no points, which is not the same as 0
            points |= {task.task: task.points for task in record.tasks}
            points["points"] = _sum(task.points for task in record.tasks)
            points["max_points"] = _sum(task.max_points for task in record.tasks)
        yield pseudonyms[record.student], record.status, len(record.flags), *points.values()


def _export(view: ClassView, pseudonyms: Mapping[str, str], folder: Path) -> None:
    """Write the unrecognised answers to each task into a file of JSON lines."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.jsonl"):
        old.unlink()
    lines: dict[str, list[str]] = defaultdict(list)
    for student, task, message, answer in view.anonymous_answers():
        line = {"task": task, "message": message, "answer": answer, "pseudonym": pseudonyms[student]}
        lines[task].append(json.dumps(line))
    for task, found in lines.items():
        name = re.sub(r"[^\w.-]", "_", task)
        # Sorted by pseudonym: the order of the records would tell who is who.
        found.sort(key=lambda line: str(json.loads(line)["pseudonym"]))
        (folder / f"{name}.jsonl").write_text("\n".join(found) + "\n", encoding="utf-8")


def _pseudonyms(records: Sequence[Record]) -> dict[str, str]:
    """Number the students in an order that is drawn anew for each report."""
    numbers = list(range(1, len(records) + 1))
    random.SystemRandom().shuffle(numbers)
    width = len(str(len(numbers)))
    return {
        record.student: f"student-{number:0{width}}" for record, number in zip(records, numbers, strict=True)
    }
