"""Put a student's answers into the notebook that was released.

The release is the skeleton: its check cells, its points and its order hold, whatever became of them in
the submission. From the submission come the sources of answer cells, and the cells that were added.
"""

import ast
import copy
import re
from collections.abc import Sequence
from typing import Any

from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell

from dianlib.grading.reading import Cell
from dianlib.grading.records import Flag


def mark(cell: NotebookNode, name: str) -> Any:
    """Return one of nbgrader's marks of a cell, None where it has none."""
    return cell.metadata.get("nbgrader", {}).get(name)


def graft(release: NotebookNode, handed_in: Sequence[Cell]) -> tuple[NotebookNode, list[Flag]]:
    """Return the released notebook with a student's answers and added cells in it, and what was noticed."""
    notebook = copy.deepcopy(release)
    for number, cell in enumerate(notebook.cells):
        cell.setdefault("id", f"cell-{number}")  # formats before 4.5 have none
    flags: list[Flag] = []
    by_grade_id = {mark(cell, "grade_id"): cell for cell in notebook.cells if mark(cell, "grade_id")}
    by_cell_id = {cell.get("id"): cell for cell in notebook.cells if cell.get("id")}
    answered: set[str] = set()
    seen: list[str] = []
    # Added cells come after the cell of the release that they followed in the submission.
    added: dict[str | None, list[NotebookNode]] = {}
    anchor: str | None = None
    for cell in handed_in:
        own = by_grade_id.get(cell.grade_id) or by_cell_id.get(cell.cell_id)
        if own is None:
            if cell.source.strip() and not _is_text_of(notebook, cell):
                added.setdefault(anchor, []).append(_new_cell(cell))
            continue
        name = own["id"]
        if name in seen:
            flags.append(Flag("duplicate-cell", f"The cell {_name(own)} is there more than once."))
        elif mark(own, "solution"):
            anchor = name
            if cell.kind == own.cell_type or own.cell_type == "markdown":
                own.source = inert(cell.source) if own.cell_type == "markdown" else cell.source
                answered.add(name)
            else:
                flags.append(Flag("metadata", f"The answer cell {_name(own)} is not a code cell any more."))
            seen.append(name)
            continue
        else:
            anchor = name
            seen.append(name)
        if cell.kind == "code" and cell.source.strip() != own.source.strip():
            # What a student wrote into a cell of ours still runs, beside the original.
            if mark(own, "locked"):
                flags.append(Flag("locked-cell-edited", f"The cell {_name(own)} was edited; ours is used."))
            added.setdefault(anchor, []).append(_new_cell(cell))
    for cell in notebook.cells:
        if mark(cell, "grade_id") and cell["id"] not in seen:
            flags.append(Flag("missing-cell", f"The cell {_name(cell)} is missing."))
        if mark(cell, "solution") and cell["id"] not in answered:
            cell.source = ""  # not the stub: it would replace an answer that stands in an added cell
    order = [cell["id"] for cell in notebook.cells if cell["id"] in seen]
    if order != seen:
        flags.append(Flag("order", "The cells are not in the order of the release; ours is used."))
    cells = list(added.pop(None, []))
    for cell in notebook.cells:
        cells += [cell, *added.pop(cell["id"], [])]
    notebook.cells = cells
    return notebook, flags


def _is_text_of(notebook: NotebookNode, cell: Cell) -> bool:
    """Tell whether a cell without a name is one of the release's own, from a program that drops names."""
    return any(cell.source.strip() == own.source.strip() for own in notebook.cells)


def _new_cell(cell: Cell) -> NotebookNode:
    made: NotebookNode
    made = new_code_cell(cell.source) if cell.kind == "code" else new_markdown_cell(inert(cell.source))
    return made


def _name(cell: NotebookNode) -> str:
    return str(mark(cell, "grade_id") or cell["id"])


def inert(text: str) -> str:
    """Take from Markdown what a browser would run or load: tags, entities, scripts, far pictures.

    Feedback and formgrader show it with the rights of whoever is logged in, and do not clean it themselves.
    """
    text = re.sub(r"&(?=[#\w])", "&amp;", text)
    text = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)
    text = re.sub(r"(?i)(java|vb)script\s*:|data\s*:", lambda match: match[0].replace(":", " :"), text)
    text = re.sub(r"!(?=\[)", "! ", text)
    # MathJax has commands that make links, styles and requests.
    return re.sub(r"\\(?=(href|require|style|class|cssId|unicode|data|import)\b)", "", text)


def asked(cell: NotebookNode) -> list[tuple[str, str]]:
    """Return the tasks that a check cell asks for: (task id, name of the answer), each once."""
    found = []
    for node in ast.walk(ast.parse(cell.source)):
        match node:
            case ast.Call(func=ast.Name("check"), args=[ast.Constant(str(task)), ast.Name(name), *_]) if (
                task,
                name,
            ) not in found:
                found.append((task, name))
    return found
