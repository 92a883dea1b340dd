"""A submission put into the release: the skeleton holds, answers still run, and a text only shows."""

import contextlib
import copy
import random
import re
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import nbformat
import pytest
from assignment import mark, read
from bs4 import BeautifulSoup
from nbconvert.exporters import HTMLExporter
from nbconvert.filters.highlight import Highlight2HTML
from nbconvert.filters.markdown_mistune import markdown2html_mistune
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from nbgrader.converters import GenerateFeedback
from nbgrader.coursedir import CourseDirectory
from test_nbgrader import submission

from dianlib.checks.registry import CHAPTERS
from dianlib.grading.graft import MAX_MARKDOWN, asked, graft, inert
from dianlib.grading.reading import Cell
from dianlib.grading.records import Flag


def cells_of(notebook: NotebookNode) -> list[Cell]:
    """Return the cells of a notebook as they are read from a submission."""
    return [Cell(c.cell_type, c.source, mark(c, "grade_id"), c.get("id")) for c in notebook.cells]


def kinds(flags: list[Flag]) -> set[str]:
    return {flag.kind for flag in flags}


def assert_skeleton_holds(release: NotebookNode, grafted: NotebookNode) -> None:
    """Check that nothing of the release changed but the sources of answers."""
    own = {cell.id for cell in release.cells}
    kept = [cell for cell in grafted.cells if cell.id in own]
    assert [cell.id for cell in kept] == [cell.id for cell in release.cells]
    for old, new in zip(release.cells, kept, strict=True):
        metadata = {name: value for name, value in new.metadata.items() if name != "magics_language"}
        assert metadata == old.metadata
        assert new.cell_type == old.cell_type
        assert mark(old, "solution") or new.source == old.source
    for cell in grafted.cells:
        if cell.id not in own:
            assert set(cell.metadata) <= {"magics_language"}
            assert not cell.get("outputs")
    assert grafted.metadata == release.metadata
    nbformat.validate(grafted)


# ----- the skeleton holds --------------------------------------------------------------------------------


@pytest.mark.parametrize("slug", CHAPTERS)
def test_a_release_handed_in_as_it_is_comes_back_as_it_is(slug: str) -> None:
    release = read("exercises", slug)
    before = copy.deepcopy(release)
    grafted, flags = graft(release, cells_of(release))
    assert flags == []
    assert grafted == release == before


@pytest.mark.parametrize("slug", CHAPTERS)
def test_answers_come_from_the_submission(slug: str) -> None:
    handed_in = submission(slug, {})
    grafted, flags = graft(read("exercises", slug), cells_of(handed_in))
    assert flags == []
    assert [c.source for c in grafted.cells if c.cell_type == "code"] == [
        c.source for c in handed_in.cells if c.cell_type == "code"
    ]


NASTY_SOURCES = [
    "",
    "   \n",
    "raise SystemExit",
    "def f(:",
    "\0",
    "x" * 5_000,
    '<script>alert("1")</script>',
    "### BEGIN SOLUTION",
    'check("mlp.softmax", print)',
    "![a](attachment:a.png)",
    "a\rb\x85c\u2028d\x0ce",
    "%%html\n<b>",
]


def mangled(cells: list[Cell], draw: random.Random) -> list[Cell]:
    """Do to cells what careless and malicious people do: shuffle, delete, repeat, retype, rename, rewrite."""
    names = [cell.grade_id for cell in cells] + ["no-such-cell", "", "\ud800", "__class__"]
    ids = [cell.cell_id for cell in cells] + ["no-such-id", ""]
    for _ in range(draw.randrange(1, 12)):
        if not cells:
            break
        place = draw.randrange(len(cells))
        cell = cells[place]
        match draw.randrange(9):
            case 0:
                draw.shuffle(cells)
            case 1:
                del cells[place : place + draw.randrange(1, 20)]
            case 2:
                cells.insert(draw.randrange(len(cells) + 1), cell)
            case 3:
                cells[place] = replace(cell, kind=draw.choice(["code", "markdown", "raw"]))
            case 4:
                cells[place] = replace(cell, grade_id=draw.choice(names))
            case 5:
                cells[place] = replace(cell, cell_id=draw.choice(ids))
            case 6:
                cells[place] = replace(cell, source=draw.choice([*NASTY_SOURCES, draw.choice(cells).source]))
            case 7:
                cells[:] = [replace(cell, grade_id=None) for cell in cells]
            case 8:
                cells.insert(place, Cell("code", draw.choice(NASTY_SOURCES), None, None))
    return cells


