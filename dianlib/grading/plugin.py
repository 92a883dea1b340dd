"""What nbgrader's plain commands use of this package, plugged in through its own traits.

``nbgrader_config.py`` names three parts: SafeExporter reads a submission and grafts it into the release,
Judge runs it in the sandbox and writes the judge's points where nbgrader reads them, and ``after`` writes
down that a submission is done. nbgrader itself stays as it is, formgrader's button included.
"""

import atexit
import hashlib
import hmac
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nbconvert.exporters import NotebookExporter
from nbformat import NotebookNode
from nbformat.v4 import new_output
from nbgrader.converters.base import NbGraderException
from nbgrader.exchange.default.exchange import Exchange
from nbgrader.preprocessors import NbGraderPreprocessor
from nbgrader.utils import is_solution, rmtree
from sqlalchemy import Engine, event
from traitlets import Float, Integer, Unicode

from dianlib.checks.judging import Bench, Report, judge, unusable
from dianlib.checks.task import Task
from dianlib.grading import reading, release, shortcuts, work
from dianlib.grading.graft import graft, mark
from dianlib.grading.isolation import Limits
from dianlib.grading.records import Flag, TaskRecord
from dianlib.grading.sandbox import Sandbox, SandboxError
from dianlib.grading.session import Answer, Session, Shown, Times

GRADEBOOK_SECONDS = 60  # that SQLite waits for other programs


@event.listens_for(Engine, "connect")
def _wait_for_others(connection: Any, _: Any) -> None:
    """Let SQLite wait a minute, not five seconds, while another grader writes to the gradebook."""
    if type(connection).__module__.startswith("sqlite3"):
        connection.execute(f"PRAGMA busy_timeout = {GRADEBOOK_SECONDS * 1000}")


# ----- the sandbox of an assignment ------------------------------------------------------------------------
_sandboxes: dict[tuple[tuple[Path, ...], tuple[str, ...]], Sandbox] = {}


def sandbox_for(
    hidden: Sequence[Path], modules: tuple[str, ...], limits: Limits, channels: int, isolation: str
) -> Sandbox:
    """Return the warm sandbox for an assignment's modules, started when it is first needed."""
    key = (tuple(folder.resolve() for folder in hidden), modules)
    if key not in _sandboxes or _sandboxes[key].channels < channels:
        if key in _sandboxes:
            _sandboxes.pop(key).close()
        named = os.environ.get("DIANLIB_DATA")
        data = Path(named) if named and Path(named).is_dir() else None
        _sandboxes[key] = Sandbox(modules, limits, data, channels, hidden, isolation)
    return _sandboxes[key]


@atexit.register
def close_sandboxes() -> None:
    """End the sandboxes that this process has started."""
    while _sandboxes:
        _sandboxes.popitem()[1].close()


# ----- reading ---------------------------------------------------------------------------------------------


