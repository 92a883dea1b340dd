"""The submission at hand: its lock, what is set aside before it is copied, and its record in the making."""

import glob
import os
import shutil
import stat
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from filelock import BaseFileLock, Timeout
from nbgrader.utils import parse_utc, rmtree

from dianlib.grading import reading, records
from dianlib.grading.records import Flag, Record, TaskRecord

OWN_FILES = ("timestamp.txt", "submission_secret.txt", "user_info.json")  # what `nbgrader submit` adds
IGNORED = (".ipynb_checkpoints", ".DS_Store", "__pycache__")  # nbgrader does not copy these
MAX_FILES = 20
MAX_NAMES = 10  # that one sentence lists
LOCK_SECONDS = 900.0


class Busy(Exception):
    """Another program is grading the same submission; the text says so."""


@dataclass
class Work:
    """The submission that this process is grading; nbgrader grades one at a time."""

    course: Path
    assignment: str
    student: str
    folder: Path
    lock: BaseFileLock | None
    submission: str
    began: float = field(default_factory=time.monotonic)
    reason: str = ""
    flags: list[Flag] = field(default_factory=list)
    tasks: list[TaskRecord] = field(default_factory=list)

    @property
    def records(self) -> Path:
        return self.course / "records"

    @cached_property
    def seed(self) -> str:
        return records.seed(self.records, self.assignment, self.student, self.submission)

    def write(self) -> None:
        """Write the record: from now on this submission is done."""
        record = Record(
            assignment=self.assignment,
            student=self.student,
            status="failed" if self.reason else "graded",
            reason=self.reason,
            submission=self.submission,
            seed=self.seed,
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - self.began, 3),
            flags=tuple(dict.fromkeys(self.flags)),
            tasks=tuple(self.tasks),
        )
        records.write(self.records, record)

    def lacks_notebook(self, expected: set[str]) -> None:
        """Record that the notebook of the assignment is not there, and which ones are."""
        there = [reading.shown(path.name) for path in sorted(self.folder.glob("*.ipynb"))]
        names = ", ".join(there[:MAX_NAMES]) + (" and others" if len(there) > MAX_NAMES else "")
        wanted = " or ".join(sorted(expected)) or "notebook"
        self.reason = f"There is no {wanted} in it; " + (
            f"found: {names}." if there else "no notebook at all."
        )
        self.flags.append(Flag("missing-notebook", self.reason))
        self.write()

    def files(self) -> dict[str, bytes]:
        """Read the small files that were handed in beside the notebooks; hidden ones do not count."""
        return {
            path.name: reading.read_file(path, reading.MAX_FILE)
            for path in sorted(self.folder.iterdir())
            if path.is_file() and path.suffix != ".ipynb" and not path.name.startswith(".")
            if path.name not in (*OWN_FILES, *IGNORED)
        }


_work: Work | None = None


def begin(course: Path, assignment: str, student: str, folder: Path) -> Work:
    """Take the lock of a submission, set aside what is not to be copied, and remember what was handed in."""
    global _work
    finish()
    lock = records.lock(course / "records", assignment, student)
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        minutes = f"{LOCK_SECONDS / 60:.0f} minutes"
        raise Busy(f"Another program has been grading {student} for {minutes}.") from None
    try:
        flags = _set_aside(course, student, assignment, folder)
        records.remove(course / "records", assignment, student)
        _work = Work(course, assignment, student, folder, lock, reading.fingerprint(folder), flags=flags)
    except BaseException:
        lock.release()
        raise
    return _work


def finish() -> None:
    """Give the lock of the last submission back."""
    global _work
    if _work is not None and _work.lock is not None:
        _work.lock.release()
    _work = None


def current() -> Work | None:
    """Return the submission that this process is grading."""
    return _work


def _set_aside(course: Path, student: str, assignment: str, folder: Path) -> list[Flag]:
    """Move out of a submission what nbgrader must not copy: links, pipes, folders, big files."""
    released = {path.name for path in (course / "exercises" / assignment).glob("*.ipynb")}
    # In a path with wildcards nbgrader does not recognise what it should leave out.
    skipped = IGNORED if glob.escape(str(folder)) == str(folder) else ()
    flags, names = [], []
    small_files = 0
    for path in sorted(folder.iterdir()):
        status = path.lstat()
        is_file = stat.S_ISREG(status.st_mode)
        is_small = is_file and status.st_size <= reading.MAX_FILE and os.access(path, os.R_OK)
        if path.name == "timestamp.txt" and is_file:
            if _is_time(path):
                continue
            text = "timestamp.txt holds no time; this counts as handed in without one."
            flags.append(Flag("timestamp", text))
        elif path.name in released or (is_file and path.suffix == ".ipynb"):
            continue  # notebooks are read with care later
        elif path.name in skipped or (path.name in OWN_FILES and is_small):
            continue
        else:
            small_files += is_small
            if is_small and small_files <= MAX_FILES:
                continue
            names.append(path.name)
        target = course / "quarantine" / student / assignment / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if stat.S_ISDIR(status.st_mode):
            path.chmod(0o700)  # whatever its owner may do with it now
        if target.is_dir() and not target.is_symlink():
            rmtree(str(target))
        else:
            target.unlink(missing_ok=True)
        shutil.move(path, target)
    for name in names[:MAX_NAMES]:
        flags.append(Flag("quarantined", f"{name!r} was set aside: only small files may come along."))
    if len(names) > MAX_NAMES:
        text = (
            f"{len(names) - MAX_NAMES:,} more files were set aside: no more than {MAX_FILES} may come along."
        )
        flags.append(Flag("quarantined", text))
    return flags


def _is_time(path: Path) -> bool:
    try:
        return parse_utc(reading.read_file(path, 1_000).decode().strip()) is not None
    except Exception:  # whoever reads dates leniently fails in many ways
        return False


def is_done(course: Path, assignment: str, student: str, folder: Path) -> bool:
    """Tell whether exactly this submission has been graded, or was found to be unreadable."""
    record = records.read(course / "records", assignment, student)
    return record is not None and record.submission == reading.fingerprint(folder)
