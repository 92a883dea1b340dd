"""The attention map: what it exports, and what a reader with a mouse, a keyboard or neither gets of it."""

import json
import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from booksite import browser as chromium_tools
from bs4 import BeautifulSoup
from playwright.sync_api import Browser, Page

from dianlib.attention import causal_mask, scaled_dot_product_attention
from dianlib.widgets import AttentionMap

STATIC = Path(__file__).resolve().parent.parent / "book" / "_static"
TOKENS = ["the", "cat", "</script>", "坐"]


def causal_weights(n_heads: int = 2) -> torch.Tensor:
    """Weights (H, 4, 4) of random queries and keys of width 4; a hidden key has a weight of exactly 0."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, n_heads, 4, 4, generator=generator, dtype=torch.float64)
    weights = scaled_dot_product_attention(query, key, key, causal_mask(4))[1]
    assert weights is not None
    return weights


def the_map() -> AttentionMap:
    return AttentionMap(TOKENS, causal_weights(), caption="Who looks at whom", head_dim=4, d_model=8)


def soup_of(shown: AttentionMap) -> BeautifulSoup:
    return BeautifulSoup(shown._repr_html_(), "html.parser")


# ----- what is exported ----------------------------------------------------------------------------------


def test_the_data_give_the_weights_back() -> None:
    data = json.loads(soup_of(the_map()).find("script").string)
    assert data["queries"] == data["keys"] == TOKENS
    assert data["heads"] == ["head 0", "head 1"]
    assert (data["headDim"], data["modelDim"]) == (4, 8)
    scores = np.array(data["scores"], dtype=float)  # None becomes NaN
    weights = np.exp(scores)
    assert np.isnan(scores[:, 0, 1:]).all()
    np.testing.assert_allclose(np.nan_to_num(weights), causal_weights(), rtol=6e-4)


def test_without_a_script_every_head_is_a_table() -> None:
    tables = soup_of(the_map()).find_all("table")
    assert [table.caption.get_text() for table in tables] == [
        "Who looks at whom: head 0",
        "Who looks at whom: head 1",
    ]
    row = [cell.get_text() for cell in tables[1].find_all("tr")[-1].find_all("td")]
    assert row == [f"{100 * weight:.0f}" for weight in causal_weights()[1, -1]]


def test_one_head_other_keys_and_empty_rows() -> None:
    shown = AttentionMap(["a"], [[0.0, 0.0]], keys=["x", "y"], caption="Nothing", head_names=["only"])
    assert shown.data() == {
        "queries": ["a"],
        "keys": ["x", "y"],
        "heads": ["only"],
        "scores": [[[None, None]]],
    }
    assert repr(shown) == "AttentionMap of 1 x 1 x 2 weights"


@pytest.mark.parametrize(
    ("weights", "names", "message"),
    [
        (np.ones((2, 3)) / 3, None, r"2 queries and 2 keys do not fit shape \(1, 2, 3\)"),
        (np.eye(2), ["a", "b"], "there are 2 names for 1 heads"),
        (np.array([[1.5, -0.5], [0, 1]]), None, "must sum to 1"),
        (np.ones((2, 2)), None, "must sum to 1"),
    ],
)
def test_what_is_no_map_gets_a_sentence(weights: np.ndarray, names: list[str] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionMap(["a", "b"], weights, caption="x", head_names=names)


# ----- in a browser ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of its own, as a file: the script and the style of the book, and the map."""
    path = tmp_path_factory.mktemp("widget") / "page.html"
    script, style = (
        (STATIC / "widgets" / name).read_text("utf8") for name in ("attention-map.js", "widgets.css")
    )
    path.with_name("attention-map.js").write_text(script, "utf8")
    path.write_text(
        "<!doctype html><html lang='en'><head><meta charset='utf8'><title>Map</title>"
        f"<style>{style} {chromium_tools.DARK}</style><script defer src='attention-map.js'></script></head>"
        f"<body class='bd-content'><main><h1>Map</h1><div class='cell_output'><div class='text_html'>"
        f"{the_map()._repr_html_()}</div></div></main>",
        "utf8",
    )
    return path


def cells(page: Page) -> list[list[str]]:
    """Return the text of all cells that are shown, row by row; a locator looks into the element by itself."""
    return [
        row.locator("td").all_inner_texts() for row in page.locator("attention-map .frame tbody tr").all()
    ]


def percents(weights: torch.Tensor) -> list[list[str]]:
    return [[f"{100 * w:.0f}" if w >= 0.005 else "" for w in row] for row in weights.tolist()]


