"""The notebooks that were released: the skeleton of every submission, and what their check cells ask for."""

from functools import cache
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbgrader.utils import is_grade, is_solution

from dianlib.checks import registry
from dianlib.checks.task import Task
from dianlib.grading.graft import asked, mark


class Unusable(Exception):
    """An assignment cannot be graded as it is; the text says what to change."""


@cache
def _read(path: Path, _: float) -> NotebookNode:
    notebook: NotebookNode = nbformat.read(path, as_version=4)
    return notebook


def notebooks(course: Path, assignment: str) -> dict[str, NotebookNode]:
    """Read the released notebooks of an assignment: name -> notebook. Raises Unusable where there is none."""
    found = sorted((course / "exercises" / assignment).glob("*.ipynb"))
    if not found:
        raise Unusable(
            f"No assignment {assignment!r} was released: run `nbgrader generate_assignment {assignment}`."
        )
    try:
        return {path.stem: _read(path, path.stat().st_mtime) for path in found}
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise Unusable(
            f"A notebook in {found[0].parent} cannot be read ({reason}): "
            f"run `nbgrader generate_assignment {assignment} --force`."
        ) from None


def tasks_of(notebook: NotebookNode) -> dict[str, list[tuple[Task, str]]]:
    """Return what each check cell asks for: its grade id -> (task, name of the answer)."""
    known = registry.tasks()
    found = {}
    for cell in notebook.cells:
        if cell.cell_type != "code" or not is_grade(cell) or is_solution(cell):
            continue
        grade_id = mark(cell, "grade_id")
        try:
            asked_for = asked(cell)
        except SyntaxError as error:
            raise Unusable(f"The check cell {grade_id!r} is not plain Python: {error}.") from None
        for task, _ in asked_for:
            if task not in known:
                raise Unusable(f"The check cell {grade_id!r} asks for the task {task!r}, which is not known.")
        if not asked_for:
            raise Unusable(
                f"The autograded cell {grade_id!r} calls no check(...), so it cannot be judged from outside: "
                "call one there, or make it a manually graded cell."
            )
        found[grade_id] = [(known[task], answer) for task, answer in asked_for]
    return found


def modules_of(course: Path, assignment: str) -> tuple[str, ...]:
    """Return the modules of dianlib that the students of an assignment may import."""
    chapters = {
        task.chapter
        for notebook in notebooks(course, assignment).values()
        for pairs in tasks_of(notebook).values()
        for task, _ in pairs
    }
    return registry.open_modules(chapters) if chapters else registry.TOOLS
