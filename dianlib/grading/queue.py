"""Grade on several computers: a queue of jobs in PostgreSQL, and workers that share the course's folder.

A job is two names, an assignment and a student; no path and no code is in it, and a worker takes only
names that its own course folder knows. PostgreSQL keeps the jobs and the library procrastinate hands
them out, each to one worker. On every computer one process talks to the database, so that its sign of
life does not depend on what is being graded; the grading is done by processes that it starts once.

Nothing is lost when a worker dies: the others notice that its sign of life is missing and put its job
back, and grading the same submission again gives the same result.
"""

import asyncio
import contextlib
import logging
import multiprocessing
import os
import re
import signal
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import psycopg
from procrastinate import App, BaseRetryStrategy, PsycopgConnector, RetryDecision
from procrastinate.exceptions import ConnectorException
from procrastinate.job_context import JobContext
from procrastinate.jobs import Job, Status
from procrastinate.schema import SchemaManager
from procrastinate.worker import Worker
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from dianlib.grading import records
from dianlib.grading.isolation import die_with_parent

# The driver brings torch and nbgrader along, and takes seconds: only who grades waits for it.
if TYPE_CHECKING:
    from dianlib.grading.driver import Course, Summary

QUEUE = "dianlib"
TASK = "dianlib.grade"
# The queue has a schema of its own, beside the gradebook's tables, and can be removed as a whole.
SCHEMA = "dianlib"

# A worker gives a sign of life every few seconds. One that was silent for so long counts as dead, and its
# job is given to another. If it was only asleep, a submission is graded twice, with the same result.
SIGN_OF_LIFE = 2.0
SILENCE = 15.0

# A database that went away is asked again after so many seconds.
PAUSE = 5.0

# A file that another computer wrote may show up late in a shared folder.
LATE = 30.0

# The queue forgets jobs that ended so many days ago.
KEPT_DAYS = 30

# Who sets the queue up, fills it or gives back the jobs of the dead holds this lock of the database.
LOCK = "SELECT pg_advisory_xact_lock(hashtext('dianlib'))"

# What goes wrong is said by us, in one sentence. The libraries' own lines would repeat it at length.
for _name in ("procrastinate", "psycopg.pool"):
    logging.getLogger(_name).addHandler(logging.NullHandler())
    logging.getLogger(_name).propagate = False


class QueueError(Exception):
    """The queue cannot be used, or a worker cannot work; the text is the sentence that the user reads."""


# ----- the database --------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _queue(url: str) -> AsyncIterator[App]:
    """Open the queue, and make its tables if there are none. Raises QueueError where that fails."""
    address = _address(url)
    await _set_up(address)
    connector = PsycopgConnector(conninfo=address, min_size=1, max_size=4, timeout=10)
    app = App(connector=connector)
    async with app.open_async():
        yield app


def _address(url: str) -> str:
    """Check the address of a database before anything is sent there.

    An "@" or "/" that a password holds unescaped would make a part of it look like the name of a host, and
    show it in an error message. So such addresses are refused here, in words that do not repeat them.
    """
    # SQLAlchemy, and so the gradebook's setting, names its driver behind a plus sign.
    scheme, _, rest = url.partition("://")
    url = f"{scheme.partition('+')[0]}://{rest}"
    host = rest.partition("/")[0]
    if scheme.partition("+")[0] in ("postgresql", "postgres") and rest.count("@") == host.count("@") <= 1:
        with contextlib.suppress(psycopg.ProgrammingError, ValueError):
            urlsplit(url).port  # noqa: B018 (it raises if that is no number)
            return make_conninfo(url, connect_timeout=10, options=f"-c search_path={SCHEMA}")
    raise QueueError(
        "The address of the queue cannot be read: it has the form postgresql://user@host/database, and in "
        "a password the characters @ : / ? # % are written as %40 %3A %2F %3F %23 %25."
    )


