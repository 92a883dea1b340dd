import http.client
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pytest

from dianlib import progress
from dianlib.checks import table, tasks
from dianlib.cli import main

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "progress.json"
    monkeypatch.setenv("DIANLIB_PROGRESS", str(path))
    return path


def write(path: Path, *cells: str) -> str:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    path.write_text(nbformat.writes(notebook))
    return str(path)


IMPORTS = "import torch\nfrom dianlib.checks import check"
RIGHT = "def accuracy(confusion):\n    return float(confusion.diagonal().sum() / confusion.sum())"
WRONG = "def accuracy(confusion):\n    return float(confusion.diagonal().sum())"
STUB = "def macro_f1(confusion):\n    raise NotImplementedError"


# ----- check, status, hint -------------------------------------------------------------------------------


def test_check_and_status(tmp_path: Path, capsys: Captured) -> None:
    work = write(
        tmp_path / "work.ipynb",
        IMPORTS,
        RIGHT,
        "check('metrics.accuracy', accuracy)",
        STUB,
        "check('metrics.macro_f1', macro_f1)",
    )
    before = Path(work).read_bytes()
    assert main(["check", work]) == 1
    assert Path(work).read_bytes() == before
    points, others = tasks()["metrics.accuracy"].points, tasks()["metrics.macro_f1"].points
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["metrics.accuracy", f"{points}", "of", f"{points}", "passed"],
        ["metrics.macro_f1", "0", "of", f"{others}", "not", "begun"],
        ["sum", f"{points}", "of", f"{points + others}"],
    ]

    assert main(["status"]) == 0
    status = capsys.readouterr().out
    n_tasks = sum(task.startswith("metrics.") for task in tasks())
    assert f"metrics: 1 of {n_tasks} tasks passed, {points} of " in status
    assert re.search(rf"^  passed  metrics\.accuracy +{points} of {points}$", status, re.MULTILINE)
    assert re.search(rf"^  tried   metrics\.macro_f1 +0 of {others}$", status, re.MULTILINE)
    assert re.search(r"^  -       metrics\.f1 +0 of \d+$", status, re.MULTILINE)


def test_check_names_the_mistake_and_ends_with_0_when_all_is_right(tmp_path: Path, capsys: Captured) -> None:
    last = "check('metrics.accuracy', accuracy)"
    assert main(["check", write(tmp_path / "wrong.ipynb", IMPORTS, WRONG, last)]) == 1
    row = capsys.readouterr().out.splitlines()[0]
    known = [mistake for mistake in tasks()["metrics.accuracy"].faults if mistake in row]
    assert known or "cause not recognised" in row
    assert main(["check", write(tmp_path / "right.ipynb", IMPORTS, RIGHT, last)]) == 0


def test_check_of_a_task_that_does_not_exist(tmp_path: Path, capsys: Captured) -> None:
    work = write(tmp_path / "work.ipynb", IMPORTS, "check('metrics.acuracy', len)")
    assert main(["check", work]) == 1
    assert capsys.readouterr().out == "There is no task 'metrics.acuracy'.\n"


def test_status_shows_the_mistake_and_counts_shares(capsys: Captured) -> None:
    progress.record(
        {
            "task": "metrics.f1",
            "score": 0.5,
            "points": 50.0,  # from a time when the task was worth more
            "max_points": 100,
            "passed": False,
            "diagnosis": ["some-mistake"],
            "message": "",
        }
    )
    assert main(["status"]) == 0
    worth = tasks()["metrics.f1"].points
    assert re.search(
        rf"^  tried   metrics\.f1 +{worth / 2:g} of {worth}  some-mistake$",
        capsys.readouterr().out,
        re.MULTILINE,
    )


def test_hints(capsys: Captured) -> None:
    assert main(["hint", "metrics.accuracy"]) == 0
    first = capsys.readouterr().out
    assert tasks()["metrics.accuracy"].hints[0] in first
    assert main(["hint", "metrics.accuracy", "3"]) == 0
    assert tasks()["metrics.accuracy"].hints[2] in capsys.readouterr().out


# ----- what goes wrong is one sentence -------------------------------------------------------------------


def test_errors_are_one_sentence_and_code_2(tmp_path: Path, capsys: Captured) -> None:
    broken = tmp_path / "broken.ipynb"
    broken.write_text("{")
    failing = write(tmp_path / "failing.ipynb", "1 / 0")
    for arguments, words in [
        (["check", str(tmp_path / "none.ipynb")], "There is no file"),
        (["check", str(broken)], "not a notebook"),
        (["check", str(tmp_path)], "cannot be read"),
        (["run", str(broken)], "not a notebook"),
        (["run", failing], "ZeroDivisionError"),
        (["hint", "metrics.acuracy"], "no task 'metrics.acuracy'"),
        (["data", "download", "imagenet"], "imagenet"),
        (["serve", str(tmp_path)], "make html"),
        (["serve", str(tmp_path), "--port", "0"], "make html"),
    ]:
        assert main(arguments) == 2, arguments
        captured = capsys.readouterr()
        assert captured.out == ""
        assert words in captured.err
        assert len(captured.err.splitlines()) == 1, captured.err


