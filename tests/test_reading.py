"""What strangers hand in is read as data: odd files end in one sentence, and never in a wait."""

import contextlib
import gc
import json
import os
import random
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from assignment import read
from nbformat import v3

from dianlib.checks.registry import CHAPTERS
from dianlib.grading import reading
from dianlib.grading.reading import Cell, Unreadable, fingerprint, read_file, read_notebook


def notebook(*cells: Any, **changed: Any) -> dict[str, Any]:
    return {"cells": list(cells), "metadata": {}, "nbformat": 4, "nbformat_minor": 5, **changed}


def code(source: Any = "x = 1", **changed: Any) -> dict[str, Any]:
    plain = {"cell_type": "code", "id": "a", "metadata": {}, "outputs": [], "execution_count": None}
    return {**plain, "source": source, **changed}


def cells_of(folder: Path, content: Any) -> list[Cell]:
    """Write a notebook, as bytes or as what JSON makes of it, and read its cells."""
    file = folder / "mlp.ipynb"
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return read_notebook(file)


def open_files() -> int:
    gc.collect()  # what other tests have left open is closed now, and not in between
    return len(list(Path("/proc/self/fd").iterdir()))


def sentence(path: Path) -> str:
    """Return the one sentence that says why a notebook cannot be read, and check that nothing waits."""
    before, began = open_files(), time.monotonic()
    with pytest.raises(Unreadable) as caught:
        read_notebook(path)
    assert time.monotonic() - began < 2
    assert open_files() == before
    text = str(caught.value)
    assert text.endswith(".")
    assert text.isprintable()
    assert len(text) < 200
    return text


# ----- content -------------------------------------------------------------------------------------------

UNREADABLE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "damaged"),
    "one byte": (b"{", "damaged"),
    "NUL bytes": (bytes(1000), "damaged"),
    "text": ("def f():\n    return '你好'\n".encode(), "damaged"),
    "half": (json.dumps(notebook(code())).encode()[:-40], "damaged"),
    "two": (json.dumps(notebook()).encode() * 2, "damaged"),
    "a conflict of git": (b"<<<<<<< HEAD\n{}\n=======\n{}\n>>>>>>> main\n", "damaged"),
    "a PDF": (b"%PDF-1.4\n\xe2\xe3\xcf\xd3", "damaged"),
    "a list": (b"[]", "not a notebook"),
    "null": (b"null", "not a notebook"),
    "a number": (b"4", "not a notebook"),
    "a text in quotes": (b'"cells"', "not a notebook"),
    "another object": (b"{}", "not a notebook"),
    "a format in words": (json.dumps(notebook(nbformat="4")).encode(), "not a notebook"),
    "a format that is true": (json.dumps(notebook(nbformat=True)).encode(), "not a notebook"),
    "a format that is null": (json.dumps(notebook(nbformat=None)).encode(), "not a notebook"),
    "format 2": (json.dumps(notebook(nbformat=2)).encode(), "format 2;"),
    "format 5": (json.dumps(notebook(nbformat=5)).encode(), "format 5;"),
    "a format of 4,000 digits": (b'{"nbformat": ' + b"7" * 4_000 + b"}", "format 7777777777;"),
    "a format of 100,000 digits": (b'{"nbformat": ' + b"7" * 100_000 + b"}", "damaged"),
    "deep lists": (b"[" * 200_000 + b"]" * 200_000, "nested too deeply"),
    "deep objects": (b'{"a":' * 200_000 + b"1" + b"}" * 200_000, "nested too deeply"),
    "deep metadata": (b'{"nbformat": 4, "cells": [], "metadata": ' + b"[" * 10**6, "nested too deeply"),
    "no cells": (b'{"nbformat": 4, "nbformat_minor": 5, "metadata": {}}', "no list of cells"),
    "cells that are null": (json.dumps(notebook(cells=None)).encode(), "no list of cells"),
    "cells in an object": (json.dumps(notebook(cells={"0": code()})).encode(), "no list of cells"),
    "no worksheet": (b'{"nbformat": 3, "worksheets": []}', "no list of cells"),
    "worksheets in an object": (b'{"nbformat": 3, "worksheets": {"cells": []}}', "no list of cells"),
    "600,000 characters": (
        json.dumps(notebook(*[code("#" * 150_000)] * 4)).encode(),
        "more than 500,000 characters",
    ),
    "5,000 cells": (json.dumps(notebook(*[code("")] * 5_000)).encode(), "more than 2,000 cells"),
}


