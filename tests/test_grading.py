"""Grading a class: with nbgrader's commands, formgrader's button and `dianlib grade`, once and again."""

import copy
import json
import os
import pty
import re
import shutil
import sqlite3
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pytest
from assignment import ROOT, read
from bs4 import BeautifulSoup
from filelock import Timeout
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell
from nbgrader.api import Gradebook
from test_nbgrader import SCRIPTS

from dianlib.cli import main
from dianlib.grading import plugin, records, work
from dianlib.grading.driver import Course, GradingError, grade_all
from dianlib.grading.records import Record

pytestmark = pytest.mark.skipif(
    shutil.which("bwrap") is None,
    reason="bubblewrap is not installed (Debian and Ubuntu: apt install bubblewrap)",
)

SMALL = "warm-up"  # an assignment of two tasks
KEPT = ("imports", "linear-task", "linear", "linear-check", "relu-task", "relu", "relu-check")
ANSWERS = {
    "right": {},
    "blank": {"linear": "raise NotImplementedError", "relu": "raise NotImplementedError"},
    "half": {"relu": "def relu(x):\n    return torch.where(x > 0, x, 0.01 * x)"},
}


def small(folder: str, changed: dict[str, str] | None = None) -> NotebookNode:
    """Return the solution or the release of the small assignment, with other sources for some cells."""
    notebook = copy.deepcopy(read(folder, "mlp"))
    notebook.cells = [cell for cell in notebook.cells if cell.id in KEPT]
    for cell in notebook.cells:
        cell.source = (changed or {}).get(cell.id, cell.source)
    return notebook


def hand_in(course: Path, student: str, changed: dict[str, str] | None = None, name: str = SMALL) -> Path:
    """Hand in the small assignment: right answers, but for the cells in ``changed``."""
    path = course / "submitted" / student / SMALL / f"{name}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    right = {cell.id: cell.source for cell in small("solutions").cells if cell.id in ("linear", "relu")}
    nbformat.write(small("exercises", right | (changed or {})), path)
    return path


def make_course(folder: Path) -> Path:
    """Make a course in which the small assignment was released."""
    (folder / "solutions" / SMALL).mkdir(parents=True)
    shutil.copy(ROOT / "nbgrader_config.py", folder)
    nbformat.write(small("solutions"), folder / "solutions" / SMALL / f"{SMALL}.ipynb")
    made = Course(folder).api.generate_assignment(SMALL)
    assert made["success"], made
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A course; each test hands in for students of its own."""
    yield make_course(tmp_path_factory.mktemp("course"))
    plugin.close_sandboxes()


@pytest.fixture
def course(folder: Path) -> Iterator[Course]:
    """The course without submissions."""
    empty = (folder / "gradebook.db").read_bytes()
    yield Course(folder)
    (folder / "gradebook.db").write_bytes(empty)
    for name in ("submitted", "autograded", "records", "feedback", "quarantine"):
        shutil.rmtree(folder / name, ignore_errors=True)


def autograde(course: Course, student: str = "*", force: bool = False) -> dict[str, str]:
    """Do what `nbgrader autograde` does, or with ``force`` what formgrader's button does."""
    result: dict[str, str] = course.api.autograde(SMALL, student, force=force)
    return result


def score(course: Course, student: str) -> float | None:
    """Return the points of a student, None where the gradebook has none."""
    with Gradebook(f"sqlite:///{course.root / 'gradebook.db'}") as gradebook:
        found = [s for s in gradebook.assignment_submissions(SMALL) if s.student.id == student]
        grades = [g for s in found for notebook in s.notebooks for g in notebook.grades]
        return sum(g.auto_score for g in grades) if any(g.auto_score is not None for g in grades) else None


def record(course: Course, student: str) -> Record:
    found = records.read(course.records, SMALL, student)
    assert found is not None, student
    return found


