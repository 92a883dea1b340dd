"""A class graded with PostgreSQL: as the gradebook of the plain commands, and as the queue of workers.

The tests start a PostgreSQL server of their own. It listens on this computer only, and asks for a password.
"""

import asyncio
import contextlib
import csv
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import nbformat
import psycopg
import pytest
from assignment import ROOT, read
from test_nbgrader import HALF_RIGHT, MISTAKES, SCRIPTS, submission

from dianlib.cli import main
from dianlib.grading import queue, records
from dianlib.grading.records import Record

BINARIES = [path.parent for path in sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))]
BINARIES += [Path(found).parent for name in ("initdb",) if (found := shutil.which(name))]
pytestmark = [
    pytest.mark.skipif(
        not BINARIES, reason="PostgreSQL is not installed (Debian and Ubuntu: apt install postgresql)"
    ),
    pytest.mark.skipif(
        shutil.which("bwrap") is None,
        reason="bubblewrap is not installed (Debian and Ubuntu: apt install bubblewrap)",
    ),
]

SUBMISSIONS = {"a slow one", "blank", "mistaken", "perfect", "jürgen", "torn"}
PASSWORD = "hush/hush@hush"
PATIENCE = 300  # seconds after which what a test waits for will not happen any more
SLOW = 4  # seconds that one submission sleeps, so that it can be met in the middle


# ----- a server, and a course ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    port: int

    def url(self, database: str, user: str = "dian", password: str = "") -> str:
        secret = f":{password}" if password else ""
        return f"postgresql://{user}{secret}@127.0.0.1:{self.port}/{database}"

    def run(self, *commands: str, database: str = "postgres") -> None:
        with psycopg.connect(self.url(database), autocommit=True) as connection:
            for command in commands:
                connection.execute(command)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Start PostgreSQL; the password lies in a file, as it should, so that addresses need not hold it."""
    binaries = BINARIES[-1]
    # PostgreSQL refuses to run as root, and the folders of tests are closed to others.
    as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = Path(tempfile.mkdtemp(prefix="dianlib-postgres-"))
    secret, passes = folder / "password", folder / "pgpass"
    secret.write_text(PASSWORD)
    if as_nobody:
        for path in (folder, secret):
            os.chown(path, 65534, 65534)
    passes.write_text(f"127.0.0.1:*:*:dian:{PASSWORD}\n127.0.0.1:*:*:guest:{PASSWORD}\n")
    passes.chmod(0o600)
    make = [binaries / "initdb", "--pgdata", folder / "data", "--username=dian", f"--pwfile={secret}"]
    make += ["--auth=scram-sha-256", "--encoding=UTF8", "--no-locale", "--no-sync"]
    subprocess.run([*as_nobody, *make], check=True, capture_output=True, cwd="/")
    serve = [binaries / "postgres", "-D", folder / "data", "-h", "127.0.0.1", "-p", str(port), "-k", "", "-F"]
    with pytest.MonkeyPatch.context() as patch, (folder / "log").open("w") as log:
        patch.setenv("PGPASSFILE", str(passes))
        process = subprocess.Popen([*as_nobody, *serve], stdout=log, stderr=log, cwd="/")
        try:
            server = Server(port)
            wait_for(lambda: answers(server), "PostgreSQL answers")
            server.run(f"CREATE ROLE guest LOGIN PASSWORD '{PASSWORD}'", "CREATE DATABASE older")
            server.run(
                "CREATE SCHEMA dianlib", "CREATE TABLE dianlib.procrastinate_jobs ()", database="older"
            )
            yield server
        finally:
            process.send_signal(signal.SIGINT)  # end at once, and properly
            process.wait()
            assert PASSWORD not in (folder / "log").read_text()
            shutil.rmtree(folder)


def answers(server: Server) -> bool:
    with contextlib.suppress(psycopg.OperationalError), psycopg.connect(server.url("postgres")):
        return True
    return False


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.02)


@dataclass(frozen=True)
class Class:
    """A course folder and its database, which is gradebook and queue."""

    server: Server
    folder: Path
    database: str

    @property
    def url(self) -> str:
        return self.server.url(self.database)

    def start(self, *command: str, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [SCRIPTS / command[0], *command[1:]],
            cwd=self.folder,
            env={**os.environ, "GRADEBOOK": self.url, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *command: str, code: int = 0) -> str:
        process = self.start(*command)
        output = process.communicate()[0]
        assert process.returncode == code, output
        return output

    def worker(self, *options: str, **variables: str) -> subprocess.Popen[str]:
        return self.start("dianlib", "worker", "--queue", self.url, *options, **variables)

    def jobs(self) -> dict[str, tuple[str, int, int]]:
        """Return the state, the attempts and the priority of each submission's newest job."""
        with psycopg.connect(self.url) as connection:
            query = "SELECT lock, status, attempts, priority FROM dianlib.procrastinate_jobs ORDER BY id"
            rows = connection.execute(query).fetchall()
        return {lock.removeprefix("metrics/"): tuple(row) for lock, *row in rows if lock}

    def records(self) -> list[Record]:
        """Return all records, without the times, which are never the same."""
        found = records.read_all(self.folder / "records", "metrics")
        return [replace(record, finished="", seconds=0.0) for record in found]

    def scores(self) -> dict[str, dict[str, float | None]]:
        from nbgrader.api import Gradebook

        with Gradebook(self.url) as gradebook:
            return {
                handed_in.student.id: {
                    grade.name: grade.auto_score for grade in handed_in.notebooks[0].grades
                }
                for handed_in in gradebook.assignment_submissions("metrics")
            }


