"""What nbgrader's plain commands use of this package, plugged in through its own traits.

``nbgrader_config.py`` names four parts: SafeExporter reads a submission and grafts it into the release, Judge
runs it in the sandbox and writes the judge's scores where nbgrader reads them, ``before`` and ``after``
stand around each submission. nbgrader itself stays as it is, formgrader's button included.
"""

import atexit
import hashlib
import hmac
import os
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
from filelock import BaseFileLock, Timeout
from nbconvert.exporters import NotebookExporter
from nbformat import NotebookNode
from nbformat.v4 import new_output
from nbgrader.converters.base import NbGraderException
from nbgrader.preprocessors import NbGraderPreprocessor
from nbgrader.utils import is_grade, is_solution, parse_utc, rmtree
from sqlalchemy import Engine, event
from traitlets import Float, Integer

from dianlib.checks import registry
from dianlib.checks.judging import Bench, Report, judge, unusable
from dianlib.checks.task import Task
from dianlib.grading import reading, records, shortcuts
from dianlib.grading.graft import asked, graft, mark
from dianlib.grading.isolation import Limits
from dianlib.grading.records import Flag, Record, TaskRecord
from dianlib.grading.sandbox import Sandbox, SandboxError
from dianlib.grading.session import Answer, Session, Shown, Times

OWN_FILES = ("timestamp.txt", "submission_secret.txt", "user_info.json")
MAX_FILES = 20
LOCK_SECONDS = 900.0


@event.listens_for(Engine, "connect")
def _wait_for_others(connection: Any, _: Any) -> None:
    """Let SQLite wait a minute, not five seconds, while another grader writes to the gradebook."""
    if type(connection).__module__.startswith("sqlite3"):
        connection.execute("PRAGMA busy_timeout = 60000")


# ----- the submission at hand ----------------------------------------------------------------------------


@dataclass
class Work:
    """The submission that this process is grading; nbgrader grades one at a time."""

    course: Path
    assignment: str
    student: str
    folder: Path
    lock: BaseFileLock | None
    submission: str
    began: float = field(default_factory=time.monotonic)
    reason: str = ""
    flags: list[Flag] = field(default_factory=list)
    tasks: list[TaskRecord] = field(default_factory=list)

    @property
    def records(self) -> Path:
        return self.course / "records"

    @property
    def seed(self) -> str:
        return records.seed(self.records, self.assignment, self.student, self.submission)

    def write(self) -> None:
        """Write the record: from now on this submission is done."""
        record = Record(
            assignment=self.assignment,
            student=self.student,
            status="failed" if self.reason else "graded",
            reason=self.reason,
            submission=self.submission,
            seed=self.seed,
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - self.began, 3),
            flags=tuple(dict.fromkeys(self.flags)),
            tasks=tuple(self.tasks),
        )
        records.write(self.records, record)


_work: Work | None = None


def begin(course: Path, assignment: str, student: str, folder: Path) -> Work:
    """Take the lock of a submission, set aside what is not to be copied, and remember what was handed in."""
    global _work
    finish()
    lock = records.lock(course / "records", assignment, student)
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        minutes = f"{LOCK_SECONDS / 60:.0f} minutes"
        raise NbGraderException(f"Another program has been grading {student} for {minutes}.") from None
    flags = list(_set_aside(course, student, assignment, folder))
    records.remove(course / "records", assignment, student)
    _work = Work(course, assignment, student, folder, lock, reading.fingerprint(folder), flags=flags)
    return _work


def finish() -> None:
    """Give the lock of the last submission back."""
    global _work
    if _work is not None and _work.lock is not None:
        _work.lock.release()
    _work = None


def before(assignment: str, student: str, notebooks: Sequence[str], **_: Any) -> None:
    """Stand before nbgrader copies a submission. It has ids with wildcards, so the path tells who it is."""
    folder = Path(notebooks[0]).absolute().parent
    work = begin(Path.cwd(), folder.name, folder.parent.name, folder)
    expected = {f"{name}.ipynb" for name in _released(Path.cwd(), work.assignment)}
    found = {Path(notebook).name for notebook in notebooks}
    if not expected & found:
        missing_notebook(work, expected)


