"""The table of grades: who has a score, who has none and why, and that a spreadsheet can open it."""

import csv
import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pytest
from assignment import ROOT
from nbgrader.api import Gradebook
from nbgrader.apps.baseapp import NbGrader
from nbgrader.coursedir import CourseDirectory
from test_nbgrader import SCRIPTS

from dianlib.grading import reading, records
from dianlib.grading.export import COLUMNS, GradedOnly
from dianlib.grading.records import Flag, Record

# SQLAlchemy says this of what nbgrader adds to a gradebook; it has no consequence.
pytestmark = pytest.mark.filterwarnings("ignore:Object of type")

Row = dict[str, str]
DUE = datetime(2026, 3, 1, 12)  # noqa: DTZ001 (the gradebook keeps times without a zone, in UTC)


@dataclass(frozen=True)
class Student:
    """How far one student of the class got with one assignment."""

    status: str
    score: float | None = None  # in the gradebook; None: the gradebook knows no submission
    late: float = 0.0
    name: tuple[str | None, str | None, str | None] | None = (None, None, None)  # None: not in the gradebook


CLASS = {
    "ada": Student("graded", 7.5, name=("Lovelace", "Ada", "ada@example.org")),
    "bob": Student("flagged", 3.0),
    "cora": Student("failed", 0.0),
    "dan": Student("not graded", 9.0),
    "eve": Student("not graded", name=None),
    "fay": Student("not submitted"),
    "gil": Student("graded", 2.0, late=5.0),
    "hal": Student("graded", 4.0, late=1.5),
    "ida": Student("changed", 6.0),
    "jon": Student("archived", 8.0),
    "kim": Student("lost", name=(None, None, None)),
    'o"neil, "the boss"': Student("graded", 1.0),
    "two\nlines": Student("graded", 1.0),
    "=cmd|'/c calc'!A0": Student("graded", 1.0, name=("+SUM(A1)", "@x", "-1@example.org")),
    "王小明": Student("graded", 1.0, name=("王", "小明", None)),
    "[a]*": Student("flagged", 1.0),
}
SAFE = {"=cmd|'/c calc'!A0": "'=cmd|'/c calc'!A0"}


def hand_in(course: Path, student: str, assignment: str) -> Path:
    folder = course / "submitted" / student / assignment
    folder.mkdir(parents=True)
    (folder / f"{assignment}.ipynb").write_text("{}")
    return folder


def grade(course: Path, gradebook: Gradebook, student: str, assignment: str, how: Student) -> None:
    """Put what became of a submission where the export looks: files, a record, the gradebook."""
    if how.status != "not submitted":
        folder = hand_in(course, student, assignment)
        submission = reading.fingerprint(folder)
        if how.status != "not graded":
            flags = (Flag("timeout", "A cell took too long."),) if how.status == "flagged" else ()
            status, reason = ("failed", "It is damaged.") if how.status == "failed" else ("graded", "")
            record = Record(assignment, student, status, reason, submission, "00", "", 1.0, flags)
            records.write(course / "records", record)
        if how.status == "changed":
            (folder / f"{assignment}.ipynb").write_text("{ }")
        if how.status == "archived":
            folder.rename(course / "archived")
    if how.name is not None:
        names = dict(zip(("last_name", "first_name", "email"), how.name, strict=True))
        gradebook.add_student(student, **names)
    if how.score is not None:
        submission = gradebook.add_submission(assignment, student, timestamp=DUE)
        (graded,) = submission.notebooks[0].grades
        graded.auto_score, graded.needs_manual_grade = how.score, False
        submission.notebooks[0].late_submission_penalty = how.late
        gradebook.db.commit()


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Iterable[Path]:
    """A course of which the gradebook and the records are filled, with nothing run."""
    folder = tmp_path_factory.mktemp("course")
    (folder / "nbgrader_config.py").write_text((ROOT / "nbgrader_config.py").read_text())
    with pytest.MonkeyPatch.context() as patch:
        # A new gradebook is made by a program that is called by its name.
        patch.setenv("PATH", os.pathsep.join([str(SCRIPTS), os.environ["PATH"]]))
        with Gradebook(f"sqlite:///{folder / 'gradebook.db'}") as gradebook:
            for assignment, due in (("mlp", DUE), ("metrics", None)):
                gradebook.add_assignment(assignment, duedate=due)
                gradebook.add_notebook(assignment, assignment)
                gradebook.add_grade_cell("task", assignment, assignment, max_score=10, cell_type="code")
            for student, how in CLASS.items():
                grade(folder, gradebook, student, "mlp", how)
        folder.joinpath("submitted", "no-folder").write_text("")
        folder.joinpath("submitted", "fay").mkdir()
        folder.joinpath("submitted", "fay", "mlp").write_text("a file")
        yield folder


def rows(table: Path) -> list[Row]:
    with table.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def export(course: Path, tmp_path: Path, **settings: object) -> list[Row]:
    """Export in this process."""
    application = NbGrader()
    application.coursedir = CourseDirectory(root=str(course))
    plugin = GradedOnly(parent=application, to=str(tmp_path / "table.csv"), **settings)
    with Gradebook(f"sqlite:///{course / 'gradebook.db'}") as gradebook:
        plugin.export(gradebook)
    return rows(tmp_path / "table.csv")


