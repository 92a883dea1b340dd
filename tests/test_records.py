"""Records, locks and the secret; what is set aside from a submission; what an assignment must be like."""

import ast
import json
import os
import random
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import nbformat
import pytest
from assignment import ROOT, mark, read
from filelock import Timeout
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

from dianlib.checks import registry
from dianlib.checks.registry import CHAPTERS
from dianlib.grading import reading, records, release, work
from dianlib.grading.records import Flag, Record, TaskRecord
from dianlib.grading.release import Unusable
from dianlib.grading.work import Work

TASK = TaskRecord(
    cell="softmax-check",
    task="mlp.softmax",
    notebook="mlp",
    points=1.5,
    max_points=3.0,
    score=0.5,
    diagnosis=("softmax-no-max-shift",),
    message="not right yet\n  数据 \ud800 \x00",
    answer="def softmax(x):\n\treturn x",
    state="wrong",
)
RECORD = Record(
    assignment="mlp",
    student="ada",
    status="graded",
    reason="",
    submission="0" * 64,
    seed="ab" * 32,
    finished="2026-03-05T07:41:09+00:00",
    seconds=1.25,
    flags=(Flag("timeout", "A cell took too long."),),
    tasks=(TASK, replace(TASK, diagnosis=(), points=0.0)),
)