@pytest.fixture(scope="module")
def prepared(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Class]:
    """A course with its release made, and submissions that nobody has graded yet."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("PATH", os.pathsep.join([str(SCRIPTS), os.environ["PATH"]]))
        folder = tmp_path_factory.mktemp("prepared")
        settings = (ROOT / "nbgrader_config.py").read_text()
        settings += '\nc.CourseDirectory.db_url = os.environ["GRADEBOOK"]\n'
        (folder / "nbgrader_config.py").write_text(settings)
        shutil.copytree(ROOT / "solutions" / "metrics", folder / "solutions" / "metrics")
        server.run("CREATE DATABASE prepared")
        course = Class(server, folder, "prepared")
        course.run("nbgrader", "generate_assignment", "metrics")
        mistaken = submission("metrics", {task: source for task, (_, source) in MISTAKES.items()})
        slow = submission("metrics", {"metrics.f1": f"import time\ntime.sleep({SLOW})\n{HALF_RIGHT}"})
        for student, notebook in {
            "a slow one": slow,  # the first in the queue
            "blank": read("exercises", "metrics"),
            "mistaken": mistaken,
            "perfect": submission("metrics", {}),
            "jürgen": submission("metrics", {"metrics.f1": HALF_RIGHT}),
        }.items():
            hand_in(course, student, nbformat.writes(notebook))
        hand_in(course, "torn", '{"cells": [')
        # The inputs follow from the secret: with the same one, two runs must agree in every digit.
        (folder / "records").mkdir()
        (folder / "records" / "secret").write_text("the same for all\n")
        assert {path.name for path in (folder / "submitted").iterdir()} == SUBMISSIONS
        yield course


def hand_in(course: Class, student: str, text: str) -> None:
    path = course.folder / "submitted" / student / "metrics" / "metrics.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture(scope="module")
def copied(prepared: Class, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Class]:
    """Return a function that copies the prepared course, with its database."""

    def copy(name: str) -> Class:
        folder = tmp_path_factory.mktemp(name) / "course"
        shutil.copytree(prepared.folder, folder)
        prepared.server.run(f"CREATE DATABASE {name} TEMPLATE prepared")
        return Class(prepared.server, folder, name)

    return copy


@pytest.fixture(scope="module")
def local(copied: Callable[[str], Class]) -> Class:
    """The class graded without a queue, by nbgrader's plain command."""
    course = copied("local")
    course.run("nbgrader", "autograde", "metrics")
    return course


# ----- the gradebook -------------------------------------------------------------------------------------


def test_the_plain_commands_work_with_a_gradebook_in_postgresql(local: Class) -> None:
    scores = local.scores()
    assert sum(score or 0 for score in scores["perfect"].values()) > 0
    assert set(scores["blank"].values()) == {0.0}
    local.run("nbgrader", "generate_feedback", "metrics")
    pages = {path.parent.parent.name for path in (local.folder / "feedback").glob("*/metrics/*.html")}
    assert {"perfect", "blank", "mistaken", "jürgen"} <= pages
    local.run("nbgrader", "export")
    with (local.folder / "grades.csv").open() as table:
        exported = {row["student_id"]: row["score"] for row in csv.DictReader(table)}
    for student in ("perfect", "blank", "mistaken", "jürgen"):
        assert float(exported[student]) == sum(score or 0 for score in scores[student].values())
    assert exported["torn"] == ""
    assert not list(local.folder.glob("*.db"))


