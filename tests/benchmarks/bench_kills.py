"""Fifty kills at random moments while a class is graded: driver, worker, warm process, bubblewrap, box.

After each the class is graded to its end, and everybody's result is compared with that of an undisturbed run.
"""

import os
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from test_kills import KINDS, N_STUDENTS, Class, Kill

N_KILLS = int(os.environ.get("DIANLIB_KILLS", "50"))
SEED = int(os.environ.get("DIANLIB_KILLS_SEED", "1"))


def test_fifty_kills(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chance = random.Random(SEED)
    graded = Class(tmp_path)
    failed = []
    rows = [f"an undisturbed run takes {graded.seconds:.1f} s; seed {SEED}"]
    rows.append("kill  part          graded  and then  runs  wrong")
    for number in range(1, N_KILLS + 1):
        in_the_start = chance.random() < 0.3
        done = 0 if in_the_start else chance.randrange(N_STUDENTS - 1)
        delay = chance.uniform(0, 0.8 * graded.seconds if in_the_start else 0.5)
        kill = Kill(KINDS[number % len(KINDS)], -1 if in_the_start else done, delay)
        story = graded.run([kill], chance)
        moment = f"{'start' if in_the_start else done:>6}  {delay:6.2f} s" if kill.hit else " never          "
        rows.append(f"{number:4}  {kill.kind:12}  {moment}  {len(story.codes):4}  {len(story.wrong):5}")
        failed += story.wrong
        with capsys.disabled():
            print("\n".join(rows), flush=True)
            rows = []
    assert failed == []
