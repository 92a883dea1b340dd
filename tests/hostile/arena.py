"""Let a grader meet the corpus: a course in a container, honest students around, and a verdict for each case.

A grader runs as an unprivileged user in a container of its own (processes, files, network, memory limit, time
limit), whatever it protects itself with. What it did is read from outside afterwards.
"""

import hashlib
import json
import os
import re
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bs4 import BeautifulSoup

from dianlib.grading import records
from hostile.build import ASSIGNMENT, FULL, HERE, ROOT, Case, hand_in

NOBODY = 65534
BEFORE, AFTER = "aaa", "zzz"  # honest students, graded before and after
NOTE = "a thought that only an honest student's answer holds"
HONEST = tuple(
    Case(
        *(name, "honest", "An honest student.", "full", FULL, FULL, "yes", frozenset(), (), name, "", True),
        changes=({"do": "answer", "cell": "mlp-essay", "source": f"I would train longer; {NOTE}."},),
    )
    for name in (BEFORE, AFTER)
)
# What nobody should read: where it lies, and the text to look for.
SECRETS = {
    "the instructor's solution": "a note that only the instructor's solution holds",
    "the grader's environment": "a password in the grader's environment",
    "the grader's home": "a key in the grader's home",
    "another student's work": NOTE,
}
HIDDEN = re.compile(r"seed=\d{5}")  # the inputs of the hidden tests


@dataclass(frozen=True)
class Result:
    """What a grader made of a case: the points (None: it was not graded), harm done, and flags."""

    points: float | None
    harm: tuple[str, ...] = ()
    flags: tuple[str, ...] | None = None


def verdict(case: Case, result: Result) -> tuple[str, ...]:
    """Compare what a grader did with what must hold; nothing is wrong with ()."""
    found = []
    if result.points is not None and result.points > case.high:
        found.append("BREACH")
    if case.graded == "yes" and (result.points is None or result.points < case.low):
        found.append("LOST")
    if case.graded == "no" and result.points is not None and result.flags is not None:
        found.append("NOT-REFUSED")
    if result.flags is not None and case.flags and not case.flags & set(result.flags):
        found.append("UNNOTICED")
    return (*found, *result.harm)


# ----- the container -------------------------------------------------------------------------------------


def _closed_parents(*paths: Path) -> list[Path]:
    """Find the folders above some paths that only their owner can enter, such as /root."""
    found = {p for path in paths for p in path.parents if not p.stat().st_mode & 0o001}
    return sorted(p for p in found if not found & set(p.parents))


def _open_to_nobody(paths: Sequence[Path]) -> list[str]:
    """Make a command that goes on as nobody, with the paths in reach."""
    command = ["bwrap", "--dev-bind", "/", "/"]
    for closed in _closed_parents(*paths):
        command += ["--perms", "0755", "--tmpfs", str(closed)]
        for path in paths:
            if closed in path.parents:
                between = [p for p in reversed(path.parents) if closed in p.parents]
                command += [part for p in between for part in ("--perms", "0755", "--dir", str(p))]
                command += ["--ro-bind", str(path), str(path)]
    return [*command, "--", "setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--"]


def container(folder: Path) -> list[str]:
    """Make the command that runs another one in a container: only ``folder`` and its parts can be written."""
    needed = [Path(os.path.realpath(sys.base_prefix)), Path(sys.prefix), ROOT / "dianlib", HERE]
    inside = ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--as-pid-1", "--clearenv"]
    inside += ["--ro-bind", "/usr", "/usr", "--dir", "/etc", "--ro-bind", "/etc/passwd", "/etc/passwd"]
    for name in ("bin", "sbin", "lib", "lib64"):
        inside += ["--symlink", f"usr/{name}", f"/{name}"]
    for name in ("/etc/ld.so.cache", "/etc/alternatives"):
        inside += ["--ro-bind-try", name, name]
    for path in needed:
        inside += ["--ro-bind", str(path), str(path)]
    inside += ["--proc", "/proc", "--dev", "/dev", "--bind", str(folder / "tmp"), "/tmp"]
    inside += ["--bind", str(folder / "home"), "/home/grader", "--bind", str(folder / "course"), "/course"]
    settings = {
        "HOME": "/home/grader",
        "PATH": f"{sys.prefix}/bin:/usr/bin",
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "GRADER_PASSWORD": SECRETS["the grader's environment"],
    }
    inside += [part for name, value in settings.items() for part in ("--setenv", name, value)]
    inside += ["--chdir", "/course", "--"]
    return [*(_open_to_nobody(needed) if os.getuid() == 0 else []), *inside]


