import re
from collections.abc import Iterator
from itertools import combinations

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from bs4 import BeautifulSoup
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from numpy.typing import NDArray

from dianlib import plotting

Colour = NDArray[np.float64]


@pytest.fixture
def ax() -> Iterator[Axes]:
    figure, axes = plt.subplots()
    yield axes
    plt.close(figure)


# ----- colours -------------------------------------------------------------------------------------------


def linear(rgb: Colour) -> Colour:
    """Return the light of an sRGB colour: IEC 61966-2-1."""
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def contrast(first: Colour, second: Colour) -> float:
    """Return the contrast ratio of WCAG 2."""
    low, high = sorted(float(linear(colour) @ [0.2126, 0.7152, 0.0722]) for colour in (first, second))
    return (high + 0.05) / (low + 0.05)


def in_dark_mode(rgb: Colour) -> Colour:
    """Apply the book's CSS filter invert(0.93) hue-rotate(180deg), as the CSS standard defines it."""
    hue_rotated = [[-0.574, 1.430, 0.144], [0.426, 0.430, 0.144], [0.426, 1.430, -0.856]]
    return np.clip(hue_rotated @ (0.93 * (1 - rgb) + 0.07 * rgb), 0, 1)


def lab(light: Colour) -> Colour:
    """Return CIE L*a*b* of linear sRGB light, white D65."""
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.cbrt(np.maximum(to_xyz @ np.clip(light, 0, 1), 1e-6) / [0.9505, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


# Machado, Oliveira and Fernandes 2009, full severity, for linear light.
VISION: dict[str, Colour] = {
    "full": np.eye(3),
    "protan": np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]),
    "deutan": np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]),
    "tritan": np.array([[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]]),
}


@pytest.mark.parametrize("colour", plotting.COLOURS)
def test_every_line_stands_out_in_light_and_in_dark_mode(colour: str) -> None:
    rgb, white = np.array(to_rgb(colour)), np.ones(3)
    assert contrast(rgb, white) >= 3
    assert contrast(in_dark_mode(rgb), in_dark_mode(white)) >= 3


@pytest.mark.parametrize("vision", VISION)
def test_no_two_lines_look_alike_to_a_colour_blind_reader(vision: str) -> None:
    seen = [lab(VISION[vision] @ linear(np.array(to_rgb(colour)))) for colour in plotting.COLOURS]
    assert min(np.linalg.norm(one - other) for one, other in combinations(seen, 2)) > 15


def test_the_house_style_is_set_for_the_figures_that_follow() -> None:
    with mpl.rc_context():
        plotting.use_house_style()
        figure, ax = plt.subplots()
        lines = [ax.plot([0, 1], [0, 1])[0] for _ in plotting.COLOURS]
        assert [line.get_color() for line in lines] == list(plotting.COLOURS)
        assert len({line.get_linestyle() for line in lines[:4]}) == 4
        assert not ax.spines["top"].get_visible()
        plt.close(figure)


# ----- curves --------------------------------------------------------------------------------------------


def test_a_curve_is_the_mean_and_the_band_spans_all_seeds(ax: Axes) -> None:
    runs = np.array([[1.0, 2.0, 6.0], [3.0, 2.0, 0.0], [2.0, 5.0, 0.0]])
    plotting.curves(ax, [1, 2, 3], {"ours": runs, "theirs": runs + 1}, x_label="epoch", y_label="loss")
    assert [line.get_label() for line in ax.lines] == ["ours", "theirs"]
    np.testing.assert_allclose(np.asarray(ax.lines[0].get_xydata(), dtype=float), [[1, 2], [2, 3], [3, 2]])
    corners = np.asarray(ax.collections[0].get_paths()[0].vertices)
    for x, low, high in zip([1, 2, 3], runs.min(axis=0), runs.max(axis=0), strict=True):
        at_x = corners[corners[:, 0] == x, 1]
        assert (at_x.min(), at_x.max()) == (low, high)
    assert ax.lines[0].get_color() != ax.lines[1].get_color()
    assert ax.lines[0].get_linestyle() != ax.lines[1].get_linestyle()
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "loss")
    legend = ax.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["ours", "theirs"]