def essence(course: Course) -> dict[str, tuple[object, ...]]:
    """What must not change when the same submissions are graded again."""
    return {
        r.student: (r.status, r.reason, r.seed, r.submission, r.flags, r.tasks, score(course, r.student))
        for r in records.read_all(course.records, SMALL)
    }


def assert_no_lock_is_held(course: Course) -> None:
    for student in course.submitted(SMALL):
        try:
            with records.lock(course.records, SMALL, student).acquire(timeout=0):
                pass
        except Timeout:
            pytest.fail(f"the lock of {student} is still held")


# ----- nbgrader autograde, again and again ---------------------------------------------------------------


def test_a_class_is_graded_and_a_second_run_does_nothing(course: Course) -> None:
    for student, changed in ANSWERS.items():
        hand_in(course.root, student, changed)
    assert autograde(course)["success"]
    assert {student: score(course, student) for student in ANSWERS} == {"right": 2, "blank": 0, "half": 1}
    files = [*(course.root / "autograded").rglob("*"), *course.records.rglob("*.json")]
    before = {path: path.stat().st_mtime_ns for path in files}
    again = autograde(course)
    assert again["success"]
    assert again["log"].count("Skipping existing assignment") == len(ANSWERS)
    assert {path: path.stat().st_mtime_ns for path in files} == before
    assert_no_lock_is_held(course)


def test_the_report_and_the_points_stand_in_the_check_cell(course: Course) -> None:
    hand_in(course.root, "half", ANSWERS["half"])
    autograde(course)
    path = course.root / "autograded" / "half" / SMALL / f"{SMALL}.ipynb"
    cells = {cell.id: cell for cell in nbformat.read(path, as_version=4).cells}
    right, wrong = cells["linear-check"].outputs, cells["relu-check"].outputs
    assert right[0].text == "mlp.linear: right, 1 of 1 points.\n"
    assert right[1].data == {"text/plain": "1.0"}
    assert "[relu-leaky]" in wrong[0].text
    assert wrong[1].data == {"text/plain": "0.0"}


def test_a_record_tells_the_whole_story(course: Course) -> None:
    hand_in(course.root, "half", ANSWERS["half"])
    found = course.grade(SMALL, "half")
    linear, relu = found.tasks
    assert (linear.state, linear.points, linear.max_points, linear.diagnosis) == ("right", 1, 1, ())
    assert (relu.state, relu.points, relu.diagnosis) == ("wrong", 0, ("relu-leaky",))
    assert relu.answer == ANSWERS["half"]["relu"]
    assert json.loads(records.path(course.records, SMALL, "half").read_text())["seed"] == found.seed


@pytest.mark.parametrize("left", ["everything", "no record", "half a record", "no notebook", "no result"])
def test_what_a_killed_run_left_is_taken_up(course: Course, left: str) -> None:
    for student, changed in ANSWERS.items():
        hand_in(course.root, student, changed)
    autograde(course)
    before = essence(course)
    kept = records.path(course.records, SMALL, "half")
    graded = course.root / "autograded" / "half" / SMALL
    if left in ("no record", "no notebook"):
        kept.unlink()
    if left == "half a record":
        kept.write_text(kept.read_text()[:200])
        kept.with_name(".new-abc").write_text("{")
    if left == "no notebook":
        (graded / f"{SMALL}.ipynb").unlink()
    if left == "no result":
        shutil.rmtree(graded)
    with Gradebook(f"sqlite:///{course.root / 'gradebook.db'}") as gradebook:
        if left != "everything":  # and the points of a run that did not come to its end
            for grade in gradebook.find_submission_notebook(SMALL, SMALL, "half").grades:
                grade.auto_score = 0.25
            gradebook.db.commit()
    again = autograde(course)
    assert again["success"]
    assert again["log"].count("Skipping existing assignment") == len(ANSWERS) - (left != "everything")
    assert essence(course) == before


def test_force_grades_all_again_with_the_same_result(course: Course) -> None:
    for student, changed in ANSWERS.items():
        hand_in(course.root, student, changed)
    autograde(course)
    before = essence(course)
    finished = {student: record(course, student).seconds for student in ANSWERS}
    assert autograde(course, force=True)["success"]
    assert essence(course) == before
    assert {student: record(course, student).seconds for student in ANSWERS} != finished


