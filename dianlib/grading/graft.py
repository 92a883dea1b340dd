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

MAX_MARKDOWN = 20_000
MAX_LINE = 1_000


def mark(cell: NotebookNode, name: str) -> Any:
    """Return one of nbgrader's marks of a cell, None where it has none."""
    return cell.metadata.get("nbgrader", {}).get(name)


def graft(release: NotebookNode, handed_in: Sequence[Cell]) -> tuple[NotebookNode, list[Flag]]:
    """Return the released notebook with a student's answers and added cells in it, and what was noticed."""
    notebook = copy.deepcopy(release)
    notebook.nbformat_minor = max(notebook.nbformat_minor, 5)  # since 4.5 cells have ids
    cells = list(notebook.cells)
    for number, own in enumerate(cells):
        own.setdefault("id", f"cell-{number}")
    flags: list[Flag] = []
    seen: list[int] = []
    answered: set[int] = set()
    # Added cells come after the cell of the release that they followed in the submission.
    before: dict[int, list[NotebookNode]] = {}
    after: dict[int, list[NotebookNode]] = {}
    anchor = -1
    for cell, place in zip(handed_in, _places(cells, handed_in), strict=True):
        if place is None:
            if cell.source.strip():
                after.setdefault(anchor, []).append(_new_cell(cell))
            continue
        own, is_first = cells[place], place not in seen
        if is_first:
            seen.append(place)
            anchor = place
        else:
            flags.append(Flag("duplicate-cell", f"The cell {_name(own)} is there more than once."))
        if is_first and mark(own, "solution"):
            if own.cell_type in (cell.kind, "markdown"):
                own.source = cell.source
                answered.add(place)
                continue
            flags.append(Flag("metadata", f"The answer cell {_name(own)} is not a code cell any more."))
        if cell.source.strip() in ("", own.source.strip()):
            continue
        # What a student wrote into a cell of ours still runs, beside the original.
        if mark(own, "locked"):
            flags.append(Flag("locked-cell-edited", f"The cell {_name(own)} was edited; ours is used."))
        if is_first and mark(own, "grade"):  # an answer that was written into the check cell
            before.setdefault(place, []).append(_new_cell(cell))
        else:
            after.setdefault(max(anchor, place), []).append(_new_cell(cell))
    added = [cell for found in (before, after) for several in found.values() for cell in several]
    for cell in [*added, *(cells[number] for number in answered)]:
        if _tame(cell):
            text = f"Text beyond {MAX_MARKDOWN:,} characters in one cell was cut off."
            flags.append(Flag("size-limit", text))
    for number, own in enumerate(cells):
        if mark(own, "grade_id") and number not in seen:
            flags.append(Flag("missing-cell", f"The cell {_name(own)} is missing."))
        if mark(own, "solution") and number not in answered:
            own.source = ""  # not the stub: it would replace an answer that stands in an added cell
    if seen != sorted(seen):
        flags.append(Flag("order", "The cells are not in the order of the release; ours is used."))
    notebook.cells = after.get(-1, [])
    for number, own in enumerate(cells):
        notebook.cells += [*before.get(number, []), own, *after.get(number, [])]
    return notebook, list(dict.fromkeys(flags))


def _places(cells: Sequence[NotebookNode], handed_in: Sequence[Cell]) -> list[int | None]:
    """Find for each cell that was handed in its place in the release; None for an added one.

    A cell is known by its mark, or by its id. Programs that drop both leave the text.
    """
    by_grade_id = {mark(own, "grade_id"): number for number, own in enumerate(cells)}
    by_id = {own.id: number for number, own in enumerate(cells)}
    places = []
    for cell in handed_in:
        place = by_grade_id.get(cell.grade_id) if cell.grade_id else None
        places.append(by_id.get(cell.cell_id) if place is None and cell.cell_id else place)
    by_text: dict[tuple[str, str], list[int]] = {}
    for number, own in enumerate(cells):
        if number not in places and own.source.strip():
            by_text.setdefault((own.cell_type, own.source.strip()), []).append(number)
    for index, cell in enumerate(handed_in):
        same = by_text.get((cell.kind, cell.source.strip()))
        if places[index] is None and same:
            places[index] = same.pop(0)
    return places


def _new_cell(cell: Cell) -> NotebookNode:
    made: NotebookNode
    made = new_code_cell(cell.source) if cell.kind == "code" else new_markdown_cell(cell.source)
    return made


def _tame(cell: NotebookNode) -> bool:
    """Make a student's cell harmless for the programs that show it; return whether text was cut off.

    They may take time in the square of the length of a text in Markdown, or of a line of code to colour.
    """
    if cell.cell_type == "code":
        if max(map(len, cell.source.split("\n"))) > MAX_LINE:
            cell.metadata.magics_language = "text"  # nbconvert's own mark: not to be coloured as Python
        return False
    is_long = len(cell.source) > MAX_MARKDOWN
    cell.source = inert(cell.source[:MAX_MARKDOWN])
    return is_long


def _name(cell: NotebookNode) -> str:
    return str(mark(cell, "grade_id") or cell.id)


# What a browser runs or loads, in Markdown that a student wrote. Each pattern matches up to the place where a
# space takes the meaning away and leaves the text readable, in formulas and in code as well.
_ACTIVE = re.compile(
    r"<(?=[A-Za-z/!?])(?!https?://)"  # tags, comments, <javascript:...>
    r"|&(?=#|\w+;)"  # entities, which may spell anything that is looked for here
    r"|!(?=\[)"  # pictures
    # Links in the page, to web pages and to mail addresses are left, and no javascript: or data:.
    r"|\](?=[(:](?![ \t\r\n]*(?:<?https?://|mailto:|#)))"
    # MathJax has commands that make links, styles and requests; Mermaid has a language of its own.
    r"|\\(?=(?:href|url|style|class|cssId|bbox|mmlToken|unicode|require|data|html)(?![a-z]))"
    r"|[`~]\s*mer(?=maid)"
)


def inert(text: str) -> str:
    """Take from Markdown what a browser would run or load: tags, scripts, pictures, links into programs.

    Feedback and formgrader show it with the rights of whoever is logged in, and do not clean it themselves.
    """
    return _ACTIVE.sub(r"\g<0> ", text)


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