@pytest.mark.parametrize("slug", CHAPTERS)
def test_whatever_is_handed_in_the_skeleton_holds(slug: str) -> None:
    draw = random.Random(5)
    release = read("exercises", slug)
    whole = cells_of(submission(slug, {}))
    seen: set[str] = set()
    for number in range(150):
        cells = mangled(list(whole), draw)
        grafted, flags = graft(release, cells)
        assert_skeleton_holds(release, grafted)
        assert len(flags) == len(set(flags))
        assert all(flag.text.isprintable() and len(flag.text) < 200 for flag in flags)
        seen |= kinds(flags)
        if number < 5:
            assert graft(release, cells)[1] == flags
    assert seen == {"duplicate-cell", "metadata", "locked-cell-edited", "missing-cell", "order"}


def test_nothing_handed_in() -> None:
    release = read("exercises", "mlp")
    grafted, flags = graft(release, [])
    assert_skeleton_holds(release, grafted)
    assert {cell.source for cell in grafted.cells if mark(cell, "solution")} == {""}
    assert kinds(flags) == {"missing-cell"}


def test_a_release_of_an_older_format_gets_names_for_its_cells() -> None:
    release = copy.deepcopy(read("exercises", "mlp"))
    cells = [replace(cell, cell_id=None) for cell in cells_of(release)]
    release.nbformat_minor = 4
    for cell in release.cells:
        del cell["id"]
    grafted, flags = graft(release, [*cells, Cell("code", "x = 1", None, None)])
    assert flags == []
    assert [cell.source for cell in grafted.cells][:-1] == [cell.source for cell in release.cells]
    nbformat.validate(grafted)


# ----- honest answers run --------------------------------------------------------------------------------


def code(source: str, **marks: Any) -> NotebookNode:
    cell = new_code_cell(source, id=f"id-{marks.get('grade_id', source[:10].split()[0])}")
    if marks:
        cell.metadata.nbgrader = {"grade": False, "solution": False, "locked": False, **marks}
    return cell


def task(name: str) -> list[NotebookNode]:
    """Make the cells of one task: its text, the cell for the answer, and the check."""
    stub = f"def {name}(x):\n    raise NotImplementedError"
    check = {"grade": True, "locked": True, "points": 2, "grade_id": f"{name}-check"}
    return [
        new_markdown_cell(f"## Write {name}", id=f"text-{name}"),
        code(stub, solution=True, grade_id=name),
        code(f'check("t.{name}", {name})', **check),
    ]


ESSAY = new_markdown_cell(
    "Write your answer here.",
    id="essay",
    metadata={"nbgrader": {"grade": True, "solution": True, "points": 3, "grade_id": "essay"}},
)
SMALL = new_notebook(
    cells=[code("import math"), *task("double"), *task("square"), *task("root"), ESSAY],
    nbformat_minor=5,
)
# Each answer needs the one before, and the import when it is defined.
ANSWERS = {
    "double": "def double(x, one=math.cos(0)):\n    return 2 * x * one",
    "square": "def square(x):\n    return double(x) * x / 2",
    "root": "def root(x):\n    return math.sqrt(square(x))",
}
RIGHT = {"double": 6.0, "square": 9.0, "root": 3.0}


