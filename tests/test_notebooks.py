import json
import stat
from pathlib import Path
from typing import Any

import nbformat
import pytest

from dianlib.notebooks import NotebookError, checked, execute

# What dianlib.checks.check does at its end, without the check itself.
RECORD = """
from dianlib import progress

def check(task, score, diagnosis=(), points=2):
    progress.record({"task": task, "score": score, "points": points * score, "max_points": points,
                     "passed": score == 1, "diagnosis": diagnosis, "message": "..."})
"""


def write(path: Path, *cells: str, **metadata: Any) -> Path:
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(cell) for cell in cells], metadata=metadata
    )
    path.write_text(nbformat.writes(notebook))
    return path


# ----- execute -------------------------------------------------------------------------------------------


def test_a_second_run_writes_the_same_bytes(tmp_path: Path) -> None:
    path = write(
        tmp_path / "page.ipynb",
        "%matplotlib inline\nimport matplotlib.pyplot as plt\nplt.plot([1, 2, 4]);",
        "import sys, time\nfor n in range(5):\n    print(n); time.sleep(0.05)\n    sys.stdout.flush()",
        "6 * 7",
        kernelspec={"name": "somebodys-own", "display_name": "?"},
        language_info={"name": "python", "version": "2.7"},
    )
    raw = json.loads(path.read_text())
    raw["nbformat_minor"] = 4  # as written by older programs: cells without ids
    for cell in raw["cells"]:
        del cell["id"]
        cell["metadata"]["execution"] = {"iopub.execute_input": "2020-01-01T00:00:00Z"}
    path.write_text(json.dumps(raw))
    assert execute(path)
    first = path.read_bytes()
    path.touch()
    modified = path.stat().st_mtime_ns
    assert not execute(path)
    assert path.read_bytes() == first
    assert path.stat().st_mtime_ns == modified, "an unchanged file is not written"

    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert [cell.id for cell in notebook.cells] == ["cell-1", "cell-2", "cell-3"]
    assert [cell.execution_count for cell in notebook.cells] == [1, 2, 3]
    assert [output.output_type for output in notebook.cells[1].outputs] == ["stream"]
    assert notebook.cells[0].outputs[0].data["image/png"]
    assert notebook.metadata.language_info == {"name": "python"}
    assert notebook.metadata.kernelspec.name == "python3"
    assert "execution" not in notebook.cells[0].metadata


def test_ids_and_mode_stay_and_twins_are_told_apart(tmp_path: Path) -> None:
    path = write(tmp_path / "page.ipynb", "1", "2", "3")
    raw = json.loads(path.read_text())
    raw["cells"][0]["id"] = raw["cells"][1]["id"] = "same"
    raw["cells"][2]["id"] = "own"
    path.write_text(json.dumps(raw))
    path.chmod(0o640)
    execute(path)
    assert [cell["id"] for cell in json.loads(path.read_text())["cells"]] == ["same", "same-again", "own"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [path], "nothing is left beside it"


def test_a_failing_cell_leaves_the_file_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "page.ipynb", "print(1)", "\n# why\n1 / 0", "print(2)")
    before = path.read_bytes()
    with pytest.raises(NotebookError, match='the cell that begins "# why" raised ZeroDivisionError'):
        execute(path)
    assert path.read_bytes() == before


def test_a_cell_may_announce_its_exception(tmp_path: Path) -> None:
    path = write(tmp_path / "page.ipynb", "1 / 0", "'after'")
    raw = json.loads(path.read_text())
    raw["cells"][0]["metadata"]["tags"] = ["raises-exception"]
    path.write_text(json.dumps(raw))
    execute(path)
    cells = json.loads(path.read_text())["cells"]
    assert cells[0]["outputs"][0]["ename"] == "ZeroDivisionError"
    assert cells[1]["outputs"][0]["data"]["text/plain"] == ["'after'"]


def test_slow_and_dead_kernels_are_told(tmp_path: Path) -> None:
    slow = write(tmp_path / "slow.ipynb", "import time\ntime.sleep(60)")
    with pytest.raises(NotebookError, match='begins "import time" took longer than 1 seconds'):
        execute(slow, timeout=1)
    dead = write(tmp_path / "dead.ipynb", "import os\nos._exit(1)")
    with pytest.raises(NotebookError, match='begins "import os" ended the kernel'):
        execute(dead)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"nbformat": 3}', b'{"nbformat": 4, "cells": 5}', b"\xff", b"print(1)"]
)
def test_what_is_no_notebook_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "page.ipynb"
    path.write_bytes(content)
    with pytest.raises(NotebookError, match="is not a notebook"):
        execute(path)
    if content != b'{"nbformat": 3}':
        with pytest.raises(NotebookError, match="is not a notebook"):
            checked(path)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    for run in (execute, checked):
        with pytest.raises(NotebookError, match="There is no file"):
            run(tmp_path / "page.ipynb")