@pytest.mark.parametrize("runs", [[1.0, 2.0, 3.0], [[1.0, 2.0]]])
def test_curves_need_seeds_times_points(ax: Axes, runs: list[float]) -> None:
    with pytest.raises(ValueError, match="'ours' needs an array of seeds x 3 points"):
        plotting.curves(ax, [1, 2, 3], {"ours": runs})


def test_more_curves_than_colours_are_refused(ax: Axes) -> None:
    with pytest.raises(ValueError, match="at most 5 curves"):
        plotting.curves(ax, [1], {str(number): [[1.0]] for number in range(6)})


# ----- matrices ------------------------------------------------------------------------------------------


def cell_texts(ax: Axes) -> dict[tuple[float, float], str]:
    """Return the text of each cell by (row, column)."""
    return {(text.get_position()[1], text.get_position()[0]): text.get_text() for text in ax.texts}


def colours(ax: Axes) -> NDArray[np.float64]:
    return np.asarray(ax.images[0].get_array(), dtype=float)


def test_a_confusion_heat_map_has_true_classes_as_rows(ax: Axes) -> None:
    plotting.confusion_heat_map(ax, [[8, 2, 0], [0, 0, 0], [1, 0, 3]], ["cat", "dog", "owl"])
    assert cell_texts(ax)[0, 1] == "2"
    assert cell_texts(ax)[2, 0] == "1"
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("true class", "predicted class")
    assert [label.get_text() for label in ax.get_yticklabels()] == ["cat", "dog", "owl"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["cat", "dog", "owl"]
    shares = np.array([[0.8, 0.2, 0], [0, 0, 0], [0.25, 0, 0.75]])
    np.testing.assert_allclose(colours(ax), shares)
    assert ax.images[0].get_clim() == (0, 1)


def test_a_heat_map_shows_zero_to_one_with_a_name_on_every_row_and_column(ax: Axes) -> None:
    values = np.array([[0.25, 0.75], [0.5, 0.5], [1.0, 0.0]])
    plotting.heat_map(ax, values, ["the", "cat", "sat"], ["die", "Katze"], x_label="key", y_label="query")
    np.testing.assert_allclose(colours(ax), values)
    assert ax.images[0].get_clim() == (0, 1)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["the", "cat", "sat"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["die", "Katze"]
    assert list(ax.get_yticks()) == [0, 1, 2]
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("query", "key")
    assert cell_texts(ax) == {}
    plotting.heat_map(ax, values, "abc", "xy", numbers=True)
    assert cell_texts(ax)[0, 1] == "0.75"


def test_the_numbers_can_be_read_on_every_colour(ax: Axes) -> None:
    values = np.linspace(0, 1, 101)[None]
    plotting.heat_map(ax, values, ["row"], [""] * 101, numbers=True)
    for value, text in zip(values[0], ax.texts, strict=True):
        cell = np.array(ax.images[0].cmap(value)[:3])
        assert contrast(cell, np.array(to_rgb(text.get_color()))) >= 4.5


def test_a_zero_count_can_be_read_too(ax: Axes) -> None:
    plotting.confusion_heat_map(ax, [[1, 0], [0, 1]], ["a", "b"])
    cell = np.array(ax.images[0].cmap(0.0)[:3])
    assert contrast(cell, np.array(to_rgb(ax.texts[1].get_color()))) >= 4.5


def test_long_names_are_turned(ax: Axes) -> None:
    plotting.confusion_heat_map(ax, np.eye(10), [f"class number {number}" for number in range(10)])
    assert {label.get_rotation() for label in ax.get_xticklabels()} == {45}


@pytest.mark.parametrize("worst", [-0.1, 1.5, np.nan])
def test_a_heat_map_refuses_other_values(ax: Axes, worst: float) -> None:
    with pytest.raises(ValueError, match="values from 0 to 1"):
        plotting.heat_map(ax, [[0.5, worst]], ["a"], ["b", "c"])


def test_names_must_fit_the_matrix(ax: Axes) -> None:
    with pytest.raises(ValueError, match=r"2 row names and 2 column names do not fit shape \(2, 3\)"):
        plotting.heat_map(ax, np.zeros((2, 3)), "ab", "xy")
    with pytest.raises(ValueError, match="3 row names"):
        plotting.confusion_heat_map(ax, np.eye(2), "abc")


# ----- images --------------------------------------------------------------------------------------------


def test_an_image_grid_shows_every_image_on_one_scale() -> None:
    images = np.stack([np.full((2, 3), value) for value in (0.2, 0.4, 0.6, 0.8, 1.0)])
    figure = plotting.image_grid(images, [f"number {number}" for number in range(5)], columns=3)
    drawn = [ax for ax in figure.axes if ax.images]
    assert len(figure.axes) == 6
    assert [ax.get_title() for ax in drawn] == [f"number {number}" for number in range(5)]
    for ax, image in zip(drawn, images, strict=True):
        np.testing.assert_allclose(colours(ax), image)
        assert ax.images[0].get_clim() == (0, 1)
    assert not any(ax.axison for ax in figure.axes)
    plt.close(figure)


@pytest.mark.parametrize("shape", [(0, 8, 8), (8, 8), (2, 1, 8, 8)])
def test_an_image_grid_needs_grey_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape \(N, H, W\)"):
        plotting.image_grid(np.zeros(shape))


def test_titles_must_fit_the_images() -> None:
    with pytest.raises(ValueError, match="1 titles for 2 images"):
        plotting.image_grid(np.zeros((2, 8, 8)), ["one"])


# ----- a heat map made of text ---------------------------------------------------------------------------


def text_heat_map() -> BeautifulSoup:
    weights = [[0.0, 0.004, 0.996], [0.25, 0.75, 0.0]]
    drawn = plotting.text_heat_map(
        weights, ["<b>", "May"], ["五", "月", "end"], caption="Weights & rows", column_language="zh-Hans"
    )
    return BeautifulSoup(drawn.data, "html.parser")


def test_a_text_heat_map_is_a_table_that_can_be_read_aloud() -> None:
    soup = text_heat_map()
    assert [cell.get_text() for cell in soup.select("th[scope=col]")] == ["五", "月", "end"]
    assert [cell.get_text() for cell in soup.select("th[scope=row]")] == ["<b>", "May"]
    assert soup.caption.get_text() == soup.div["aria-label"] == "Weights & rows"
    assert soup.find("th", string="五").find_parent(lang="zh-Hans")
    assert soup.find("th", string="May")["lang"] == "en"
    rows = [[cell.get_text() for cell in row.select("td")] for row in soup.select("tr")]
    assert rows == [[""], ["", "", "100"], ["25", "75", ""]]


def test_the_percents_of_a_text_heat_map_can_be_read_on_every_colour() -> None:
    cells = plotting.text_heat_map(
        np.linspace(0, 1, 101).reshape(1, -1), ["row"], [str(n) for n in range(101)], caption="all"
    )
    for cell in BeautifulSoup(cells.data, "html.parser").select("tr:nth-of-type(2) td"):
        numbers = [int(part) for part in re.findall(r"\d+", cell["style"].split(";")[0])]
        ink = np.array(to_rgb(re.search(r"(?<!-)color: (#\w+)", cell["style"])[1]))
        assert contrast(np.array(numbers) / 255, ink) >= 4.5


def test_a_text_heat_map_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="do not fit shape"):
        plotting.text_heat_map([[0.5]], ["a", "b"], ["c"], caption="x")
    with pytest.raises(ValueError, match=r"values from 0 to 1, not 1\.5"):
        plotting.text_heat_map([[1.5]], ["a"], ["c"], caption="x")