def results(notebook: NotebookNode) -> dict[str, Any]:
    """Run the cells in order, as the grader does; return what each answer gives for 3 at its check cell."""
    names: dict[str, Any] = {"check": lambda *_: None}
    found: dict[str, Any] = {}
    for cell in notebook.cells:
        if cell.cell_type == "code" and mark(cell, "grade"):
            ((_, name),) = asked(cell)
            try:
                found[name] = names[name](3) if name in names else "missing"
            except Exception as error:
                found[name] = type(error).__name__
        elif cell.cell_type == "code":
            with contextlib.suppress(Exception):
                exec(cell.source, names)
    return found


def answered() -> list[Cell]:
    return [
        replace(cell, source=ANSWERS[cell.grade_id]) if cell.grade_id in ANSWERS else cell
        for cell in cells_of(SMALL)
    ]


def place(cells: list[Cell], name: str) -> int:
    return next(number for number, cell in enumerate(cells) if name in (cell.grade_id, cell.cell_id))


def helper(source: str) -> Cell:
    return Cell("code", source, None, "x")


def move_helper(cells: list[Cell]) -> list[Cell]:
    """Define part of an answer in an added cell above it."""
    at = place(cells, "square")
    cells[at] = replace(cells[at], source="def square(x):\n    return half(double(x)) * x")
    return [*cells[:at], helper("def half(x):\n    return x / 2"), *cells[at:]]


def helper_on_top(cells: list[Cell]) -> list[Cell]:
    at = place(cells, "square")
    cells[at] = replace(cells[at], source="def square(x):\n    return half(double(x)) * x")
    return [helper("def half(x):\n    return x / 2"), *cells]


def helper_at_the_end_of_another_task(cells: list[Cell]) -> list[Cell]:
    at = place(cells, "double-check")
    cells = helper_on_top(cells)[1:]
    return [*cells[: at + 1], helper("def half(x):\n    return x / 2"), *cells[at + 1 :]]


def delete_checks(cells: list[Cell]) -> list[Cell]:
    return [cell for cell in cells if not (cell.grade_id or "").endswith("-check")]


def delete_texts(cells: list[Cell]) -> list[Cell]:
    return [cell for cell in cells if cell.kind == "code"]


def answer_in_the_check_cell(cells: list[Cell]) -> list[Cell]:
    """Leave the stub where it is, and write the answer above the check."""
    answer, check = place(cells, "square"), place(cells, "square-check")
    cells[check] = replace(cells[check], source=f"{ANSWERS['square']}\n\n{cells[check].source}")
    cells[answer] = cells_of(SMALL)[answer]
    return cells


def answer_in_the_check_cell_alone(cells: list[Cell]) -> list[Cell]:
    cells = answer_in_the_check_cell(cells)
    del cells[place(cells, "square")]
    return cells


def answer_in_a_new_cell(cells: list[Cell]) -> list[Cell]:
    at = place(cells, "square")
    cells[at] = helper(ANSWERS["square"])
    return cells


def answer_in_a_new_cell_below_the_stub(cells: list[Cell]) -> list[Cell]:
    at = place(cells, "square")
    return [*cells[:at], cells_of(SMALL)[at], helper(ANSWERS["square"]), *cells[at + 1 :]]


def second_version_in_a_copy(cells: list[Cell]) -> list[Cell]:
    """Copy the answer cell with its marks; the last version holds, as in Jupyter."""
    at = place(cells, "square")
    wrong = replace(cells[at], source="def square(x):\n    return 0")
    return [*cells[:at], wrong, replace(cells[at], cell_id="copy"), *cells[at + 1 :]]


def second_version_above_the_check_of_a_moved_answer(cells: list[Cell]) -> list[Cell]:
    """Put the answer above the task before, and its second version too."""
    at, above = place(cells, "square"), place(cells, "text-double")
    wrong = replace(cells[at], source="def square(x):\n    return 0")
    copy_of_it = replace(cells[at], cell_id="copy")
    return [*cells[:above], wrong, copy_of_it, *cells[above:at], *cells[at + 1 :]]


