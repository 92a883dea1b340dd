"""Grade a whole class at once: ``dianlib grade ASSIGNMENT``.

nbgrader does the grading, in this process, one submission after the other; here several such processes
are forked after everything was imported once. Killed at any moment, a second run finishes the rest.
"""

import contextlib
import functools
import gc
import glob
import importlib
import logging
import multiprocessing
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import nbgrader.api
from nbgrader.api import Gradebook
from nbgrader.apps import NbGraderAPI
from nbgrader.apps.baseapp import NbGrader
from nbgrader.converters import Autograde
from nbgrader.converters.base import NbGraderException
from nbgrader.coursedir import CourseDirectory
from sqlalchemy.exc import SQLAlchemyError
from tqdm import tqdm
from traitlets.config import Config

from dianlib.grading import plugin, records, release, work
from dianlib.grading.isolation import die_with_parent
from dianlib.grading.records import Record
from dianlib.grading.sandbox import Sandbox, SandboxError


class GradingError(Exception):
    """Grading cannot go on; the text is the sentence that the instructor reads."""


class Course:
    """A course folder with an ``nbgrader_config.py`` that plugs in this package."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.records = self.root / "records"
        if not (self.root / "nbgrader_config.py").is_file():
            raise GradingError(
                f"There is no nbgrader_config.py in {self.root}: run this in the course's folder."
            )
        self.config = self._load()
        if "SafeExporter" not in str(self.config.Autograde.get("exporter_class", "")):
            raise GradingError(
                f"{self.root / 'nbgrader_config.py'} does not plug in the sandbox: take the section "
                '"grading" from the file that comes with the course.'
            )

    def _load(self) -> Config:
        """Load the settings that nbgrader's own commands would load in this folder."""
        app = NbGrader()
        app.log_level = logging.ERROR
        app.raise_config_file_errors = True
        try:
            with contextlib.chdir(self.root):
                app.load_config_file()
            Autograde(
                coursedir=CourseDirectory(config=app.config), config=app.config
            )  # imports what it names
        except Exception as error:
            raise GradingError(
                f"{self.root / 'nbgrader_config.py'} cannot be used: {type(error).__name__}: {error}"
            ) from None
        config: Config = app.config
        return config

    @cached_property
    def api(self) -> NbGraderAPI:
        return NbGraderAPI(CourseDirectory(config=self.config), config=self.config)

    def folder(self, assignment: str, student: str) -> Path:
        """Return where a submission lies."""
        return self.root / "submitted" / student / assignment

    def submitted(self, assignment: str) -> list[str]:
        """List the students who handed something in for an assignment."""
        folders = (self.root / "submitted").glob(f"*/{glob.escape(assignment)}")
        return sorted(folder.parent.name for folder in folders if folder.is_dir())

    def pending(self, assignment: str, force: bool = False) -> list[str]:
        """List the students whose submission, as it is now, has not been graded; with ``force`` all."""
        self._check(assignment)
        return [
            student
            for student in self.submitted(assignment)
            if force or not work.is_done(self.root, assignment, student, self.folder(assignment, student))
        ]

    def _check(self, assignment: str) -> None:
        """Say early and once what would go wrong for each student, or that nobody has handed in."""
        known = sorted(path.name for path in (self.root / "exercises").glob("*") if path.is_dir())
        if assignment not in known:
            raise GradingError(
                f"There is no released assignment {assignment!r}; released are: {', '.join(known) or 'none'}."
            )
        try:
            release.modules_of(self.root, assignment)
            with self._gradebook() as gradebook:
                names = [found.name for found in gradebook.assignments]
        except (NbGraderException, release.Unusable) as error:
            raise GradingError(str(error)) from None
        if assignment not in names:
            raise GradingError(
                f"The gradebook does not know {assignment!r}: "
                f"run `nbgrader generate_assignment {assignment} --force`."
            )
        if not self.submitted(assignment):
            place = self.folder(assignment, "STUDENT") / f"{assignment}.ipynb"
            raise GradingError(f"Nobody has handed in {assignment!r}: submissions belong in {place}.")

    @contextlib.contextmanager
    def _gradebook(self) -> Iterator[Gradebook]:
        """Open the gradebook; raises GradingError when the database cannot be used."""
        coursedir = self.api.coursedir
        try:
            with Gradebook(coursedir.db_url, coursedir.course_id) as gradebook:
                yield gradebook
        except SQLAlchemyError as error:
            reason = str(getattr(error, "orig", None) or error).splitlines()[0]
            if "locked" in reason:
                raise GradingError(
                    "Another program has kept the gradebook locked for a minute: close it, then grade again."
                ) from None
            address = re.sub("//.*@", "//", coursedir.db_url)  # without a password
            raise GradingError(f"The gradebook {address} cannot be used: {reason}.") from None

    def sandbox(self, assignment: str, channels: int = 1) -> Sandbox:
        """Start the sandbox for an assignment before the first submission needs it."""
        try:
            judge = plugin.Judge(config=self.config)
            return judge.sandbox(self.root, release.modules_of(self.root, assignment), channels)
        except (SandboxError, release.Unusable) as error:
            raise GradingError(str(error)) from None

    def add_students(self, students: Sequence[str]) -> None:
        """Put new students into the gradebook, before several processes try to do it at once."""
        with self._gradebook() as gradebook:
            known = {student.id for student in gradebook.students}
            for student in students:
                if student not in known:
                    gradebook.add_student(student)

    def grade(self, assignment: str, student: str) -> Record:
        """Grade one submission in this process, whatever was graded before; return its record.

        Raises GradingError when the fault is not the student's: no sandbox, no gradebook.
        """
        with contextlib.chdir(self.root):
            return self._grade(assignment, student, self.folder(assignment, student))

    def _grade(self, assignment: str, student: str, folder: Path) -> Record:
        said = ""
        try:
            if not any(folder.glob("*.ipynb")):
                expected = {f"{name}.ipynb" for name in release.notebooks(self.root, assignment)}
                work.begin(self.root, assignment, student, folder).lacks_notebook(expected)
                work.finish()
            else:
                records.remove(self.records, assignment, student)
                said = self._autograde(assignment, student)
            record = records.read(self.records, assignment, student)
        except (NbGraderException, work.Busy) as error:
            raise GradingError(str(error)) from None
        finally:
            work.finish()
        if record is None:
            raise GradingError(f"{student}: {said}")
        return record

    def _autograde(self, assignment: str, student: str) -> str:
        """Have nbgrader grade one submission; return the last thing that it complained about."""
        coursedir = self.api.coursedir
        coursedir.assignment_id, coursedir.student_id = assignment, student
        converter = Autograde(coursedir=coursedir, parent=self.api)
        converter.force = True
        # Found by our exporter: nbgrader would take some characters of an id for wildcards.
        converter.init_notebooks = lambda: None
        last = _Last()
        converter.log.addHandler(last)
        try:
            with contextlib.redirect_stderr(None):
                converter.start()
        except NbGraderException as error:
            return last.text or str(error)
        finally:
            converter.log.removeHandler(last)
        return last.text or "nbgrader did not grade it, and gave no reason."