async def _set_up(address: str) -> None:
    try:
        async with await psycopg.AsyncConnection.connect(address) as connection:
            # Two that start at the same moment must not both make the tables.
            await connection.execute(LOCK)
            found = await (await connection.execute("SELECT to_regclass('procrastinate_jobs')")).fetchone()
            if found == (None,):
                await connection.execute(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
                await connection.execute(SchemaManager.get_schema())
    except psycopg.errors.InsufficientPrivilege:
        raise QueueError(
            f"The user may not make tables in {_database(address)}: make the user its owner, "
            "with `createdb --owner USER DATABASE`."
        ) from None
    except psycopg.Error as error:
        raise QueueError(f"The queue cannot be used at {_database(address)}: {_reason(error)}.") from None


def _database(address: str) -> str:
    """Name a database without the password."""
    parts = conninfo_to_dict(address)
    host = f"{parts.get('host', 'this computer')}, port {parts.get('port', 5432)}"
    return f"the database {parts.get('dbname', parts.get('user', ''))!r} on {host}"


def _reason(error: psycopg.Error) -> str:
    """Take the reason out of a message such as "connection failed: ... failed: FATAL:  no such database"."""
    if "Is the server running" in str(error):
        return "no server answers there"
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.split(r"failed: |bad: |FATAL: |fe_sendauth: ", line)[-1].strip()


def _lost(error: Exception) -> str:
    """Tell why the queue cannot be used any more."""
    cause = error.__cause__ or error
    if isinstance(cause, psycopg.ProgrammingError):
        reason = str(cause).partition("\n")[0]
        return (
            f"The tables of the queue cannot be used: {reason}. If another version of procrastinate made "
            f"them, remove them with `DROP SCHEMA {SCHEMA} CASCADE` in psql and start again."
        )
    return (
        "The database of the queue does not answer any more. The jobs stay there: try again when it is back."
    )


async def _jobs(app: App, *states: str) -> list[Job]:
    found: list[Job] = []
    for state in states:
        found += await app.job_manager.list_jobs_async(queue=QUEUE, status=state)
    return found


@contextlib.asynccontextmanager
async def _alone(app: App) -> AsyncIterator[None]:
    """Be the only one to change the queue as a whole."""
    assert isinstance(app.connector, PsycopgConnector)
    async with app.connector.pool.connection() as connection:
        await connection.execute(LOCK)
        yield


async def _recover(app: App, course: Path) -> None:
    """Give the jobs of dead workers back to the queue.

    Such a job may have killed its worker, by taking all memory for example. So it goes behind all others,
    and when it has cost a second worker it is given up. Its priority tells that it was given back.
    """
    if not await app.job_manager.get_stalled_jobs(queue=QUEUE, seconds_since_heartbeat=SILENCE):
        return
    async with _alone(app):
        for job in await app.job_manager.get_stalled_jobs(queue=QUEUE, seconds_since_heartbeat=SILENCE):
            # The worker may wake up at this very moment and finish the job.
            with contextlib.suppress(ConnectorException):
                if job.priority == 0:
                    await app.job_manager.retry_job(job, priority=-1)
                else:
                    await app.job_manager.finish_job(job, Status.FAILED, delete_job=False)
                    _give_up(course, job.task_kwargs, "Two workers died while they graded it.")


# ----- the course's folder -------------------------------------------------------------------------------


def _named(names: dict[str, Any]) -> tuple[str, str] | None:
    """Return the assignment and the student that a job names, None if it is no job of ours."""
    match names:
        case {"assignment": str(assignment), "student": str(student), **more} if not more:
            return assignment, student
    return None


def _is_there(course: Path, assignment: str, student: str) -> bool:
    """Tell whether something was handed in.

    Names become parts of paths, so each of them must be the whole name of a folder of this course.
    """
    released, handed_in = course / "exercises", course / "submitted"
    return (
        assignment in {path.name for path in released.glob("*")}
        and student in {path.name for path in handed_in.glob("*")}
        and (handed_in / student / assignment).is_dir()
    )


def _give_up(course: Path, names: dict[str, Any], reason: str) -> None:
    """Record why a submission has no grade. The record names no submission, so the next run tries again."""
    known = _named(names)
    if known is not None and _is_there(course, *known):
        now = datetime.now(UTC).isoformat(timespec="seconds")
        record = records.Record(*known, "failed", reason, submission="", seed="", finished=now, seconds=0.0)
        records.write(course / "records", record)


# ----- who wants grades ----------------------------------------------------------------------------------


def grade_all(
    course: "Course", assignment: str, url: str, force: bool = False, wait: bool = True
) -> "Summary | None":
    """Have the workers grade all pending students; return the summary, unless it should not ``wait``.

    Raises QueueError when the queue cannot be used.
    """
    try:
        return asyncio.run(_grade_all(course, assignment, url, force, wait))
    except (ConnectorException, psycopg.Error) as error:
        raise QueueError(_lost(error)) from None
    except KeyboardInterrupt:
        _say("The jobs stay in the queue, and the workers go on. Run the command again to wait for them.")
        raise


async def _grade_all(
    course: "Course", assignment: str, url: str, force: bool, wait: bool
) -> "Summary | None":
    async with _queue(url) as app:
        jobs, added = await _enqueue(app, course, assignment, force)
        _say(f"Put into the queue: {added}. Already there: {len(jobs) - added}.")
        if not wait:
            return None
        done = await _follow(app, course, assignment, jobs)
    return await _summary(course, assignment, done)


async def _enqueue(
    app: App, course: "Course", assignment: str, force: bool
) -> tuple[dict[int | None, str], int]:
    """Put a job into the queue for each pending student who has none.

    Returns the student of each job of the assignment that is there now, and how many jobs are new.
    """
    jobs = {}
    async with _alone(app):
        # In this order: a job that ends in between has left its record, so its student is not pending.
        for job in await _jobs(app, "todo", "doing"):
            head, _, student = str(job.lock).partition("/")
            if head == assignment:
                jobs[job.id] = student
        new = sorted(set(course.pending(assignment, force)) - set(jobs.values()))
        course.add_students(new)
        for student in new:
            name = f"{assignment}/{student}"
            task = app.configure_task(TASK, queue=QUEUE, lock=name, queueing_lock=name)
            jobs[await task.defer_async(assignment=assignment, student=student)] = student
    return jobs, len(new)


async def _follow(app: App, course: "Course", assignment: str, jobs: dict[int | None, str]) -> set[str]:
    """Show a bar until all jobs have ended; return the students whose job went well."""
    from dianlib.grading.driver import Progress, Summary

    so_far = Summary()
    waiting = set(jobs)
    warned = False
    with Progress() as progress:
        while waiting:
            ended = waiting - {job.id for job in await _jobs(app, "todo", "doing")}
            for number in ended:
                if record := records.read(course.records, assignment, jobs[number]):
                    so_far.add(record)
            waiting = waiting - ended
            progress(len(jobs) - len(waiting), len(jobs), so_far)
            await _recover(app, course.root)
            if waiting and not warned and not await _workers(app):
                _say("No worker is there yet: start `dianlib worker --queue ...`, here or elsewhere.")
                warned = True
            await asyncio.sleep(1 if waiting else 0)
    done = {job.id for job in await _jobs(app, "succeeded")}
    return {student for number, student in jobs.items() if number in done}


async def _workers(app: App) -> bool:
    """Tell whether any worker has given a sign of life."""
    assert isinstance(app.connector, PsycopgConnector)
    query = (
        "SELECT 1 FROM procrastinate_workers WHERE last_heartbeat > now() - %(silence)s * interval '1 second'"
    )
    return bool(await app.connector.execute_query_all_async(query, silence=SILENCE))


async def _summary(course: "Course", assignment: str, done: set[str]) -> "Summary":
    from dianlib.grading.driver import Summary

    summary = Summary()
    late = time.monotonic() + LATE
    for student in course.submitted(assignment):
        record = records.read(course.records, assignment, student)
        while record is None and student in done and time.monotonic() < late:
            await asyncio.sleep(1)
            record = records.read(course.records, assignment, student)
        if record is None:
            summary.failed.append((student, "No worker could grade it."))
        else:
            summary.add(record)
    return summary


# ----- who grades ----------------------------------------------------------------------------------------


def work(course: Path, url: str, processes: int, until_empty: bool = False) -> None:
    """Take jobs from the queue and grade them, in so many processes, until told to stop.

    Ctrl-C or SIGTERM lets the running jobs end, a second one gives them back to the queue. With
    ``until_empty`` it ends when no job waits or runs anywhere. Raises QueueError when the queue, the
    course's folder or the sandbox of this computer cannot be used.
    """
    asyncio.run(_check(url))
    # A server that has imported everything forks the graders, so that they start fast and share memory.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dianlib.grading.driver"])
    graders = [_Grader(context, course) for _ in range(processes)]
    try:
        for grader in graders:
            grader.greet()
        asyncio.run(_Host(course, graders, until_empty).work(url))
    finally:
        for grader in graders:
            grader.kill()


async def _check(url: str) -> None:
    """Say at once what is wrong with the queue, before anything else is started."""
    try:
        async with _queue(url) as app:
            await _jobs(app, "todo", "doing")
    except (ConnectorException, psycopg.Error) as error:
        raise QueueError(_lost(error)) from None


class _Broken(QueueError):
    """This computer cannot grade; another one may."""


class _Failed(Exception):
    """A job has no result: its process died, or grading it went wrong."""


class _Refused(Exception):
    """A job names what this course does not have."""


class _Again(BaseRetryStrategy):
    """Decide what becomes of a job that did not end well; compare _recover."""

    def get_retry_decision(self, *, exception: BaseException, job: Job) -> RetryDecision | None:
        if isinstance(exception, _Broken):
            return RetryDecision()
        if isinstance(exception, _Failed) and job.priority == 0:
            return RetryDecision(priority=-1)
        return None


class _Host:
    """What one computer does: hand the jobs that it gets to its graders."""

    def __init__(self, course: Path, graders: list["_Grader"], until_empty: bool) -> None:
        self.course = course
        self.graders = graders
        self.idle = list(graders)
        self.threads = ThreadPoolExecutor(len(graders))  # each waits for the answer of one grader
        self.until_empty = until_empty
        self.worker: Worker | None = None
        self.stopped = asyncio.Event()
        self.trouble: _Broken | None = None

    async def work(self, url: str) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_report_unless_lost)
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.leave)
        _say(f"Waiting for jobs, with {len(self.graders)} processes. Press Ctrl-C to stop.")
        while not self.stopped.is_set():
            # A database that is restarted is waited for: a worker is meant to run for weeks.
            try:
                async with _queue(url) as app:
                    await self.serve(app)
            except (ConnectorException, psycopg.Error, QueueError) as error:
                if isinstance(error.__cause__, psycopg.ProgrammingError):
                    raise QueueError(_lost(error)) from None
            if not self.stopped.is_set():
                _say(f"The queue was lost; it is looked for again in {PAUSE:g} seconds.")
                await _pause(PAUSE, self.stopped)
        if self.trouble:
            raise self.trouble

    def leave(self) -> None:
        if not self.stopped.is_set():
            _say("The running jobs end, and no others are taken. Press Ctrl-C again to give them back.")
            self.stop()
        else:
            for grader in self.graders:
                grader.kill()

    def stop(self) -> None:
        self.stopped.set()
        if self.worker:
            self.worker.stop()

    async def serve(self, app: App) -> None:
        """Work until stopped, or until the database goes away."""
        app.task(name=TASK, queue=QUEUE, retry=_Again(), pass_context=True)(self.grade)
        await app.job_manager.delete_old_jobs(
            24 * KEPT_DAYS, QUEUE, include_failed=True, include_cancelled=True, include_aborted=True
        )
        self.worker = Worker(
            app,
            queues=[QUEUE],
            concurrency=len(self.graders),
            fetch_job_polling_interval=SIGN_OF_LIFE,
            update_heartbeat_interval=SIGN_OF_LIFE,
            stalled_worker_timeout=SILENCE,
            install_signal_handlers=False,
        )
        ended = asyncio.Event()
        watch = asyncio.create_task(self.watch(app, self.worker, ended))
        try:
            await self.worker.run()
        finally:
            ended.set()
            await watch

    async def watch(self, app: App, worker: Worker, ended: asyncio.Event) -> None:
        """Look after the queue while the worker runs."""
        while not ended.is_set():
            with contextlib.suppress(ConnectorException):  # the worker meets it too
                # The library gives no sign of life any more while it waits for the last jobs to end.
                if worker.worker_id is not None:
                    await app.job_manager.update_heartbeat(worker.worker_id)
                await _recover(app, self.course)
                if self.until_empty and not await _jobs(app, "todo", "doing"):
                    self.stop()
            await _pause(SIGN_OF_LIFE, ended)

    async def grade(self, context: JobContext, /, **names: Any) -> None:
        """Have one job done. This is the task that the library calls."""
        grader = self.idle.pop()  # the library takes as many jobs at a time as there are graders
        try:
            answer = await asyncio.get_running_loop().run_in_executor(self.threads, grader.grade, names)
        except _Broken as error:
            self.trouble = error
            self.stop()
            raise
        except _Refused as error:
            _say(str(error))
            raise
        except _Failed as error:
            _say(f"{_shown(names)}: {error}")
            if context.job.priority < 0:
                _give_up(self.course, names, f"Two attempts failed. {error}")
            raise
        finally:
            self.idle.append(grader)
        _say(answer)