def python(code: str, *arguments: Any) -> "subprocess.Popen[str]":
    """Start another program that knows the same records."""
    command = [sys.executable, "-c", f"import sys\nfrom dianlib.grading import records\n{code}"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([*command, *map(str, arguments)], text=True, cwd=ROOT, **pipes)


# ----- reading and writing -------------------------------------------------------------------------------

IDS = {
    "plain": "ada.lovelace-1815_x",
    "a space": "Ada Lovelace",
    "Chinese": "王小明",
    "a long name in Chinese": "王" * 85,
    "200 letters": "a" * 200,
    "percent": "100%",
    "a quoted percent": "100%25",
    "a leading dot": ".hidden",
    "two dots": "..",
    "one dot": ".",
    "wildcards": "[a-z]*?{b}",
    "quotes": 'O\'Brien "Bob"',
    "a newline": "a\nb",
    "control characters": "a\x00\x1b[31m",
    "a backslash": "a\\b",
    "a slash": "a/../../b",
    "an address": "a+b@example.org",
    "formula": "=cmd|'/c calc'!A0",
    "no UTF-8": "a\udcff",
    "an emoji": "😀",
    "letters over letters": "e\u0301",
    "the same letters at once": "\u00e9",
    "trailing dot and space": "a. ",
    "the name of the lock": ".ada.json.lock",
    "the secret's": "secret",
    "json": "ada.json",
}


@pytest.mark.parametrize("student", IDS.values(), ids=IDS)
def test_a_record_is_read_as_it_was_written(tmp_path: Path, student: str) -> None:
    record = replace(RECORD, student=student)
    records.write(tmp_path, record)
    assert records.read(tmp_path, "mlp", student) == record
    assert records.read_all(tmp_path, "mlp") == [record]
    assert records.path(tmp_path, "mlp", student).parent == tmp_path / "mlp"
    with records.lock(tmp_path, "mlp", student).acquire(timeout=5):
        pass
    records.remove(tmp_path, "mlp", student)
    records.remove(tmp_path, "mlp", student)
    assert records.read(tmp_path, "mlp", student) is None
    assert records.read_all(tmp_path, "mlp") == []


def test_no_two_students_share_a_record(tmp_path: Path) -> None:
    students = [*IDS.values(), "王" * 84 + "李", "王" * 84, "b" * 199, "%E7%8E%8B", "%61da.lovelace-1815_x"]
    assert len({records.path(tmp_path, "mlp", student) for student in students}) == len(students)
    for student in students:
        records.write(tmp_path, replace(RECORD, student=student))
    assert [record.student for record in records.read_all(tmp_path, "mlp")] == sorted(students)


@pytest.mark.parametrize("assignment", IDS.values(), ids=IDS)
def test_an_assignment_may_have_an_odd_name_too(tmp_path: Path, assignment: str) -> None:
    seed = records.seed(tmp_path, assignment, "ada", "1")
    records.write(tmp_path, replace(RECORD, assignment=assignment))
    (record,) = records.read_all(tmp_path, assignment)
    assert record.assignment == assignment
    assert records.read_all(tmp_path, "other") == []
    assert records.seed(tmp_path, assignment, "ada", "1") == seed


WHOLE = asdict(RECORD)

DAMAGED: dict[str, bytes] = {
    "empty": b"",
    "half": json.dumps(WHOLE).encode()[:300],
    "zeros": bytes(4096),
    "no JSON": b"graded",
    "no text": b"\xff\xfe\x00\x01",
    "null": b"null",
    "a list": b"[]",
    "a number": b"3",
    "a text": b'"graded"',
    "an empty object": b"{}",
    "deep": b"[" * 100_000,
    "an unknown field": json.dumps({**WHOLE, "more": 1}).encode(),
    "flags that are null": json.dumps({**WHOLE, "flags": None}).encode(),
    "flags in an object": json.dumps({**WHOLE, "flags": {"kind": "a"}}).encode(),
    "a flag that is a text": json.dumps({**WHOLE, "flags": ["timeout"]}).encode(),
    "a flag without a text": json.dumps({**WHOLE, "flags": [{"kind": "a"}]}).encode(),
    "tasks in a number": json.dumps({**WHOLE, "tasks": 3}).encode(),
    "a task that is null": json.dumps({**WHOLE, "tasks": [None]}).encode(),
    "a task without a diagnosis": json.dumps(
        {**WHOLE, "tasks": [{k: v for k, v in WHOLE["tasks"][0].items() if k != "diagnosis"}]}
    ).encode(),
    "a diagnosis that is null": json.dumps(
        {**WHOLE, "tasks": [{**WHOLE["tasks"][0], "diagnosis": None}]}
    ).encode(),
    "somebody else's": json.dumps({**WHOLE, "student": "bob"}).encode(),
    "another assignment's": json.dumps({**WHOLE, "assignment": "metrics"}).encode(),
    "a number for a name": json.dumps({**WHOLE, "student": 3}).encode(),
    "null for a name": json.dumps({**WHOLE, "student": None}).encode(),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_record_is_no_record(tmp_path: Path, content: bytes) -> None:
    records.write(tmp_path, RECORD)
    records.write(tmp_path, replace(RECORD, student="bob"))
    records.path(tmp_path, "mlp", "ada").write_bytes(content)
    assert records.read(tmp_path, "mlp", "ada") is None
    assert [record.student for record in records.read_all(tmp_path, "mlp")] == ["bob"]


def test_a_record_without_one_of_its_fields_is_no_record(tmp_path: Path) -> None:
    records.write(tmp_path, RECORD)
    file = records.path(tmp_path, "mlp", "ada")
    for name in WHOLE:
        file.write_text(json.dumps({k: v for k, v in WHOLE.items() if k != name}))
        assert records.read(tmp_path, "mlp", "ada") is None, name
    file.write_text(json.dumps(WHOLE))
    assert records.read(tmp_path, "mlp", "ada") == RECORD


def test_a_folder_in_place_of_a_record_is_no_record(tmp_path: Path) -> None:
    records.path(tmp_path, "mlp", "ada").mkdir(parents=True)
    assert records.read(tmp_path, "mlp", "ada") is None
    assert records.read_all(tmp_path, "mlp") == []


def test_what_a_killed_writer_leaves_is_no_record(tmp_path: Path) -> None:
    records.write(tmp_path, RECORD)
    (tmp_path / "mlp" / ".new-abc").write_text(json.dumps({**WHOLE, "student": "bob"}))
    (tmp_path / "mlp" / ".new-abc.json").write_text(json.dumps({**WHOLE, "student": "bob"}))
    (tmp_path / "mlp" / "a copy of ada.json").write_text(json.dumps(WHOLE))
    assert records.read_all(tmp_path, "mlp") == [RECORD]


def test_a_reader_never_sees_half_a_record(tmp_path: Path) -> None:
    short = replace(RECORD, reason="a" * 10)
    long = replace(RECORD, reason="b" * 50_000, tasks=RECORD.tasks * 50)
    records.write(tmp_path, short)
    reader = python(
        """
from pathlib import Path
found = {}
print("ready", flush=True)
while "stop" not in found:
    record = records.read(Path(sys.argv[1]), "mlp", "ada")
    reason = record.reason if record else "nothing"
    found[reason] = found.get(reason, 0) + 1
print({f"{reason[:4]}{len(reason)}" for reason in found})
""",
        tmp_path,
    )
    assert reader.stdout is not None
    assert reader.stdout.readline() == "ready\n"
    for number in range(500):
        records.write(tmp_path, (short, long)[number % 2])
    records.write(tmp_path, replace(RECORD, reason="stop"))
    seen, _ = reader.communicate(timeout=30)
    assert ast.literal_eval(seen) == {"aaaa10", "bbbb50000", "stop4"}
    assert [file.name for file in (tmp_path / "mlp").iterdir()] == ["ada.json"]


def test_a_record_of_seeds_and_answers_is_for_its_owner_only(tmp_path: Path) -> None:
    records.write(tmp_path, RECORD)
    assert stat.S_IMODE(records.path(tmp_path, "mlp", "ada").stat().st_mode) == 0o600


# ----- locks ---------------------------------------------------------------------------------------------


def test_a_lock_is_free_again_when_its_holder_is_killed(tmp_path: Path) -> None:
    holder = python(
        """
from pathlib import Path
import time
lock = records.lock(Path(sys.argv[1]), "mlp", "ada")
lock.acquire()
print("held", flush=True)
time.sleep(60)
""",
        tmp_path,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(Timeout):
        records.lock(tmp_path, "mlp", "ada").acquire(timeout=0.2)
    for other in (("mlp", "bob"), ("metrics", "ada")):
        with records.lock(tmp_path, *other).acquire(timeout=0):
            pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with records.lock(tmp_path, "mlp", "ada").acquire(timeout=2):
        pass


def test_a_lock_is_no_record(tmp_path: Path) -> None:
    with records.lock(tmp_path, "mlp", "ada"):
        assert records.read(tmp_path, "mlp", "ada") is None
        assert records.read_all(tmp_path, "mlp") == []


# ----- the secret and the seed ---------------------------------------------------------------------------


def test_the_secret_is_drawn_once_by_whoever_comes_first(tmp_path: Path) -> None:
    code = """
from pathlib import Path
print("ready", flush=True)
sys.stdin.readline()
print(records.seed(Path(sys.argv[1]) / "new" / "records", "mlp", "ada", "0"))
"""
    drawers = [python(code, tmp_path) for _ in range(4)]
    for drawer in drawers:
        assert drawer.stdout is not None
        assert drawer.stdout.readline() == "ready\n"
    for drawer in drawers:
        assert drawer.stdin is not None
        drawer.stdin.write("go\n")
        drawer.stdin.flush()
    seeds = {drawer.communicate(timeout=30)[0] for drawer in drawers}
    folder = tmp_path / "new" / "records"
    assert seeds == {records.seed(folder, "mlp", "ada", "0") + "\n"}
    assert sorted(file.name for file in folder.iterdir()) == [".secret.lock", "secret"]
    assert len((folder / "secret").read_text().strip()) == 64


def test_nobody_else_reads_the_secret(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        records.seed(tmp_path, "mlp", "ada", "0")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600


def test_an_empty_secret_is_drawn_again(tmp_path: Path) -> None:
    (tmp_path / "secret").touch(mode=0o644)
    first = records.seed(tmp_path, "mlp", "ada", "0")
    assert len((tmp_path / "secret").read_text().strip()) == 64
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600
    assert records.seed(tmp_path, "mlp", "ada", "0") == first


def test_the_seed_depends_on_each_of_its_parts(tmp_path: Path) -> None:
    parts = [("mlp", "ada", "0"), ("metrics", "ada", "0"), ("mlp", "bob", "0"), ("mlp", "ada", "1")]
    parts += [("mlpa", "da", "0"), ("mlp", "ada0", ""), ('mlp", "ada', "", "0"), ("ada", "mlp", "0")]
    parts += [("mlp", "a\udcff", "0"), ("mlp", "王", "0")]
    seeds = [records.seed(tmp_path, *part) for part in parts]
    seeds += [records.seed(tmp_path / "another course", *part) for part in parts]
    assert len(set(seeds)) == 2 * len(parts)
    assert all(len(bytes.fromhex(seed)) == 32 for seed in seeds)
    assert [records.seed(tmp_path, *part) for part in parts] == seeds[: len(parts)]


# ----- the submission at hand ----------------------------------------------------------------------------


@pytest.fixture
def submitted(tmp_path: Path) -> Iterator[Path]:
    """A course with one release and one submission, of which the folder is returned."""
    (tmp_path / "exercises" / "mlp").mkdir(parents=True)
    nbformat.write(read("exercises", "mlp"), tmp_path / "exercises" / "mlp" / "mlp.ipynb")
    folder = tmp_path / "submitted" / "ada" / "mlp"
    folder.mkdir(parents=True)
    (folder / "mlp.ipynb").write_text("{}")
    yield folder
    work.finish()


def begin(folder: Path) -> Work:
    student, assignment = folder.parts[-2:]
    return work.begin(folder.parents[2], assignment, student, folder)


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def quarantine(folder: Path) -> Path:
    return folder.parents[2] / "quarantine" / folder.parent.name / folder.name


def big(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(reading.MAX_FILE + 1)


def folder_with_a_link(path: Path) -> None:
    path.mkdir()
    (path / "link").symlink_to("/etc/passwd")


SET_ASIDE: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "a link to a file": ("data.csv", lambda path: path.symlink_to("/etc/passwd")),
    "a link to a folder": ("data", lambda path: path.symlink_to("/etc")),
    "a link to nothing": ("data.csv", lambda path: path.symlink_to("nothing")),
    "a link to itself": ("data.csv", lambda path: path.symlink_to(path)),
    "a pipe": ("data.csv", os.mkfifo),
    "a folder": ("data", folder_with_a_link),
    "a closed folder": ("data", lambda path: path.mkdir(mode=0)),
    "a big file": ("data.csv", big),
    "a hidden link": (".netrc", lambda path: path.symlink_to("/etc/passwd")),
    "a link that is a notebook": ("other.ipynb", lambda path: path.symlink_to("/etc/passwd")),
    "a folder that is a notebook": ("other.ipynb", folder_with_a_link),
    "a pipe that is a notebook": ("other.ipynb", os.mkfifo),
    "a link for a time": ("timestamp.txt", lambda path: path.symlink_to("/etc/passwd")),
    "a folder for a time": ("timestamp.txt", Path.mkdir),
    "a link for a name": ("user_info.json", lambda path: path.symlink_to("/etc/passwd")),
    "a big file for a name": ("user_info.json", big),
    "a name of any bytes": (os.fsdecode(b"\xff\n\x1b[31m"), os.mkfifo),
}


@pytest.mark.parametrize(("name", "make"), SET_ASIDE.values(), ids=SET_ASIDE)
def test_what_must_not_be_copied_is_set_aside(
    submitted: Path, name: str, make: Callable[[Path], Any]
) -> None:
    (submitted / "helper.py").write_text("x = 1")
    make(submitted / name)
    at_hand = begin(submitted)
    assert left(submitted) == {"mlp.ipynb", "helper.py"}
    assert [path.name for path in quarantine(submitted).iterdir()] == [name]
    (flag,) = at_hand.flags
    assert flag.kind == "quarantined"
    assert flag.text.isprintable()
    assert at_hand.files() == {"helper.py": b"x = 1"}
    # Handed in again: the second takes the place of the first.
    make(submitted / name)
    assert begin(submitted).flags == [flag]
    assert left(submitted) == {"mlp.ipynb", "helper.py"}


def test_what_may_come_along_stays(submitted: Path) -> None:
    for name in ("helper.py", "data.csv", ".hidden", "submission_secret.txt", "user_info.json", ".DS_Store"):
        (submitted / name).write_text(name)
    (submitted / "other.ipynb").write_text("{}")
    (submitted / "timestamp.txt").write_text("2026-03-01 12:00:00 UTC")
    for name in (".ipynb_checkpoints", "__pycache__"):
        folder_with_a_link(submitted / name)
    before = left(submitted)
    at_hand = begin(submitted)
    assert at_hand.flags == []
    assert left(submitted) == before
    assert at_hand.files() == {"helper.py": b"helper.py", "data.csv": b"data.csv"}


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("/etc/passwd"), os.mkfifo, folder_with_a_link])
def test_the_notebook_itself_is_left_for_the_reader_to_refuse(submitted: Path, make: Any) -> None:
    (submitted / "mlp.ipynb").unlink()
    make(submitted / "mlp.ipynb")
    assert begin(submitted).flags == []
    with pytest.raises(reading.Unreadable):
        reading.read_notebook(submitted / "mlp.ipynb")


def test_in_a_path_with_wildcards_nothing_is_left_to_chance(submitted: Path) -> None:
    # nbgrader looks for what it should leave out with a pattern that begins with the path.
    odd = submitted.parent.rename(submitted.parent.with_name("[ada]")) / "mlp"
    folder_with_a_link(odd / ".ipynb_checkpoints")
    begin(odd)
    assert left(odd) == {"mlp.ipynb"}


def test_only_some_small_files_may_come_along(submitted: Path) -> None:
    for number in range(60):
        (submitted / f"{number:02}.txt").write_text("x")
    at_hand = begin(submitted)
    kept = {f"{number:02}.txt" for number in range(work.MAX_FILES)}
    assert left(submitted) == {"mlp.ipynb", *kept}
    assert len(list(quarantine(submitted).iterdir())) == 40
    assert len(at_hand.flags) == 11
    assert at_hand.flags[-1].text.startswith("30 more files")


TIMES = {
    "2026-03-01 12:00:00 UTC": True,
    "2026-03-01 12:00:00.123456 UTC\n": True,
    "2026-03-01T12:00:00+08:00": True,
    "2026-03-01 12:00:00 Asia/Shanghai": True,
    "": False,
    "yesterday": False,
    "2026-13-41 25:00:00 UTC": False,
    "0001-01-01 00:00:00 86399": False,
    "2026-03-01 12:00999999999999999999999999999999": False,
    "2026-03-01 12:00 /etc/passwd": False,
    "9" * 900: False,
    "2026-03-01 12:00:00 UTC" + " " * 1_000: False,
    "\0": False,
    "\ufeff2026-03-01 12:00:00 UTC": False,
}


@pytest.mark.parametrize(("text", "is_time"), TIMES.items())
def test_a_timestamp_is_a_time_or_is_set_aside(submitted: Path, text: str, is_time: bool) -> None:
    (submitted / "timestamp.txt").write_text(text)
    at_hand = begin(submitted)
    assert ("timestamp.txt" in left(submitted)) is is_time
    assert [flag.kind for flag in at_hand.flags] == ([] if is_time else ["timestamp"])


@pytest.mark.filterwarnings("ignore:tzname")
def test_random_timestamps_never_raise(submitted: Path) -> None:
    draw = random.Random(7)
    file = submitted / "timestamp.txt"
    kinds = set()
    for _ in range(400):
        text = bytearray(b"2026-03-01 12:00:00 UTC")
        for _ in range(draw.randrange(1, 8)):
            text[draw.randrange(len(text))] = draw.choice(b"0123456789 :-+./TZaE\x00\xff")
        file.write_bytes(text)
        kinds |= {flag.kind for flag in begin(submitted).flags} or {"time"}
    assert kinds == {"time", "timestamp"}


def test_a_record_says_what_was_graded(submitted: Path) -> None:
    began = time.time()
    at_hand = begin(submitted)
    at_hand.tasks.append(TASK)
    at_hand.flags += [Flag("timeout", "a"), Flag("died", "b"), Flag("timeout", "a")]
    at_hand.write()
    record = records.read(at_hand.records, "mlp", "ada")
    assert record is not None
    assert (record.assignment, record.student, record.status, record.reason) == ("mlp", "ada", "graded", "")
    assert record.submission == reading.fingerprint(submitted)
    assert record.seed == records.seed(at_hand.records, "mlp", "ada", record.submission)
    assert [flag.kind for flag in record.flags] == ["timeout", "died"]
    assert record.tasks == (TASK,)
    assert 0 <= record.seconds < 60
    assert record.finished.endswith("+00:00")
    assert record.finished[:4] == str(time.gmtime(began).tm_year)
    course = submitted.parents[2]
    assert work.is_done(course, "mlp", "ada", submitted)
    (submitted / "mlp.ipynb").write_text("{ }")
    assert not work.is_done(course, "mlp", "ada", submitted)


def test_a_submission_that_is_begun_is_not_done_and_is_locked(submitted: Path) -> None:
    begin(submitted).write()
    course = submitted.parents[2]
    at_hand = begin(submitted)
    assert work.current() is at_hand
    assert not work.is_done(course, "mlp", "ada", submitted)
    probe = "from pathlib import Path\nrecords.lock(Path(sys.argv[1]), 'mlp', 'ada').acquire(timeout=0)"
    assert python(probe, at_hand.records).wait() != 0
    work.finish()
    assert work.current() is None
    assert python(probe, at_hand.records).wait() == 0


def test_who_waits_too_long_for_a_lock_is_told_so(submitted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "LOCK_SECONDS", 0.1)
    holder = python(
        "from pathlib import Path\nlock = records.lock(Path(sys.argv[1]), 'mlp', 'ada')\nlock.acquire()\n"
        "print('held', flush=True)\nsys.stdin.read()",
        submitted.parents[2] / "records",
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    try:
        with pytest.raises(work.Busy, match="Another program has been grading ada"):
            begin(submitted)
    finally:
        holder.kill()
        holder.communicate()


def test_a_missing_notebook_is_named(submitted: Path) -> None:
    (submitted / "mlp.ipynb").rename(submitted / "mlp (1).ipynb")
    at_hand = begin(submitted)
    at_hand.lacks_notebook({"mlp.ipynb"})
    record = records.read(at_hand.records, "mlp", "ada")
    assert record is not None
    assert record.status == "failed"
    assert record.reason == "There is no mlp.ipynb in it; found: mlp (1).ipynb."
    assert record.flags == (Flag("missing-notebook", record.reason),)
    assert work.is_done(submitted.parents[2], "mlp", "ada", submitted)


def test_many_odd_names_of_notebooks_fit_in_one_line(submitted: Path) -> None:
    for number in range(100):
        (submitted / os.fsdecode(b"\xff\n\x1b%d.ipynb" % number)).write_text("{}")
    at_hand = begin(submitted)
    at_hand.lacks_notebook({"a.ipynb", "b.ipynb"})
    assert at_hand.reason.startswith("There is no a.ipynb or b.ipynb in it; found: ")
    assert at_hand.reason.isprintable()
    assert at_hand.reason.endswith(" and others.")
    assert len(at_hand.reason) < 500


# ----- the release ---------------------------------------------------------------------------------------


def check_cell(source: str, **marks: Any) -> NotebookNode:
    marks = {"grade": True, "solution": False, "locked": True, "points": 1, "grade_id": "c", **marks}
    return new_code_cell(source, metadata={"nbgrader": marks})


def notebook(*sources: str, **marks: Any) -> NotebookNode:
    return new_notebook(cells=[check_cell(source, **marks) for source in sources])


@pytest.mark.parametrize("slug", CHAPTERS)
def test_the_tasks_of_a_release_are_those_of_its_chapter(slug: str) -> None:
    found = release.tasks_of(read("exercises", slug))
    asked_for = [task for pairs in found.values() for task, _ in pairs]
    assert asked_for == [task for task in registry.tasks().values() if task.chapter == slug]
    cells = {mark(cell, "grade_id") for cell in read("exercises", slug).cells}
    assert found.keys() <= cells


def test_one_check_cell_may_ask_for_several_tasks() -> None:
    ((pair, other),) = release.tasks_of(
        notebook('check("mlp.relu", relu)\ncheck("mlp.softmax", softmax)\ncheck("mlp.relu", relu, seed=2)')
    ).values()
    assert (pair[0].id, pair[1], other[0].id, other[1]) == ("mlp.relu", "relu", "mlp.softmax", "softmax")


@pytest.mark.parametrize(
    ("source", "sentence"),
    {
        'check("mlp.magic", f)': "The check cell 'c' asks for the task 'mlp.magic', which is not known.",
        "assert f(1) == 2": "The autograded cell 'c' calls no check(...), so it cannot be judged",
        "": "The autograded cell 'c' calls no check(...)",
        "%timeit f(1)": "The check cell 'c' is not plain Python: ",
        "check(": "The check cell 'c' is not plain Python: ",
        "check('a\0', f)": "The check cell 'c' is not plain Python: ",
    }.items(),
)
def test_a_check_cell_that_cannot_be_judged_is_named(source: str, sentence: str) -> None:
    with pytest.raises(Unusable) as caught:
        release.tasks_of(notebook(source))
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


def test_cells_that_people_grade_are_not_judged() -> None:
    assert release.tasks_of(notebook("anything", solution=True)) == {}


def test_an_assignment_that_was_not_released_is_named(tmp_path: Path) -> None:
    with pytest.raises(Unusable, match="'mlp' was released: run `nbgrader generate_assignment mlp`"):
        release.notebooks(tmp_path, "mlp")


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"nbformat": 2}', "<<<<<<< HEAD", "\0"])
def test_a_damaged_release_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "exercises" / "mlp").mkdir(parents=True)
    (tmp_path / "exercises" / "mlp" / "mlp.ipynb").write_text(content)
    with pytest.raises(Unusable, match="run `nbgrader generate_assignment mlp --force`") as caught:
        release.notebooks(tmp_path, "mlp")
    assert "\n" not in str(caught.value)


def test_a_release_that_changes_is_read_again(tmp_path: Path) -> None:
    folder = tmp_path / "exercises" / "mlp"
    folder.mkdir(parents=True)
    nbformat.write(notebook('check("mlp.relu", relu)'), folder / "mlp.ipynb")
    assert release.modules_of(tmp_path, "mlp") == registry.open_modules({"mlp"})
    nbformat.write(notebook('check("metrics.f1", f1)'), folder / "mlp.ipynb")
    os.utime(folder / "mlp.ipynb", (0, 0))
    assert release.modules_of(tmp_path, "mlp") == registry.open_modules({"metrics"})
    nbformat.write(notebook("an essay", solution=True), folder / "mlp.ipynb")
    os.utime(folder / "mlp.ipynb", (1, 1))
    assert release.modules_of(tmp_path, "mlp") == registry.TOOLS
