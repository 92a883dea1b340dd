"""The rules of the repository that no other test would notice: layout, imports, versions, forbidden words."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml
from nbgrader.api import Gradebook
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dianlib.checks.registry import CHAPTERS

ROOT = Path(__file__).parent.parent
BINARY = {".png", ".ico", ".gz", ".woff2"}


@cache
def tracked() -> tuple[str, ...]:
    """List the files that git keeps."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return tuple(name for name in listed if (ROOT / name).is_file())


# ----- the six rooms -------------------------------------------------------------------------------------


@pytest.mark.parametrize("slug", CHAPTERS)
def test_a_chapter_has_its_six_rooms(slug: str) -> None:
    rooms = [
        f"book/{slug}.ipynb",
        f"dianlib/{slug}.py",
        f"dianlib/checks/{slug}.py",
        f"solutions/{slug}/{slug}.ipynb",
        f"exercises/{slug}/{slug}.ipynb",
        f"tests/test_{slug}.py",
    ]
    assert [room for room in rooms if room not in tracked()] == []


def test_every_chapter_is_in_the_table_of_contents_and_in_the_list_of_assignments() -> None:
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    pages = [chapter["file"] for part in toc["parts"] for chapter in part["chapters"]]
    # The chapters of the book are its notebooks; the other pages are Markdown.
    chapters = [page for page in pages if (ROOT / f"{page}.ipynb").is_file()]
    assert chapters == [f"book/{slug}" for slug in CHAPTERS]


def test_every_notebook_of_the_book_is_a_chapter() -> None:
    notebooks = {name for name in tracked() if re.fullmatch(r"(book|solutions|exercises)/.*\.ipynb", name)}
    rooms = {f"book/{slug}.ipynb" for slug in CHAPTERS}
    rooms |= {f"{folder}/{slug}/{slug}.ipynb" for slug in CHAPTERS for folder in ("solutions", "exercises")}
    assert notebooks == rooms


# ----- one import direction ------------------------------------------------------------------------------


def imports(module: Path, *, lazy: bool) -> set[str]:
    """Name what a module of dianlib imports from dianlib; with ``lazy`` inside functions too."""
    tree = ast.parse(module.read_text())
    nodes = ast.walk(tree) if lazy else iter(tree.body)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{module} imports relatively"
            # `from dianlib import x` imports the module dianlib.x.
            found |= {f"{node.module}.{name.name}" for name in node.names} | {node.module}
    parts = {tuple(name.split(".")) for name in found}
    return {name[1] for name in parts if name[0] == "dianlib" and len(name) > 1}


MODULES = {path.stem: path for path in (ROOT / "dianlib").glob("*.py") if path.stem != "__init__"}
# What serves every chapter; all other flat modules are models, one for each chapter.
SERVICES = {"cli", "data", "glue", "metrics", "notebooks", "plotting", "progress", "training", "widgets"}
MODELS = MODULES.keys() - SERVICES
OUTSIDE = {"checks", "grading", "plotting", "cli", "notebooks", "progress", "reproduce", "widgets"}


def test_models_are_the_chapters() -> None:
    assert set(CHAPTERS) - {"metrics"} <= MODELS


@pytest.mark.parametrize("name", ["data", "metrics", "training"])
def test_services_import_no_model(name: str) -> None:
    assert imports(MODULES[name], lazy=True) & (MODELS | OUTSIDE) == set()


@pytest.mark.parametrize("name", sorted(MODELS))
def test_models_import_nothing_that_uses_them(name: str) -> None:
    assert imports(MODULES[name], lazy=True) & OUTSIDE == set()


def test_nothing_imports_the_command_line() -> None:
    for path in (ROOT / "dianlib").rglob("*.py"):
        assert "cli" not in imports(path, lazy=True), path


def test_checks_do_not_import_grading() -> None:
    for path in (ROOT / "dianlib" / "checks").glob("*.py"):
        assert imports(path, lazy=True) & {"grading", "notebooks", "reproduce"} == set(), path


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_running_an_answer_needs_neither_references_nor_mistakes_nor_judge() -> None:
    loaded = {name for name in loaded_by("import dianlib.checks.running") if name.startswith("dianlib")}
    assert loaded == {"dianlib", "dianlib.checks", "dianlib.checks.running"}


