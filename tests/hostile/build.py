"""Build the submissions of the corpus: a notebook as it was handed in, and the files beside it.

``cases/*.toml`` hold the cases. A case starts from a notebook of the assignment ``mlp`` that is ``blank``
(as released), ``stub`` (wrong answers that run and are worth nothing) or ``full`` (all answers right), and
changes it step by step; ``CHANGES`` lists the kinds of steps. The notebook is handled as plain
JSON, so that invalid ones can be written too.
"""

import copy
import json
import os
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat

from dianlib.checks import tasks

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
ASSIGNMENT = "mlp"
FULL = float(sum(task.points for task in tasks().values() if task.chapter == ASSIGNMENT))
ESSAY = "I would look at the loss first: it still falls, so I would train longer before I add layers."

# What a grader may notice; the words are those of the records.
FLAGS = frozenset(
    {
        *("timeout", "died", "memory", "processes", "disk-limit", "output-limit", "size-limit", "denied"),
        *("unreadable", "metadata", "missing-cell", "duplicate-cell", "locked-cell-edited", "order"),
        *("quarantined", "timestamp", "missing-notebook", "inert", "shortcut"),
    }
)
Notebook = dict[str, Any]
Cell = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A submission, and what must hold when it is graded.

    The points lie between ``low`` and ``high``. ``graded`` is "yes", "no" (it must be reported as not
    gradable) or "either". At least one of ``flags`` is wanted where there are any. ``secrets`` must not
    appear in anything that a student gets to read. ``after`` is the id of a case that is graded in the same
    course, before. ``feedback``: the page that the student gets is worth a look.
    """

    id: str
    group: str
    does: str
    start: str
    low: float
    high: float
    graded: str
    flags: frozenset[str]
    secrets: tuple[str, ...]
    student: str
    after: str
    feedback: bool
    changes: tuple[dict[str, Any], ...]


def load() -> dict[str, Case]:
    """Read all cases, in the order of the files."""
    found: dict[str, Case] = {}
    for file in sorted((HERE / "cases").glob("*.toml")):
        for entry in tomllib.loads(file.read_text())["case"]:
            case = _case(file.stem, entry)
            if case.id in found:
                raise ValueError(f"{file.name}: the case {case.id} is there twice.")
            found[case.id] = case
    return found


def _case(group: str, entry: dict[str, Any]) -> Case:
    name = entry["id"]
    unknown = entry.keys() - {
        *(
            "id",
            "does",
            "start",
            "loses",
            "points",
            "graded",
            "flags",
            "secrets",
            "student",
            "after",
            "feedback",
            "change",
        )
    }
    flags = frozenset(entry.get("flags", ()))
    if unknown or not flags <= FLAGS:
        raise ValueError(f"{group}.toml: the case {name} has unknown words: {unknown or flags - FLAGS}.")
    if "points" in entry:
        low, high = map(float, entry["points"])
    elif entry["start"] == "full":
        lost = sum(tasks()[f"{ASSIGNMENT}.{task}"].points for task in entry.get("loses", ()))
        low = high = FULL - lost
    else:
        low = high = 0.0
    return Case(
        id=name,
        group=group,
        does=entry["does"],
        start=entry["start"],
        low=low,
        high=high,
        graded=entry.get("graded", "yes"),
        flags=flags,
        secrets=tuple(entry.get("secrets", ())),
        # A name may also be given as bytes that are no text.
        student=os.fsdecode(bytes(entry["student"]))
        if isinstance(entry.get("student"), list)
        else entry.get("student", name),
        after=entry.get("after", ""),
        feedback=entry.get("feedback", False),
        changes=tuple(entry.get("change", ())),
    )


# ----- notebooks -----------------------------------------------------------------------------------------


def notebook(start: str) -> Notebook:
    """Return the assignment, blank or filled in, with the source of each cell as one text."""
    made = _read("exercises")
    if start == "blank":
        return made
    if start == "full":
        answers = {mark(cell): cell["source"] for cell in _read("solutions")["cells"]} | {"mlp-essay": ESSAY}
    else:
        answers = tomllib.loads((HERE / "stubs.toml").read_text())
    for cell in made["cells"]:
        if cell["metadata"].get("nbgrader", {}).get("solution"):
            cell["source"] = answers.get(mark(cell), cell["source"]).strip()
    return made


def _read(folder: str) -> Notebook:
    made: Notebook = json.loads((ROOT / folder / ASSIGNMENT / f"{ASSIGNMENT}.ipynb").read_text())
    for cell in made["cells"]:
        cell["source"] = "".join(cell["source"])
    return made


def mark(cell: Cell) -> str:
    """Return the name that nbgrader knows a cell by, "" where it has none."""
    return str(cell["metadata"].get("nbgrader", {}).get("grade_id", ""))


def new_cell(kind: str, source: str, number: int = 0) -> Cell:
    """Make a cell as a student's editor makes one."""
    cell: Cell = {"cell_type": kind, "id": f"own-{number}", "metadata": {}, "source": source}
    return cell | {"outputs": [], "execution_count": None} if kind == "code" else cell