@pytest.mark.parametrize(("content", "reason"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_damaged_notebook_ends_in_one_sentence(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "mlp.ipynb").write_bytes(content)
    text = sentence(tmp_path / "mlp.ipynb")
    assert reason in text
    assert text.startswith("mlp.ipynb ")


@pytest.mark.parametrize("slug", CHAPTERS)
def test_a_release_is_read_cell_by_cell(tmp_path: Path, slug: str) -> None:
    release = read("exercises", slug)
    nbformat.write(release, tmp_path / "mlp.ipynb")
    expected = [
        Cell(cell.cell_type, cell.source, cell.metadata.get("nbgrader", {}).get("grade_id"), cell.id)
        for cell in release.cells
    ]
    assert read_notebook(tmp_path / "mlp.ipynb") == expected


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"]
)
def test_every_encoding_of_json_is_read(tmp_path: Path, encoding: str) -> None:
    text = json.dumps(notebook(code("x = '数据 🎲'")), ensure_ascii=False)
    (cell,) = cells_of(tmp_path, text.encode(encoding))
    assert cell.source == "x = '数据 🎲'"


def test_a_letter_in_another_encoding_costs_that_letter_only(tmp_path: Path) -> None:
    text = json.dumps(notebook(code("# Größe\nx = 1")), ensure_ascii=False)
    for encoding in ("latin-1", "cp1252"):
        (cell,) = cells_of(tmp_path, text.encode(encoding))
        assert cell.source == "# Gr��e\nx = 1"
    content = json.dumps(notebook(code("# 你好\nx = 1")), ensure_ascii=False).encode("gbk")
    (cell,) = cells_of(tmp_path, content)
    assert cell.source.endswith("\nx = 1")


def test_lines_end_as_in_python(tmp_path: Path) -> None:
    lines = ["def f():\r\n", "    return 1\r\n"]
    for source in (lines, "".join(lines), ["def f():\r", "\n    return 1\r\n"]):
        (cell,) = cells_of(tmp_path, notebook(code(source)))
        assert cell.source == "def f():\n    return 1\n"
    content = json.dumps(notebook(code("x = 1")), indent=1).replace("\n", "\r\n").encode()
    assert cells_of(tmp_path, content)[0].source == "x = 1"


SOURCES: dict[str, tuple[Any, str]] = {
    "lines": (["a = 1\n", "b = 2"], "a = 1\nb = 2"),
    "lines and others": (["a = 1\n", None, 3, {"b": 1}, ["c"], "d = 4"], "a = 1\nd = 4"),
    "null": (None, ""),
    "a number": (17, ""),
    "an object": ({"a": "b"}, ""),
    "nothing": ([], ""),
    "half a pair of code units": ("x = '\ud83d'", "x = '?'"),
    "both halves apart": (["x = '\ud83d", "\ude00'"], "x = '??'"),
    "NUL": ("a\0b", "a\0b"),
    "a very long text": ("x" * 1_000_000, "x" * reading.MAX_SOURCE),
}


@pytest.mark.parametrize(("source", "expected"), SOURCES.values(), ids=SOURCES)
def test_any_source_becomes_a_text_that_can_be_written(tmp_path: Path, source: Any, expected: str) -> None:
    (cell,) = cells_of(tmp_path, notebook(code(source)))
    assert cell.source == expected
    cell.source.encode()


def test_a_source_as_deep_as_json_may_be_does_no_harm(tmp_path: Path) -> None:
    # The reader of JSON, and whatever looks at its result, have the same limit of depth.
    for depth in range(900, 1_000):
        source = b'[{"source": ' + b"[" * depth + b"]" * depth + b"}]"
        with contextlib.suppress(Unreadable):
            assert cells_of(tmp_path, b'{"nbformat": 4, "cells": ' + source + b"}")[0].source == ""


def test_odd_marks_count_as_none(tmp_path: Path) -> None:
    for metadata in (None, [], "text", {"nbgrader": None}, {"nbgrader": []}, {"nbgrader": {"grade_id": 7}}):
        (cell,) = cells_of(tmp_path, notebook(code(metadata=metadata, id=7)))
        assert (cell.grade_id, cell.cell_id) == (None, None)
    nameless = code(metadata={"nbgrader": {"grade_id": ["a"]}})
    del nameless["id"]
    (cell,) = cells_of(tmp_path, notebook(nameless))
    assert (cell.grade_id, cell.cell_id) == (None, None)


def test_odd_cells(tmp_path: Path) -> None:
    found = cells_of(
        tmp_path,
        notebook(
            *(None, 3, "text", [], {}),
            {"cell_type": "raw", "source": "r"},
            {"cell_type": "heading", "source": "h"},
            {"cell_type": ["code"], "source": "l"},
            {"cell_type": "code", "source": "c"},
        ),
    )
    assert [(cell.kind, cell.source) for cell in found] == [
        ("markdown", ""),
        ("raw", "r"),
        ("markdown", "h"),
        ("markdown", "l"),
        ("code", "c"),
    ]


@pytest.mark.parametrize("minor", [0, 4, 5, 99, None, "x"])
def test_the_minor_format_does_not_matter(tmp_path: Path, minor: Any) -> None:
    plain = code()
    del plain["id"]
    assert cells_of(tmp_path, notebook(plain, nbformat_minor=minor)) == [Cell("code", "x = 1", None, None)]


def test_format_3_has_worksheets_and_inputs(tmp_path: Path) -> None:
    old = v3.new_notebook(
        worksheets=[
            v3.new_worksheet(cells=[v3.new_code_cell(input="x = 1"), v3.new_text_cell("markdown", "a text")]),
            v3.new_worksheet(cells=[v3.new_code_cell(input="y = 2")]),
        ]
    )
    found = cells_of(tmp_path, v3.writes_json(old).encode())
    assert [(c.kind, c.source) for c in found] == [
        ("code", "x = 1"),
        ("markdown", "a text"),
        ("code", "y = 2"),
    ]


def test_worksheets_mean_nothing_in_format_4(tmp_path: Path) -> None:
    assert len(cells_of(tmp_path, notebook(code(), worksheets=[]))) == 1


def test_a_damaged_notebook_is_read_or_ends_in_a_sentence(tmp_path: Path) -> None:
    draw = random.Random(4)
    nbformat.write(read("exercises", "mlp"), tmp_path / "whole.ipynb")
    whole = (tmp_path / "whole.ipynb").read_bytes()
    results = []
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(draw.randrange(1, 5)):
            place = draw.randrange(len(content))
            if draw.random() < 0.5:
                content[place] = draw.randrange(256)
            else:
                content[place : place + draw.randrange(30)] = draw.randbytes(draw.randrange(3))
        try:
            for cell in cells_of(tmp_path, bytes(content)):
                cell.source.encode()
            results.append("read")
        except Unreadable:
            results.append("refused")
    assert set(results) == {"read", "refused"}


# ----- files ---------------------------------------------------------------------------------------------


def sparse(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(100 << 20)


def listen(path: Path) -> None:
    # Not by its own path, which may be too long for a socket.
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)


ODD_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: None, "No such file"),
    "a folder": (Path.mkdir, "not an ordinary file"),
    "a pipe without a writer": (os.mkfifo, "not an ordinary file"),
    "a socket": (listen, "cannot be read"),
    "100 MB": (sparse, "larger than 20 MB"),
    "a link to a notebook": (lambda path: path.symlink_to("other.ipynb"), "it is a link"),
    "a link to a folder": (lambda path: path.symlink_to(".."), "it is a link"),
    "a link to nothing": (lambda path: path.symlink_to("nothing"), "it is a link"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "it is a link"),
    "a link to zeros without end": (lambda path: path.symlink_to("/dev/zero"), "it is a link"),
}


