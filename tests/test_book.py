"""The book as a reader meets it: built strictly, read offline, in light and dark, wide and narrow."""

import contextlib
import importlib.util
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
import yaml
from booksite import browser as chromium_tools
from booksite import links, notebooks
from bs4 import BeautifulSoup
from playwright.sync_api import Page

from dianlib.checks import tasks
from dianlib.checks.judging import where

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"
NOTEBOOKS = sorted(BOOK.glob("*.ipynb"))
CHINESE = re.compile(r"[\u4e00-\u9fff]")

LARGEST_PAGE = 400_000  # bytes of one HTML file
LARGEST_SITE = 40_000_000  # bytes of all files, of which MathJax takes about 6.5 million


def build(source: Path, output: Path) -> subprocess.CompletedProcess[str]:
    """Build a book strictly, as `make html` does, with the result outside of the source."""
    program = Path(sys.executable).with_name("jupyter-book")
    command = [str(program), "build", ".", "-W", "-n", "--keep-going"]
    command += ["--path-output", str(output)]
    return subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built pages, from a clean build."""
    output = tmp_path_factory.mktemp("built")
    result = build(ROOT, output)
    assert result.returncode == 0, result.stderr or result.stdout
    return output / "_build" / "html"


@pytest.fixture(scope="session")
def page_names(site: Path) -> list[str]:
    """The pages to visit: all but the front door, which leads away at once."""
    front_door = site / "index.html"
    return [page.relative_to(site).as_posix() for page in links.pages(site) if page != front_door]


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    with chromium_tools.served(site) as base:
        yield base


def toc_files() -> list[str]:
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text("utf8"))
    return [contents["root"], *(entry["file"] for part in contents["parts"] for entry in part["chapters"])]


# ----- the files ---------------------------------------------------------------------------------------


def test_every_entry_of_the_contents_has_its_page(site: Path) -> None:
    for name in toc_files():
        page = site / f"{name}.html"
        assert page.is_file(), f"{name} was not built"
        heading = BeautifulSoup(page.read_text("utf8"), "html.parser").find("h1")
        assert heading is not None, name
        assert heading.get_text(strip=True), name


def test_every_page_of_the_book_is_in_the_contents() -> None:
    written = {path.relative_to(ROOT).with_suffix("").as_posix() for path in [*BOOK.glob("*.md"), *NOTEBOOKS]}
    assert written == {name for name in toc_files() if name.startswith("book/")}


def test_links_arrive_and_nothing_comes_from_another_host(site: Path) -> None:
    assert links.problems(site) == []


def test_the_site_check_sees_each_fault(tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text(
        "<html><head><title> </title><script src='https://example.org/x.js'></script></head><body><article>"
        "<img src='data:,'><img src='data:,' alt='fig/plot.png'><img src='data:,' alt=''>"
        "<a href='nowhere.html'>a</a><a href='#missing'>b</a><p>A claim.[^1]</p></article></body></html>",
        encoding="utf8",
    )
    found = "\n".join(links.problems(tmp_path))
    for fault in (
        "loads from another host: https://example.org/x.js",
        "image without alt text",
        "described by its file name: fig/plot.png",
        "empty alt text",
        "missing file: nowhere.html",
        "missing anchor: #missing",
        "undefined footnote: [^1]",
        "without a language",
        "without a title",
        "without a description",
    ):
        assert fault in found


def test_the_strict_build_refuses_what_is_missing(tmp_path: Path) -> None:
    """The book's own settings stop a build over a download, a link, a citation or a term that is missing."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text("utf8"))
    shutil.copytree(BOOK / "_ext", tmp_path / "book" / "_ext")
    shutil.copytree(BOOK / "_static", tmp_path / "book" / "_static")
    shutil.copy(BOOK / "references.bib", tmp_path / "book")
    (tmp_path / "_config.yml").write_text(yaml.safe_dump(config), encoding="utf8")
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: book/index\n", encoding="utf8")
    faults = {
        "{download}`x <../exercises/none/none.ipynb>`": "download file not readable",
        "[a link](none.md)": "target not found",
        "{cite}`nobody1900`": "could not find bibtex key",
        "{term}`no such term`": "term not in glossary",
    }
    page = "\n\n".join(["# A book", *faults, "```{bibliography}\n```\n"])
    (tmp_path / "book" / "index.md").write_text(page, encoding="utf8")
    result = build(tmp_path, tmp_path.parent / f"{tmp_path.name}-built")
    assert result.returncode != 0
    for message in faults.values():
        assert message in result.stderr