def test_a_changed_submission_is_graded_again_on_new_inputs(course: Course) -> None:
    hand_in(course.root, "eve", ANSWERS["half"])
    hand_in(course.root, "bob")
    autograde(course)
    first, other = record(course, "eve"), record(course, "bob")
    hand_in(course.root, "eve")
    again = autograde(course)
    assert again["log"].count("Skipping existing assignment") == 1
    assert (score(course, "eve"), record(course, "bob")) == (2, other)
    assert record(course, "eve").seed != first.seed
    # Handed in as before, it gets what it got before.
    hand_in(course.root, "eve", ANSWERS["half"])
    autograde(course)
    assert record(course, "eve").seed == first.seed
    assert record(course, "eve").tasks == first.tasks


def test_the_feedback_is_that_of_the_last_grading(course: Course) -> None:
    page = course.root / "feedback" / "eve" / SMALL / f"{SMALL}.html"
    for changed in (ANSWERS["half"], {}):
        hand_in(course.root, "eve", changed)
        autograde(course)
        assert course.api.generate_feedback(SMALL, "eve", force=False)["success"]
        told = BeautifulSoup(page.read_text(), "html.parser").get_text()
        assert all(task.message in told for task in record(course, "eve").tasks)


def test_what_an_answer_needs_may_stand_below_its_check(course: Course) -> None:
    bent = "def relu(x):\n    return bend(x)"
    path = hand_in(course.root, "eve", {"relu": bent})
    notebook = nbformat.read(path, as_version=4)
    cells = {cell.id: cell for cell in notebook.cells}
    cells["linear"].source = "def bend(x):\n    return x.clamp(min=0)\n\n\n" + cells["linear"].source
    # The cells of the first task were moved behind those of the second.
    first = [cell for cell in notebook.cells if cell.id.startswith("linear")]
    notebook.cells = [cell for cell in notebook.cells if cell not in first] + first
    nbformat.write(notebook, path)
    autograde(course)
    assert score(course, "eve") == 2
    # Without a move an answer has what is defined above it, and nothing else.
    path = hand_in(course.root, "bob", {"relu": bent})
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(new_code_cell("def bend(x):\n    return x.clamp(min=0)"))
    nbformat.write(notebook, path)
    autograde(course, "bob")
    assert score(course, "bob") == 1


def test_handed_in_again_with_a_newer_time(course: Course) -> None:
    path = hand_in(course.root, "eve", ANSWERS["half"])
    stamp = path.with_name("timestamp.txt")
    stamp.write_text("2030-01-01 12:00:00 UTC")
    autograde(course)
    assert score(course, "eve") == 1
    stamp.write_text("2030-01-02 12:00:00 UTC")
    hand_in(course.root, "eve")
    assert autograde(course)["success"]
    assert score(course, "eve") == 2


ODD_STUDENTS = ("stu[1]", "stu1", "Zoë Müller", "李 雷", "a*b", "what?", "o'neil", "...", "a--b", "%41")


def test_students_may_have_any_name(course: Course) -> None:
    for student in ODD_STUDENTS:
        hand_in(course.root, student, ANSWERS["half"] if student == "stu[1]" else {})
    assert autograde(course)["success"]
    points = {student: score(course, student) for student in ODD_STUDENTS}
    assert points == {student: 1 if student == "stu[1]" else 2 for student in ODD_STUDENTS}
    assert {r.student for r in records.read_all(course.records, SMALL)} == set(ODD_STUDENTS)
    assert autograde(course)["log"].count("Skipping existing assignment") == len(ODD_STUDENTS)
    assert course.pending(SMALL) == []


def test_one_student_with_wildcards_can_be_graded_alone(course: Course) -> None:
    hand_in(course.root, "stu[1]", ANSWERS["half"])
    hand_in(course.root, "stu1")
    assert course.grade(SMALL, "stu[1]").status == "graded"
    assert (score(course, "stu[1]"), score(course, "stu1")) == (1, None)