async def _pause(seconds: float, end: asyncio.Event) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(end.wait(), seconds)


def _report_unless_lost(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Keep quiet where a job cannot be marked as done: the database is away, or another worker has it now."""
    if not isinstance(context.get("exception"), ConnectorException):
        loop.default_exception_handler(context)


class _Grader:
    """A process that grades one submission after the other. If it dies, another one is started."""

    def __init__(self, context: multiprocessing.context.ForkServerContext, course: Path) -> None:
        self._context = context
        self._course = course
        self._killed = False
        self._start()

    def _start(self) -> None:
        self._pipe, other = self._context.Pipe()
        self._process = self._context.Process(target=_serve, args=(other, self._course), daemon=True)
        self._process.start()
        other.close()  # so that the pipe ends with the process
        self._is_new = True

    def greet(self) -> None:
        """Wait until the process is ready. Raises QueueError where it cannot work."""
        try:
            self._receive()
        except (EOFError, ConnectionError):
            raise _Broken("A process that should grade died when it started.") from None
        self._is_new = False

    def grade(self, names: dict[str, Any]) -> str:
        """Grade one submission and return one line about it."""
        try:
            if self._is_new:
                self.greet()
            self._pipe.send(names)
            return self._receive()
        except (EOFError, ConnectionError):
            if self._killed:
                raise _Broken("The jobs that ran were given back to the queue.") from None
            self._start()
            raise _Failed("The process that graded it died.") from None

    def _receive(self) -> str:
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    def kill(self) -> None:
        self._killed = True
        self._process.kill()


def _serve(pipe: Connection, root: Path) -> None:
    """Be a grader: answer each pair of names with a line, or with the exception that it ended in."""
    os.setsid()  # Ctrl-C in a terminal goes to all processes of a session, and this one has to end its job
    die_with_parent()
    from dianlib.grading.driver import Course, GradingError

    with contextlib.suppress(EOFError, ConnectionError):  # the worker has left
        try:
            course = Course(root)
            pipe.send("ready")
        except GradingError as error:
            pipe.send(_Broken(str(error)))
            return
        while True:
            names = pipe.recv()
            try:
                pipe.send(_grade(course, names))
            except (_Broken, _Failed, _Refused) as error:
                pipe.send(error)


def _grade(course: "Course", names: dict[str, Any]) -> str:
    from dianlib.grading.driver import GradingError

    if not (course.root / "nbgrader_config.py").is_file():
        raise _Broken(f"The course's folder {course.root} is not there any more.")
    known = _named(names)
    if known is None or not _appears(course.root, *known):
        raise _Refused(f"Refused a job: nobody handed in {_shown(names)}.")
    try:
        course.sandbox(known[0])
    except GradingError as error:
        raise _Broken(str(error)) from None
    try:
        record = course.grade(*known)
    except GradingError as error:
        raise _Failed(str(error)) from None
    except Exception as error:  # a fault of ours or of the course's settings: the next job may go well
        raise _Failed(f"{type(error).__name__}: {error}") from None
    flags = ", ".join(flag.kind for flag in record.flags)
    result = record.status if record.status == "graded" else f"failed: {record.reason}"
    return f"{_shown(names)}: {result}{f' ({flags})' if flags else ''}, {record.seconds:.1f} s"


def _appears(course: Path, assignment: str, student: str) -> bool:
    """Tell whether something was handed in; it may be on its way here through the shared folder."""
    late = time.monotonic() + LATE
    while not _is_there(course, assignment, student):
        if time.monotonic() > late:
            return False
        time.sleep(1)
    return True


def _shown(names: dict[str, Any]) -> str:
    """Name a job on one line of a terminal, whatever characters are in its names."""
    text = f"{names.get('assignment')}/{names.get('student')}"[:200]
    return text if text.isprintable() else ascii(text)


def _say(text: str) -> None:
    print(text, flush=True)