def test_a_missing_or_unknown_command_shows_the_usage(capsys: Captured) -> None:
    for arguments in ([], ["dance"], ["data"], ["checks", "report", "--loud"], ["hint", "metrics.f1", "4"]):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2
        assert capsys.readouterr().err.startswith("usage: dianlib")


def test_a_notebook_without_checks(tmp_path: Path, capsys: Captured) -> None:
    assert main(["check", write(tmp_path / "work.ipynb", "1")]) == 1
    assert "holds no check" in capsys.readouterr().out


def test_the_keyboard_interrupts_quietly(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    def interrupted() -> dict[str, progress.Standing]:
        raise KeyboardInterrupt

    monkeypatch.setattr(progress, "load", interrupted)
    assert main(["status"]) == 130
    assert capsys.readouterr() == ("", "")


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f"{shlex.quote(sys.executable)} -m dianlib.cli status | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stderr == ""


# ----- run -----------------------------------------------------------------------------------------------


def test_run_says_what_changed(tmp_path: Path, capsys: Captured) -> None:
    page = write(tmp_path / "page.ipynb", "6 * 7")
    assert main(["run", page]) == 0
    assert f"{page}: changed" in capsys.readouterr().out
    assert json.loads(Path(page).read_text())["cells"][0]["outputs"][0]["data"]["text/plain"] == ["42"]
    assert main(["run", page]) == 0
    assert f"{page}: unchanged" in capsys.readouterr().out


# ----- data, reproduce, report ---------------------------------------------------------------------------


def test_data_download_finds_what_is_there(capsys: Captured) -> None:
    if not Path(os.environ.get("DIANLIB_DATA", ""), "MNIST").is_dir() or "DIANLIB_DATA" not in os.environ:
        pytest.skip("DIANLIB_DATA names no folder with MNIST")
    assert main(["data", "download", "mnist"]) == 0
    assert capsys.readouterr().out.startswith("mnist is in ")


def test_reproduce_gets_its_own_arguments(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as end:
        main(["reproduce", "--help"])
    assert end.value.code == 0
    assert "mlp" in capsys.readouterr().out


def test_the_report_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    # All tasks take half a minute, and have tests of their own; one shows that the command works.
    monkeypatch.setattr(table, "tasks", lambda: {"mlp.relu": tasks()["mlp.relu"]})
    assert main(["checks", "report"]) == 0
    plain = capsys.readouterr().out
    assert main(["checks", "report", "--markdown"]) == 0
    markdown = capsys.readouterr().out
    assert plain != markdown
    assert "mlp.relu" in plain
    assert re.search(r"^\|.*mlp\.relu.*\|$", markdown, re.MULTILINE)


# ----- serve ---------------------------------------------------------------------------------------------


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[int], tuple[subprocess.Popen[str], int]]]:
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "index.html").write_text("<h1>The book</h1>")
    (tmp_path / "secret.txt").write_text("secret")
    servers: list[subprocess.Popen[str]] = []

    def start(port: int) -> tuple[subprocess.Popen[str], int]:
        command = [sys.executable, "-m", "dianlib.cli", "serve", str(folder), "--port", str(port)]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        servers.append(server)
        assert server.stdout is not None
        line = server.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/", line)
        assert found, line
        return server, int(found[1])

    yield start
    for server in servers:
        server.kill()
        server.communicate()


def get(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path)
    response = connection.getresponse()
    return response.status, response.read().decode()


def test_serve_shows_the_folder_and_nothing_else(
    serve: Callable[[int], tuple[subprocess.Popen[str], int]],
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        wanted = taken.getsockname()[1]
        server, port = serve(wanted)
        assert port > wanted, "a port that is taken is passed over"
    assert get(port, "/") == (200, "<h1>The book</h1>")
    assert get(port, "/../secret.txt")[0] == 404
    server.send_signal(signal.SIGINT)
    _, errors = server.communicate(timeout=10)
    assert (server.returncode, errors) == (0, "")


def test_two_servers_get_two_ports(serve: Callable[[int], tuple[subprocess.Popen[str], int]]) -> None:
    _, first = serve(20_000)
    _, second = serve(first)
    assert second > first
    assert get(first, "/") == get(second, "/")
