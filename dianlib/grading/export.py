"""``nbgrader export``: the usual table, in which nobody who was not graded looks like a zero."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nbgrader.api import MissingEntry
from nbgrader.plugins import ExportPlugin

from dianlib.grading import records, work

COLUMNS = (
    *("assignment", "duedate", "timestamp", "student_id", "last_name", "first_name", "email"),
    *("raw_score", "late_submission_penalty", "score", "max_score", "status"),
)


class GradedOnly(ExportPlugin):  # type: ignore[misc]
    """Writes nbgrader's own columns and a last one, ``status``.

    It is "graded", "flagged" (graded, with something to look at), "failed" (this cannot be graded),
    "not graded" (not yet, or not in its present form) or "not submitted". Only what is graded, or was
    never handed in and counts 0, has a score.
    """

    def export(self, gradebook: Any) -> None:
        """Write the table to the file that ``--to`` names, or to grades.csv."""
        target = Path(self.to or "grades.csv")
        self.log.info("Exporting grades to %s", target)
        with target.open("w", newline="", encoding="utf-8", errors="backslashreplace") as table:
            writer = csv.DictWriter(table, COLUMNS)
            writer.writeheader()
            for assignment in gradebook.assignments:
                if not self.assignment or assignment.name in map(str, self.assignment):
                    writer.writerows(self._rows(gradebook, assignment))

    def _rows(self, gradebook: Any, assignment: Any) -> Iterator[dict[str, Any]]:
        wanted = {str(student) for student in self.student}
        students = {student.id: student for student in gradebook.students}
        # Whoever handed in and was never graded is not in the gradebook yet, and must not be left out.
        for student_id in sorted(students.keys() | set(self._submitted(assignment.name))):
            if wanted and student_id not in wanted:
                continue
            student = students.get(student_id)
            row = {
                "assignment": assignment.name,
                "duedate": assignment.duedate,
                "student_id": _plain(student_id),
                "last_name": _plain(student and student.last_name),
                "first_name": _plain(student and student.first_name),
                "email": _plain(student and student.email),
                "max_score": assignment.max_score,
                "status": self._status(assignment.name, student_id),
            }
            if row["status"] == "not submitted":
                row |= {"raw_score": 0.0, "late_submission_penalty": 0.0, "score": 0.0}
            elif row["status"] in ("graded", "flagged"):
                row |= _scores(gradebook, assignment.name, student_id, row["status"])
            yield {name: "" if value is None else value for name, value in row.items()}

    def _submitted(self, assignment: str) -> Iterator[str]:
        for folder in (Path(self.parent.coursedir.root) / "submitted").glob("*"):
            if (folder / assignment).is_dir():
                yield folder.name

    def _status(self, assignment: str, student: str) -> str:
        course = Path(self.parent.coursedir.root)
        folder = course / "submitted" / student / assignment
        record = records.read(course / "records", assignment, student)
        if record is None:
            return "not graded" if folder.is_dir() else "not submitted"
        # A folder that was taken away after grading takes no grade away.
        if folder.is_dir() and not work.is_done(course, assignment, student, folder):
            return "not graded"
        if record.status == "failed":
            return "failed"
        return "flagged" if record.flags else "graded"


def _plain(text: str | None) -> str | None:
    """Keep a spreadsheet from running a name or an id that looks like a formula."""
    return f"'{text}" if text and text.lstrip().startswith(("=", "+", "-", "@")) else text


def _scores(gradebook: Any, assignment: str, student: str, status: str) -> dict[str, Any]:
    try:
        submission = gradebook.find_submission(assignment, student)
    except MissingEntry:  # the gradebook was replaced by an older one
        return {"status": "not graded"}
    penalty = submission.late_submission_penalty
    return {
        "status": f"{status}; text waits" if submission.needs_manual_grade else status,
        "timestamp": submission.timestamp,
        "raw_score": submission.score,
        "late_submission_penalty": penalty,
        "score": max(0.0, submission.score - (penalty or 0.0)),
    }
