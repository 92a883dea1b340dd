"""Read the assignment notebooks: their tasks, and what their cells define when they are run."""

import contextlib
import io
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

ROOT = Path(__file__).parent.parent

BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
# The visible line of a check cell, and in the source notebook the hidden lines that follow it.
CHECK = re.compile(
    r'check\("(?P<task>[\w.]+)", (?P<candidate>\w+)\)'
    r"(?:\n### BEGIN HIDDEN TESTS\n"
    r'check\("(?P=task)", (?P=candidate), seed=(?P<seed>\d+)\)\n### END HIDDEN TESTS)?'
)


@dataclass(frozen=True)
class Item:
    """One task of an assignment: its statement, the cell for the answer and the cell with the check."""

    task: str
    candidate: str  # the name that the answer defines
    seed: int | None  # of the hidden check; None in the release
    statement: str
    answer: NotebookNode
    check: NotebookNode


@cache
def read(folder: str, slug: str) -> NotebookNode:
    """Read solutions/<slug>/<slug>.ipynb or exercises/<slug>/<slug>.ipynb."""
    return nbformat.read(ROOT / folder / slug / f"{slug}.ipynb", as_version=4)


def mark(cell: NotebookNode, name: str) -> Any:
    """Return one of nbgrader's marks of a cell, None where it has none."""
    return cell.metadata.get("nbgrader", {}).get(name)


def items(notebook: NotebookNode) -> list[Item]:
    """List the tasks of a notebook in their order."""
    found, statement, answer = [], "", None
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and cell.source.startswith("## "):
            statement = cell.source
        elif cell.cell_type == "code" and mark(cell, "solution"):
            answer = cell
        elif cell.cell_type == "code" and mark(cell, "grade"):
            match = CHECK.fullmatch(cell.source)
            assert match, cell.source
            assert answer is not None, cell.source
            seed = int(match["seed"]) if match["seed"] else None
            found.append(Item(match["task"], match["candidate"], seed, statement, answer, cell))
    return found


def answer_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """Return the cells that the answers consist of and need: no checks, no hints, no tries on real data."""
    shown = ("hint", "use-it-digits", "grade-this-submissions")
    return [
        cell
        for cell in notebook.cells
        if cell.cell_type == "code" and not mark(cell, "grade") and cell.id not in shown
    ]


def define(sources: list[str]) -> dict[str, Any]:
    """Run cells one after the other, quietly, and return what they define; a stub may raise."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for source in sources:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(NotImplementedError):
            exec(compile(source, "<cell>", "exec"), names)
    return names


def visible_and_hidden(cell: NotebookNode) -> tuple[set[str], set[str]]:
    """Sort the lines of a source cell into those that students see and those that they must not see."""
    lines: dict[bool, set[str]] = {True: set(), False: set()}
    inside = False
    for line in cell.source.splitlines():
        if line.strip() in (BEGIN, "### BEGIN HIDDEN TESTS"):
            inside = True
        elif line.strip() in (END, "### END HIDDEN TESTS"):
            inside = False
        else:
            lines[inside].add(line.strip())
    return lines[False], lines[True]
