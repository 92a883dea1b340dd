"""The chapter for instructors: its commands exist, its limits, sentences and results are the real ones."""

import ast
import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pytest
from assignment import ROOT, mark, read
from nbformat.v4 import new_code_cell, new_notebook
from nbgrader.apps.nbgraderapp import NbGraderApp
from test_nbgrader import MISTAKES, submission

from dianlib.checks import tasks
from dianlib.cli import _parser, main
from dianlib.grading import isolation, reading, records, release, sandbox, session, work
from dianlib.grading.driver import Course, GradingError, Summary
from dianlib.grading.plugin import Judge

PAGE = (ROOT / "book" / "grading.md").read_text("utf8")
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "book").glob("*.md"))]
SCRIPTS = Path(sys.executable).parent
BLOCK = re.compile(r"^ *```(?!`)(.*?)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def tables(page: str) -> Iterator[list[list[str]]]:
    """Yield the tables of a page: a row is a list of cells, the head is the first row."""
    for table in re.findall(r"(?:^\|.*\|\n)+", page, re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
        yield [rows[0], *rows[2:]]


def table(*head: str) -> list[list[str]]:
    """Return the rows of the page's table with this head."""
    (found,) = [rows for rows in tables(PAGE) if rows[0] == list(head)]
    return found[1:]


# ----- commands ------------------------------------------------------------------------------------------


def commands(program: str) -> list[list[str]]:
    """Return the arguments of each command line that a document shows, in a block or in the text."""
    found = []
    for document in DOCUMENTS:
        text = document.read_text("utf8").replace("\\\n", " ")
        blocks = re.findall(BLOCK, text)
        lines = [
            line for language, block in blocks if language in ("bash", "ini") for line in block.splitlines()
        ]
        lines += re.findall(rf"`({program} [^`\n]+)`", re.sub(BLOCK, "", text))
        for line in lines:
            if match := re.search(rf"(?:^|&& |/bin/|dian-grading )({program} [^#|]+)", line):
                found.append(shlex.split(match[1])[1:])
    return found


def test_every_dianlib_command_of_the_documents_is_understood() -> None:
    shown = commands("dianlib")
    assert {"grade", "worker", "report"} <= {arguments[0] for arguments in shown}
    for arguments in shown:
        if "..." in arguments or arguments[0] == "reproduce" or len(arguments) == 1:
            continue  # named, and not spelled out; test_house looks at these names
        try:
            _parser().parse_args(arguments)
        except SystemExit:
            pytest.fail(f"dianlib {shlex.join(arguments)}")


def test_every_nbgrader_command_of_the_documents_exists_with_its_options() -> None:
    shown = commands("nbgrader")
    assert {"autograde", "collect", "export", "generate_feedback"} <= {arguments[0] for arguments in shown}
    for name, *arguments in shown:
        assert name in NbGraderApp.subcommands, name
        app = NbGraderApp.subcommands[name][0]()
        options = {word.removeprefix("--").partition("=")[0] for word in arguments if word.startswith("--")}
        assert options <= app.flags.keys() | app.aliases.keys(), (name, options)


# ----- limits --------------------------------------------------------------------------------------------


def configured() -> dict[str, str]:
    """Return what nbgrader_config.py sets of the Judge, as written."""
    settings = (ROOT / "nbgrader_config.py").read_text("utf8")
    return dict(re.findall(r"^c\.Judge\.(\w+) = (.+)$", settings, re.MULTILINE))


def test_the_settings_are_those_of_the_judge() -> None:
    defaults = {
        name: trait.default_value
        for name, trait in Judge.class_own_traits(config=True).items()
        if name != "enabled"
    }
    shown = {setting.strip("`").removeprefix("c.Judge."): ast.literal_eval(value) for setting, value, _ in
             table("setting", "value", "what it limits")}  # fmt: skip
    assert shown == defaults
    for name, value in configured().items():
        assert shown[name] == ast.literal_eval(value), name


def test_the_fixed_limits_are_those_of_the_code() -> None:
    limits, times = isolation.Limits(), session.Times()
    (seconds,) = {task.limit for task in tasks().values()}

    def megabytes(size: int) -> str:
        return f"{size >> 20} MB"

    assert dict(table("what", "limit")) == {
        "an answer, on one input": f"{seconds:g} s",
        "how often a submission whose process died is begun": f"{times.restarts} times",
        "a notebook file": megabytes(reading.MAX_NOTEBOOK),
        "the cells of a notebook": f"{reading.MAX_CELLS:,}",
        "the characters of all cells": f"{reading.MAX_TEXT:,}",
        "files beside the notebook": f"{work.MAX_FILES} files of {megabytes(reading.MAX_FILE)}",
        "what one cell prints": f"{limits.output:,} characters",
        "what all cells show": megabytes(session.MAX_SHOWN),
        "one picture": megabytes(session.MAX_PICTURE),
        "one file that is written": megabytes(limits.file_size),
        "the processor time of one process": f"{limits.processor_seconds} s",
    }


def test_the_page_explains_every_flag() -> None:
    kinds = set()
    for module in (ROOT / "dianlib" / "grading").glob("*.py"):
        for node in ast.walk(ast.parse(module.read_text("utf8"))):
            match node:
                case ast.Call(
                    func=ast.Name("Flag") | ast.Attribute(attr="flag"), args=[ast.Constant(str(kind)), *_]
                ):
                    kinds.add(kind)
                case ast.FunctionDef(name="_note_limits"):
                    kinds |= {
                        key.value
                        for part in ast.walk(node)
                        if isinstance(part, ast.Dict)
                        for key in part.keys
                        if isinstance(key, ast.Constant)
                    }
    assert {"timeout", "memory", "shortcut"} <= kinds
    explained = re.findall(
        r"`([\w-]+)`", " ".join(row[0] for row in table("flag", "what happened", "usually"))
    )
    assert sorted(explained) == sorted(kinds)


# ----- sentences -----------------------------------------------------------------------------------------


def said(action: Callable[[], object], error: type[Exception]) -> str:
    with pytest.raises(error) as raised:
        action()
    return str(raised.value)


def quoted(beginning: str) -> str:
    """Return the block of the page that begins with these words."""
    blocks = [block.strip() for language, block in re.findall(BLOCK, PAGE) if language == "text"]
    (found,) = [block for block in blocks if block.startswith(beginning)]
    return found


def test_the_sentences_about_the_sandbox_are_quoted_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    start = lambda: sandbox.Bubblewrap().command((), None, [])  # noqa: E731
    with monkeypatch.context() as patched:
        patched.setattr(sys, "platform", "linux")
        patched.setattr(shutil, "which", lambda name: None)
        assert quoted("Students' code runs only in a sandbox, and bubblewrap") == said(
            start, sandbox.SandboxError
        )
    with monkeypatch.context() as patched:
        patched.setattr(sys, "platform", "darwin")
        assert quoted("Students' code runs only in a sandbox, which needs Linux") == said(
            start, sandbox.SandboxError
        )
    refused = sandbox.Bubblewrap().why("bwrap: Creating new namespace failed: Operation not permitted\n")
    assert refused.startswith(quoted("Students' code runs only in a sandbox, and this system"))
    # What the sentence advises stands on the page as well.
    advice = re.findall(r"`(sudo sysctl [^`]+)`", refused) + re.findall(r"--security-opt [\w=]+", refused)
    assert len(advice) >= 4
    assert [words for words in advice if words not in PAGE] == []


def check_cell(source: str) -> nbformat.NotebookNode:
    nature = {"grade": True, "solution": False, "locked": True, "grade_id": "x-check", "points": 1}
    return new_notebook(cells=[new_code_cell(source, metadata={"nbgrader": nature})])


def test_the_messages_in_the_table_are_those_of_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    course = tmp_path / "course"
    released = course / "exercises" / "mlp"
    released.mkdir(parents=True)
    nbformat.write(read("exercises", "mlp"), released / "mlp.ipynb")
    messages = [str(Summary()), said(lambda: Course(tmp_path), GradingError)]
    (course / "nbgrader_config.py").write_text("")
    messages.append(said(lambda: Course(course), GradingError))
    shutil.copy(ROOT / "nbgrader_config.py", course)
    messages.append(said(lambda: Course(course).pending("x"), GradingError))
    messages.append(said(lambda: Course(course).pending("mlp"), GradingError))
    messages.append(said(lambda: release.tasks_of(check_cell("assert x == 1")), release.Unusable))
    messages.append(said(lambda: release.tasks_of(check_cell("check('x.y', x)")), release.Unusable))
    monkeypatch.setattr(work, "LOCK_SECONDS", 0.0)
    with records.lock(course / "records", "mlp", "s01"):
        messages.append(said(lambda: work.begin(course, "mlp", "s01", course), work.Busy))
    rows = [row[0].replace("'x'", "...").replace("'mlp'", "...") for row in
            table("message", "cause", "what to do")]  # fmt: skip
    patterns = [".*".join(re.escape(part) for part in row.split("...")) for row in rows]
    for message in messages:
        assert any(re.fullmatch(pattern, message) for pattern in patterns), message


# ----- the class of the page -------------------------------------------------------------------------------


@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("bwrap") is None, reason="needs Linux with bubblewrap"
)
def test_the_class_comes_out_as_the_page_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lost = submission("mlp", {})
    lost.cells = [cell for cell in lost.cells if mark(cell, "grade_id") != "mlp-relu-check"]
    shortcut = "def softmax(logits):\n    return torch.softmax(logits, dim=1)"
    handed_in = {
        "s01": submission("mlp", {}),
        "s02": submission("mlp", {task: answer for task, (_, answer) in MISTAKES.items()}),
        "s03": lost,
        "s04": submission("mlp", {"mlp.softmax": shortcut}),
        "s05": submission("mlp", {}),
        "s06": read("exercises", "mlp"),
    }
    for student, notebook in handed_in.items():
        folder = tmp_path / "submitted" / student / "mlp"
        folder.mkdir(parents=True)
        nbformat.write(notebook, folder / ("homework.ipynb" if student == "s05" else "mlp.ipynb"))
    shutil.copy(ROOT / "nbgrader_config.py", tmp_path)
    (tmp_path / "solutions" / "mlp").mkdir(parents=True)
    nbformat.write(read("solutions", "mlp"), tmp_path / "solutions" / "mlp" / "mlp.ipynb")

    Course(tmp_path).api.generate_assignment("mlp")
    assert main(["grade", "mlp", "--course", str(tmp_path), "--jobs", "1"]) == 1
    assert capsys.readouterr().out.strip() == quoted("5 graded")
    subprocess.run([SCRIPTS / "nbgrader", "export"], cwd=tmp_path, capture_output=True, check=True)
    with (tmp_path / "grades.csv").open() as grades:
        rows = list(csv.DictReader(grades))
    assert len(rows[0]) == 12
    columns = ("student_id", "score", "max_score", "status")
    lines = [",".join(columns), *(",".join(row[name] for name in columns) for row in rows)]
    assert "\n".join(lines) == quoted("student_id")
    flags = json.loads((tmp_path / "records" / "mlp" / "s03.json").read_text())["flags"]
    assert [flag["kind"] for flag in flags] == ["missing-cell"]


# ----- the image -------------------------------------------------------------------------------------------


def test_the_image_is_made_of_files_that_exist_and_are_let_through() -> None:
    recipe = (ROOT / "Dockerfile").read_text("utf8")
    copied = {name for line in re.findall(r"^COPY (.+)$", recipe, re.MULTILINE) for name in line.split()[:-1]}
    assert all((ROOT / name).exists() for name in copied)
    rules = (ROOT / ".dockerignore").read_text("utf8").splitlines()
    assert "*" in rules  # everything stays outside, but for these
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied
    assert "bubblewrap" in recipe
    assert recipe.rindex("\nUSER grader") > recipe.rindex("\nRUN "), "nothing is graded as root"
