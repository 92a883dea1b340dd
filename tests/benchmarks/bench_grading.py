"""Grading 40 submissions of a real assignment: plain nbgrader beside this course, in one interleaved run.

Plain nbgrader means its own preprocessors (the same settings without dianlib.grading): student code runs in
a kernel, unguarded. All include their start. Seconds are those of the processor, of all processes; wall
time depends on what else the computer does.

Processor time is compared with one worker, since plain nbgrader has one: two that share a core slow each
other down. Submissions an hour are compared with two.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import psutil
import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from test_nbgrader import MISTAKES, submission  # noqa: E402 (found through the line above)

SLUG = "mlp"
SCRIPTS = Path(sys.executable).parent
N_SUBMISSIONS, N_PER_TURN = 40, 20
# What the speed must reach, as multiples of plain nbgrader's.
LESS_PROCESSOR_TIME, MORE_AN_HOUR = 8.0, 8.0
N_LARGE_CLASS = 500
# The lines of the settings that plug dianlib.grading in.
PLUGGED_IN = r"^c\.(Autograde|ExportApp|Judge)\.\w+ = (\[.*?\]|\S+).*?$"


@dataclass
class Cost:
    """Processor seconds and wall seconds of commands, and how much memory they held, every two seconds."""

    processor: float = 0.0
    wall: float = 0.0
    memory: list[int] = field(default_factory=list)

    def run(self, command: list[str], folder: Path) -> None:
        """Run a command and add up what it and all its descendants used."""
        environment = {**os.environ, "PATH": f"{SCRIPTS}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        began = time.monotonic()
        process = psutil.Popen(command, cwd=folder, env=environment, **quiet)
        # What a process has waited for is counted with it. Only bubblewrap does not hand the time of its
        # inside on, so that is read while it lives.
        inside: dict[psutil.Process, float] = {}
        done = threading.Event()

        def watch() -> None:
            rounds = 0
            while not done.wait(0.2):
                rounds += 1
                held = 0
                for each in [process, *process.children(recursive=True)]:
                    with contextlib.suppress(psutil.Error):
                        if each.name() != "bwrap" and each.parent().name() == "bwrap":
                            times = each.cpu_times()
                            inside[each] = sum(times[:4])  # own and children's, user and system
                        if rounds % 10 == 0:
                            held += each.memory_full_info().pss
                if rounds % 10 == 0:
                    self.memory.append(held)

        watcher = threading.Thread(target=watch)
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        done.set()
        watcher.join()
        assert status == 0
        self.wall += time.monotonic() - began
        self.processor += usage.ru_utime + usage.ru_stime + sum(inside.values())


@pytest.fixture(scope="module")
def courses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two courses with the same submissions: right ones, and ones with a mistake in every task."""
    mistaken = submission(SLUG, {task: source for task, (_, source) in MISTAKES.items()})
    kinds = [submission(SLUG, {}), mistaken]
    made = {}
    for name in ("plain", "ours"):
        folder = made[name] = tmp_path_factory.mktemp(name)
        settings = (ROOT / "nbgrader_config.py").read_text()
        if name == "plain":
            settings = re.sub(PLUGGED_IN, "", settings, flags=re.MULTILINE | re.DOTALL)
        (folder / "nbgrader_config.py").write_text(settings)
        (folder / "solutions" / SLUG).mkdir(parents=True)
        shutil.copy(ROOT / "solutions" / SLUG / f"{SLUG}.ipynb", folder / "solutions" / SLUG)
        Cost().run([str(SCRIPTS / "nbgrader"), "generate_assignment", SLUG], folder)
        for number in range(N_SUBMISSIONS):
            target = folder / "waiting" / f"student-{number:02}" / SLUG / f"{SLUG}.ipynb"
            target.parent.mkdir(parents=True)
            nbformat.write(kinds[number % 2], target)
    return made