def test_pages_and_site_stay_small(site: Path) -> None:
    sizes = {page.name: page.stat().st_size for page in links.pages(site)}
    assert {name: size for name, size in sizes.items() if size > LARGEST_PAGE} == {}
    assert sum(file.stat().st_size for file in site.rglob("*") if file.is_file()) < LARGEST_SITE


def test_assignments_are_downloaded_unchanged(site: Path) -> None:
    soup = BeautifulSoup((site / "book" / "assignments.html").read_text("utf8"), "html.parser")
    downloads = {Path(link["href"]).name: site / "book" / link["href"] for link in soup.select("a.download")}
    chapters = {path.stem for path in NOTEBOOKS}
    assert {name.removesuffix(".ipynb") for name in downloads} == chapters
    for name, file in downloads.items():
        original = ROOT / "exercises" / name.removesuffix(".ipynb") / name
        assert file.read_bytes() == original.read_bytes()


def test_chapters_have_launch_and_download_buttons(site: Path) -> None:
    repository = yaml.safe_load((ROOT / "_config.yml").read_text("utf8"))["repository"]["url"]
    for path in NOTEBOOKS:
        soup = BeautifulSoup((site / "book" / f"{path.stem}.html").read_text("utf8"), "html.parser")
        targets = [str(link["href"]) for link in soup.select(".article-header-buttons a[href]")]
        assert any(t.endswith(f"blob/main/book/{path.name}") and "colab" in t for t in targets), path.name
        assert any(t.endswith(f"_sources/book/{path.name}") for t in targets), path.name
        assert repository in targets


def test_the_address_of_the_repository_stands_in_one_place() -> None:
    repository = yaml.safe_load((ROOT / "_config.yml").read_text("utf8"))["repository"]["url"]
    pages = [*BOOK.glob("*.md"), *NOTEBOOKS]
    assert [page.name for page in pages if repository in page.read_text("utf8")] == []


def test_chinese_words_are_marked_as_chinese(site: Path) -> None:
    marked = 0
    for page in links.pages(site):
        article = BeautifulSoup(page.read_text("utf8"), "html.parser").find("article")
        for text in article.find_all(string=CHINESE) if article else []:
            if text.find_parent(["script", "pre"]):
                continue
            assert text.find_parent(lang="zh-Hans"), f"{page.name}: {text.strip()[:60]}"
            marked += 1
    assert marked > 35


def test_glossary_names_each_term_in_english_and_chinese(site: Path) -> None:
    soup = BeautifulSoup((site / "book" / "glossary.html").read_text("utf8"), "html.parser")
    entries: list[list[str]] = []
    names: list[str] = []
    for element in soup.select("dl.glossary > *"):
        if element.name == "dt":
            names.append(element.get_text().removesuffix("#"))
        else:
            entries.append(names)
            names = []
    assert len(entries) >= 35
    one_name_in_both = {"softmax"}
    lacking = [e for e in entries if not any(CHINESE.search(n) for n in e) and not one_name_in_both & set(e)]
    assert lacking == []
    first = [entry[0].lower() for entry in entries]
    assert first == sorted(first)


# ----- what the pages say ------------------------------------------------------------------------------