def missing_notebook(work: Work, expected: set[str]) -> None:
    """Record that the notebook of an assignment is not there, and which ones are."""
    there = sorted(path.name for path in work.folder.glob("*.ipynb"))
    wanted = " or ".join(sorted(expected)) or "a notebook"
    work.reason = f"There is no {wanted}; " + (
        f"found: {', '.join(there)}." if there else "nothing is there."
    )
    work.flags.append(Flag("missing-notebook", work.reason))
    work.write()


def after(**_: Any) -> None:
    """Stand after a submission, when all its grades are in the gradebook: write the record."""
    if _work is not None:
        _work.write()
    finish()


def _set_aside(course: Path, student: str, assignment: str, folder: Path) -> Iterator[Flag]:
    """Move out of a submission what nbgrader must not copy: links, pipes, folders, big files."""
    small_files = 0
    for path in sorted(folder.iterdir()):
        status = path.lstat()
        if path.name == "timestamp.txt" and stat.S_ISREG(status.st_mode):
            if _is_time(path):
                continue
            kind, text = (
                "timestamp",
                "timestamp.txt holds no time; it counts as handed in without a time.",
            )
        elif path.suffix == ".ipynb" or (path.name in OWN_FILES and stat.S_ISREG(status.st_mode)):
            continue  # notebooks are read with care later
        elif path.name in (".ipynb_checkpoints", ".DS_Store", "__pycache__"):
            continue  # nbgrader leaves them out
        else:
            is_small_file = stat.S_ISREG(status.st_mode) and status.st_size <= reading.MAX_FILE
            small_files += is_small_file
            if is_small_file and small_files <= MAX_FILES:
                continue
            kind, text = (
                "quarantined",
                f"{path.name!r} was set aside: only a few small files may be handed in.",
            )
        target = course / "quarantine" / student / assignment / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
        path.rename(target)
        yield Flag(kind, text)


def _is_time(path: Path) -> bool:
    try:
        return parse_utc(reading.read_file(path, 1_000).decode().strip()) is not None
    except (reading.Unreadable, ValueError, OverflowError, AttributeError):
        return False


def is_done(course: Path, assignment: str, student: str, folder: Path) -> bool:
    """Tell whether exactly this submission has been graded, or was found to be unreadable."""
    record = records.read(course / "records", assignment, student)
    return record is not None and record.submission == reading.fingerprint(folder)


# ----- the release -----------------------------------------------------------------------------------------


@cache
def _release(path: Path, _: float) -> NotebookNode:
    notebook: NotebookNode = nbformat.read(path, as_version=4)
    return notebook


def _released(course: Path, assignment: str) -> list[str]:
    return sorted(path.stem for path in (course / "exercises" / assignment).glob("*.ipynb"))


def release_notebook(path: Path) -> NotebookNode:
    """Read a released notebook; it is read again when it has changed."""
    try:
        return _release(path, path.stat().st_mtime)
    except FileNotFoundError:
        raise NbGraderException(
            f"There is no {path}: run `nbgrader generate_assignment {path.parent.name}` first."
        ) from None


def tasks_of(notebook: NotebookNode, name: str) -> dict[str, list[tuple[Task, str]]]:
    """Return what each check cell asks for: grade id -> (task, name of the answer)."""
    known = registry.tasks()
    found = {}
    for cell in notebook.cells:
        if cell.cell_type == "code" and is_grade(cell) and not is_solution(cell):
            pairs = asked(cell)
            unknown = [task for task, _ in pairs if task not in known]
            if not pairs or unknown:
                what = (
                    f"the task {unknown[0]!r}, which is not known" if unknown else "no `check(...)` of a task"
                )
                raise NbGraderException(
                    f"{name}: the autograded cell {mark(cell, 'grade_id')!r} holds {what}, so it cannot be "
                    "judged from outside. Call check there, or make it a manually graded cell."
                )
            found[mark(cell, "grade_id")] = [(known[task], answer) for task, answer in pairs]
    return found


