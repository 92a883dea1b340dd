"""Read what was handed in as data from a stranger: no links, no pipes, no surprise of size or encoding."""

import hashlib
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_NOTEBOOK = 20 << 20
MAX_FILE = 1 << 20
MAX_CELLS = 2_000
MAX_SOURCE = 200_000
MAX_TEXT = 500_000


class Unreadable(Exception):
    """A notebook cannot be read; the text says why, in one sentence."""


@dataclass(frozen=True)
class Cell:
    """A cell of a submission: its kind, its source, and the names that nbgrader and Jupyter gave it."""

    kind: str  # "code", "markdown" or "raw"
    source: str
    grade_id: str | None
    cell_id: str | None


def read_file(path: Path, limit: int) -> bytes:
    """Read an ordinary file, and nothing else. Raises Unreadable."""
    try:
        return _read_file(path, limit)
    except OSError as error:
        reason = "it is a link" if path.is_symlink() else error.strerror
        raise Unreadable(f"{shown(path.name)} cannot be read: {reason}.") from None


def _read_file(path: Path, limit: int) -> bytes:
    # Without waiting for the other end of a pipe, and without following a link.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise Unreadable(f"{shown(path.name)} is not an ordinary file.")
        if status.st_size > limit:
            raise Unreadable(f"{shown(path.name)} is larger than {limit >> 20} MB.")
        with os.fdopen(descriptor, "rb", closefd=False) as stream:
            return stream.read(limit)
    finally:
        os.close(descriptor)


def shown(name: str) -> str:
    """Write a file name in one line: its odd characters could not be stored, or would move the cursor."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)


def read_notebook(path: Path) -> list[Cell]:
    """Read the cells of a notebook of format 3 or 4. Raises Unreadable."""
    content, name = read_file(path, MAX_NOTEBOOK), shown(path.name)
    try:
        # A byte that is no character becomes a question mark: one damaged comment should not cost all points.
        notebook = json.loads(content.decode(json.detect_encoding(content), "replace"))
    except RecursionError:
        raise Unreadable(f"{name} is nested too deeply to be a notebook.") from None
    except ValueError:
        raise Unreadable(f"{name} is damaged: it is not a complete JSON file.") from None
    if not isinstance(notebook, dict) or type(notebook.get("nbformat")) is not int:
        raise Unreadable(f"{name} is not a notebook.")
    if notebook["nbformat"] not in (3, 4):
        raise Unreadable(f"{name} has the notebook format {notebook['nbformat']!s:.10}; save it in format 4.")
    sheets = [notebook] if notebook["nbformat"] == 4 else notebook.get("worksheets")
    lists = [sheet.get("cells") for sheet in _dictionaries(sheets)]
    if not lists or not all(isinstance(cells, list) for cells in lists):
        raise Unreadable(f"{name} is damaged: it has no list of cells.")
    cells = [_cell(cell) for cells in lists for cell in _dictionaries(cells)]
    if len(cells) > MAX_CELLS:
        raise Unreadable(f"{name} has more than {MAX_CELLS:,} cells.")
    if sum(len(cell.source) for cell in cells) > MAX_TEXT:
        raise Unreadable(f"{name} has more than {MAX_TEXT:,} characters of code and text.")
    return cells


def _dictionaries(parts: Any) -> list[dict[str, Any]]:
    return [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []


def _cell(cell: dict[str, Any]) -> Cell:
    source = cell.get("source", cell.get("input", ""))  # format 3 calls it input
    lines = source if isinstance(source, list) else [source]
    text = "".join(line for line in lines if isinstance(line, str)).replace("\r\n", "\n")[:MAX_SOURCE]
    # A lone half of a pair of code units cannot be written to a file.
    text = text.encode("utf-8", "replace").decode()
    metadata = cell.get("metadata")
    marks = metadata.get("nbgrader") if isinstance(metadata, dict) else None
    grade_id = marks.get("grade_id") if isinstance(marks, dict) else None
    kind = cell.get("cell_type")
    return Cell(
        kind if kind in ("code", "raw") else "markdown",
        text,
        grade_id if isinstance(grade_id, str) else None,
        cell["id"] if isinstance(cell.get("id"), str) else None,
    )


def fingerprint(folder: Path) -> str:
    """Return a hash of what was handed in: the names, kinds and contents of the files that count."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.is_dir():
            continue
        digest.update(json.dumps(path.name).encode())
        try:
            digest.update(hashlib.sha256(read_file(path, MAX_NOTEBOOK)).digest())
        except Unreadable as reason:
            digest.update(str(reason).encode())
    return digest.hexdigest()