def test_paragraphs_named_by_the_checks_exist(site: Path) -> None:
    """A report sends its reader to "book/CHAPTER.html#ANCHOR": the place and the heading have to be there."""
    headings: dict[str, dict[str, str]] = {}
    for path in NOTEBOOKS:
        soup = BeautifulSoup((site / "book" / f"{path.stem}.html").read_text("utf8"), "html.parser")
        headings[f"book/{path.stem}.html"] = {
            str(section["id"]): section.find(["h1", "h2", "h3"]).get_text()
            for section in soup.select("section[id]")
        }
    missing = set()
    for task in tasks().values():
        for fault in task.mistakes:
            quoted, target = where(fault).rsplit(", ", 1)
            page, anchor = target.split("#")
            if quoted.strip('"') not in headings.get(page, {}).get(anchor, ""):
                missing.add(where(fault))
    assert missing == set()


EXAMPLE = re.compile(r"```python\n(?P<code>.*?)```\n\n```text\n(?P<printed>.*?)```\n", re.DOTALL)


def test_reports_shown_in_the_book_are_what_the_checks_print() -> None:
    names: dict[str, object] = {}
    examples = list(EXAMPLE.finditer((BOOK / "checks.md").read_text("utf8")))
    assert len(examples) >= 4
    for example in examples:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(example["code"], names)
        assert example["printed"] == printed.getvalue(), "book/checks.md shows an old report"


# ----- notebooks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_keeps_the_rules(path: Path) -> None:
    assert notebooks.problems(path) == []


