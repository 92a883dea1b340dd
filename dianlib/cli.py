"""The command line: ``dianlib COMMAND ...``.

Every command imports what it needs when it runs, so that ``dianlib --help`` does not wait for torch.
Exit codes: 0 all is well, 1 the answer is no (a check failed), 2 the command could not be carried out,
130 interrupted from the keyboard.
"""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class CommandError(Exception):
    """A command cannot be carried out; the text is the one sentence that the user reads."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["reproduce"]:  # its options, --help too, are its own
            return _reproduce(arguments[1:])
        options = _parser().parse_args(arguments)
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except CommandError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output, `head` for example, has left. Nothing more can be written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dianlib", description="The tools of the course.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Any, text: str, parent: Any = commands) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = parent.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    check = command("check", _check, "Run a notebook's checks on the side and print its score.")
    check.add_argument("notebook", type=Path, metavar="NOTEBOOK")
    check.add_argument(
        "--timeout", type=int, default=120, metavar="SECONDS", help="limit for one cell (default: 120)"
    )

    command("status", _status, "Show which tasks you have passed on this computer.")

    hint = command("hint", _hint, "Print a hint: 1 asks a question, 2 names a property, 3 gives pseudocode.")
    hint.add_argument("task", metavar="TASK", help="for example mlp.softmax")
    hint.add_argument(
        "step",
        type=int,
        nargs="?",
        default=1,
        choices=(1, 2, 3),
        metavar="STEP",
        help="1, 2 or 3 (default: 1)",
    )

    data = command("data", None, "Get the larger data sets.")
    actions = data.add_subparsers(title="commands", metavar="COMMAND", required=True)
    download = command(
        "download", _download, "Download data sets into DIANLIB_DATA, or into a cache.", actions
    )
    download.add_argument("names", nargs="*", metavar="NAME", help="mnist or fashion_mnist (default: both)")

    # Listed for the help; main hands everything behind it to dianlib.reproduce.
    command("reproduce", None, "Repeat an experiment of the book at full size, for example: reproduce mlp.")

    grade = command("grade", _grade, "For instructors: grade all submissions of an assignment, many at once.")
    grade.add_argument("assignment", metavar="ASSIGNMENT")
    grade.add_argument("-j", "--jobs", type=int, metavar="N", help="processes (default: one a core, up to 4)")
    grade.add_argument("--force", action="store_true", help="grade again what was graded already")
    grade.add_argument(
        "--course",
        type=Path,
        default=Path(),
        metavar="FOLDER",
        help="the course's folder (default: this one)",
    )
    grade.add_argument("--queue", metavar="URL", help="have workers grade: postgresql://user@host/database")
    grade.add_argument("--no-wait", action="store_true", help="with --queue: do not wait for the workers")

    worker = command("worker", _worker, "For instructors: grade what `dianlib grade --queue` asks for.")
    worker.add_argument("--queue", required=True, metavar="URL", help="postgresql://user@host/database")
    worker.add_argument(
        "-j", "--jobs", type=int, metavar="N", help="processes (default: one a core, up to 4)"
    )
    worker.add_argument("--until-empty", action="store_true", help="leave when no job waits or runs")
    worker.add_argument(
        "--course",
        type=Path,
        default=Path(),
        metavar="FOLDER",
        help="the course's folder (default: this one)",
    )

    overview = command("report", _overview, "For instructors: show what a class gets wrong, on one page.")
    overview.add_argument("assignment", metavar="ASSIGNMENT")
    overview.add_argument(
        "--course",
        type=Path,
        default=Path(),
        metavar="FOLDER",
        help="the course's folder (default: this one)",
    )
    overview.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where to write (default: reports/ASSIGNMENT in the course)",
    )
    overview.add_argument("--book", default="", metavar="URL", help="the published book, to link to it")

    serve = command("serve", _serve, "Show the built book on this computer, and print its address.")
    serve.add_argument("folder", type=Path, nargs="?", default=Path("_build/html"), metavar="FOLDER")
    serve.add_argument("--port", type=int, default=8000, help="the first port to try (default: 8000)")

    run = command("run", _run, "For authors: run notebooks in place, so that a second run changes nothing.")
    run.add_argument("notebooks", type=Path, nargs="+", metavar="NOTEBOOK")
    run.add_argument(
        "--timeout", type=int, default=300, metavar="SECONDS", help="limit for one cell (default: 300)"
    )

    checks = command("checks", None, "For authors: look at the checks themselves.")
    actions = checks.add_subparsers(title="commands", metavar="COMMAND", required=True)
    report = command("report", _report, "Print how the checks fare against all known mistakes.", actions)
    report.add_argument("--markdown", action="store_true", help="as a Markdown table")
    return parser


# ----- learners ------------------------------------------------------------------------------------------


def _check(options: argparse.Namespace) -> int:
    from dianlib.notebooks import NotebookError, checked

    try:
        score = checked(options.notebook, options.timeout)
    except NotebookError as error:
        raise CommandError(error) from None
    if not score.results:
        print("\n".join(score.problems) or f"{options.notebook} holds no check of a task.")
        return 1
    print(score)
    return 0 if score.passed else 1


def _status(options: argparse.Namespace) -> int:
    from dianlib import progress
    from dianlib.checks import tasks

    standings = progress.load()
    chapters: dict[str, list[str]] = {}
    known = tasks()
    for task in known:
        chapters.setdefault(task.partition(".")[0], []).append(task)
    width = max(len(task) for task in known)
    for chapter, names in chapters.items():
        rows = []
        earned, passed = 0.0, 0
        for name in names:
            standing = standings.get(name)
            points, mark, note = 0.0, "-", ""
            if standing is not None:
                # The points are shares of what the task is worth now; that may have changed since.
                points = standing["score"] * known[name].points
                mark = "passed" if standing["passed"] else "tried"
                note = "" if standing["passed"] else ", ".join(standing["diagnosis"])
                passed += standing["passed"]
            earned += points
            rows.append(f"  {mark:6}  {name:{width}}  {points:g} of {known[name].points:g}  {note}".rstrip())
        available = sum(known[name].points for name in names)
        print(f"{chapter}: {passed} of {len(names)} tasks passed, {earned:g} of {available:g} points")
        print("\n".join(rows))
    return 0


def _hint(options: argparse.Namespace) -> int:
    from dianlib.checks import hint, tasks

    if options.task not in tasks():
        raise CommandError(f"There is no task {options.task!r}: `dianlib status` lists them all.")
    hint(options.task, options.step)
    return 0


def _download(options: argparse.Namespace) -> int:
    from dianlib import data

    for name in options.names or data.DOWNLOADABLE:
        try:
            folder = data.download(name)
        except (data.DataError, ValueError) as error:
            raise CommandError(_sentence(error)) from None
        print(f"{name} is in {folder}")
    return 0


def _reproduce(arguments: list[str]) -> int:
    from dianlib import reproduce

    return reproduce.main(arguments)


# ----- instructors ---------------------------------------------------------------------------------------


def _grade(options: argparse.Namespace) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # several processes share the cores
    # jsonschema would spend a second on a grammar for international addresses, of which no notebook has any.
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
    try:
        from dianlib.grading.driver import Course, GradingError, Progress, grade_all
    except ImportError as error:
        raise CommandError(
            f"Grading needs more packages ({error.name} is missing): install them with "
            "`pip install -e '.[grading]'`."
        ) from None
    jobs = _processes(options.jobs)
    if options.no_wait and not options.queue:
        raise CommandError("--no-wait goes with --queue: without a queue there are no workers to wait for.")
    try:
        course = Course(options.course)
        if options.queue:
            return _grade_by_queue(course, options)
        with Progress() as progress:
            summary = grade_all(course, options.assignment, jobs, options.force, progress)
    except GradingError as error:
        raise CommandError(_sentence(error)) from None
    print(summary)
    return 1 if summary.failed else 0


def _grade_by_queue(course: Any, options: argparse.Namespace) -> int:
    queue = _queue()
    try:
        summary = queue.grade_all(
            course, options.assignment, options.queue, options.force, not options.no_wait
        )
    except queue.QueueError as error:
        raise CommandError(error) from None
    if summary is None:
        return 0
    print(summary)
    return 1 if summary.failed else 0


def _worker(options: argparse.Namespace) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    queue = _queue()
    try:
        queue.work(options.course, options.queue, _processes(options.jobs), options.until_empty)
    except queue.QueueError as error:
        raise CommandError(error) from None
    return 0


def _queue() -> Any:
    try:
        from dianlib.grading import queue
    except ImportError as error:
        raise CommandError(
            f"A queue needs more packages ({error.name} is missing): install them with "
            "`pip install -e '.[grading]'`."
        ) from None
    return queue


def _processes(wanted: int | None) -> int:
    jobs = wanted if wanted is not None else min(4, os.cpu_count() or 1)
    if jobs < 1:
        raise CommandError(f"The number of processes must be 1 or more, not {jobs}.")
    return jobs


def _overview(options: argparse.Namespace) -> int:
    from dianlib.grading.records import read_all
    from dianlib.grading.report import write_report

    if options.book and not options.book.startswith(("https://", "http://", "file://")):
        raise CommandError(f"--book takes an address such as https://example.org/book, not {options.book!r}.")
    records = read_all(options.course / "records", options.assignment)
    if not records:
        raise CommandError(
            f"There are no records of {options.assignment!r} in {options.course / 'records'}: "
            "grade first, with `dianlib grade`, or name the folder of the course with --course."
        )
    submitted = options.course / "submitted"
    handed_in = None
    if submitted.is_dir():
        handed_in = [
            student.name for student in submitted.iterdir() if (student / options.assignment).is_dir()
        ]
    folder = options.output or options.course / "reports" / options.assignment
    try:
        page = write_report(records, folder, handed_in, options.book)
    except OSError as error:
        raise CommandError(f"The report cannot be written to {folder}: {error.strerror}.") from None
    print(f"The report is written: {page}")
    return 0


# ----- readers -------------------------------------------------------------------------------------------


class _Pages(SimpleHTTPRequestHandler):
    """Serve files without a line in the terminal for each, and have the browser ask for them anew."""

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "no-cache")  # else a rebuilt page would look unchanged
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the name is http.server's)
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # On Windows reuse would let two servers have one port; elsewhere it only skips a waiting time.
    allow_reuse_address = os.name != "nt"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay quiet when a browser hangs up in the middle of a page."""