# ----- the steps -----------------------------------------------------------------------------------------


@dataclass
class Draft:
    """A submission in the making."""

    notebook: Notebook
    name: str = f"{ASSIGNMENT}.ipynb"
    text: str | None = None  # in place of the notebook
    rewrite: list[Callable[[str], str]] = field(default_factory=list)  # applied to the file's text
    head: bytes = b""
    beside: list[Callable[[Path], None]] = field(default_factory=list)  # write further files

    @property
    def cells(self) -> list[Cell]:
        found: list[Cell] = self.notebook["cells"]
        return found

    def index(self, name: str) -> int:
        """Return the place of a cell; "start" and "end" are places too."""
        if name in ("start", "end"):
            return -1 if name == "start" else len(self.cells) - 1
        return next(number for number, cell in enumerate(self.cells) if mark(cell) == name)


def _answer(draft: Draft, cell: str, source: str) -> None:
    """Put a source in place of a cell's own."""
    draft.cells[draft.index(cell)]["source"] = source.strip("\n")


def _insert(draft: Draft, after: str, source: str, kind: str = "code", repeat: int = 1) -> None:
    """Add a cell of the student's own, once or many times."""
    place, number = draft.index(after) + 1, len(draft.cells)
    draft.cells[place:place] = [new_cell(kind, source.strip("\n"), number + i) for i in range(repeat)]


def _long(draft: Draft, after: str, kind: str, text: str, repeat: int, end: str) -> None:
    """Add a cell with a piece of text again and again on one line."""
    _insert(draft, after, text * repeat + end, kind)


def _delete(draft: Draft, cells: list[str]) -> None:
    """Remove cells."""
    for name in cells:
        del draft.cells[draft.index(name)]


def _copy(draft: Draft, cell: str, after: str = "end", source: str | None = None) -> None:
    """Copy a cell with all its metadata, as JupyterLab does it; the copy may get a source of its own."""
    made = copy.deepcopy(draft.cells[draft.index(cell)])
    made["id"] = f"copy-{len(draft.cells)}"
    made["source"] = made["source"] if source is None else source
    draft.cells.insert(draft.index(after) + 1, made)


def _move(draft: Draft, cell: str, before: str) -> None:
    """Move a cell to an earlier or later place."""
    moved = draft.cells.pop(draft.index(cell))
    draft.cells.insert(draft.index(before), moved)


def _kind(draft: Draft, cell: str, kind: str) -> None:
    """Make code of text, or text of code."""
    changed = draft.cells[draft.index(cell)]
    for name in ("outputs", "execution_count"):
        changed.pop(name, None)
    changed["cell_type"] = kind
    if kind == "code":
        changed |= {"outputs": [], "execution_count": None}


def _mark(draft: Draft, cell: str, key: str, value: Any) -> None:
    """Change one of nbgrader's marks of a cell."""
    draft.cells[draft.index(cell)]["metadata"]["nbgrader"][key] = value


def _metadata(draft: Draft, key: str, value: Any, cell: str = "") -> None:
    """Change metadata of a cell, or of the notebook."""
    owner = draft.cells[draft.index(cell)] if cell else draft.notebook
    owner["metadata"][key] = value


def _unmark(draft: Draft) -> None:
    """Remove nbgrader's marks from all cells."""
    for cell in draft.cells:
        cell["metadata"].pop("nbgrader", None)


def _swap_marks(draft: Draft, a: str, b: str) -> None:
    """Exchange the names of two cells."""
    first, second = draft.cells[draft.index(a)], draft.cells[draft.index(b)]
    first["metadata"]["nbgrader"]["grade_id"], second["metadata"]["nbgrader"]["grade_id"] = b, a


def _output(draft: Draft, cell: str, text: str, repeat: int = 1) -> None:
    """Store outputs in a cell: a line of text, many times, and the text as its result."""
    owner = draft.cells[draft.index(cell)]
    owner["outputs"] = [
        {"output_type": "stream", "name": "stdout", "text": (text + "\n") * repeat},
        {"output_type": "execute_result", "execution_count": 1, "metadata": {}, "data": {"text/plain": text}},
    ]
    owner["execution_count"] = 1


def _attachment(draft: Draft, cell: str, name: str, kind: str, content: str) -> None:
    """Attach a file to a markdown cell."""
    draft.cells[draft.index(cell)]["attachments"] = {name: {kind: content}}


def _ids(draft: Draft, style: str) -> None:
    """Give all cells the "same" id, or "none" as editors did before 2021."""
    for cell in draft.cells:
        cell["id"] = "same"
        if style == "none":
            del cell["id"]
    if style == "none":
        draft.notebook["nbformat_minor"] = 4