def split_in_two(cells: list[Cell]) -> list[Cell]:
    """Split an answer cell, as JupyterLab does it: both parts have the marks."""
    at = place(cells, "square")
    first = replace(cells[at], source="factor = 0.5")
    second = replace(cells[at], source="def square(x):\n    return double(x) * x * factor", cell_id="new")
    return [*cells[:at], first, second, *cells[at + 1 :]]


def without_marks(cells: list[Cell]) -> list[Cell]:
    return [replace(cell, grade_id=None) for cell in cells]


def without_ids(cells: list[Cell]) -> list[Cell]:
    return [replace(cell, cell_id=None) for cell in cells]


def without_both(cells: list[Cell]) -> list[Cell]:
    return [replace(cell, grade_id=None, cell_id=None) for cell in cells]


def with_new_ids(cells: list[Cell]) -> list[Cell]:
    return [replace(cell, grade_id=None, cell_id=f"new-{number}") for number, cell in enumerate(cells)]


def texts_at_the_end(cells: list[Cell]) -> list[Cell]:
    return sorted(cells, key=lambda cell: cell.kind)


def copied_release_cells(cells: list[Cell]) -> list[Cell]:
    """Paste an import and a check once more, without their marks, above the originals."""
    return [replace(cells[0], cell_id="a"), replace(cells[3], grade_id=None, cell_id="b"), *cells]


VARIANTS: dict[str, tuple[Callable[[list[Cell]], list[Cell]], set[str]]] = {
    "as it should be": (list, set()),
    "a helper above": (move_helper, set()),
    "a helper at the end of another task": (helper_at_the_end_of_another_task, set()),
    "a helper on top": (helper_on_top, set()),
    "no checks": (delete_checks, {"missing-cell"}),
    "no texts": (delete_texts, {"missing-cell"}),
    "the answer in the check cell": (answer_in_the_check_cell, {"locked-cell-edited"}),
    "the answer in the check cell alone": (
        answer_in_the_check_cell_alone,
        {"locked-cell-edited", "missing-cell"},
    ),
    "the answer in a new cell": (answer_in_a_new_cell, {"missing-cell"}),
    "the answer in a new cell below the stub": (answer_in_a_new_cell_below_the_stub, set()),
    "a second version in a copy": (second_version_in_a_copy, {"duplicate-cell"}),
    "a second version of a moved answer": (
        second_version_above_the_check_of_a_moved_answer,
        {"duplicate-cell", "order"},
    ),
    "a cell split in two": (split_in_two, {"duplicate-cell"}),
    "no marks": (without_marks, set()),
    "no ids": (without_ids, set()),
    "neither marks nor ids": (without_both, {"missing-cell"}),
    "new ids": (with_new_ids, {"missing-cell"}),
    "texts at the end": (texts_at_the_end, {"order"}),
    "cells of the release once more": (copied_release_cells, set()),
}


@pytest.mark.parametrize(("change", "expected"), VARIANTS.values(), ids=VARIANTS)
def test_an_honest_answer_still_runs(change: Callable[[list[Cell]], list[Cell]], expected: set[str]) -> None:
    grafted, flags = graft(SMALL, change(answered()))
    assert_skeleton_holds(SMALL, grafted)
    assert results(grafted) == RIGHT
    assert kinds(flags) == expected


@pytest.mark.parametrize("slug", CHAPTERS)
@pytest.mark.parametrize("change", [without_marks, without_ids, without_both, with_new_ids])
def test_programs_that_drop_names_keep_the_order_of_a_real_submission(
    slug: str, change: Callable[[list[Cell]], list[Cell]]
) -> None:
    handed_in = submission(slug, {})
    grafted, _ = graft(read("exercises", slug), change(cells_of(handed_in)))
    assert_skeleton_holds(read("exercises", slug), grafted)
    ran = [c.source for c in grafted.cells if c.cell_type == "code" and c.source]
    assert ran == [c.source for c in handed_in.cells if c.cell_type == "code"]