# ----- the queue -----------------------------------------------------------------------------------------


@pytest.fixture
def enqueue(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return a function that does in this process what ``dianlib grade --queue URL`` does."""

    def run(course: Class, wait: bool = False) -> int:
        monkeypatch.setenv("GRADEBOOK", course.url)
        options = ["--queue", course.url, "--course", str(course.folder)]
        if not wait:
            return main(["grade", "metrics", *options, "--no-wait"])
        ctrl_c = threading.Timer(PATIENCE, os.kill, (os.getpid(), signal.SIGINT))
        ctrl_c.start()
        try:
            return main(["grade", "metrics", *options])
        finally:
            ctrl_c.cancel()

    return run


def test_all_is_graded_although_a_worker_is_killed(
    local: Class,
    copied: Callable[[str], Class],
    enqueue: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    course = copied("several")
    # Two instructors ask at the same time. Both make the tables.
    ask = ("dianlib", "grade", "metrics", "--queue", course.url, "--no-wait")
    both = [course.start(*ask), course.start(*ask)]
    said = "".join(process.communicate(timeout=PATIENCE)[0] for process in both)
    assert [process.returncode for process in both] == [0, 0], said
    counts = re.findall(r"Put into the queue: (\d+)\. Already there: (\d+)\.", said)
    assert sorted(counts) == [("0", "6"), ("6", "0")]
    assert set(course.jobs()) == SUBMISSIONS

    # Two computers know the shared folder, and nothing else of each other. The first one stands still over a
    # job, until the second one has taken others; then it dies.
    first = course.worker("-j", "1", HOME=str(tmp_path / "a"))
    with ended(first):
        wait_for(lambda: course.jobs()["a slow one"][0] == "doing", "the first worker has a job")
        first.send_signal(signal.SIGSTOP)
        assert course.jobs()["a slow one"] == ("doing", 0, 0)
        second = course.worker("-j", "2", "--until-empty", HOME=str(tmp_path / "b"))
        with ended(second):
            others = SUBMISSIONS - {"a slow one"}
            wait_for(
                lambda: any(course.jobs()[name][0] != "todo" for name in others),
                "the second worker has a job",
            )
            first.kill()
            assert enqueue(course, wait=True) == 1  # one submission cannot be read
            summary = capsys.readouterr().out
            said = second.communicate(timeout=PATIENCE)[0]
            assert second.returncode == 0, said
    assert re.search(r"^5 graded .* 1 failed\n  torn: ", summary, re.MULTILINE), summary
    assert len(re.findall(r"^metrics/.*: (?:graded|failed)", said, re.MULTILINE)) == 6, said
    assert PASSWORD not in said + summary

    ends = course.jobs()
    assert ends.pop("a slow one") == ("succeeded", 2, -1)  # it was given back
    assert set(ends.values()) == {("succeeded", 1, 0)}
    assert course.records() == local.records()
    assert course.scores() == local.scores()

    # What is graded is not graded again; what was handed in anew is, once.
    assert enqueue(course) == 0
    hand_in(course, "blank", nbformat.writes(submission("metrics", {})))
    assert enqueue(course) == enqueue(course) == 0
    assert capsys.readouterr().out.splitlines() == [
        "Put into the queue: 0. Already there: 0.",
        "Put into the queue: 1. Already there: 0.",
        "Put into the queue: 0. Already there: 1.",
    ]


@contextlib.contextmanager
def ended(*processes: subprocess.Popen[str]) -> Iterator[None]:
    """Make sure that processes do not outlive a test that fails."""
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_worker_outlives_its_processes_and_bad_jobs_and_leaves_when_told(
    copied: Callable[[str], Class], enqueue: Callable[..., int]
) -> None:
    course = copied("troubled")
    for student in SUBMISSIONS - {"a slow one"}:
        shutil.rmtree(course.folder / "submitted" / student)
    assert enqueue(course) == 0
    bad = [
        {"assignment": "metrics", "student": "a slow one", "context": "x"},
        {"assignment": ["metrics"], "student": None},
        {},
    ]
    asyncio.run(defer(course.url, bad))

    def slow() -> tuple[str, int, int]:
        return course.jobs()["a slow one"]

    worker = course.worker("-j", "1")
    with ended(worker):
        # Whatever kills the process that grades, a bug or a want of memory: it is tried once more.
        for attempts, priority in ((0, 0), (1, -1)):
            wait_for(lambda: slow() == ("doing", attempts, priority), "the job is taken")  # noqa: B023
            (grader,) = [child for server in children(worker.pid) for child in children(server)]
            os.kill(grader, signal.SIGKILL)
        wait_for(lambda: slow() == ("failed", 2, -1), "the job is given up")
        (record,) = course.records()
        assert (record.student, record.status) == ("a slow one", "failed")
        assert record.reason == "Two attempts failed. The process that graded it died."

        # Given up is not graded: another run tries again. This time the worker itself is told to stop.
        assert enqueue(course) == 0
        wait_for(lambda: slow() == ("doing", 0, 0), "the job is taken")
        worker.send_signal(signal.SIGTERM)
        said = worker.communicate(timeout=PATIENCE)[0]
    assert worker.returncode == 0, said
    assert slow() == ("succeeded", 1, 0)
    (record,) = course.records()
    assert record.status == "graded"
    assert len(re.findall("^Refused a job: ", said, re.MULTILINE)) == len(bad), said


@pytest.mark.parametrize(
    ("assignment", "student"),
    [
        ("*", "perfect"),
        ("metrics", "*"),
        ("metrics", ""),
        ("", "perfect"),
        (".", "perfect"),
        ("metrics", "."),
        ("metrics", "../submitted/perfect"),
        ("metrics/../metrics", "perfect"),
        ("metrics", "nobody"),
    ],
)
def test_a_name_that_is_no_folder_of_the_course_is_not_followed(
    prepared: Class, assignment: str, student: str
) -> None:
    assert queue._is_there(prepared.folder, "metrics", "perfect")
    assert not queue._is_there(prepared.folder, assignment, student)


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


async def defer(url: str, jobs: list[dict[str, object]]) -> None:
    async with queue._queue(url) as app:
        for names in jobs:
            await app.configure_task(queue.TASK, queue=queue.QUEUE).defer_async(**names)


# ----- what can be wrong -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("nonsense", "The address of the queue cannot be read"),
        ("mysql://dian:hush@127.0.0.1/x", "The address of the queue cannot be read"),
        ("postgresql://dian:hush/hush@127.0.0.1/x", "The address of the queue cannot be read"),
        ("postgresql://dian:hush@hush@127.0.0.1/x", "The address of the queue cannot be read"),
        ("postgresql://dian:%zzhush@127.0.0.1/x", "The address of the queue cannot be read"),
        ("postgresql://dian:hush:5432/x", "The address of the queue cannot be read"),
        ("postgresql://dian:hush@127.0.0.1:{port}/postgres", "password authentication failed"),
        ("postgresql+psycopg://dian@127.0.0.1:{port}/nowhere", 'database "nowhere" does not exist'),
        ("postgresql://stranger@127.0.0.1:{port}/postgres", "no password supplied"),
        ("postgresql://guest@127.0.0.1:{port}/postgres", "The user may not make tables"),
        ("postgresql://dian@127.0.0.1:{port}/older", "If another version of procrastinate made them"),
        ("postgresql://dian:hush@127.0.0.1:1/x", "no server answers there"),
        ("postgresql://dian:hush@host.invalid/x", "failed to resolve host 'host.invalid'"),
    ],
)
def test_a_queue_that_cannot_be_used_is_named_in_one_sentence(
    server: Server, url: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["worker", "--queue", url.format(port=server.port)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert sentence in said.err
    assert said.err.count("\n") == 1
    assert "hush" not in said.err


def test_missing_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import dianlib.grading

    monkeypatch.delattr(dianlib.grading, "queue")
    monkeypatch.delitem(sys.modules, "dianlib.grading.queue")
    monkeypatch.setitem(sys.modules, "procrastinate", None)
    assert main(["worker", "--queue", "postgresql://dian@127.0.0.1/dian"]) == 2
    assert capsys.readouterr().err == (
        "A queue needs more packages (procrastinate is missing): install them with "
        "`pip install -e '.[grading]'`.\n"
    )
