"""What was graded: one JSON file for each assignment and student.

``<course>/records/<assignment>/<student>.json`` is written last, when all grades of a submission are in
the gradebook. It says which submission was graded (a hash), on which inputs (the seed), what every
task got and what was noticed. A submission without such a file is not graded yet, whatever else lies
in the course folder: this is how a run that was killed is taken up again.
"""

import dataclasses
import hashlib
import hmac
import json
import os
import secrets
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from filelock import FileLock

SECRET = "secret"


@dataclass(frozen=True)
class Flag:
    """Something that an instructor may want to know: a kind such as "timeout", and one sentence."""

    kind: str
    text: str


@dataclass(frozen=True)
class TaskRecord:
    """What one task of one submission got.

    ``state`` is "right", "wrong", "stub", "missing" (the name was never defined), "refused" (a forbidden
    shortcut) or "limit" (out of time or memory, or its process died). ``answer`` is the student's code.
    """

    cell: str
    task: str
    notebook: str
    points: float
    max_points: float
    score: float
    diagnosis: tuple[str, ...]
    message: str
    answer: str
    state: str


@dataclass(frozen=True)
class Record:
    """The result of one submission. ``status`` is "graded" or "failed"; a failed one has a ``reason``."""

    assignment: str
    student: str
    status: str
    reason: str
    submission: str
    seed: str
    finished: str
    seconds: float
    flags: tuple[Flag, ...] = ()
    tasks: tuple[TaskRecord, ...] = ()


def path(folder: Path, assignment: str, student: str) -> Path:
    """Return where the record of a submission lies; ``folder`` is the course's folder ``records``."""
    return folder / _file_name(assignment) / f"{_file_name(student)}.json"


def _file_name(text: str) -> str:
    """Make a file name from an id: a student id may hold anything but "/", even a leading dot."""
    name = quote(text, safe=" +,=@", errors="surrogateescape")
    if len(name) > 200:  # a name in Chinese becomes nine times as long
        name = f"{name[:100]}~{hashlib.sha256(os.fsencode(text)).hexdigest()}"
    # No file is hidden, and no assignment takes the place of the secret.
    is_taken = name.startswith(".") or name == SECRET
    return f"%{ord(name[0]):02X}{name[1:]}" if is_taken else name


def write(folder: Path, record: Record) -> None:
    """Write a record so that others see all of it or nothing, even after a loss of power."""
    target = path(folder, record.assignment, record.student)
    target.parent.mkdir(parents=True, exist_ok=True)
    _write(target, json.dumps(dataclasses.asdict(record), indent=1))


def _write(target: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile("w", dir=target.parent, prefix=".new-", delete=False) as unfinished:
        unfinished.write(text)
        unfinished.flush()
        os.fsync(unfinished.fileno())
    Path(unfinished.name).replace(target)  # it has the mode 600


def read(folder: Path, assignment: str, student: str) -> Record | None:
    """Read one record; None where there is none, or none that can be read."""
    return _read(folder, path(folder, assignment, student))


def read_all(folder: Path, assignment: str) -> list[Record]:
    """Read all records of an assignment, sorted by student."""
    found = (folder / _file_name(assignment)).glob("[!.]*.json")
    records = [record for file in found if (record := _read(folder, file)) is not None]
    return sorted(records, key=lambda record: record.student)


def remove(folder: Path, assignment: str, student: str) -> None:
    """Take a done-mark away before the same submission is graded again."""
    path(folder, assignment, student).unlink(missing_ok=True)


def _read(folder: Path, file: Path) -> Record | None:
    """Read a file; what is damaged, or is not what its name says, is no record."""
    try:
        content: dict[str, Any] = json.loads(file.read_text())
        flags = tuple(Flag(**flag) for flag in content.pop("flags"))
        tasks = tuple(
            TaskRecord(**{**task, "diagnosis": tuple(task["diagnosis"])}) for task in content.pop("tasks")
        )
        record = Record(**content, flags=flags, tasks=tasks)
        return record if path(folder, record.assignment, record.student) == file else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def lock(folder: Path, assignment: str, student: str) -> FileLock:
    """Return the lock of one submission. The system frees it when its holder dies."""
    file = path(folder, assignment, student)
    file.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(file.with_name(f".{file.name}.lock"))


def seed(folder: Path, assignment: str, student: str, submission: str) -> str:
    """Return the seed, in hex, from which the inputs of a submission are drawn.

    It follows from the course's secret, the assignment, the student and what was handed in: grading the same
    submission again repeats its inputs, and a student who hands in again meets new ones.
    """
    text = json.dumps([assignment, student, submission]).encode()
    return hmac.new(_secret(folder), text, hashlib.sha256).hexdigest()


def _secret(folder: Path) -> bytes:
    """Return the course's secret, drawn when it is first needed. Only its owner can read the file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / SECRET
    with FileLock(folder / f".{SECRET}.lock"):
        # An empty one, left by a full disk, would be a secret that everybody knows.
        if not file.exists() or not file.stat().st_size:
            _write(file, secrets.token_hex(32) + "\n")
    return file.read_bytes()