class SafeExporter(NotebookExporter):
    """Reads a submission as data from a stranger and hands on the release with its answers grafted in."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)  # type: ignore[no-untyped-call]
        # nbgrader makes its exporter before it looks at the first submission.
        converter: Any = self.parent
        self._course = Path(converter.coursedir.root)
        try:
            modules = release.modules_of(self._course, converter.coursedir.assignment_id)
            Judge(parent=converter).sandbox(self._course, modules)
        except (SandboxError, release.Unusable) as error:
            self.log.error("%s", error)
            raise NbGraderException(str(error)) from None
        self._find_all(converter)
        # nbgrader's hook before a submission will not do: what it raises is lost, and by then the result of
        # an earlier run is gone, on which another program may be at work.
        self._converter = converter
        self._busy: list[str] = []
        self._init_destination = converter.init_destination
        self._convert_notebooks = converter.convert_notebooks
        converter.init_destination = self._begin
        converter.convert_notebooks = self._convert

    def _find_all(self, converter: Any) -> None:
        """Find the submissions anew: nbgrader takes a wildcard in the id of a student for other students."""
        coursedir = converter.coursedir
        submitted, assignment = self._course / "submitted", coursedir.assignment_id
        alone = submitted / coursedir.student_id / assignment
        folders = [alone] if alone.is_dir() else submitted.glob(f"{coursedir.student_id}/{assignment}")
        found = {
            str(folder): sorted(str(path) for path in folder.glob(f"{coursedir.notebook_id}.ipynb"))
            for folder in folders
        }
        converter.assignments = {folder: notebooks for folder, notebooks in found.items() if notebooks}

    def _begin(self, assignment: str, student: str) -> bool:
        """Tell whether a submission is to be graded; if so lock it and look through its files first.

        What a killed run left half done is graded again.
        """
        folder = self._course / "submitted" / student / assignment
        is_done = work.is_done(self._course, assignment, student, folder)
        if is_done and not self._converter.force and not self._init_destination(assignment, student):
            return False
        try:
            at_hand = work.begin(self._course, assignment, student, folder)
        except work.Busy as busy:
            # Not passed on: nbgrader would remove what the other program has made so far.
            self.log.error("%s", busy)
            self._busy.append(str(busy))
            return False
        graded = self._course / "autograded" / student / assignment
        if graded.exists():
            if not is_done:
                self.log.warning("%s: grading was not finished, so it is done again.", student)
            rmtree(str(graded))
        expected = {f"{name}.ipynb" for name in release.notebooks(self._course, assignment)}
        if not any((folder / name).exists() for name in expected):
            at_hand.lacks_notebook(expected)
            raise NbGraderException(at_hand.reason)
        return bool(self._init_destination(assignment, student))

    def _convert(self) -> None:
        """Grade all submissions; the lock of one that failed is given back."""
        try:
            self._convert_notebooks()
        finally:
            work.finish()
        if self._busy:
            raise NbGraderException(" ".join(self._busy))

    def from_filename(self, filename: str, resources: Any = None, **settings: Any) -> Any:
        """Read a submission safely; the notebook that was made of it is read as always."""
        at_hand = work.current()
        assert at_hand is not None
        if Path(filename).absolute().parent != at_hand.folder:
            return super().from_filename(filename, resources=resources, **settings)
        name = Path(filename).stem
        try:
            handed_in = reading.read_notebook(Path(filename))
        except reading.Unreadable as reason:
            # Graded as far as possible, which is not at all: the feedback tells the student why.
            at_hand.reason = str(reason)
            at_hand.flags.append(Flag("unreadable", str(reason)))
            handed_in = []
        skeleton = release.notebooks(self._course, at_hand.assignment)[name]
        notebook, flags = graft(skeleton, handed_in)
        at_hand.flags += [] if at_hand.reason else flags
        for flag in at_hand.flags:
            self.log.warning("%s: %s", at_hand.student, flag.text)
        resources["metadata"] = {"name": name, "path": str(Path(filename).parent)}
        return self.from_notebook_node(notebook, resources=resources, **settings)  # type: ignore[no-untyped-call]


def after(**_: Any) -> None:
    """Stand after a submission, when all its grades are in the gradebook: write its record.

    The feedback of an earlier grading goes, for nbgrader would take it for the one that is wanted now.
    """
    at_hand = work.current()
    if at_hand is not None:
        feedback = at_hand.course / "feedback" / at_hand.student / at_hand.assignment
        shutil.rmtree(feedback, ignore_errors=True)
        at_hand.write()
    work.finish()


# ----- judging ---------------------------------------------------------------------------------------------


class Judge(NbGraderPreprocessor):  # type: ignore[misc]
    """Runs a submission's cells in the sandbox, judges its answers here, and writes the points as outputs.

    A check cell gets the report and, as its result, the points: nbgrader's own SaveAutoGrades, feedback and
    formgrader read them from there.
    """

    cell_seconds = Float(30.0, help="How long one cell may run.").tag(config=True)
    submission_seconds = Float(300.0, help="How long one submission may run in all.").tag(config=True)
    memory_mb = Integer(2048, help="Memory for a process of a submission, beside what torch needs.").tag(
        config=True
    )
    processes = Integer(64, help="How many processes and threads a submission may have.").tag(config=True)
    disk_mb = Integer(100, help="How much a submission may write.").tag(config=True)
    isolation = Unicode(
        "namespaces",
        help="How submissions are shut in: 'namespaces', with bubblewrap; or 'landlock', which is weaker, "
        "where the system allows no namespaces.",
    ).tag(config=True)

    def sandbox(self, course: Path, modules: tuple[str, ...], channels: int = 1) -> Sandbox:
        """Return the warm sandbox with the limits that were configured."""
        limits = Limits(memory=self.memory_mb << 20, processes=self.processes, disk=self.disk_mb << 20)
        # Submissions wait in the exchange, which lies among the system's folders.
        hidden = [course, Path(Exchange(config=self.config).root)]
        return sandbox_for(hidden, modules, limits, channels, self.isolation)

    def preprocess(self, notebook: NotebookNode, resources: Any) -> tuple[NotebookNode, Any]:
        """Run and judge one notebook."""
        at_hand = work.current()
        assert at_hand is not None
        name = resources["nbgrader"]["notebook"]
        tasks = release.tasks_of(release.notebooks(at_hand.course, at_hand.assignment)[name])
        sandbox = self.sandbox(at_hand.course, release.modules_of(at_hand.course, at_hand.assignment))
        times = Times(self.cell_seconds, self.submission_seconds)
        session = Session(sandbox, times, at_hand.files())
        try:
            _Grading(session, at_hand, name).run(notebook, tasks)
        finally:
            session.close()
        at_hand.flags += session.flags
        for flag in session.flags:
            self.log.warning("%s: %s", at_hand.student, flag.text)
        return notebook, resources


class _Grading:
    """Goes through one notebook: runs its cells in order and judges the answers where they are asked for."""

    def __init__(self, session: Session, at_hand: work.Work, notebook: str) -> None:
        self.session = session
        self.work = at_hand
        self.notebook = notebook
        self.sources: list[str] = []

    def run(self, notebook: NotebookNode, tasks: dict[str, list[tuple[Task, str]]]) -> None:
        """Run and judge all cells, and write what they showed and what they got as their outputs."""
        judged: dict[str, list[TaskRecord]] = {}
        answers: dict[str, str] = {}
        answer = ""
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        for number, cell in enumerate(code, 1):
            cell.execution_count, cell.outputs = number, []
            grade_id = mark(cell, "grade_id")
            if is_solution(cell):
                answer = cell.source
            if grade_id in tasks:
                answers[grade_id] = answer
                judged[grade_id] = self._judge(tasks[grade_id], grade_id, answer)
            elif cell.source.strip():
                self.sources.append(cell.source)
                cell.outputs = _outputs(self.session.cell(cell.source))
        # In a notebook whose cells were moved, an answer or what it needs may stand below its check cell.
        is_moved = any(flag.kind == "order" for flag in self.work.flags)
        for grade_id, found in judged.items():
            if any(result.state == "missing" or (is_moved and result.state != "right") for result in found):
                again = self._judge(tasks[grade_id], grade_id, answers[grade_id])
                judged[grade_id] = max(found, again, key=_earned)
        for cell in code:
            if mark(cell, "grade_id") in judged:
                found = judged[mark(cell, "grade_id")]
                self.work.tasks += found
                _write_points(cell, found, self.work.reason)
        helpers = [
            code.decode("utf-8", "replace")
            for name, code in self.work.files().items()
            if name.endswith(".py")
        ]
        for sentence in shortcuts.evasions([*self.sources, *helpers]):
            self.session.flag("shortcut", sentence)

    def _judge(self, asked_for: list[tuple[Task, str]], grade_id: str, answer: str) -> list[TaskRecord]:
        found = []
        for task, name in asked_for:
            # The inputs of a task depend on nothing but the seed and the task.
            key = hmac.new(bytes.fromhex(self.work.seed), task.id.encode(), hashlib.sha256).digest()
            bench = Bench(task, int.from_bytes(key[:7]))
            report, state = _report(task, name, bench, self.session, self.sources)
            found.append(
                TaskRecord(
                    cell=grade_id,
                    task=task.id,
                    notebook=self.notebook,
                    points=report.points,
                    max_points=report.max_points,
                    score=report.score,
                    diagnosis=report.diagnosis,
                    message=report.message,
                    answer=answer or _defining(self.sources, name),
                    state=state,
                )
            )
        return found


def _earned(found: list[TaskRecord]) -> tuple[float, bool]:
    """Order two judgements of one cell: by points, and a missing answer comes last."""
    return sum(result.points for result in found), all(result.state != "missing" for result in found)


def _defining(sources: list[str], name: str) -> str:
    """Find the answer of a notebook whose answer cell is gone: the last cell that defines the name."""
    definition = re.compile(rf"^(def|class)\s+{name}\b|^{name}\s*=", re.MULTILINE)
    return next((source for source in reversed(sources) if definition.search(source)), "")


def _report(task: Task, name: str, bench: Bench, session: Session, sources: list[str]) -> tuple[Report, str]:
    """Ask the sandbox for one answer and judge it."""
    answer = session.task(bench, name, task.forbidden)
    if answer.state == "missing":
        message = (
            f"{task.id}: no points yet. The name {name!r} is not defined: did its cell run without an error?"
        )
        return Report(task.id, 0.0, 0.0, task.points, (), message), "missing"
    if answer.state == "unusable":
        return unusable(task, answer.type_name), "wrong"
    if task.forbidden and (found := shortcuts.find(sources, name, task.forbidden)):
        session.flag("shortcut", f"{task.id}: the answer consists of {found[0]}.")
        first = answer.outcomes[0]
        answer.outcomes[0] = replace(first, used=(*first.used, *found))
    report = judge(bench, answer.outcomes)
    return report, _state(report, answer)


def _state(report: Report, answer: Answer) -> str:
    errors = [outcome.error for outcome in answer.outcomes]
    if report.passed:
        return "right"
    if any(outcome.used for outcome in answer.outcomes):
        return "refused"
    if "still the stub" in report.message:
        return "stub"
    return "limit" if errors[0] in ("TimeLimit", "Died") else "wrong"


def _outputs(shown: Shown) -> list[NotebookNode]:
    """Make the outputs of a cell for the notebook that people will see: text and pictures only."""
    outputs = []
    if shown.text:
        outputs.append(new_output("stream", name="stdout", text=shown.text))
    outputs += [new_output("display_data", data=data) for data in shown.shown]
    if shown.error:
        name, text = shown.error
        outputs.append(new_output("error", ename=name, evalue=text, traceback=[text]))
    return outputs


def _write_points(cell: NotebookNode, found: list[TaskRecord], reason: str) -> None:
    """Write the reports and the points where nbgrader looks for them."""
    share = sum(result.score * result.max_points for result in found) / sum(r.max_points for r in found)
    points = round(share * mark(cell, "points"), 2)
    text = f"Nothing could be graded. {reason}" if reason else "\n\n".join(r.message for r in found)
    cell.outputs = [
        new_output("stream", name="stdout", text=text + "\n"),
        new_output("execute_result", data={"text/plain": repr(points)}, execution_count=cell.execution_count),
    ]