class _Last(logging.Handler):
    """Remembers what the last traceback that was logged says below its last call."""

    text = ""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)

    def emit(self, record: logging.LogRecord) -> None:
        lines = record.getMessage().strip().splitlines()
        if lines and lines[0].startswith("Traceback"):
            last_call = max((n for n, line in enumerate(lines) if line.startswith(" ")), default=0)
            self.text = lines[min(last_call + 1, len(lines) - 1)]


# ----- many at once --------------------------------------------------------------------------------------


@dataclass
class Summary:
    """How a run ended: counts, and a sentence for each submission that has no grade."""

    graded: int = 0
    flagged: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, record: Record) -> None:
        """Count a record."""
        if record.status == "failed":
            self.failed.append((record.student, record.reason))
        else:
            self.graded += 1
            self.flagged += bool(record.flags)

    def __str__(self) -> str:
        lines = [f"{self.graded} graded ({self.flagged} of them flagged), {len(self.failed)} failed"]
        lines += [f"  {student}: {reason}" for student, reason in sorted(self.failed)]
        return "\n".join(lines)


def grade_all(
    course: Course,
    assignment: str,
    jobs: int,
    force: bool = False,
    progress: Callable[[int, int, Summary], None] | None = None,
) -> Summary:
    """Grade all pending submissions in ``jobs`` processes; the results of earlier runs are counted too."""
    began = time.monotonic()
    submitted, pending = course.submitted(assignment), course.pending(assignment, force)
    summary = Summary()
    for student in [student for student in submitted if not student.isprintable()]:
        # No gradebook and no terminal can hold such an id.
        summary.failed.append((ascii(student), "a student id is one line of text: rename its folder."))
    submitted = [student for student in submitted if student.isprintable()]
    pending = [student for student in pending if student.isprintable()]
    for student in sorted(set(submitted) - set(pending)):
        record = records.read(course.records, assignment, student)
        if record is not None:
            summary.add(record)
    if pending:
        jobs = min(jobs, len(pending))
        with ThreadPoolExecutor(1) as beside:
            # A part of torch that loads with the first optimizer. Here it is loaded once, before the workers
            # are forked, and while the sandbox starts.
            loading = beside.submit(importlib.import_module, "torch._dynamo")
            course.sandbox(assignment, jobs)
            loading.result()
        course.add_students(pending)
        for student in pending if force else []:
            records.remove(course.records, assignment, student)  # so that a second run knows what is left
        if progress:
            progress(0, len(pending), summary)
        for done, result in enumerate(_in_processes(course, assignment, pending, jobs), 1):
            if isinstance(result, Record):
                summary.add(result)
            else:
                summary.failed.append(result)
            if progress:
                progress(done, len(pending), summary)
    summary.seconds = time.monotonic() - began
    return summary