def small_notebook() -> nbformat.NotebookNode:
    """A sound notebook of two cells, as if it had been run."""
    version = nbformat.v4
    printed = version.new_output("stream", name="stdout", text="0.625\n")
    figure = version.new_output("display_data", {"image/png": "iVBORw0KGgo=", "text/plain": "<Figure>"})
    cells = [
        version.new_markdown_cell("# A page", id="title"),
        version.new_code_cell("print(5 / 8)", id="divide", execution_count=1, outputs=[printed]),
        version.new_code_cell(
            "...",
            id="figure",
            execution_count=2,
            outputs=[figure],
            metadata={"mystnb": {"image": {"alt": "A curve that falls from 2.3 to 0.1."}}},
        ),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return version.new_notebook(cells=cells, metadata={"kernelspec": kernel})


SPOILED: dict[str, tuple[str, Callable[[nbformat.NotebookNode], object]]] = {
    "unrun": ("never run", lambda nb: nb.cells[1].update(execution_count=None)),
    "order": ("top to the bottom", lambda nb: nb.cells[1].update(execution_count=7)),
    "timing": (
        "time at which",
        lambda nb: nb.cells[1].metadata.update(execution={"iopub.status.idle": "2026"}),
    ),
    "stderr": ("stderr", lambda nb: nb.cells[1].outputs[0].update(name="stderr")),
    "error": (
        "ends with an error",
        lambda nb: nb.cells[1].outputs.append(
            nbformat.v4.new_output("error", ename="ValueError", evalue="no", traceback=[])
        ),
    ),
    "no alt": ("alt text", lambda nb: nb.cells[2].metadata.pop("mystnb")),
    "file name": (
        "alt text",
        lambda nb: nb.cells[2].metadata.mystnb.image.update(alt="../_images/0123456789abcdef0123456789.png"),
    ),
    "svg": ("no PNG", lambda nb: nb.cells[2].outputs[0].data.update({"image/svg+xml": "<svg/>"})),
    "footnote": ("footnote", lambda nb: nb.cells[0].update(source="A claim.[^1]")),
    "ids": ("same id", lambda nb: nb.cells[2].update(id="divide")),
    "folder": ("shows a folder", lambda nb: nb.cells[1].outputs[0].update(text="/home/somebody/x\n")),
    "widgets": ("widgets", lambda nb: nb.metadata.update(widgets={})),
}


@pytest.mark.filterwarnings("ignore:Non-unique cell id")
@pytest.mark.parametrize("fault", SPOILED)
def test_the_notebook_rules_see_each_fault(fault: str, tmp_path: Path) -> None:
    path = tmp_path / "page.ipynb"
    notebook = small_notebook()
    path.write_text(nbformat.writes(notebook), encoding="utf8")
    assert notebooks.problems(path) == []
    message, spoil = SPOILED[fault]
    spoil(notebook)
    path.write_text(nbformat.v4.writes(notebook), encoding="utf8")
    assert message in "\n".join(notebooks.problems(path))


def test_a_changed_number_fails_the_regression_run(tmp_path: Path) -> None:
    """The same options as for the book: the notebook as it was run passes, one altered digit does not."""
    notebook = small_notebook()
    del notebook.cells[2]
    right, wrong = tmp_path / "right.ipynb", tmp_path / "wrong.ipynb"
    right.write_text(nbformat.writes(notebook), encoding="utf8")
    notebook.cells[1].outputs[0].text = "0.626\n"
    wrong.write_text(nbformat.writes(notebook), encoding="utf8")
    settings = ["-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "--nbval", *settings, str(right), str(wrong)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stdout
    assert "1 failed, 1 passed" in result.stdout
    failure = result.stdout.partition("FAILURES")[2]
    assert "0.626" in failure
    assert "0.625" in failure


# ----- extensions --------------------------------------------------------------------------------------


def extension(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BOOK / "_ext" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_repairs_change_a_page_once() -> None:
    accessibility = extension("dian_accessibility")
    before = (
        '<div id="pst-primary-sidebar" class="x"><div class="citation" id="id2" role="doc-biblioentry">'
        '<th class="head"><p></p></th><th></th><th class="head"><p>Class</p></th>'
    )
    after = accessibility.repair(before)
    assert 'role="region" aria-label="Book"' in after
    assert 'id="id2" role="listitem"' in after
    assert '<td class="head"></td><td></td><th class="head"><p>Class</p></th>' in after
    assert accessibility.repair(after) == after


def test_the_pages_are_repaired(site: Path) -> None:
    """No page holds anything that a repair would change, and the marks of the first two repairs are there."""
    accessibility = extension("dian_accessibility")
    for page in links.pages(site):
        text = page.read_text("utf8")
        assert accessibility.repair(text) == text, page.name
    assert 'role="region" aria-label="Book"' in (site / "book" / "index.html").read_text("utf8")
    assert 'role="listitem"' in (site / "book" / "references.html").read_text("utf8")


def test_a_page_is_described_by_its_first_paragraph() -> None:
    from docutils import nodes
    from docutils.utils import new_document

    describe = extension("dian_pages").describe
    document = new_document("page")
    assert describe(document) == ""
    document += nodes.paragraph("", "One sentence\nover two lines.")
    document += nodes.paragraph("", "Another.")
    assert describe(document) == "One sentence over two lines."
    document[0][0] = nodes.Text("word " * 100)
    assert describe(document).endswith("word …")
    assert len(describe(document)) <= 202


# ----- in a browser ------------------------------------------------------------------------------------


def formulas(page: Page) -> tuple[int, int]:
    """Count the formulas of a page, and those of them that are set with a size."""
    return tuple(
        page.evaluate(
            """() => [document.querySelectorAll('span.math, div.math').length,
            [...document.querySelectorAll('mjx-container')].filter(m => m.getClientRects().length).length]"""
        )
    )


@pytest.mark.parametrize("origin", ["http", "file"])
def test_the_book_reads_offline(
    origin: str, site: Path, address: str, page_names: list[str], visit: Callable[..., chromium_tools.Visit]
) -> None:
    base = address if origin == "http" else site.as_uri()
    reader = visit()
    with_formulas = 0
    for name in page_names:
        page = reader.open(f"{base}/{name}")
        wanted, shown = formulas(page)
        assert shown >= wanted, f"{name}: {wanted} formulas, {shown} of them set"
        with_formulas += wanted > 0
        if wanted:
            fonts = page.evaluate(
                """() => document.fonts.ready.then(all =>
                [...all].filter(font => font.family.includes('MJX')).map(font => font.status))"""
            )
            assert "loaded" in fonts, name
            assert "error" not in fonts, name
    assert with_formulas >= 2
    assert (reader.left, reader.failed, reader.errors) == ([], [], [])


@pytest.mark.parametrize("origin", ["http", "file"])
@pytest.mark.parametrize(("query", "found"), [("softmax", "glossary.html"), ("准确率", "glossary.html")])
def test_search_works_offline(
    origin: str, query: str, found: str, site: Path, address: str, visit: Callable[..., chromium_tools.Visit]
) -> None:
    base = address if origin == "http" else site.as_uri()
    reader = visit()
    page = reader.open(f"{base}/search.html?q={query}")
    page.wait_for_selector("#search-results li a")
    results = page.eval_on_selector_all("#search-results li a", "all => all.map(a => a.href)")
    assert any(found in result for result in results)
    assert reader.left == []
    page = reader.open(f"{base}/search.html?q=nosuchwordanywhere")
    page.wait_for_function("() => /did not match/.test(document.querySelector('#search-results').innerText)")


@pytest.mark.parametrize(
    ("scheme", "rules"), [("light", chromium_tools.ALL_RULES), ("dark", chromium_tools.COLOUR_RULES)]
)
def test_axe_finds_nothing(
    scheme: str,
    rules: list[str],
    address: str,
    page_names: list[str],
    visit: Callable[..., chromium_tools.Visit],
) -> None:
    """Both schemes show the same elements: the dark one is tested for what its colours decide."""
    reader = visit(colour_scheme=scheme)
    found = []
    for name in page_names:
        page = reader.open(f"{address}/{name}")
        assert page.evaluate("() => document.documentElement.dataset.theme") == scheme
        found += [f"{name}: {line}" for line in chromium_tools.axe_violations(page, rules)]
    assert found == []


def test_axe_is_at_work(tmp_path: Path, visit: Callable[..., chromium_tools.Visit]) -> None:
    bad = "<html lang='en'><body><img src='data:,'><p style='color:#bbb'>Pale</p></body></html>"
    (tmp_path / "bad.html").write_text(bad, encoding="utf8")
    page = visit().open((tmp_path / "bad.html").as_uri())
    found = "\n".join(chromium_tools.axe_violations(page, chromium_tools.ALL_RULES))
    assert "critical image-alt" in found
    assert "serious color-contrast" in found
    (colours,) = chromium_tools.axe_violations(page, chromium_tools.COLOUR_RULES)
    assert "serious color-contrast" in colours


def test_a_phone_never_scrolls_sideways(
    address: str, page_names: list[str], visit: Callable[..., chromium_tools.Visit]
) -> None:
    reader = visit(width=390)
    for name in page_names:
        page = reader.open(f"{address}/{name}")
        needed, screen = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert needed <= screen == 390, f"{name} needs {needed} pixels"


def test_figures_turn_dark_and_photographs_do_not(
    address: str, visit: Callable[..., chromium_tools.Visit]
) -> None:
    filters = """() => [...document.querySelectorAll('div.cell_output img, img.drawing')]
        .map(i => [Boolean(i.closest('.tag_photo')), getComputedStyle(i).filter])"""
    seen = {True: 0, False: 0}
    for scheme in ("light", "dark"):
        reader = visit(colour_scheme=scheme)
        for name in ["index", *(path.stem for path in NOTEBOOKS)]:
            for is_photo, used in reader.open(f"{address}/book/{name}.html").evaluate(filters):
                assert ("invert" in used) == (scheme == "dark" and not is_photo), f"{name}: {used}"
                seen[is_photo] += 1
    assert seen[False] > 0


def test_the_front_door_leads_into_the_book(
    site: Path, address: str, visit: Callable[..., chromium_tools.Visit]
) -> None:
    door = BeautifulSoup((site / "index.html").read_text("utf8"), "html.parser")
    assert door.html["lang"] == "en"
    assert door.title.get_text(strip=True)
    for base in (address, site.as_uri()):
        page = visit().page
        page.goto(f"{base}/index.html")
        page.wait_for_url("**/book/index.html")
        assert page.locator("article h1").inner_text().startswith("Dian")