def test_a_check_of_the_students_own_does_not_replace_ours() -> None:
    cells = answered()
    at = place(cells, "square-check")
    cells[at] = replace(cells[at], source='print("all right")')
    grafted, flags = graft(SMALL, cells)
    assert kinds(flags) == {"locked-cell-edited"}
    sources = [cell.source for cell in grafted.cells]
    assert sources.index('print("all right")') + 1 == sources.index('check("t.square", square)')


def test_an_answer_that_became_text_is_shown_and_does_not_run() -> None:
    cells = answered()
    at = place(cells, "square")
    cells[at] = replace(cells[at], kind="raw")
    grafted, flags = graft(SMALL, cells)
    assert kinds(flags) == {"metadata"}
    assert results(grafted)["square"] == "missing"
    shown = [cell.source for cell in grafted.cells if cell.cell_type == "markdown"]
    assert ANSWERS["square"] in shown


def test_an_essay_is_kept_wherever_it_was_written() -> None:
    text = "Because the sum is one."
    for change in (
        lambda cells: [*cells[:-1], replace(cells[-1], source=text)],
        lambda cells: [*cells[:-1], replace(cells[-1], source=text, kind="code")],
        lambda cells: [*cells, Cell("markdown", text, None, None)],
        lambda cells: [*cells, replace(cells[-1], source=text)],
        lambda cells: [*cells[:-1], Cell("markdown", text, None, None)],
        lambda cells: [*cells[:-1], Cell("raw", text, None, None)],
        lambda cells: [*cells[:-4], replace(cells[-4], source=f"{cells[-4].source}\n\n{text}"), *cells[-3:]],
    ):
        grafted, _ = graft(SMALL, change(answered()))
        assert_skeleton_holds(SMALL, grafted)
        shown = [cell.source for cell in grafted.cells if cell.cell_type == "markdown"]
        assert sum(text in source for source in shown) == 1


def test_an_untouched_essay_stays_blank() -> None:
    grafted, flags = graft(SMALL, answered())
    assert flags == []
    assert grafted.cells[-1].source == ESSAY.source
    for slug in CHAPTERS:
        for cell in read("exercises", slug).cells:
            if cell.cell_type == "markdown" and mark(cell, "solution"):
                assert inert(cell.source) == cell.source


# ----- text only shows -----------------------------------------------------------------------------------

