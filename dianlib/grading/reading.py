"""Read what was handed in as data from a stranger: no links, no pipes, no surprise of size or encoding."""

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_NOTEBOOK = 20 << 20
MAX_FILE = 1 << 20
MAX_CELLS = 2_000
MAX_SOURCE = 200_000


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
        # Without waiting for the other end of a pipe, and without following a link.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as stream:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise Unreadable(f"{path.name} is not an ordinary file.")
            if status.st_size > limit:
                raise Unreadable(f"{path.name} is larger than {limit >> 20} MB.")
            return stream.read(limit + 1)[:limit]
    except OSError as error:
        reason = "it is a link" if path.is_symlink() else error.strerror
        raise Unreadable(f"{path.name} cannot be read: {reason}.") from None


def read_notebook(path: Path) -> list[Cell]:
    """Read the cells of a notebook of format 3 or 4. Raises Unreadable."""
    content = read_file(path, MAX_NOTEBOOK)
    try:
        # A byte that is no character becomes a question mark: one damaged comment should not cost all points.
        notebook = json.loads(content.decode(json.detect_encoding(content), "replace"))
    except RecursionError:
        raise Unreadable(f"{path.name} is nested too deeply to be a notebook.") from None
    except ValueError:
        raise Unreadable(f"{path.name} is damaged: it is not a complete JSON file.") from None
    if not isinstance(notebook, dict) or not isinstance(notebook.get("nbformat"), int):
        raise Unreadable(f"{path.name} is not a notebook.")
    if notebook["nbformat"] not in (3, 4):
        raise Unreadable(f"{path.name} has the notebook format {notebook['nbformat']}; save it in format 4.")
    cells = list(_cells(notebook))
    if len(cells) > MAX_CELLS:
        raise Unreadable(f"{path.name} has more than {MAX_CELLS:,} cells.")
    return cells


def _cells(notebook: dict[str, Any]) -> Iterator[Cell]:
    sheets = notebook["worksheets"] if isinstance(notebook.get("worksheets"), list) else [notebook]
    for sheet in sheets:
        cells = sheet.get("cells") if isinstance(sheet, dict) else None
        for cell in cells if isinstance(cells, list) else []:
            if isinstance(cell, dict):
                yield _cell(cell)


def _cell(cell: dict[str, Any]) -> Cell:
    source = cell.get("source", cell.get("input", ""))  # format 3 calls it input
    lines = [part for part in source if isinstance(part, str)] if isinstance(source, list) else [str(source)]
    # A lone half of a pair of code units cannot be written to a file.
    text = "".join(lines)[:MAX_SOURCE].encode("utf-8", "replace").decode().replace("\r\n", "\n")
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