def test_the_command_line_starts_without_torch() -> None:
    loaded = loaded_by("from dianlib.cli import _parser; _parser()")
    assert "dianlib.cli" in loaded
    assert loaded & {"torch", "numpy", "nbformat", "sklearn", "matplotlib"} == set()


# ----- versions and commands -----------------------------------------------------------------------------


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return [Requirement(text) for group in groups for text in group]


def test_constraints_are_exact_and_agree_with_the_requirements() -> None:
    pins = pinned()
    assert (pins["torch"], pins["torchvision"]) == ("2.13.0", "0.28.0")
    assert all(re.fullmatch(r"\d[\w.]*", version) for version in pins.values()), (
        "no local versions such as +cpu"
    )
    for requirement in requirements():
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_the_documents_name_only_commands_that_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"book", "html", "test", "lint", "bench", "clean"} <= targets
    pages = ["README.md", "CONTRIBUTING.md", *(f"book/{path.name}" for path in (ROOT / "book").glob("*.md"))]
    text = "\n".join((ROOT / page).read_text() for page in pages)
    assert set(re.findall(r"(?:^|`)make ([a-z]+)", text, re.MULTILINE)) <= targets
    used = set(re.findall(r"(?:^|`)dianlib ([a-z]+)", text, re.MULTILINE))
    assert {"check", "status", "hint", "run"} <= used
    overview = subprocess.run(
        [sys.executable, "-m", "dianlib.cli", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert used <= set(re.findall(r"^    ([a-z]+)\b", overview, re.MULTILINE))


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_the_links_of_the_documents_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text())
    assert [target for target in targets if target not in tracked()] == []


def test_continuous_integration_runs_what_everybody_runs() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert script.rstrip().endswith("make test")
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100


@pytest.mark.parametrize(
    "name", [n for n in tracked() if n.startswith(".github/") or n == ".pre-commit-config.yaml"]
)
def test_workflows_are_yaml(name: str) -> None:
    assert isinstance(yaml.safe_load((ROOT / name).read_text()), dict)


# ----- make ----------------------------------------------------------------------------------------------


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "-f", str(ROOT / "Makefile"), *arguments]
    # These tests may themselves be run by make, which hands its state and settings on in the environment.
    handed_on = ("MAKE", "MFLAGS", "PIN", "PYTHON")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(handed_on)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with what the Makefile's first rule reads."""
    folder = tmp_path / "a clone"
    folder.mkdir()
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    return folder