# ----- the sandbox of an assignment ------------------------------------------------------------------------

_sandboxes: dict[tuple[str, ...], Sandbox] = {}


def sandbox_for(modules: tuple[str, ...], limits: Limits, channels: int = 1) -> Sandbox:
    """Return the warm sandbox for an assignment's modules, started when it is first needed."""
    if modules not in _sandboxes:
        data = os.environ.get("DIANLIB_DATA")
        sandbox = Sandbox(modules, limits, Path(data) if data and Path(data).is_dir() else None, channels)
        _sandboxes[modules] = sandbox
        atexit.register(sandbox.close)
    return _sandboxes[modules]


# ----- nbgrader's parts ------------------------------------------------------------------------------------


class SafeExporter(NotebookExporter):
    """Reads a submission as data from a stranger and hands on the release with its answers grafted in."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)  # type: ignore[no-untyped-call]
        # nbgrader makes its exporter before it looks at the first submission.
        converter: Any = self.parent
        self._course = Path(converter.coursedir.root)
        try:
            modules = modules_of(self._course, converter.coursedir.assignment_id)
            Judge(parent=converter).sandbox(modules)
        except SandboxError as error:
            self.log.error("%s", error)
            raise NbGraderException(str(error)) from None
        self._take_up(converter)

    def _take_up(self, converter: Any) -> None:
        """Have nbgrader grade again what a killed run left half done, and find ids with wildcards in them."""
        coursedir = converter.coursedir
        if coursedir.student_id == "*":
            for folder in sorted((self._course / "submitted").glob(f"*/{coursedir.assignment_id}")):
                notebooks = [str(path) for path in sorted(folder.glob("*.ipynb"))]
                if notebooks and str(folder) not in converter.assignments:
                    converter.assignments[str(folder)] = notebooks
        for name in converter.assignments:
            folder = Path(name)
            assignment, student = folder.name, folder.parent.name
            graded = self._course / "autograded" / student / assignment
            if graded.exists() and not is_done(self._course, assignment, student, folder):
                try:
                    with records.lock(self._course / "records", assignment, student).acquire(timeout=0):
                        rmtree(str(graded))
                        self.log.warning("%s: grading was not finished, so it is done again.", student)
                except Timeout:
                    self.log.warning("%s: another program is grading this submission.", student)

    def from_filename(self, filename: str, resources: Any = None, **settings: Any) -> Any:
        """Read a submission safely; nbgrader's own, already grafted notebooks are read as always."""
        if _work is None or Path(filename).absolute().parent != _work.folder:
            return super().from_filename(filename, resources=resources, **settings)
        name = Path(filename).stem
        release = release_notebook(self._course / "exercises" / _work.assignment / f"{name}.ipynb")
        try:
            handed_in = reading.read_notebook(Path(filename))
        except reading.Unreadable as reason:
            # Graded as far as possible, which is not at all: the student learns why from the feedback.
            _work.reason = str(reason)
            _work.flags.append(Flag("unreadable", str(reason)))
            handed_in = []
        notebook, flags = graft(release, handed_in)
        if not _work.reason:
            _work.flags += flags
        for flag in flags:
            self.log.warning("%s: %s", _work.student, flag.text)
        resources["metadata"] = {"name": name, "path": str(Path(filename).parent)}
        return self.from_notebook_node(notebook, resources=resources, **settings)  # type: ignore[no-untyped-call]