# ----- formgrader's button -------------------------------------------------------------------------------


def test_the_button_grades_several_students_twice_and_leaves_no_lock(course: Course) -> None:
    for student, changed in ANSWERS.items():
        hand_in(course.root, student, changed)
    for _ in range(2):
        for student in ANSWERS:
            assert autograde(course, student, force=True)["success"]
        assert_no_lock_is_held(course)
    assert {student: score(course, student) for student in ANSWERS} == {"right": 2, "blank": 0, "half": 1}


def test_the_button_says_what_is_wrong_and_leaves_no_lock(course: Course) -> None:
    hand_in(course.root, "eve", name="my homework")
    hand_in(course.root, "bob")
    failed = autograde(course, "eve", force=True)
    assert not failed["success"]
    assert f"There is no {SMALL}.ipynb in it; found: my homework.ipynb." in failed["log"]
    assert_no_lock_is_held(course)
    assert autograde(course, "bob", force=True)["success"]
    assert score(course, "eve") is None
    assert record(course, "eve").status == "failed"


def test_who_waits_in_vain_for_a_lock_leaves_the_work_of_the_other_alone(
    course: Course, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "LOCK_SECONDS", 0.2)
    hand_in(course.root, "eve")
    hand_in(course.root, "bob")
    autograde(course, "eve")
    half_done = course.root / "autograded" / "eve" / SMALL / "half-done"
    half_done.touch()
    records.remove(course.records, SMALL, "eve")
    with records.lock(course.records, SMALL, "eve"):
        result = autograde(course)
        with pytest.raises(GradingError, match="Another program has been grading eve"):
            course.grade(SMALL, "eve")
    assert not result["success"]
    assert "Another program has been grading eve" in result["log"]
    assert half_done.exists()
    assert score(course, "bob") == 2
    assert course.grade(SMALL, "eve").status == "graded"


# ----- what students write -------------------------------------------------------------------------------


def test_a_students_output_cannot_imitate_points(course: Course) -> None:
    path = hand_in(course.root, "eve", ANSWERS["blank"])
    notebook = nbformat.read(path, as_version=4)
    claim = "print('mlp.linear: right, 1 of 1 points.')\nprint('1.0')\n2.0"
    for number in reversed(range(len(notebook.cells) + 1)):
        notebook.cells.insert(number, new_code_cell(claim))
    for cell in notebook.cells:
        if cell.id in ("linear", "relu", "linear-check", "relu-check"):
            cell.source = claim
    nbformat.write(notebook, path)
    autograde(course)
    assert score(course, "eve") == 0
    assert {task.state for task in record(course, "eve").tasks} == {"missing"}


def test_the_feedback_of_an_unreadable_submission_says_why(course: Course) -> None:
    path = hand_in(course.root, "eve")
    path.write_text(path.read_text()[:-100])
    autograde(course)
    reason = f"{SMALL}.ipynb is damaged: it is not a complete JSON file."
    found = record(course, "eve")
    assert (found.status, found.reason, [flag.kind for flag in found.flags]) == (
        "failed",
        reason,
        ["unreadable"],
    )
    made = course.api.generate_feedback(SMALL, "eve")
    assert made["success"], made
    page = course.root / "feedback" / "eve" / SMALL / f"{SMALL}.html"
    assert f"Nothing could be graded. {reason}" in BeautifulSoup(page.read_text(), "html.parser").get_text()


# ----- dianlib grade -------------------------------------------------------------------------------------


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run `dianlib grade` in this process; return its exit code and what it said."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(["grade", *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


Said = Callable[..., tuple[int, str, str]]