@pytest.fixture(scope="module")
def table(course: Path) -> dict[tuple[str, str], Row]:
    """The table that the real command writes: (assignment, student) -> row."""
    done = subprocess.run(
        [str(SCRIPTS / "nbgrader"), "export"], cwd=course, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return {(row["assignment"], row["student_id"]): row for row in rows(course / "grades.csv")}


def test_the_table_has_its_columns_and_a_row_for_everybody(
    course: Path, table: dict[tuple[str, str], Row]
) -> None:
    assert all(tuple(row) == COLUMNS for row in table.values())
    ids = {SAFE.get(student, student) for student in CLASS}
    assert {student for assignment, student in table if assignment == "mlp"} == ids
    assert {student for assignment, student in table if assignment == "metrics"} == ids - {"eve"}
    assert len(rows(course / "grades.csv")) == 2 * len(CLASS) - 1


@pytest.mark.parametrize("student", CLASS)
def test_a_score_is_there_for_what_is_graded_only(table: dict[tuple[str, str], Row], student: str) -> None:
    how, row = CLASS[student], table["mlp", SAFE.get(student, student)]
    expected = {"changed": "not graded", "archived": "graded", "lost": "not graded"}
    assert row["status"] == expected.get(how.status, how.status)
    assert row["max_score"] == "10.0"
    assert row["duedate"] == "2026-03-01 12:00:00"
    if row["status"] in ("graded", "flagged"):
        assert how.score is not None
        assert float(row["raw_score"]) == how.score
        assert float(row["late_submission_penalty"]) == how.late
        assert float(row["score"]) == max(0.0, how.score - how.late)
        assert row["timestamp"] == "2026-03-01 12:00:00"
    elif row["status"] == "not submitted":
        assert (row["raw_score"], row["late_submission_penalty"], row["score"]) == ("0.0", "0.0", "0.0")
        assert row["timestamp"] == ""
    else:
        scores = (row["raw_score"], row["late_submission_penalty"], row["score"], row["timestamp"])
        assert scores == ("", "", "", "")


def test_a_text_that_nobody_has_read_yet_is_said(tmp_path: Path) -> None:
    (tmp_path / "nbgrader_config.py").write_text((ROOT / "nbgrader_config.py").read_text())
    with Gradebook(f"sqlite:///{tmp_path / 'gradebook.db'}") as gradebook:
        gradebook.add_assignment("mlp")
        gradebook.add_notebook("mlp", "mlp")
        gradebook.add_grade_cell("essay", "mlp", "mlp", max_score=2, cell_type="markdown")
        grade(tmp_path, gradebook, "ann", "mlp", Student("graded"))
        grade(tmp_path, gradebook, "bob", "mlp", Student("flagged"))
        for student in ("ann", "bob"):
            (essay,) = gradebook.add_submission("mlp", student).notebooks[0].grades
            essay.needs_manual_grade = True
        gradebook.db.commit()
        assert [row["status"] for row in export(tmp_path, tmp_path)] == [
            "graded; text waits",
            "flagged; text waits",
        ]
        for student in ("ann", "bob"):
            essay = gradebook.find_grade("essay", "mlp", "mlp", student)
            essay.manual_score, essay.needs_manual_grade = 2.0, False
        gradebook.db.commit()
    assert [(row["status"], row["score"]) for row in export(tmp_path, tmp_path)] == [
        ("graded", "2.0"),
        ("flagged", "2.0"),
    ]


def test_nobody_has_handed_in_the_other_assignment(table: dict[tuple[str, str], Row]) -> None:
    others = [row for (assignment, _), row in table.items() if assignment == "metrics"]
    assert {(row["status"], row["score"], row["duedate"]) for row in others} == {("not submitted", "0.0", "")}


def test_names_are_kept_and_formulas_are_not_run(table: dict[tuple[str, str], Row]) -> None:
    def name(student: str) -> tuple[str, str, str]:
        row = table["mlp", student]
        return row["last_name"], row["first_name"], row["email"]

    assert name("ada") == ("Lovelace", "Ada", "ada@example.org")
    assert name("王小明") == ("王", "小明", "")
    assert name("bob") == name("eve") == ("", "", "")
    assert name("'=cmd|'/c calc'!A0") == ("'+SUM(A1)", "'@x", "'-1@example.org")
    for row in table.values():
        assert not any(value.lstrip().startswith(("=", "+", "-", "@")) for value in row.values())


def test_only_what_was_asked_for_is_exported(course: Path, tmp_path: Path) -> None:
    found = export(course, tmp_path, assignment=["mlp"], student=["ada", "eve", "nobody"])
    assert [(row["assignment"], row["student_id"]) for row in found] == [("mlp", "ada"), ("mlp", "eve")]
    assert len(export(course, tmp_path, student=["ada"])) == 2
    assert export(course, tmp_path, assignment=["other"]) == []


def test_an_id_that_is_no_text_does_not_stop_the_export(course: Path, tmp_path: Path) -> None:
    folder = hand_in(course, os.fsdecode(b"a\xff"), "metrics")
    try:
        found = export(course, tmp_path, assignment=["metrics"])
    finally:
        (folder / "metrics.ipynb").unlink()
        folder.rmdir()
        folder.parent.rmdir()
    assert ("a\\udcff", "not graded", "") in [(r["student_id"], r["status"], r["score"]) for r in found]