def modules_of(course: Path, assignment: str) -> tuple[str, ...]:
    """Return the modules of dianlib that the students of an assignment may import."""
    chapters = {
        task.chapter
        for name in _released(course, assignment)
        for pairs in tasks_of(
            release_notebook(course / "exercises" / assignment / f"{name}.ipynb"), name
        ).values()
        for task, _ in pairs
    }
    return registry.open_modules(chapters) if chapters else registry.TOOLS


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

    def sandbox(self, modules: tuple[str, ...], channels: int = 1) -> Sandbox:
        """Return the warm sandbox with the limits that were configured."""
        limits = Limits(memory=self.memory_mb << 20, processes=self.processes, disk=self.disk_mb << 20)
        return sandbox_for(modules, limits, channels)

    def preprocess(self, notebook: NotebookNode, resources: Any) -> tuple[NotebookNode, Any]:
        """Run and judge one notebook."""
        assert _work is not None
        name = resources["nbgrader"]["notebook"]
        course = _work.course
        release = release_notebook(course / "exercises" / _work.assignment / f"{name}.ipynb")
        tasks = tasks_of(release, name)
        times = Times(self.cell_seconds, self.submission_seconds)
        session = Session(self.sandbox(modules_of(course, _work.assignment)), times, _files(_work.folder))
        try:
            self._run(notebook, tasks, session, _work, name)
        finally:
            session.close()
        _work.flags += session.flags
        for flag in session.flags:
            self.log.warning("%s: %s", _work.student, flag.text)
        return notebook, resources

    def _run(
        self,
        notebook: NotebookNode,
        tasks: dict[str, list[tuple[Task, str]]],
        session: Session,
        work: Work,
        name: str,
    ) -> None:
        sources: list[str] = []
        waiting: list[tuple[NotebookNode, str]] = []
        judged: dict[str, tuple[NotebookNode, list[TaskRecord]]] = {}
        answer = ""
        number = 0
        for cell in notebook.cells:
            if cell.cell_type == "code" and is_solution(cell):
                answer = cell.source
            if cell.cell_type != "code":
                continue
            number += 1
            cell.execution_count, cell.outputs = number, []
            grade_id = mark(cell, "grade_id")
            if grade_id in tasks:
                found = self._judge(tasks[grade_id], session, sources, work, name, grade_id, answer)
                judged[grade_id] = (cell, found)
                if any(result.state == "missing" for result in found):
                    waiting.append((cell, answer))
            elif cell.source.strip():
                sources.append(cell.source)
                cell.outputs = _outputs(session.cell(cell.source), number)
        # An answer may stand below its check cell, in a notebook whose cells were moved.
        for cell, answer in waiting:
            grade_id = mark(cell, "grade_id")
            found = self._judge(tasks[grade_id], session, sources, work, name, grade_id, answer)
            judged[grade_id] = (cell, found)
        for cell, found in judged.values():
            work.tasks += found
            _write_points(cell, found, work.reason)

    def _judge(
        self,
        pairs: list[tuple[Task, str]],
        session: Session,
        sources: list[str],
        work: Work,
        notebook: str,
        grade_id: str,
        answer: str,
    ) -> list[TaskRecord]:
        found = []
        for task, name in pairs:
            key = hmac.new(bytes.fromhex(work.seed), task.id.encode(), hashlib.sha256).digest()
            bench = Bench(task, int.from_bytes(key[:7]))
            report, state = _report(task, name, bench, session, sources)
            found.append(
                TaskRecord(
                    cell=grade_id,
                    task=task.id,
                    notebook=notebook,
                    points=report.points,
                    max_points=report.max_points,
                    score=report.score,
                    diagnosis=report.diagnosis,
                    message=report.message,
                    answer=answer,
                    state=state,
                )
            )
        return found


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


def _files(folder: Path) -> dict[str, bytes]:
    """Read the small files that were handed in beside the notebooks."""
    names = [path for path in sorted(folder.iterdir()) if path.name not in OWN_FILES]
    return {
        path.name: reading.read_file(path, reading.MAX_FILE)
        for path in names
        if path.is_file() and path.suffix != ".ipynb" and not fnmatch(path.name, ".*")
    }


def _outputs(shown: Shown, number: int) -> list[NotebookNode]:
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