def _limits() -> None:
    """Set limits for a whole container, so that a grader without its own cannot take the machine down."""
    for kind, value in (
        (resource.RLIMIT_AS, 9 << 30),
        (resource.RLIMIT_NPROC, 600),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))


# ----- a course ------------------------------------------------------------------------------------------


class Course:
    """A course folder in which submissions can be graded and looked at."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "course"
        self.submitted = self.root / "submitted"

    def set_up(self, config: str) -> None:
        """Make the folder, with settings and the solution, and with things that nobody should read."""
        source = self.root / "solutions" / ASSIGNMENT
        for path in (source, self.submitted, self.folder / "home", self.folder / "tmp"):
            path.mkdir(parents=True)
        (self.root / "nbgrader_config.py").write_text(config)
        (self.folder / "home" / "key.txt").write_text(SECRETS["the grader's home"])
        text = (ROOT / "solutions" / ASSIGNMENT / f"{ASSIGNMENT}.ipynb").read_text()
        first = "### BEGIN SOLUTION\\n"
        note = SECRETS["the instructor's solution"]
        assert first in text
        (source / f"{ASSIGNMENT}.ipynb").write_text(text.replace(first, f"{first}    # {note}\\n", 1))

    def run(self, commands: Sequence[Sequence[str]], seconds: float) -> dict[str, Any]:
        """Run commands in the container and return the keeper's report; with what it planted outside."""
        self._own()
        kept = {path: self._digest(path) for path in self._watched()}
        reading, writing = os.pipe()
        keeper = [sys.executable, "-I", str(HERE / "keeper.py"), str(writing), str(seconds)]
        command = [*container(self.folder), *keeper, json.dumps([list(c) for c in commands])]
        with subprocess.Popen(command, pass_fds=[writing], preexec_fn=_limits) as process:
            os.close(writing)
            with os.fdopen(reading) as pipe:
                text = pipe.read()
            process.wait()
        if not text:
            raise RuntimeError(
                "The container could not be started: bubblewrap and user namespaces are needed."
            )
        report: dict[str, Any] = json.loads(text)
        report["changed"] = [str(path) for path in kept if self._digest(path) != kept[path]]
        return report

    def _own(self) -> None:
        """Give everything to the user that the container runs as."""
        if os.getuid() == 0:
            for path in [self.folder, *self.folder.rglob("*")]:
                os.chown(path, NOBODY, NOBODY, follow_symlinks=False)

    def _watched(self) -> list[Path]:
        """List what grading has no business to change: settings, sources, releases, honest submissions."""
        found = [self.root / "nbgrader_config.py", self.folder / "home" / "key.txt"]
        for part in ("solutions", "exercises", *(f"submitted/{name}" for name in (BEFORE, AFTER))):
            found += [path for path in (self.root / part).rglob("*") if path.is_file()]
        return found

    @staticmethod
    def _digest(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""

    def planted(self) -> list[str]:
        """List the files that a submission has put outside its own folders."""
        found = [path for part in ("home", "tmp") for path in (self.folder / part).rglob("*planted*")]
        for path in self.root.rglob("*planted*"):
            top = path.relative_to(self.root).parts[0]
            if top not in ("submitted", "autograded", "feedback", "quarantine"):
                found.append(path)
        found += (self.folder / "home").rglob("*_config.py")
        return [str(path.relative_to(self.folder)) for path in found]

    def points(self) -> dict[str, dict[str, float]]:
        """Read the gradebook: student -> cell -> points. Empty where there is no gradebook any more."""
        database = self.root / "gradebook.db"
        if not database.is_file():
            return {}
        query = """
            select a.student_id, c.name,
                coalesce(g.manual_score, g.auto_score, 0) + coalesce(g.extra_credit, 0)
            from grade g join submitted_notebook n on g.notebook_id = n.id
            join submitted_assignment a on n.assignment_id = a.id join base_cell c on g.cell_id = c.id
        """
        found: dict[str, dict[str, float]] = {}
        with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
            for student, cell, points in connection.execute(query):
                found.setdefault(student, {})[cell] = points
        return found

    def graded(self, student: str) -> bool:
        """Tell whether the grader came to an end with a submission."""
        return (self.root / "autograded" / student / ASSIGNMENT / f"{ASSIGNMENT}.ipynb").is_file()


# ----- looking at a result -------------------------------------------------------------------------------


def shown(course: Course, student: str) -> tuple[str, str]:
    """Collect what a student can read: the outputs of the cells, and all of the feedback folder."""
    outputs = ""
    notebook = course.root / "autograded" / student / ASSIGNMENT / f"{ASSIGNMENT}.ipynb"
    if notebook.is_file():
        cells = json.loads(notebook.read_text()).get("cells", [])
        outputs = "\n".join(str(cell.get("outputs", "")) for cell in cells)
    folder = course.root / "feedback" / student / ASSIGNMENT
    files = [path for path in folder.rglob("*") if path.is_file()]
    return outputs, "\n".join(path.read_bytes().decode(errors="replace") for path in files)


def active(page: str, honest: str) -> list[str]:
    """List what a browser would run, load or submit in a page and does not in an honest student's."""
    return sorted(_active(page) - _active(honest)) if page else []


@cache
def _active(page: str) -> frozenset[str]:
    return frozenset(_active_parts(page))


def _active_parts(page: str) -> Iterator[str]:
    parsed = BeautifulSoup(page, "html.parser")
    for element in parsed.find_all(True):
        if element.name in ("script", "iframe", "object", "embed", "form", "base", "meta", "style", "link"):
            yield f"<{element.name}> {element.get_text()} {sorted(element.attrs.items())}"[:3000]
        for name, value in element.attrs.items():
            address = re.sub(r"[\s\x00-\x1f]", "", str(value)).lower()
            if name.startswith("on") or (
                name in ("href", "src", "xlink:href", "action", "formaction", "srcdoc", "data")
                and address.startswith(("javascript:", "vbscript:", "data:text", "data:image/svg"))
            ):
                yield f"<{element.name} {name}={str(value)[:100]}>"
            elif name == "src" and address.startswith(("http:", "https:", "//")) and element.name != "script":
                yield f"<{element.name} loads {address[:100]}>"


def look(case: Case, course: Course, report: dict[str, Any]) -> Result:
    """Find out what nbgrader alone made of a case, in a course where it is the only one."""
    points = round(sum(course.points().get(case.student, {}).values()), 2)
    harm = (*harm_to_course(course, report), *harm_in_output(case, course))
    return Result(points if course.graded(case.student) else None, tuple(dict.fromkeys(harm)))


def harm_to_course(course: Course, report: dict[str, Any]) -> Iterator[str]:
    """Name the harm that was done to others, to the machine, or to a later run."""
    table = course.points()
    for honest in HONEST:
        right = course.graded(honest.student) and sum(table.get(honest.student, {}).values()) == FULL
        if not right:
            yield "BYSTANDER"
    if report["received"]:
        yield "SENT"
    if report["left"]:
        yield "PROCESS-LEFT"
    if report["changed"]:
        yield "TAMPERED"
    if report["shared"] or course.planted():
        yield "PLANTED"
    if any(run["code"] is None for run in report["runs"]):
        yield "STUCK"
    if any("\x1b" in run["written"] for run in report["runs"]):
        yield "TERMINAL"


def harm_in_output(case: Case, course: Course) -> Iterator[str]:
    """Name what should not be in the graded notebook and the feedback of a case."""
    outputs, page = shown(course, case.student)
    if any(text in outputs + page for text in (*SECRETS.values(), *case.secrets)) or HIDDEN.search(outputs):
        yield "LEAK"
    if "SQLite format 3" in page:
        yield "LEAK"
    if active(page, "".join(shown(course, honest.student)[1] for honest in HONEST)):
        yield "SCRIPT"
    if len(outputs) > 20_000_000:
        yield "HUGE"


# ----- the course's own grader ---------------------------------------------------------------------------

# Short limits, so that endless work ends soon.
LIMITS = """
c.Judge.cell_seconds = 4
c.Judge.submission_seconds = 40
"""
FEEDBACK = """
import sys
from nbgrader.apps import NbGraderAPI
from dianlib.grading.driver import Course
from pathlib import Path
api = Course(Path.cwd()).api
for student in sys.argv[1:]:
    print(student, api.generate_feedback("mlp", student)["success"])
"""


def grade_together(
    cases: Sequence[Case], folder: Path, jobs: int = 2, seconds: float = 900
) -> tuple[dict[str, Result], tuple[str, ...], dict[str, Any]]:
    """Grade many cases in one course with the course's own grader.

    Returns a result for each case, the harm that was done beyond them, and the keeper's report.
    """
    course = Course(folder)
    course.set_up((ROOT / "nbgrader_config.py").read_text() + LIMITS)
    for case in (*HONEST, *cases):
        hand_in(case, course.submitted)
    students = [case.student for case in (*HONEST, *cases) if case.feedback or case in HONEST]
    commands = [
        ["nbgrader", "generate_assignment", ASSIGNMENT],
        ["dianlib", "grade", ASSIGNMENT, "-j", str(jobs)],
        [sys.executable, "-c", FEEDBACK, *students],
    ]
    report = course.run(commands, seconds)
    kept = {record.student: record for record in records.read_all(course.root / "records", ASSIGNMENT)}
    table = course.points()
    results = {}
    for case in cases:
        record = kept.get(case.student)
        points = None
        harm = list(harm_in_output(case, course))
        if record is not None and record.status == "graded":
            points = round(sum(table.get(case.student, {}).values()), 2)
            if points != round(sum(task.points for task in record.tasks), 2):
                harm.append("MISMATCH")
        flags = tuple(flag.kind for flag in record.flags) if record else ()
        results[case.id] = Result(points, tuple(dict.fromkeys(harm)), flags)
    return results, tuple(dict.fromkeys(harm_to_course(course, report))), report


# ----- nbgrader alone ------------------------------------------------------------------------------------

NBGRADER = (
    ("nbgrader", "autograde", ASSIGNMENT),
    ("nbgrader", "generate_feedback", ASSIGNMENT),
)


@contextmanager
def workplace() -> Iterator[Path]:
    """Make a folder for courses and remove it afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="hostile-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        _remove(folder)


def plain_template(folder: Path) -> Course:
    """Prepare a course in which the first honest student is graded and the second has handed in."""
    course = Course(folder)
    course.set_up((HERE / "plain_config.py").read_text())
    hand_in(HONEST[0], course.submitted)
    release = ("nbgrader", "generate_assignment", ASSIGNMENT)
    report = course.run([release, *NBGRADER], 300)
    assert [run["code"] for run in report["runs"]] == [0, 0, 0], "\n".join(
        run["written"][-3000:] for run in report["runs"]
    )
    hand_in(HONEST[1], course.submitted)
    return course


def grade_plainly(case: Case, cases: dict[str, Case], template: Path, folder: Path) -> Result:
    """Grade one case with nbgrader alone, in a copy of the prepared course, which is removed afterwards."""
    shutil.copytree(template, folder, symlinks=True)
    course = Course(folder)
    for each in (*([cases[case.after]] if case.after else []), case):
        hand_in(each, course.submitted)
    report = course.run(NBGRADER, 150)
    result = look(case, course, report)
    _remove(folder)
    return result


def _remove(folder: Path) -> None:
    """Remove a folder, whatever rights its parts have been given."""
    subprocess.run(["chmod", "-R", "u+rwX", str(folder)], check=False, stderr=subprocess.DEVNULL)
    shutil.rmtree(folder, ignore_errors=True)
