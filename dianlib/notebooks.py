"""Run notebooks: the author's in place and reproducibly, a learner's on the side for its score."""

import json
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

from dianlib.progress import LOG_VARIABLE, PROGRESS_VARIABLE

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


class NotebookError(Exception):
    """A notebook cannot be read, or cannot be run to its end; the text says which and why."""


# ----- authors -------------------------------------------------------------------------------------------


def execute(path: Path, timeout: int = 300) -> bool:
    """Run a notebook in a fresh kernel and store its outputs in it; return whether the file changed.

    Nothing that differs between two runs is stored: no times, no widget states, no version of the
    interpreter, and streams as one piece. Cells without an id get one from their position. So a
    second run writes the same bytes. The file is replaced at the end, or, when a cell fails
    or takes longer than ``timeout`` seconds, not touched. Raises NotebookError in that case.
    """
    before = _read_bytes(path)
    notebook = _parse_source(path, before)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = _client(notebook, path, timeout=timeout, coalesce_streams=True, store_widget_state=False)
    # The author's own progress is none of the notebook's business, nor is a plot window.
    environment = {**os.environ, PROGRESS_VARIABLE: ""}
    environment.pop("MPLBACKEND", None)
    try:
        client.execute(env=environment)
    except CellExecutionError as error:
        raised = _raised(error.ename, error.evalue)
        raise NotebookError(f"{path}: {_cell_name(client.current)} {raised}") from None
    except (CellTimeoutError, DeadKernelError) as error:
        raise NotebookError(f"{path}: {_cell_name(client.current)} {_gave_up(error, timeout)}") from None
    notebook.metadata.update(kernelspec=KERNEL, language_info={"name": "python"})
    notebook.metadata.pop("widgets", None)
    after = (nbformat.writes(notebook).rstrip("\n") + "\n").encode()
    if after == before:
        return False
    _replace(path, after)
    return True


def _parse_source(path: Path, content: bytes) -> NotebookNode:
    """Read a notebook for writing it again, with an id on every cell that another run would give it too."""
    try:
        raw = json.loads(content)
        cells = raw["cells"] if raw["nbformat"] == 4 else None
    except (ValueError, TypeError, KeyError):
        cells = None
    if not isinstance(cells, list):
        raise NotebookError(f"{path} is not a notebook of format 4.")
    raw["nbformat_minor"] = max(5, raw.get("nbformat_minor", 0))
    used: set[str] = set()
    for number, cell in enumerate(cells, start=1):
        name = cell.get("id")
        while not name or name in used:
            name = f"cell-{number}" if not name else f"{name}-again"
        cell["id"] = name
        used.add(name)
    notebook: NotebookNode = nbformat.reads(json.dumps(raw), as_version=4)
    try:
        nbformat.validate(notebook)
    except nbformat.ValidationError as error:
        raise NotebookError(f"{path} is not a valid notebook: {str(error).splitlines()[0]}") from None
    return notebook


def _replace(path: Path, content: bytes) -> None:
    """Write a file so that others see the old one or the new one, and never a half of it."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as unfinished:
        unfinished.write(content)
    aside = Path(unfinished.name)
    aside.chmod(path.stat().st_mode)
    aside.replace(path)


# ----- learners ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskResult:
    """What a notebook's last check of a task said; ``ran`` is False where that check was never reached."""

    task: str
    points: float
    max_points: float
    passed: bool
    diagnosis: tuple[str, ...]
    is_stub: bool = False
    ran: bool = True


@dataclass(frozen=True)
class Score:
    """The results of a notebook in the order of its tasks, and one sentence about each cell that failed."""

    results: tuple[TaskResult, ...]
    problems: tuple[str, ...] = ()

    @property
    def points(self) -> float:
        return sum(result.points for result in self.results)

    @property
    def max_points(self) -> float:
        return sum(result.max_points for result in self.results)

    @property
    def passed(self) -> bool:
        """True when all is well: some task was checked, each was passed, and no cell failed."""
        return bool(self.results) and all(result.passed for result in self.results) and not self.problems

    def __str__(self) -> str:
        rows = [(r.task, f"{r.points:g} of {r.max_points:g}", _verdict(r)) for r in self.results]
        rows.append(("sum", f"{self.points:g} of {self.max_points:g}", ""))
        width, digits = (max(len(row[column]) for row in rows) for column in (0, 1))
        lines = [f"{task:{width}}  {points:>{digits}}  {verdict}".rstrip() for task, points, verdict in rows]
        return "\n".join([*lines, *self.problems])


def _verdict(result: TaskResult) -> str:
    if not result.ran:
        return "its check did not run"
    if result.passed:
        return "passed"
    if result.is_stub:
        return "not begun"
    return ", ".join(result.diagnosis) or "cause not recognised"