def program(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_make_says_what_is_missing_in_one_sentence(clone: Path, tmp_path: Path) -> None:
    old = program(tmp_path / "old", 'case "$1" in --version) echo Python 3.9.6;; *) exit 1;; esac')
    bare = program(tmp_path / "bare", 'case "$2" in *venv*) exit 1;; esac')
    for python, words in [("nopython", "no command 'nopython'"), (old, "3.9.6"), (bare, "no venv module")]:
        done = make(clone, "lint", f"PYTHON={python}")
        assert done.returncode != 0
        sentence, end = done.stderr.splitlines()
        assert words in sentence
        assert end.startswith("make: ***")
        assert done.stdout == ""


def test_make_renews_the_environment_of_another_folder(clone: Path) -> None:
    (clone / ".venv").mkdir()
    (clone / ".venv" / ".installed").write_text("/somewhere/else --constraint constraints.txt\n")
    make(clone, "lint", "PYTHON=nopython")
    assert not (clone / ".venv").exists()


def test_a_build_with_a_warning_fails_every_time(clone: Path, tmp_path: Path) -> None:
    """Sphinx reads a page once, and says nothing about it in the next run."""
    (clone / "_config.yml").write_text("title: x\nonly_build_toc_files: true\n")
    (clone / "_toc.yml").write_text("format: jb-book\nroot: index\n")
    (clone / "index.md").write_text("# A page\n\n{ref}`nowhere`\n")
    stamp = clone / "stamp"  # newer than what it depends on: this environment serves
    stamp.write_text(f"{clone} --constraint constraints.txt\n")
    (tmp_path / "environment").symlink_to(sys.prefix)
    for _ in range(2):
        done = make(clone, "html", "BIN=../environment/bin", "STAMP=stamp")
        assert done.returncode != 0
        assert "nowhere" in done.stdout + done.stderr


# ----- nbgrader ------------------------------------------------------------------------------------------


def assignment_cell(source: str, grade_id: str, **marks: Any) -> nbformat.NotebookNode:
    nature = {"grade": False, "locked": False, "solution": False, "task": False, "schema_version": 3}
    return nbformat.v4.new_code_cell(source, metadata={"nbgrader": {**nature, "grade_id": grade_id, **marks}})


def test_nbgrader_settings_keep_out_of_known_traps(tmp_path: Path) -> None:
    """Called from outside the environment, and with a warning in an answer, grading still works."""
    solution = """import warnings


def accuracy(confusion):
    ### BEGIN SOLUTION
    warnings.warn("a word from a library")
    return confusion.diagonal().sum().item() / confusion.sum().item()
    ### END SOLUTION"""
    answer = assignment_cell(solution, "answer", solution=True)
    check = 'from dianlib.checks import check\ncheck("metrics.accuracy", accuracy)'
    test = assignment_cell(check, "test", grade=True, locked=True, points=3)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=[answer, test], metadata={"kernelspec": kernel})
    for folder in ("solutions/x", "submitted/somebody/x"):
        (tmp_path / folder).mkdir(parents=True)
        nbformat.write(notebook, tmp_path / folder / "x.ipynb")
    shutil.copy(ROOT / "nbgrader_config.py", tmp_path)

    nbgrader = Path(sys.executable).parent / "nbgrader"
    for command in ("generate_assignment x", "autograde x"):
        subprocess.run(
            [nbgrader, *command.split()],
            cwd=tmp_path,
            env={**os.environ, "PATH": os.defpath},
            capture_output=True,
            check=True,
        )
    released = nbformat.read(tmp_path / "exercises" / "x" / "x.ipynb", as_version=4)
    assert released.cells[0].source.endswith("def accuracy(confusion):\n    raise NotImplementedError")
    with Gradebook(f"sqlite:///{tmp_path / 'gradebook.db'}") as gradebook:
        submission = gradebook.find_submission("x", "somebody")
        assert (submission.score, submission.max_score) == (3.0, 3.0)


# ----- words ---------------------------------------------------------------------------------------------

# Each pattern has one letter in brackets, so that this file does not hold what it forbids.
FORBIDDEN = re.compile(
    r"\bTOD[O]\b|\bFIXM[E]\b"
    r"|(?<![\w.])/wor[k]/|/roo[t]/"  # folders of one machine
    r"|pyp[i]\.org|pythonhoste[d]|npmj[s]\.|debia[n]\.org|conda\.anacond[a]|download\.pytorc[h]|index-ur[l]"
)


def text_files() -> list[str]:
    return [name for name in tracked() if Path(name).suffix not in BINARY]


def test_no_file_holds_a_forbidden_word() -> None:
    found = []
    for name in text_files():
        text = (ROOT / name).read_text(encoding="utf-8")
        # A picture inside a notebook is letters by chance.
        text = re.sub(r'"image/png": "[^"]*"', "", text)
        found += [f"{name}: {match[0]}" for match in FORBIDDEN.finditer(text)]
    assert found == []


def test_shared_data_is_named_by_settings_only() -> None:
    word = "../" + "shared"
    naming = [name for name in text_files() if word in (ROOT / name).read_text(encoding="utf-8")]
    assert naming == [".ci/run"]


def test_prose_avoids_words_that_belittle() -> None:
    pages = ["README.md", "CONTRIBUTING.md", *(f"book/{path.name}" for path in (ROOT / "book").glob("*.md"))]
    for page in pages:
        # The style guide may quote them.
        text = re.sub(r'"[^"\n]*"', "", (ROOT / page).read_text(encoding="utf-8"))
        assert re.findall(r"\b(?:simply|just|obviously|trivially|of course)\b", text, re.IGNORECASE) == [], (
            page
        )


def test_licences_are_whole() -> None:
    assert "Permission is hereby granted" in (ROOT / "LICENSE").read_text()
    text = (ROOT / "LICENSE-text").read_text()
    assert all(f"Section {number} --" in text for number in range(1, 9))
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["license"] == "MIT"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["version"] == project["version"]
