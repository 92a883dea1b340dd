"""The element that shows the size of a cache: its numbers are those of dianlib, in a real browser."""

import json
import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from booksite import browser as chromium_tools
from bs4 import BeautifulSoup, Tag
from playwright.sync_api import Browser, Page

from dianlib.grouped_query import cache_bytes

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "book" / "_static" / "widgets" / "cache-size.js"


def the_element() -> str:
    """Read the element from the chapter: what readers get is what is tested."""
    cells = json.loads((ROOT / "book" / "grouped_query.ipynb").read_text("utf8"))["cells"]
    text = "\n\n".join("".join(cell["source"]) for cell in cells)
    found = re.search(r"<cache-size.*?</cache-size>", text, re.DOTALL)
    assert found
    return found[0]


def the_models() -> dict[str, tuple[int, int, int, int]]:
    """Read the table in it: name -> layers, query heads, key-value heads, numbers in a head."""
    body = BeautifulSoup(the_element(), "html.parser").tbody
    assert isinstance(body, Tag)
    rows = [[cell.get_text() for cell in row.find_all(["th", "td"])] for row in body.find_all("tr")]
    return {name: (int(a), int(b), int(c), int(d)) for name, a, b, c, d in rows}


def test_key_value_heads_divide_the_query_heads_of_every_model() -> None:
    assert len(the_models()) >= 6
    for layers, heads, kv_heads, head_dim in the_models().values():
        assert heads % kv_heads == 0
        assert layers <= 128  # the ends of the sliders
        assert heads <= 128
        assert head_dim % 16 == 0
        assert head_dim <= 256


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("widget") / "page.html"
    path.with_name(SCRIPT.name).write_text(SCRIPT.read_text("utf8"), "utf8")
    path.write_text(
        "<!doctype html><html lang='en'><head><meta charset='utf8'><title>Cache</title>"
        f"<style>{chromium_tools.DARK}</style><script defer src='{SCRIPT.name}'></script></head>"
        f"<body><main><h1>Cache</h1>{the_element()}</main>",
        "utf8",
    )
    return path


def shown_bytes(page: Page) -> list[int]:
    """Return the three exact sizes: multi-head, chosen, multi-query."""
    sizes = page.locator("cache-size td.size").evaluate_all("cells => cells.map(c => c.dataset.bytes)")
    return [int(size) for size in sizes]


def sizes(model: tuple[int, int, int, int], length: int, batch: int = 1, precision: int = 2) -> list[int]:
    layers, heads, kv_heads, head_dim = model
    return [cache_bytes(layers, n, head_dim, length, batch, precision) for n in (heads, kv_heads, 1)]


def move(page: Page, label: str, value: int) -> None:
    page.get_by_label(label, exact=False).first.evaluate(
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')); }", value
    )


def test_every_model_and_slider_shows_what_dianlib_computes(
    page_file: Path, visit: Callable[..., chromium_tools.Visit]
) -> None:
    reader = visit()
    page = reader.open(page_file.as_uri())
    assert shown_bytes(page) == sizes(the_models()["Llama 3 8B"], 8192)
    for name, model in the_models().items():
        page.get_by_label("Model").select_option(name)
        assert shown_bytes(page) == sizes(model, 8192), name
        for option, precision in (("32 bits", 4), ("8 bits", 1), ("16 bits", 2)):
            page.get_by_label("Precision").select_option(option)
            assert shown_bytes(page) == sizes(model, 8192, precision=precision), name
    page.get_by_label("Model").select_option("Llama 3 8B")
    move(page, "Tokens", 17)
    move(page, "Sequences at a time", 5)
    assert shown_bytes(page) == sizes((32, 32, 8, 128), 2**17, batch=5)
    move(page, "Layers", 7)
    move(page, "Numbers in a head", 4)
    assert shown_bytes(page) == sizes((7, 32, 8, 64), 2**17, batch=5)
    assert page.get_by_label("Model").evaluate("menu => menu.selectedOptions[0].text") == "none of these"
    # The divisors of 32 are 1, 2, 4, 8, 16 and 32; of 24 they are 1, 2, 3, 4, 6, 8, ...
    move(page, "Key-value heads", 5)
    assert shown_bytes(page) == sizes((7, 32, 32, 64), 2**17, batch=5)
    move(page, "Query heads", 24)
    assert shown_bytes(page) == sizes((7, 24, 24, 64), 2**17, batch=5)
    move(page, "Key-value heads", 2)
    assert shown_bytes(page) == sizes((7, 24, 3, 64), 2**17, batch=5)
    assert (reader.left, reader.failed, reader.errors) == ([], [], [])


def test_the_sentence_says_it_in_words(page_file: Path, visit: Callable[..., chromium_tools.Visit]) -> None:
    page = visit().open(page_file.as_uri())
    sentence = page.locator("cache-size [aria-live]")
    assert sentence.inner_text() == (
        "One token leaves 128 KiB, so 8,192 tokens fill a GiB. 8,192 tokens of 1 sequence take 1.00 GiB, "
        "1/4 of what multi-head attention would take."
    )
    page.get_by_label("Model").select_option("LLaMA 7B")
    assert "4.00 GiB, the whole of what multi-head attention" in sentence.inner_text()


def test_the_sliders_are_moved_by_keyboard(
    page_file: Path, visit: Callable[..., chromium_tools.Visit]
) -> None:
    page = visit().open(page_file.as_uri())
    page.keyboard.press("Tab")
    for _ in range(3):  # model, layers, query heads, key-value heads
        page.keyboard.press("Tab")
    page.evaluate("() => document.addEventListener('keydown', () => { window.reachedThePage = true; })")
    page.keyboard.press("ArrowLeft")
    assert shown_bytes(page) == sizes((32, 32, 4, 128), 8192)
    page.keyboard.press("Home")
    assert shown_bytes(page) == sizes((32, 32, 1, 128), 8192)
    # The theme turns pages with the arrow keys; it does not get these.
    assert page.evaluate("() => window.reachedThePage") is None


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_in_the_element(
    scheme: str, page_file: Path, visit: Callable[..., chromium_tools.Visit]
) -> None:
    page = visit(colour_scheme=scheme).open(page_file.as_uri())
    page.evaluate("scheme => { document.documentElement.dataset.theme = scheme; }", scheme)
    assert chromium_tools.axe_violations(page, chromium_tools.ALL_RULES) == []


def test_without_javascript_the_table_is_read(page_file: Path, browser: Browser) -> None:
    with closing(browser.new_context(java_script_enabled=False)) as context:
        page = context.new_page()
        page.goto(page_file.as_uri())
        assert page.get_by_text("Llama 3 405B").is_visible()


def test_the_book_loads_the_script() -> None:
    assert "widgets/cache-size.js, {defer: defer}" in (ROOT / "_config.yml").read_text("utf8")