def test_an_author_s_progress_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIANLIB_PROGRESS", str(tmp_path / "progress.json"))
    execute(write(tmp_path / "page.ipynb", RECORD, "check('mlp.relu', 1.0)"))
    assert not (tmp_path / "progress.json").exists()


# ----- checked -------------------------------------------------------------------------------------------


def test_the_score_of_a_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIANLIB_PROGRESS", str(tmp_path / "progress.json"))
    path = write(
        tmp_path / "work.ipynb",
        RECORD,
        "check('mlp.linear', 1.0)",
        "check('mlp.relu', 0.0, ['first-try'])\ncheck('mlp.relu', 0.5, ['one', 'two'])",
        "oops(",
        "raise ValueError('no such thing')",
        "check('mlp.softmax', 0.0)",
        "undefined_function; check('mlp.cross_entropy', 1.0)",
        "# check('mlp.sgd_step', 1.0)",
        "raise KeyboardInterrupt",
        kernelspec={"name": "conda-env-of-a-student", "display_name": "?"},
    )
    before = path.read_bytes()
    score = checked(path)
    assert path.read_bytes() == before
    lines = str(score).splitlines()
    assert lines[0].split() == ["mlp.linear", "2", "of", "2", "passed"]
    assert lines[1].split() == ["mlp.relu", "1", "of", "2", "one,", "two"]
    assert lines[2].split() == ["mlp.softmax", "0", "of", "2", "cause", "not", "recognised"]
    assert lines[3].startswith("mlp.cross_entropy")
    assert lines[3].endswith("its check did not run")
    not_run = score.results[3]
    assert (not_run.points, not_run.ran) == (0, False)
    assert not_run.max_points > 0
    assert lines[4].split() == ["sum", "3", "of", f"{6 + not_run.max_points:g}"]
    assert 'The cell that begins "oops(" raised SyntaxError' in lines[5]
    assert lines[6].endswith("raised ValueError: no such thing")
    assert "undefined_function" in lines[7]
    assert lines[8].endswith("raised KeyboardInterrupt")
    assert len(lines) == 9
    assert not score.passed
    saved = json.loads((tmp_path / "progress.json").read_text())["tasks"]
    assert saved["mlp.linear"]["passed"], "a learner's own run counts as progress"


def test_all_passed(tmp_path: Path) -> None:
    score = checked(write(tmp_path / "work.ipynb", RECORD, "check('mlp.linear', 1.0, points=1.5)"))
    assert score.passed
    assert (score.points, score.max_points, score.problems) == (1.5, 1.5, ())


def test_no_check_is_no_pass(tmp_path: Path) -> None:
    score = checked(write(tmp_path / "work.ipynb", "1"))
    assert score.results == ()
    assert not score.passed


def test_a_cell_that_hangs_is_stopped_and_the_next_one_runs(tmp_path: Path) -> None:
    path = write(tmp_path / "work.ipynb", RECORD, "while True:\n    pass", "check('mlp.linear', 1.0)")
    score = checked(path, timeout=3)
    assert [result.task for result in score.results] == ["mlp.linear"]
    assert score.results[0].passed
    assert score.problems == (
        'The cell that begins "while True:" took longer than 3 seconds and was stopped.',
    )


def test_a_cell_that_cannot_be_stopped_ends_the_run(tmp_path: Path) -> None:
    path = write(
        tmp_path / "work.ipynb",
        RECORD,
        "check('mlp.linear', 1.0)",
        "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass",
        "check('mlp.relu', 1.0)",
    )
    score = checked(path, timeout=3)
    assert [(result.task, result.ran) for result in score.results] == [
        ("mlp.linear", True),
        ("mlp.relu", False),
    ]
    assert "could not be stopped" in score.problems[0]


def test_a_dead_kernel_keeps_what_was_scored(tmp_path: Path) -> None:
    path = write(
        tmp_path / "work.ipynb", RECORD, "check('mlp.linear', 1.0)", "import os\nos._exit(1)", "'never'"
    )
    score = checked(path)
    assert [result.passed for result in score.results] == [True]
    assert score.problems == ('The cell that begins "import os" ended the kernel, so no cell after it ran.',)


def test_an_old_format_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    old = nbformat.v3.new_notebook(
        worksheets=[
            nbformat.v3.new_worksheet(cells=[nbformat.v3.new_code_cell(RECORD + "check('mlp.linear', 1.0)")])
        ]
    )
    path = tmp_path / "work.ipynb"
    path.write_bytes(b"\xef\xbb\xbf" + nbformat.v3.writes_json(old).encode())
    assert checked(path).passed


def test_a_helper_file_beside_the_notebook_is_found(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("score = 1.0")
    assert checked(
        write(tmp_path / "work.ipynb", RECORD, "import mine\ncheck('mlp.linear', mine.score)")
    ).passed