ACTIVE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "text <b onmouseover='alert(1)'>bold</b>",
    "<svg onload=alert(1)>",
    "<math><mi href='javascript:alert(1)'>x</mi></math>",
    '<a href="javascript:alert(1)">x</a>',
    "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
    "<style>body { display: none }</style>",
    "<form action=https://example.org><input name=q></form>",
    "<meta http-equiv=refresh content='0;url=https://example.org'>",
    "<!-- a comment --><b>",
    "<!--><script>alert(1)</script>-->",
    "<![CDATA[<b>]]>",
    "<?php echo 1 ?><b>",
    "<!DOCTYPE html><b>",
    "</div></div></div><b>out</b>",
    "\\<b>",
    "<\x00script>alert(1)</script>",
    "<b\x00>",
    "\x00<b>",
    "<b\n>",
    "<b/onclick=alert(1)//",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](javascript\\:alert(1))",
    "[x](java&#115;cript:alert(1))",
    "[x](javascript&colon;alert(1))",
    "[x](&#x6a;avascript:alert(1))",
    "[x](java\tscript:alert(1))",
    "[x](java\nscript:alert(1))",
    "[x](<java\tscript:alert(1)>)",
    "[x](<javascript:alert(1)>)",
    "[x]( \n javascript:alert(1))",
    "[x](\x01javascript:alert(1))",
    "[x](\u00a0javascript:alert(1))",
    "[x](vbscript:alert(1))",
    "[x](data:text/html;base64,PHNjcmlwdD4=)",
    "[x](file:///etc/passwd)",
    "[x](//example.org)",
    "[x](relative.html)",
    "[x](/files/javascript:alert(1))",
    "[x](files/javascript:alert(1))",
    "[x](blob:https://example.org/1)",
    "[x]\n\n[x]: javascript:alert(1)",
    "[x][y]\n\n[y]:\n  javascript\\:alert(1)",
    "[x]\n\n[x]: <javascript:alert(1)>",
    "[x]\n\n[x]:\u00a0javascript:alert(1)",
    "[x]\n\n> [x]:\n> javascript:alert(1)",
    "- [y]: javascript:alert(1)\n- [y]",
    "<javascript:alert(1)>",
    "<data:text/html,x>",
    "<vbscript:alert(1)>",
    '[x](https://example.org "t" onclick="alert(1)")',
    '[x](https://example.org "t\\" onclick=\\"alert(1)")',
    '[x](https://example.org"onclick="alert(1))',
    'https://example.org/"onclick="alert(1)',
    "https://example.org/<script>alert(1)</script>",
    '<https://example.org/"onclick="alert(1)>',
    "<https://example.org/<script>alert(1)</script>>",
    "<https:><script>alert(1)</script>",
    "![x](https://example.org/a.png)",
    "![x](data:image/svg+xml;base64,PHN2Zy8+)",
    '![x](https://example.org/a.png "t" onerror="alert(1)")',
    "![x][y]\n\n[y]: https://example.org/a.png",
    "[![x](https://example.org/a.png)](https://example.org)",
    "![not there](attachment:not-there.png)",
    '# a" onclick="alert(1)',
    "# <b>x</b>",
    "# [x](javascript:alert(1))",
    '```x"onclick="alert(1)\na\n```',
    "```x onclick=alert(1)\n<b>\n```",
    "```html\n<script>alert(1)</script>\n```",
    "    <script>alert(1)</script>",
    "`<script>`",
    "`` ` <script> ` ``",
    "` `` <script>",
    '```mermaid\ngraph TD\nclick A "javascript:alert(1)"\n```',
    "~~~  \u00a0mermaid\n<img src=x>\n~~~",
    "> ````mermaid-like\n> x\n> ````",
    "| <b>a</b> | b |\n|---|---|\n| <img src=x> | [x](javascript:a) |",
    "- [ ] <b>x",
    "term\n: <b>definition",
    "~~<b>~~ *<b>* __<b>__",
    "$<script>alert(1)</script>$",
    "$$\n<script>alert(1)</script>\n$$",
    "\\\\(<script>\\\\) \\\\[<script>\\\\]",
    "\\begin{a<b>}<script>\\end{a<b>}",
    "$\\href{javascript:alert(1)}{x}$",
    "$\\\\href{javascript:alert(1)}{x}$",
    "$\\\\\\href{javascript:alert(1)}{x}$",
    "\\$\\\\href{javascript:alert(1)}{x}\\$",
    "&#92;href{javascript:alert(1)}{x}",
    "&bsol;href{javascript:alert(1)}{x}",
    "$\\href_{javascript:alert(1)}{x}$",
    "$\\require{HTML}\\style{position:fixed}{x}\\class{a}{x}\\cssId{b}{x}\\unicode{x41}$",
    "$\\bbox[background:url(https://example.org)]{x}\\mmlToken{mi}[href='javascript:alert(1)']{x}$",
    "$\\def\\x{\\href}\\let\\y=\\style\\htmlClass{a}{b}\\data{a=b}{c}\\url{a}$",
]

HARMLESS = {
    "x < y & z": "x < y & z",
    "a<=b, a <- b, 1<2 and R&D": "a<=b, a <- b, 1<2 and R&D",
    "$a < b$ and $x \\le y$": "$a < b$ and $x \\le y$",
    "$a<b$": "$a< b$",
    "$$\\begin{aligned} a &= b \\\\\n c &< d \\end{aligned}$$": (
        "$$\\begin{aligned} a &= b \\\\\n c &< d \\end{aligned}$$"
    ),
    "$\\frac{1}{2} \\hat{y} \\data_set$": "$\\frac{1}{2} \\hat{y} \\ data_set$",
    "`a < b` and `x[0]` and `a & b`": "a < b and x[0] and a & b",
    "- one\n- two\n\n1. three": "one\ntwo\n\n\nthree",
    "*em* **strong** ~~gone~~": "em strong gone",
    "> quoted": "quoted",
    "你好，世界 😀 <3": "你好，世界 😀 <3",
    "Loss: 2.3026 (= log 10)!": "Loss: 2.3026 (= log 10)!",
    "the mermaid sings": "the mermaid sings",
}

