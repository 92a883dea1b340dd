"""Parts of `dianlib grade` are killed; in the end everybody has what an undisturbed run gives."""

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from filelock import Timeout
from nbgrader.api import Gradebook
from test_grading import ANSWERS, SMALL, hand_in, make_course
from test_nbgrader import SCRIPTS

from dianlib.grading import records

pytestmark = pytest.mark.skipif(
    shutil.which("bwrap") is None,
    reason="bubblewrap is not installed (Debian and Ubuntu: apt install bubblewrap)",
)

KINDS = ("driver", "worker", "warm process", "bubblewrap", "box")
N_STUDENTS = 8
# Long enough that a kill often meets a submission in the middle.
PAUSE = "import time, torch\ntime.sleep(0.4)\n"


@dataclass
class Kill:
    """A part to be killed: some seconds after so many submissions are done."""

    kind: str
    graded: int
    delay: float
    hit: bool = False  # False where the run had ended before there was such a part


@dataclass
class Story:
    """A class that was graded in spite of kills."""

    kills: list[Kill]
    codes: list[int] = field(default_factory=list)  # of the runs that were needed
    wrong: list[str] = field(default_factory=list)  # what is not as it has to be


class Class:
    """A course with submissions, graded as often as wanted from the same beginning."""

    def __init__(self, folder: Path) -> None:
        self.folder = make_course(folder)
        answers = list(ANSWERS.values())
        for number in range(N_STUDENTS):
            changed: dict[str, str] = answers[number % len(answers)]
            linear = PAUSE + changed.get(
                "linear", "def linear(x, weight, bias):\n    return x @ weight.T + bias"
            )
            hand_in(self.folder, f"student {number}", {**changed, "linear": linear})
        self.students = [f"student {number}" for number in range(N_STUDENTS)]
        self._ungraded = (self.folder / "gradebook.db").read_bytes()
        began = time.monotonic()
        assert self.run([]).codes == [0]
        self.seconds = time.monotonic() - began
        self.result = self._read()

    def run(self, kills: Sequence[Kill], chance: random.Random | None = None) -> Story:
        """Grade all submissions; while the first runs go on carry out the kills, then run undisturbed."""
        for folder in (self.folder / "autograded", self.folder / "records" / SMALL):  # the secret stays
            shutil.rmtree(folder, ignore_errors=True)
        (self.folder / "gradebook.db").write_bytes(self._ungraded)
        story, waiting = Story(list(kills)), list(kills)
        while not story.codes or (story.codes[-1] != 0 and len(story.codes) < len(kills) + 2):
            command = [str(SCRIPTS / "dianlib"), "grade", SMALL, "-j", "2"]
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            with psutil.Popen(command, cwd=self.folder, **quiet) as driver:
                seen = self._disturb(driver, waiting, chance or random.Random(0))
                story.codes.append(driver.wait(timeout=120))
            _, left = psutil.wait_procs(seen, timeout=10)
            story.wrong += [f"a process was left: {process.cmdline()}" for process in left]
        if kills:
            story.wrong += self._differences()
        return story

    def _disturb(
        self, driver: psutil.Popen, waiting: list[Kill], chance: random.Random
    ) -> set[psutil.Process]:
        """Kill what is to be killed in this run; return all processes that belonged to it."""
        ready: float | None = None
        seen: set[psutil.Process] = set()
        while driver.poll() is None:
            family = _below(driver)
            seen |= set(family)
            if waiting and ready is None and self._count() >= waiting[0].graded:
                ready = time.monotonic() + waiting[0].delay
            if ready is not None and time.monotonic() >= ready:
                found = _parts(waiting[0].kind, driver, family)
                if found:
                    kill, ready = waiting.pop(0), None
                    kill.hit = True
                    chance.choice(found).send_signal(signal.SIGKILL)
                    if kill.kind == "driver":
                        break
            time.sleep(0.05)
        return seen

    def _count(self) -> int:
        return len(list((self.folder / "records" / SMALL).glob("[!.]*.json")))

    def _differences(self) -> list[str]:
        """Compare with the undisturbed run."""
        wrong = []
        now = self._read()
        for student in self.students:
            if now.get(student) != self.result[student]:
                wrong.append(f"{student} has another result: {now.get(student)}")
            try:
                with records.lock(self.folder / "records", SMALL, student).acquire(timeout=0):
                    pass
            except Timeout:
                wrong.append(f"the lock of {student} is held")
        return wrong

    def _read(self) -> dict[str, Any]:
        """Return for each student the points in the gradebook, and what the record says of the tasks."""
        with Gradebook(f"sqlite:///{self.folder / 'gradebook.db'}") as gradebook:
            points = {
                submission.student.id: [
                    grade.auto_score for notebook in submission.notebooks for grade in notebook.grades
                ]
                for submission in gradebook.assignment_submissions(SMALL)
            }
        found = records.read_all(self.folder / "records", SMALL)
        return {r.student: (points.get(r.student), r.status, r.seed, r.tasks) for r in found}


def _below(driver: psutil.Process) -> list[psutil.Process]:
    try:
        found: list[psutil.Process] = driver.children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return found


def _parts(kind: str, driver: psutil.Process, family: list[psutil.Process]) -> list[psutil.Process]:
    """Find the living processes of one kind."""
    if kind == "driver":
        return [driver]
    found = []
    for process in family:
        try:
            name, parent = process.name(), process.parent()
            is_inside = "dianlib.grading.inside" in process.cmdline() and name != "bwrap"
            parent_name = parent.name() if parent else ""
        except psutil.NoSuchProcess:
            continue
        if is_inside:
            found_kind = "warm process" if parent_name == "bwrap" else "box"
        elif name == "bwrap":
            found_kind = "bubblewrap"
        else:
            found_kind = "worker" if parent == driver else "other"
        if found_kind == kind:
            found.append(process)
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Class:
    return Class(tmp_path_factory.mktemp("course"))


def test_an_undisturbed_run(undisturbed: Class) -> None:
    points = {student: sum(result[0]) for student, result in undisturbed.result.items()}
    assert points == {f"student {number}": (2, 0, 1)[number % 3] for number in range(N_STUDENTS)}
    assert len({result[2] for result in undisturbed.result.values()}) == N_STUDENTS


def test_parts_of_a_run_are_killed_and_it_goes_on(undisturbed: Class) -> None:
    chance = random.Random(7)
    kinds = ("box", "worker", "warm process", "box")
    kills = [Kill(kind, number, chance.uniform(0, 0.3)) for number, kind in enumerate(kinds)]
    story = undisturbed.run(kills, chance)
    assert story.wrong == []
    assert story.codes == [0]
    assert [kill.kind for kill in kills if not kill.hit] == []


def test_a_run_is_killed_and_a_second_finishes_the_rest(undisturbed: Class) -> None:
    chance = random.Random(8)
    kills = [Kill(kind, number, chance.uniform(0, 0.3)) for kind, number in (("driver", 2), ("box", 5))]
    story = undisturbed.run(kills, chance)
    assert story.wrong == []
    assert story.codes == [-signal.SIGKILL, 0]
    assert kills[1].hit