def _id(draft: Draft, number: int, id: str) -> None:  # noqa: A002 (the format's own word)
    """Give one cell, by its place, another cell id."""
    draft.cells[number]["id"] = id


def _format(draft: Draft, major: int, minor: int) -> None:
    """Write another version of the format, whatever the content is."""
    draft.notebook |= {"nbformat": major, "nbformat_minor": minor}


def _old_format(draft: Draft) -> None:
    """Save the notebook as editors did before 2015."""
    old = nbformat.convert(nbformat.from_dict(draft.notebook), 3)
    draft.text = json.dumps(old)


def _newlines(draft: Draft) -> None:
    """End all lines as Windows does."""
    for cell in draft.cells:
        cell["source"] = cell["source"].replace("\n", "\r\n")


def _rename(draft: Draft, to: str) -> None:
    """Save the notebook under another name."""
    draft.name = to


def _text(draft: Draft, text: str) -> None:
    """Hand in a file that holds this text instead of the notebook."""
    draft.text = text


def _cut(draft: Draft, characters: int) -> None:
    """Keep the beginning of the file only."""
    draft.rewrite.append(lambda text: text[:characters])


def _bom(draft: Draft) -> None:
    """Begin the file with a byte order mark, as some Windows editors do."""
    draft.head = b"\xef\xbb\xbf"


def _deep(draft: Draft, levels: int) -> None:
    """Add metadata that is nested very deeply."""
    nested = '{"a": ' * levels + "1" + "}" * levels
    draft.rewrite.append(lambda text: text.replace('"kernelspec":', f'"deep": {nested}, "kernelspec":', 1))


def _surrogate(draft: Draft) -> None:
    """Write half a character, which no encoding can hold, in place of the word HALF."""
    draft.rewrite.append(lambda text: text.replace("HALF", "\\ud800"))


def _file(draft: Draft, path: str, text: str = "", repeat: int = 1) -> None:
    """Hand in a further file."""

    def write(folder: Path) -> None:
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text * repeat)

    draft.beside.append(write)


def _link(draft: Draft, path: str, target: str) -> None:
    """Hand in a symbolic link, in place of the notebook where it has its name."""

    def write(folder: Path) -> None:
        (folder / path).unlink(missing_ok=True)
        (folder / path).symlink_to(target)

    draft.beside.append(write)


def _pipe(draft: Draft, path: str) -> None:
    """Hand in a named pipe; who reads it waits for ever."""

    def write(folder: Path) -> None:
        (folder / path).unlink(missing_ok=True)
        os.mkfifo(folder / path)

    draft.beside.append(write)


def _folder(draft: Draft, path: str) -> None:
    """Hand in a folder, in place of the notebook where it has its name."""

    def write(folder: Path) -> None:
        (folder / path).unlink(missing_ok=True)
        (folder / path).mkdir(parents=True)

    draft.beside.append(write)


def _rights(draft: Draft, path: str, mode: int) -> None:
    """Change the rights of a file or folder that was handed in."""
    draft.beside.append(lambda folder: (folder / path).chmod(mode))


def _bytes_name(draft: Draft, path: list[int]) -> None:
    """Hand in a file whose name is no text in any usual encoding."""
    draft.beside.append(lambda folder: Path(os.fsdecode(os.fsencode(folder) + b"/" + bytes(path))).touch())


CHANGES: dict[str, Callable[..., None]] = {
    "answer": _answer,
    "insert": _insert,
    "long": _long,
    "delete": _delete,
    "copy": _copy,
    "move": _move,
    "kind": _kind,
    "mark": _mark,
    "metadata": _metadata,
    "unmark": _unmark,
    "swap-marks": _swap_marks,
    "output": _output,
    "attachment": _attachment,
    "id": _id,
    "ids": _ids,
    "format": _format,
    "old-format": _old_format,
    "newlines": _newlines,
    "rename": _rename,
    "text": _text,
    "cut": _cut,
    "bom": _bom,
    "deep": _deep,
    "surrogate": _surrogate,
    "file": _file,
    "link": _link,
    "pipe": _pipe,
    "folder": _folder,
    "rights": _rights,
    "bytes-name": _bytes_name,
}


def hand_in(case: Case, submitted: Path) -> Path:
    """Write a case's submission into the folder of submissions and return its own folder."""
    draft = Draft(notebook(case.start))
    for change in case.changes:
        settings = dict(change)
        CHANGES[settings.pop("do")](draft, **settings)
    text = json.dumps(draft.notebook) if draft.text is None else draft.text
    for rewrite in draft.rewrite:
        text = rewrite(text)
    folder = submitted / case.student / ASSIGNMENT
    folder.mkdir(parents=True)
    (folder / "timestamp.txt").write_text("2026-11-20 12:00:00 UTC")
    (folder / draft.name).write_bytes(draft.head + text.encode())
    for write in draft.beside:
        write(folder)
    return folder