def test_a_class_in_two_processes(
    course: Course, said: Said, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for student, changed in ANSWERS.items():
        hand_in(course.root, student, changed)
    hand_in(course.root, "eve", name="my homework")
    hand_in(course.root, "kim").write_text("{")
    (course.root / "submitted" / "lee" / SMALL).mkdir(parents=True)
    arguments = [SMALL, "-j", "2", "--course", str(course.root)]
    code, out, err = said(*arguments)
    assert (code, err) == (1, "")  # no terminal, no bar
    assert out.splitlines() == [
        "3 graded (0 of them flagged), 3 failed",
        f"  eve: There is no {SMALL}.ipynb in it; found: my homework.ipynb.",
        f"  kim: {SMALL}.ipynb is damaged: it is not a complete JSON file.",
        f"  lee: There is no {SMALL}.ipynb in it; no notebook at all.",
    ]
    assert {student: score(course, student) for student in ANSWERS} == {"right": 2, "blank": 0, "half": 1}
    assert_no_lock_is_held(course)
    # A second run has nothing to do, and says the same.
    before = essence(course)
    began = time.monotonic()
    assert said(*arguments) == (code, out, err)
    assert time.monotonic() - began < 3
    # What is mended is graded, and nothing else.
    finished = {student: records.path(course.records, SMALL, student).stat().st_mtime for student in ANSWERS}
    for student in ("eve", "kim", "lee"):
        hand_in(course.root, student)
    assert said(*arguments) == (0, "6 graded (0 of them flagged), 0 failed\n", "")
    assert {s: records.path(course.records, SMALL, s).stat().st_mtime for s in ANSWERS} == finished
    # Where there is no sandbox any more nothing is graded, and what was graded before stays.
    after = essence(course)
    assert {s: after[s] for s in ANSWERS} == {s: before[s] for s in ANSWERS}
    monkeypatch.setenv("PATH", str(tmp_path))
    code, out, err = said(*arguments, "--force")
    assert (code, out) == (2, "")
    assert err.startswith("Students' code runs only in a sandbox, and bubblewrap is not installed")
    assert err.count("\n") == 1
    assert essence(course) == after
    hand_in(course.root, "bob")
    result = autograde(course)
    assert not result["success"]
    assert "bubblewrap is not installed" in result["log"]
    assert score(course, "bob") is None


def test_a_fault_of_ours_costs_one_submission(course: Course, monkeypatch: pytest.MonkeyPatch) -> None:
    hand_in(course.root, "bob")
    hand_in(course.root, "eve")
    write = records.write

    def write_while_there_is_room(folder: Path, made: Record) -> None:
        if made.student == "bob":
            raise OSError(28, "No space left on device")
        write(folder, made)

    monkeypatch.setattr(records, "write", write_while_there_is_room)
    summary = grade_all(course, SMALL, 1)
    assert summary.graded == 1
    assert [student for student, _ in summary.failed] == ["bob"]
    assert course.pending(SMALL) == ["bob"]


def test_a_bar_in_a_terminal(course: Course) -> None:
    hand_in(course.root, "eve")
    hand_in(course.root, "bob", ANSWERS["half"])
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (24, 100))
    command = [str(SCRIPTS / "dianlib"), "grade", SMALL, "-j", "2"]
    with subprocess.Popen(command, cwd=course.root, stdout=subprocess.PIPE, stderr=its, text=True) as process:
        os.close(its)
        seen = b""
        while True:
            try:
                part = os.read(ours, 1 << 16)
            except OSError:  # the terminal was closed at the other end
                break
            seen += part
        assert process.stdout is not None
        assert process.stdout.read() == "2 graded (0 of them flagged), 0 failed\n"
    os.close(ours)
    assert process.returncode == 0
    assert re.search(r"100%\|.*\| 2/2 \[.*failed=0, flagged=0\]", seen.decode())


def test_submissions_that_nobody_handed_in(course: Course, said: Said) -> None:
    place = course.root / "submitted" / "STUDENT" / SMALL / f"{SMALL}.ipynb"
    sentence = f"Nobody has handed in {SMALL!r}: submissions belong in {place}.\n"
    assert said(SMALL, "--course", str(course.root)) == (2, "", sentence)