def agrees(page: Page, wanted: torch.Tensor) -> bool:
    """Compare rounded percents: 42.49 and 42.51 are written 42 and 43."""
    shown = torch.tensor([[float(text or 0) for text in row] for row in cells(page)])
    return bool((shown - 100 * wanted).abs().max() <= 0.6)


def move_slider(page: Page, value: float) -> None:
    page.get_by_label("Temperature").evaluate(
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')); }", value
    )


def test_heads_temperature_and_divisor_show_what_dianlib_computes(
    page_file: Path, visit: Callable[..., chromium_tools.Visit]
) -> None:
    reader = visit()
    page = reader.open(page_file.as_uri())
    assert cells(page) == percents(causal_weights()[0])
    page.get_by_role("combobox", name="Head").select_option("head 1")
    assert cells(page) == percents(causal_weights()[1])

    # The scores of head 1, computed here: another divisor and a temperature change them before the softmax.
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 2, 4, 4, generator=generator, dtype=torch.float64)[:, 1]
    hidden = ~causal_mask(4)
    for divisor, label in [(1.0, "1 (no scale)"), (4.0, "d = 4"), (8**0.5, "√D = √8"), (2.0, "√d = √4")]:
        page.get_by_role("combobox", name="Scores divided by").select_option(label)
        wanted = (query @ key.T / divisor).masked_fill(hidden, -torch.inf).softmax(-1)
        assert agrees(page, wanted), label
    move_slider(page, 2)
    wanted = (query @ key.T / 2 / 4).masked_fill(hidden, -torch.inf).softmax(-1)
    assert agrees(page, wanted)
    page.get_by_role("button", name="Reset").click()
    assert cells(page) == percents(causal_weights()[1])
    assert (reader.left, reader.failed, reader.errors) == ([], [], [])


def test_the_map_is_read_by_keyboard_and_by_mouse(
    page_file: Path, visit: Callable[..., chromium_tools.Visit]
) -> None:
    page = visit().open(page_file.as_uri())
    sentence = page.locator("attention-map [aria-live]")
    for _ in range(4):  # head, divisor, slider; the button waits; the first cell
        page.keyboard.press("Tab")
    assert sentence.inner_text() == "“the” looks at “the” with 100.0 % of its weight."
    for key in ("ArrowDown", "ArrowRight", "ArrowUp", "ArrowUp"):  # the last one leads nowhere
        page.keyboard.press(key)
    assert sentence.inner_text() == "“the” looks at “cat” with 0.0 % of its weight."
    page.keyboard.press("ArrowDown")
    page.keyboard.press("End")
    assert re.fullmatch(r"“cat” looks at “坐” with 0\.0 % of its weight\.", sentence.inner_text())
    page.locator("attention-map .frame tbody tr").nth(3).locator("td").nth(1).hover()
    weight = 100 * causal_weights()[0, 3, 1]
    assert sentence.inner_text() == f"“坐” looks at “cat” with {weight:.1f} % of its weight."
    marked = page.locator("attention-map .frame th.marked").all_inner_texts()
    assert sorted(marked) == ["cat", "坐"]
    # The slider keeps its arrow keys: the theme's page turner does not get them.
    page.evaluate("() => document.addEventListener('keydown', () => { window.reachedThePage = true; })")
    page.get_by_label("Temperature").press("ArrowRight")
    assert page.get_by_label("Temperature").input_value() == "0.25"
    assert page.evaluate("() => window.reachedThePage") is None


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_in_the_map(
    scheme: str, page_file: Path, visit: Callable[..., chromium_tools.Visit]
) -> None:
    page = visit(colour_scheme=scheme).open(page_file.as_uri())
    page.evaluate("scheme => { document.documentElement.dataset.theme = scheme; }", scheme)
    assert chromium_tools.axe_violations(page, chromium_tools.ALL_RULES) == []


def test_without_javascript_the_tables_are_read(page_file: Path, browser: Browser) -> None:
    with closing(browser.new_context(java_script_enabled=False)) as context:
        page = context.new_page()
        page.goto(page_file.as_uri())
        assert page.locator("attention-map table").count() == 2
        assert page.locator("attention-map table").first.is_visible()


def test_the_book_loads_the_script_and_the_style() -> None:
    settings = (STATIC.parent.parent / "_config.yml").read_text("utf8")
    assert "widgets/attention-map.js, {defer: defer}" in settings
    assert "- widgets/widgets.css" in settings
