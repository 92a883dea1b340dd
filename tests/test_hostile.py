"""The corpus of hostile, broken and honest submissions meets the course's grader; and tests of its arena."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hostile import arena, measured, page
from hostile.arena import HONEST, Result, verdict
from hostile.build import ASSIGNMENT, CHANGES, FULL, hand_in, load

CASES = load()
# The whole corpus takes some minutes of two cores; a run without this variable takes every sixth case of it.
EVERY = 1 if os.environ.get("DIANLIB_ALL_CASES") else 6
TRIED = {name: case for number, (name, case) in enumerate(CASES.items()) if number % EVERY == 0}
TRIED |= {case.after: CASES[case.after] for case in list(TRIED.values()) if case.after}
needs_bubblewrap = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("bwrap") is None or Path(sys.prefix).is_relative_to("/tmp"),
    reason="needs Linux with bubblewrap, and Python outside of /tmp: the arena has one of its own",
)


# ----- the corpus ----------------------------------------------------------------------------------------


def test_every_case_can_be_built_and_every_kind_of_step_is_used(tmp_path: Path) -> None:
    for case in CASES.values():
        folder = hand_in(case, tmp_path)
        assert folder == tmp_path / case.student / ASSIGNMENT
        assert case.low <= case.high <= FULL, case.id
        assert not case.after or case.after in CASES, case.id
    assert {change["do"] for case in CASES.values() for change in case.changes} == CHANGES.keys()


def test_no_two_students_have_one_name() -> None:
    students = [case.student for case in (*CASES.values(), *HONEST)]
    assert len(students) == len(set(students))


# ----- the grader ----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def graded() -> Iterator[tuple[dict[str, Result], tuple[str, ...], dict[str, object]]]:
    """Let the course's grader meet the cases in one course."""
    with arena.workplace() as folder:
        yield arena.grade_together(list(TRIED.values()), folder / "all")


@needs_bubblewrap
def test_nobody_else_is_harmed(
    graded: tuple[dict[str, Result], tuple[str, ...], dict[str, object]],
) -> None:
    _, harm, report = graded
    assert harm == (), report


@needs_bubblewrap
@pytest.mark.parametrize("name", TRIED)
def test_a_case_ends_as_it_must(
    graded: tuple[dict[str, Result], tuple[str, ...], dict[str, object]], name: str
) -> None:
    result = graded[0][name]
    assert verdict(CASES[name], result) == (), (CASES[name].does, result)


# ----- the arena -----------------------------------------------------------------------------------------


def test_a_verdict_says_what_is_wrong() -> None:
    case = CASES["infinite_loop"]
    right = Result(case.high, flags=("timeout",))
    assert verdict(case, right) == ()
    assert verdict(case, Result(case.high + 1, flags=("timeout",))) == ("BREACH",)
    assert verdict(case, Result(case.low - 1, flags=("timeout",))) == ("LOST",)
    assert verdict(case, Result(None, flags=("timeout",))) == ("LOST",)
    assert verdict(case, Result(case.high, flags=("order",))) == ("UNNOTICED",)
    assert verdict(case, Result(case.high, ("LEAK",), ("timeout",))) == ("LEAK",)
    assert verdict(case, Result(case.high)) == (), "a grader without flags is not asked for them"
    damaged = CASES["empty_file"]
    assert verdict(damaged, Result(None, flags=("unreadable",))) == ()
    assert verdict(damaged, Result(0.0, flags=("unreadable",))) == ("NOT-REFUSED",)


@pytest.mark.parametrize(
    "text",
    [
        "<script>document.title = 'owned'</script>",
        "<img src=x onerror=alert(1)>",
        "<a href=' java\tscript:alert(1)'>x</a>",
        "<iframe srcdoc='x'></iframe>",
        "<style>body { display: none }</style>",
        "<img src='//example.org/pixel.png'>",
    ],
)
def test_scripts_in_a_page_are_seen(text: str) -> None:
    honest = "<html><script>theirs()</script><p>text</p></html>"
    assert arena.active(honest.replace("<p>", f"{text}<p>"), honest)
    assert not arena.active(honest, honest)
    quoted = text.replace("<", "&lt;")
    assert not arena.active(honest.replace("text", f"<pre>{quoted}</pre>"), honest)


@needs_bubblewrap
def test_the_container_is_closed_and_the_keeper_sees_what_is_left() -> None:
    with arena.workplace() as folder:
        course = arena.Course(folder / "closed")
        course.set_up("")
        look = (
            "import json, os; "
            "print(json.dumps([os.getuid(), os.path.exists('/ro' 'ot/.ssh'), os.listdir('/home')]))"
        )
        plant = "touch /tmp/planted; echo x >> nbgrader_config.py; setsid sleep 60 &"
        send = "import socket; socket.create_connection(('127.0.0.1', 47999)).sendall(b'x')"
        outside = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=5)"
        commands = [
            ["python", "-c", look],
            ["sh", "-c", plant],
            ["python", "-c", send],
            ["python", "-c", outside],
            ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "--proc", "/proc", "true"],
        ]
        report = course.run(commands, 60)
        own, _, _, reached, nested = report["runs"]
        user, root_seen, homes = json.loads(own["written"])
        assert user == (arena.NOBODY if os.getuid() == 0 else os.getuid())
        assert not root_seen
        assert homes == ["grader"]
        assert "unreachable" in reached["written"]
        assert nested["code"] == 0, nested["written"]
        harm = set(arena.harm_to_course(course, report))
        assert {"SENT", "PROCESS-LEFT", "PLANTED", "TAMPERED"} <= harm
        report = course.run([["sleep", "60"]], 1)
        assert "STUCK" in set(arena.harm_to_course(course, report))
        assert not report["left"]


# ----- the page ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grader", ["plain", "ours"])
def test_the_measurements_are_of_the_cases_as_they_are_now(grader: str) -> None:
    entries = measured.read(grader)
    stale = [name for name, entry in entries.items() if entry["case"] != measured.digest(CASES[name])]
    assert not stale, f"run `python -m hostile.measured {grader}` in the folder tests"


def test_every_case_has_been_measured_with_the_grader_of_the_course() -> None:
    assert measured.read("ours").keys() == CASES.keys()


def test_the_page_shows_the_measurements() -> None:
    assert page.PAGE.read_text() == page.page(), "run `python -m hostile.page` in the folder tests"