@pytest.mark.parametrize(("make", "reason"), ODD_FILES.values(), ids=ODD_FILES)
def test_what_is_no_ordinary_file_ends_in_one_sentence(
    tmp_path: Path, make: Callable[[Path], Any], reason: str
) -> None:
    (tmp_path / "other.ipynb").write_text(json.dumps(notebook(code("secret"))))
    make(tmp_path / "mlp.ipynb")
    assert reason in sentence(tmp_path / "mlp.ipynb")


def test_a_device_is_no_ordinary_file() -> None:
    assert "not an ordinary file" in sentence(Path("/dev/zero"))


@pytest.mark.parametrize("name", [b"\xff\xfe.ipynb", b"a\x1b[31m\nb.ipynb", "a\u202eb.ipynb".encode()])
def test_an_odd_name_is_shown_in_one_plain_line(tmp_path: Path, name: bytes) -> None:
    path = tmp_path / os.fsdecode(name)
    assert "\N{REPLACEMENT CHARACTER}" in sentence(path)
    path.mkdir()
    assert "\N{REPLACEMENT CHARACTER}" in sentence(path)
    path.rmdir()
    path.write_text("[")
    assert "\N{REPLACEMENT CHARACTER}" in sentence(path)
    assert len(fingerprint(tmp_path)) == 64