def _serve(options: argparse.Namespace) -> int:
    folder = options.folder.resolve()
    if not (folder / "index.html").is_file():
        raise CommandError(f"There is no index.html in {folder}: build the book first, with `make html`.")
    if not 0 < options.port < 65_536:
        raise CommandError(f"A port is a number from 1 to 65535, not {options.port}.")
    with _server(folder, options.port) as server:
        print(
            f"The book is at http://127.0.0.1:{server.server_port}/ until you press Ctrl-C here.", flush=True
        )
        # Ctrl-C is how this command is meant to end.
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    return 0


def _server(folder: Path, first_port: int) -> ThreadingHTTPServer:
    """Open a server on the first port that is free; it answers this computer only."""
    last_port = min(first_port + 100, 65_535)
    for port in range(first_port, last_port + 1):
        try:
            return _Server(("127.0.0.1", port), partial(_Pages, directory=str(folder)))
        except OSError:
            continue
    raise CommandError(f"No port from {first_port} to {last_port} can be used: give another with --port.")


# ----- authors -------------------------------------------------------------------------------------------


def _run(options: argparse.Namespace) -> int:
    from dianlib.notebooks import NotebookError, execute

    for notebook in options.notebooks:
        start = time.perf_counter()
        try:
            changed = execute(notebook, options.timeout)
        except NotebookError as error:
            raise CommandError(error) from None
        seconds = time.perf_counter() - start
        print(f"{notebook}: {'changed' if changed else 'unchanged'}, {seconds:.1f} s", flush=True)
    return 0


def _report(options: argparse.Namespace) -> int:
    from dianlib.checks.table import write_table

    return 0 if write_table(options.markdown, sys.stdout) else 1


def _sentence(error: Exception) -> str:
    text = str(error)
    return text[:1].upper() + text[1:]


if __name__ == "__main__":
    sys.exit(main())