TAGS = set(
    re.findall(
        r"\w+",
        "p em strong del code pre span div h1 h2 h3 h4 h5 h6 a ul ol li blockquote hr br input "
        "table thead tbody tr th td dl dt dd",
    )
)
COMMAND = re.compile(r"\\(href|url|style|class|cssId|bbox|mmlToken|unicode|require|data|html)(?![a-z])")


def assert_shows_only(source: str, shown: Any) -> None:
    """Check every tag, attribute and address of a text as it was rendered."""
    for tag in shown.find_all(True):
        assert tag.name in TAGS, source
        for name, value in tag.attrs.items():
            match name:
                case "href":
                    assert re.match(r"https?://|mailto:|#", value), (source, value)
                case "style":
                    assert re.fullmatch("text-align:(left|right|center)", value), source
                case "class":
                    assert not {"mermaid", "jp-Mermaid"} & set(value), source
                case "type" | "disabled" | "checked":
                    assert tag.name == "input", source
                case _:
                    assert name in ("id", "title"), (source, name)
    assert not COMMAND.search(shown.get_text()), source


@cache
def rendered(template: str) -> dict[str, Any]:
    """Render all texts as cells of one notebook, with nbconvert's page or with nbgrader's feedback."""
    texts = [*ACTIVE, *HARMLESS]
    notebook = new_notebook(cells=[new_markdown_cell(inert(text)) for text in texts])
    if template == "feedback":
        exporter = HTMLExporter(config=GenerateFeedback(coursedir=CourseDirectory()).config)
    else:
        exporter = HTMLExporter(template_name=template)
    grades = {"notebook": "mlp", "score": 1.0, "max_score": 2.0, "late_penalty": 0.0}
    html, _ = exporter.from_notebook_node(notebook, resources={"nbgrader": grades})
    cells = BeautifulSoup(html, "html.parser").select("div.jp-RenderedMarkdown, div.text_cell_render")
    return dict(zip(texts, cells, strict=True))


@pytest.mark.parametrize("template", ["lab", "feedback"])
def test_text_only_shows(template: str) -> None:
    for source, shown in rendered(template).items():
        assert_shows_only(source, shown)


@pytest.mark.parametrize("template", ["lab", "feedback"])
def test_ordinary_text_is_shown_as_it_was_meant(template: str) -> None:
    for source, expected in HARMLESS.items():
        assert rendered(template)[source].get_text().strip() == expected


def test_links_to_pages_mail_and_headings_are_kept() -> None:
    for source, address in {
        "[x](https://pytorch.org/docs?a=1&b=2#c)": "https://pytorch.org/docs?a=1&b=2#c",
        "[x](<https://pytorch.org>)": "https://pytorch.org",
        "[x](https://pytorch.org 'title')": "https://pytorch.org",
        "[x][y]\n\n[y]: http://example.org": "http://example.org",
        "[y]\n\n[y]: <https://example.org> 'title'": "https://example.org",
        "<https://example.org>": "https://example.org",
        "see https://example.org, or": "https://example.org",
        "[x](mailto:a@example.org)": "mailto:a@example.org",
        "[x](#Why)": "#Why",
    }.items():
        page = BeautifulSoup(markdown2html_mistune(inert(source)), "html.parser")
        assert [link["href"] for link in page.find_all("a")] == [address]