def test_a_file_of_just_the_limit_is_read(tmp_path: Path) -> None:
    file = tmp_path / "data.csv"
    file.write_bytes(b"12345")
    assert read_file(file, 5) == b"12345"
    with pytest.raises(Unreadable):
        read_file(file, 4)


# ----- fingerprint ---------------------------------------------------------------------------------------


def handed_in(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


FILES = {"mlp.ipynb": b"{}", "data.csv": b"1,2\n", "timestamp.txt": b"2026-03-01 12:00:00 UTC\n"}


def test_the_fingerprint_depends_on_what_was_handed_in_only(tmp_path: Path) -> None:
    first = handed_in(tmp_path / "a", FILES)
    second = handed_in(tmp_path / "b", dict(reversed(FILES.items())))
    os.utime(second / "mlp.ipynb", (0, 0))
    (second / "data.csv").chmod(0o600)
    (second / ".hidden").write_bytes(b"x")
    (second / ".ipynb_checkpoints").mkdir()
    (second / "folder").mkdir()
    (second / "folder" / "mlp.ipynb").write_bytes(b"other")
    assert fingerprint(first) == fingerprint(second)


def exchange(folder: Path) -> None:
    (folder / "data.csv").write_bytes(b"{}")
    (folder / "mlp.ipynb").write_bytes(b"1,2\n")


def link(folder: Path) -> None:
    (folder / "mlp.ipynb").rename(folder / ".kept")
    (folder / "mlp.ipynb").symlink_to(".kept")


CHANGES: dict[str, Callable[[Path], Any]] = {
    "another notebook": lambda folder: (folder / "mlp.ipynb").write_bytes(b"{ }"),
    "another time": lambda folder: (folder / "timestamp.txt").write_bytes(b"2026-03-01 12:00:01 UTC\n"),
    "another file": lambda folder: (folder / "data.csv").write_bytes(b"1,3\n"),
    "another name": lambda folder: (folder / "data.csv").rename(folder / "Data.csv"),
    "one file more": lambda folder: (folder / "more.txt").write_bytes(b""),
    "one file less": lambda folder: (folder / "data.csv").unlink(),
    "contents exchanged": exchange,
    "a link instead": link,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_fingerprint_changes_with(tmp_path: Path, change: Callable[[Path], Any]) -> None:
    folder = handed_in(tmp_path / "a", FILES)
    before = fingerprint(folder)
    change(folder)
    assert fingerprint(folder) != before


def test_no_file_makes_the_fingerprint_wait_or_fail(tmp_path: Path) -> None:
    seen = set()
    began = time.monotonic()
    for number, make in enumerate(make for make, _ in ODD_FILES.values()):
        folder = handed_in(tmp_path / str(number), FILES)
        make(folder / "odd.ipynb")
        seen.add(fingerprint(folder))
        assert fingerprint(folder) == fingerprint(folder)
    assert time.monotonic() - began < 5
    # Folders do not count, even behind a link; other links look alike wherever they lead.
    assert len(seen) == 5