class Progress:
    """A bar in the terminal, with the rate and the time that remains; it is silent where nobody looks."""

    def __init__(self) -> None:
        tqdm.monitor_interval = 0  # no thread of its own: processes are forked beside it
        self._bar: tqdm[None] | None = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, done: int, total: int, summary: Summary) -> None:
        if self._bar is None:
            self._bar = tqdm(total=total, unit="submission", disable=None, dynamic_ncols=True)
        self._bar.set_postfix(flagged=summary.flagged, failed=len(summary.failed), refresh=False)
        self._bar.update(done - self._bar.n)


@dataclass
class _Worker:
    number: int
    process: BaseProcess
    connection: Connection
    student: str | None = None


def _in_processes(
    course: Course, assignment: str, students: Sequence[str], jobs: int
) -> Iterator[Record | tuple[str, str]]:
    """Yield the results in the order in which they come. A submission whose worker dies is tried again."""
    waiting = list(reversed(students))
    tried: dict[str, int] = {}
    # Forked, not started anew: torch, nbgrader and the checks are in memory already.
    context = multiprocessing.get_context("fork")
    workers = [_start(context, course, assignment, number, private=False) for number in range(jobs)]
    course.sandbox(assignment).leave()
    try:
        while workers:
            for worker in workers:
                if worker.student is None and waiting:
                    worker.student = waiting.pop()
                    tried[worker.student] = tried.get(worker.student, 0) + 1
                    with contextlib.suppress(BrokenPipeError):
                        worker.connection.send(worker.student)
            for worker in [worker for worker in workers if worker.student is None]:
                # Not by closing the pipe: the workers that were forked later hold copies of its ends.
                with contextlib.suppress(BrokenPipeError):
                    worker.connection.send(None)
                worker.process.join()
                workers.remove(worker)
            if not workers:
                break
            # A dead worker shows by its sentinel, for the same reason.
            ends = set(wait([end for w in workers for end in (w.connection, w.process.sentinel)]))
            for worker in [w for w in workers if ends & {w.connection, w.process.sentinel}]:
                student = worker.student
                assert student is not None
                try:
                    result = worker.connection.recv() if worker.connection.poll() else None
                except (EOFError, OSError):  # it was killed, maybe in the middle of its answer
                    result = None
                if result is not None:
                    worker.student = None
                    yield result
                else:
                    worker.process.join()
                    workers.remove(worker)
                    if tried[student] < 3:
                        waiting.append(student)
                    else:
                        yield student, "the program that graded it was killed three times."
                    if waiting:
                        workers.append(_start(context, course, assignment, worker.number, private=True))
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.join()


def _start(context: ForkContext, course: Course, assignment: str, number: int, private: bool) -> _Worker:
    ours, its = context.Pipe()
    process = context.Process(target=_serve, args=(course, assignment, its, number, private), daemon=True)
    process.start()
    its.close()
    return _Worker(number, process, ours)


def _serve(course: Course, assignment: str, connection: Connection, number: int, private: bool) -> None:
    """Grade what the driver asks for until it has nothing more."""
    die_with_parent()
    gc.freeze()  # what is in memory now stays there: no need to look for garbage in it again and again
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's business
    # nbgrader opens the gradebook seven times a submission, and each new engine compiles all queries anew.
    nbgrader.api.create_engine = functools.cache(nbgrader.api.create_engine)
    if not private:  # else it starts a sandbox of its own: the channel of a dead worker is not to be trusted
        course.sandbox(assignment).use(number)
    while (student := connection.recv()) is not None:
        try:
            result: Record | tuple[str, str] = course.grade(assignment, student)
        except GradingError as error:
            result = (student, str(error))
        except Exception as error:  # a fault of ours costs this submission its grade, and no other
            result = (student, f"grading it failed with {type(error).__name__}: {error}")
        connection.send(result)
    plugin.close_sandboxes()