def hand_in(course: Path, numbers: range) -> None:
    for number in numbers:
        (course / "submitted").mkdir(exist_ok=True)
        name = f"student-{number:02}"
        (course / "waiting" / name).rename(course / "submitted" / name)


def points(course: Path) -> dict[str, float]:
    from nbgrader.api import Gradebook

    with Gradebook(f"sqlite:///{course / 'gradebook.db'}") as gradebook:
        return {found.student.id: found.score for found in gradebook.assignment_submissions(SLUG)}


def test_forty_submissions_cost_an_eighth(
    courses: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    plain, alone, pair = Cost(), Cost(), Cost()
    # Plain, ours, plain: what else the computer does changes slowly, and meets all.
    turns = [range(N_PER_TURN), range(N_PER_TURN, N_SUBMISSIONS)]
    autograde = [str(SCRIPTS / "nbgrader"), "autograde", SLUG]
    grade = [str(SCRIPTS / "dianlib"), "grade", SLUG, "--force"]
    hand_in(courses["plain"], turns[0])
    plain.run(autograde, courses["plain"])
    hand_in(courses["ours"], range(N_SUBMISSIONS))
    alone.run([*grade, "-j", "1"], courses["ours"])
    pair.run([*grade, "-j", "2"], courses["ours"])
    hand_in(courses["plain"], turns[1])
    plain.run(autograde, courses["plain"])

    with capsys.disabled():
        print(f"\n{'a submission':16}{'processor':>12}{'less':>8}{'wall':>10}{'less':>8}")
        for name, cost in (("plain", plain), ("ours, -j 1", alone), ("ours, -j 2", pair)):
            print(
                f"{name:16}{cost.processor / N_SUBMISSIONS:10.2f} s{plain.processor / cost.processor:8.1f}"
                f"{cost.wall / N_SUBMISSIONS:8.2f} s{plain.wall / cost.wall:8.1f}"
            )
    found, expected = points(courses["ours"]), points(courses["plain"])
    right = {student for student, score in expected.items() if score == max(expected.values())}
    assert len(right) == N_SUBMISSIONS // 2
    assert {student: found[student] for student in right} == {student: expected[student] for student in right}
    assert plain.processor / alone.processor >= LESS_PROCESSOR_TIME
    assert plain.wall / pair.wall >= MORE_AN_HOUR


def test_a_class_of_five_hundred(courses: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Memory stays flat, and the last hundred take as long as the first."""
    course = courses["ours"]
    kinds = [path / SLUG / f"{SLUG}.ipynb" for path in sorted((course / "submitted").iterdir())][:2]
    for number in range(N_LARGE_CLASS):
        target = course / "submitted" / f"large-{number:03}" / SLUG / f"{SLUG}.ipynb"
        target.parent.mkdir(parents=True)
        shutil.copy(kinds[number % 2], target)
    cost = Cost()
    cost.run([str(SCRIPTS / "dianlib"), "grade", SLUG, "-j", "2"], course)

    finished = sorted((course / "records" / SLUG).glob("large-*.json"), key=lambda path: path.stat().st_mtime)
    assert len(finished) == N_LARGE_CLASS
    at = [path.stat().st_mtime for path in finished]
    first, last = at[99] - at[0], at[-1] - at[-100]
    early, late = cost.memory[len(cost.memory) // 10], cost.memory[-2]
    began = time.monotonic()
    Cost().run([str(SCRIPTS / "dianlib"), "report", SLUG], course)
    report = time.monotonic() - began
    with capsys.disabled():
        print(f"\n{N_LARGE_CLASS} submissions: {cost.wall:.0f} s, report {report:.1f} s")
        print(f"processor seconds each: {cost.processor / N_LARGE_CLASS:.2f}")
        print(f"the first hundred {first:.0f} s, the last hundred {last:.0f} s")
        print(f"memory: {early >> 20} MB after a tenth of the time, {late >> 20} MB at the end")
    assert late < 1.2 * early
    assert last < 1.5 * first