def checked(path: Path, timeout: int = 120) -> Score:
    """Run a learner's notebook on the side and return what its checks said.

    The file itself is only read. A cell that fails, or takes longer than ``timeout`` seconds, does
    not stop the cells after it. Raises NotebookError when the file is not a notebook.
    """
    notebook = _parse_anything(path, _read_bytes(path))
    problems: list[str] = []
    client = _client(
        notebook,
        path,
        timeout=timeout,
        allow_errors=True,
        interrupt_on_timeout=True,
        # Go on after an interrupted cell; a kernel that cannot be interrupted ends the run.
        error_on_timeout={"ename": "CellTimeout", "evalue": "", "traceback": []},
        raise_on_iopub_timeout=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "reports.jsonl"
        client.on_cell_executed = lambda cell, cell_index, execute_reply: problems.extend(
            _problem(cell, execute_reply["content"], timeout)
        )
        try:
            client.execute(env={**os.environ, LOG_VARIABLE: str(log)})
        except (CellTimeoutError, DeadKernelError) as error:
            problems.append(f"{_cell_name(client.current, 'The')} {_gave_up(error, timeout)}.")
        results = {result.task: result for result in _logged(log)}
    named = [task for task in _named_tasks(notebook) if task not in results]
    order = list(dict.fromkeys([*_named_tasks(notebook), *results]))
    if named:
        from dianlib.checks import tasks  # torch, and only needed here

        known = tasks()
        for task in named:
            if task in known:
                results[task] = TaskResult(task, 0.0, known[task].points, False, (), ran=False)
            else:
                problems.append(f"There is no task {task!r}.")
    return Score(tuple(results[task] for task in order if task in results), tuple(problems))


def _parse_anything(path: Path, content: bytes) -> NotebookNode:
    """Read a notebook of any format, as leniently as Jupyter does."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about missing cell ids, which do not matter here
            notebook: NotebookNode = nbformat.reads(content.decode("utf-8-sig"), as_version=4)
            notebook.metadata.get("kernelspec"), [cell.cell_type for cell in notebook.cells]
    except Exception:  # whatever is inside, the answer is the same
        raise NotebookError(f"{path} is not a notebook, or it is damaged.") from None
    return notebook


def _problem(cell: NotebookNode, reply: dict[str, Any], timeout: int) -> Iterator[str]:
    if reply["status"] != "error":
        return
    name = _cell_name(cell, "The")
    if reply["ename"] == "CellTimeout":
        yield f"{name} took longer than {timeout} seconds and was stopped."
    else:
        yield f"{name} {_raised(reply['ename'], reply['evalue'])}"


def _logged(log: Path) -> Iterator[TaskResult]:
    if not log.exists():
        return
    for line in log.read_text(encoding="utf-8").splitlines():
        report = json.loads(line)
        yield TaskResult(
            report["task"],
            report["points"],
            report["max_points"],
            report["passed"],
            tuple(report["diagnosis"]),
            is_stub="still the stub" in report["message"],
        )


def _named_tasks(notebook: NotebookNode) -> list[str]:
    """List the tasks whose checks stand in the code, run or not."""
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    calls = re.findall(r"""^[^#\n]*\bcheck\(\s*["']([\w.]+)["']""", code, re.MULTILINE)
    return list(dict.fromkeys(calls))


# ----- both ----------------------------------------------------------------------------------------------


class _Client(NotebookClient):
    """A client that knows which cell it is at."""

    current: NotebookNode | None = None


def _client(notebook: NotebookNode, path: Path, **settings: Any) -> _Client:
    quiet = logging.getLogger("dianlib.notebooks")
    quiet.setLevel(logging.CRITICAL + 1)  # what goes wrong is said by us, in one sentence
    client = _Client(
        notebook,
        kernel_name="python3",  # that of this environment, whatever kernel the file was made with
        resources={"metadata": {"path": str(path.resolve().parent)}},
        record_timing=False,
        extra_arguments=["--IPKernelApp.log_level=ERROR", "--HistoryManager.hist_file=:memory:"],
        log=quiet,
        **settings,
    )

    def remember(cell: NotebookNode, cell_index: int) -> None:
        client.current = cell

    client.on_cell_execute = remember
    return client


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise NotebookError(f"There is no file {path}.") from None
    except OSError as error:
        raise NotebookError(f"{path} cannot be read: {error.strerror}.") from None


def _cell_name(cell: NotebookNode | None, article: str = "the") -> str:
    """Name a cell by its first line of code, which is what a person sees of it."""
    lines = [line.strip() for line in cell.source.splitlines() if line.strip()] if cell else []
    return f'{article} cell that begins "{lines[0]}"' if lines else f"{article} kernel"


def _raised(name: str, text: str) -> str:
    return f"raised {name}: {text}" if text else f"raised {name}"


def _gave_up(error: Exception, timeout: int) -> str:
    if isinstance(error, DeadKernelError):
        return "ended the kernel, so no cell after it ran"
    return f"took longer than {timeout} seconds and could not be stopped, so no cell after it ran"