def test_tables_tasks_and_code_are_kept() -> None:
    for source in (
        "| a | b |\n|:--|--:|\n| 1 | 2 |",
        "- [ ] to do\n- [x] done",
        "```python\nif a < b:\n    x = {1: 2}\n```",
        "# One\n\n## Two",
        "a  \nb\n\n***",
        "term\n: definition",
    ):
        assert inert(source) == source
        assert_shows_only(source, BeautifulSoup(markdown2html_mistune(source), "html.parser"))


PIECES = [
    *("<", ">", "&", "!", "[", "]", "(", ")", ":", "\\", "`", "```", "~~~", "$", "$$", "#", "*", "_", "|"),
    *('"', "'", " ", "\n", "\n\n", "\t", "\x00", "\u00a0", "- ", "> ", "    ", "x", "/", "=", ";", "?"),
    *("-->", "<!--", "]]>", "script", "javascript:", "data:", "https://a.b", "mailto:", "href", "style"),
    *("img", "src", "onclick=a", "b", "mermaid", "#92", "&#58;", "colon", "bsol;", "[x]: ", "](", "!["),
    *("\\href{a}{b}", "\\begin{a}", "\\end{a}", "files/", "\\\\(", "\\\\)", "\\\\[", "\\\\]"),
    *("<b>", "</a>", "<a", "|---|", "\n: ", "- [ ] ", "\\:", "\\\n"),
]


def test_random_text_only_shows_either() -> None:
    draw = random.Random(6)
    seen = set()
    for _ in range(1_500):
        source = "".join(draw.choices(PIECES, k=draw.randrange(2, 25)))
        made = inert(source)
        assert inert(made) == made
        page = BeautifulSoup(markdown2html_mistune(made), "html.parser")
        assert_shows_only(source, page)
        seen |= {tag.name for tag in page.find_all(True)}
    assert {"a", "code", "em", "h1", "pre", "li", "blockquote"} <= seen


def test_all_of_a_submission_is_made_inert() -> None:
    script = "<script>alert(1)</script>"
    text = Cell("markdown", script, None, None)
    cells = answered()
    for number, cell in enumerate(cells):
        if cell.kind == "markdown":
            cells[number] = replace(cell, source=script)
    copied = replace(cells[-1], source=f"a {script}")
    for variant in ([text, *cells, replace(text, kind="raw"), copied], [text]):
        grafted, _ = graft(SMALL, variant)
        sources = [cell.source for cell in grafted.cells]
        assert not any("<script" in source for source in sources)
        assert any("< script" in source for source in sources)


def test_text_that_takes_long_to_show_is_cut() -> None:
    slow = "\\\\[" * 60_000
    grafted, flags = graft(SMALL, [*answered()[:-1], replace(answered()[-1], source=slow)])
    assert kinds(flags) == {"size-limit"}
    assert len(grafted.cells[-1].source) == MAX_MARKDOWN


def test_a_line_that_takes_long_to_colour_is_shown_plainly() -> None:
    slow = "x." * 40_000
    grafted, _ = graft(SMALL, [Cell("code", slow, None, None), *answered()])
    began = time.monotonic()
    html = Highlight2HTML()(slow, metadata=grafted.cells[0].metadata)
    assert time.monotonic() - began < 5
    assert BeautifulSoup(html, "html.parser").get_text().strip() == slow
    assert [bool(cell.metadata.get("magics_language")) for cell in grafted.cells].count(True) == 1


# ----- what a check cell asks for ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "expected"),
    {
        'check("mlp.softmax", softmax)': [("mlp.softmax", "softmax")],
        'check("a.b", f)\ncheck("a.c", g)\ncheck("a.b", f, seed=3)': [("a.b", "f"), ("a.c", "g")],
        'print("check"); x = check("a.b", f, seed=4)': [("a.b", "f")],
        "check(name, f)": [],
        'check("a.b", model.forward)': [],
        'check("a.b")': [],
        'other.check("a.b", f)': [],
        '# check("a.b", f)': [],
        "": [],
    }.items(),
)
def test_what_a_check_cell_asks_for(source: str, expected: list[tuple[str, str]]) -> None:
    assert asked(new_code_cell(source)) == expected