@pytest.mark.parametrize("jobs", ["0", "-3"])
def test_no_processes(course: Course, said: Said, jobs: str) -> None:
    sentence = f"The number of processes must be 1 or more, not {jobs}.\n"
    assert said(SMALL, f"-j={jobs}", "--course", str(course.root)) == (2, "", sentence)


@pytest.mark.parametrize("name", ["nothing", "../solutions", "", "."])
def test_an_assignment_that_is_not_there(course: Course, said: Said, name: str) -> None:
    sentence = f"There is no released assignment {name!r}; released are: {SMALL}.\n"
    assert said(name, "--course", str(course.root)) == (2, "", sentence)


def test_an_assignment_that_was_never_generated(course: Course, said: Said) -> None:
    other = course.root / "exercises" / "other"
    shutil.copytree(course.root / "exercises" / SMALL, other)
    (other / f"{SMALL}.ipynb").rename(other / "other.ipynb")
    try:
        code, out, err = said("other", "--course", str(course.root))
    finally:
        shutil.rmtree(other)
    sentence = "The gradebook does not know 'other': run `nbgrader generate_assignment other --force`.\n"
    assert (code, out, err) == (2, "", sentence)


def test_a_check_cell_without_a_check_is_refused(course: Course, said: Said) -> None:
    path = course.root / "exercises" / SMALL / f"{SMALL}.ipynb"
    kept = path.read_text()
    notebook = nbformat.read(path, as_version=4)
    next(cell for cell in notebook.cells if cell.id == "relu-check").source = "assert relu(1) == 1"
    nbformat.write(notebook, path)
    os.utime(path, (0, 0))
    hand_in(course.root, "eve")
    sentence = (
        "The autograded cell 'mlp-relu-check' calls no check(...), so it cannot be judged from outside: "
        "call one there, or make it a manually graded cell."
    )
    try:
        assert said(SMALL, "--course", str(course.root)) == (2, "", f"{sentence}\n")
        result = autograde(course)
    finally:
        path.write_text(kept)
    assert not result["success"]
    assert sentence in result["log"]
    assert score(course, "eve") is None


def test_a_gradebook_that_another_program_locks(
    course: Course, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "GRADEBOOK_SECONDS", 0.2)
    hand_in(course.root, "eve")
    other = sqlite3.connect(course.root / "gradebook.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    try:
        found = said(SMALL, "--course", str(course.root))
    finally:
        other.close()
    sentence = "Another program has kept the gradebook locked for a minute: close it, then grade again.\n"
    assert found == (2, "", sentence)


def test_a_gradebook_that_is_none(course: Course, said: Said) -> None:
    database = course.root / "gradebook.db"
    database.rename(course.root / "kept.db")
    database.write_text("This is no database.\n" * 100)
    try:
        code, out, err = said(SMALL, "--course", str(course.root))
    finally:
        (course.root / "kept.db").replace(database)
    sentence = f"The gradebook sqlite:///{database} cannot be used: file is not a database.\n"
    assert (code, out, err) == (2, "", sentence)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (None, "There is no nbgrader_config.py in {folder}: run this in the course's folder."),
        (
            "c = get_config()\nc.CourseDirectory.course_id = 'x'\n",
            "{folder}/nbgrader_config.py does not plug in the sandbox: "
            'take the section "grading" from the file that comes with the course.',
        ),
        (
            "c = get_config(\n",
            "{folder}/nbgrader_config.py cannot be used: "
            "SyntaxError: '(' was never closed (nbgrader_config.py, line 1)",
        ),
        ("1 / 0\n", "{folder}/nbgrader_config.py cannot be used: ZeroDivisionError: division by zero"),
    ],
)
def test_a_folder_that_is_no_course(tmp_path: Path, said: Said, config: str | None, sentence: str) -> None:
    if config is not None:
        (tmp_path / "nbgrader_config.py").write_text(config)
    code, out, err = said(SMALL, "--course", str(tmp_path))
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == sentence.format(folder=tmp_path)
