"""The house style: figures that colour-blind readers can use, in light and in dark mode.

The book turns line figures dark by inverting them, so every line colour keeps a contrast of at
least 3 : 1 both on white and after that inversion. Heat maps and photographs are not inverted
(their cells carry the tag ``photo``).
"""

from collections.abc import Mapping, Sequence
from html import escape

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from IPython.display import HTML
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

# Five colours of Okabe and Ito's set (Color Universal Design, 2008). Its orange, sky blue and
# yellow are left out: on white they stay below 3 : 1.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000")
# Every line differs in its dashes too, for prints in grey.
LINE_STYLES = ("-", "--", "-.", ":", (0, (3, 1, 1, 1, 1, 1)))


def use_house_style() -> None:
    """Set matplotlib's defaults for all figures that follow."""
    plt.rcParams.update(
        {
            "figure.figsize": (6.4, 3.6),
            "figure.dpi": 120,
            "figure.constrained_layout.use": True,
            "font.size": 11,
            "axes.prop_cycle": cycler(color=COLOURS) + cycler(linestyle=LINE_STYLES),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#D9D9D9",
            "grid.linewidth": 0.6,
            "axes.axisbelow": True,
            "lines.linewidth": 2.0,
            "legend.frameon": False,
            "image.cmap": "Blues",
        }
    )


def curves(
    ax: Axes,
    x: ArrayLike,
    runs_by_label: Mapping[str, ArrayLike],
    *,
    x_label: str = "",
    y_label: str = "",
) -> None:
    """Draw the mean over seeds as a line and all seeds, lowest to highest, as a band around it.

    ``runs_by_label`` maps the text of the legend to an array (S, P), one row for each of S seeds
    and one column for each of the P points ``x``. Raises ValueError for another shape, or for more
    labels than there are colours to tell apart.
    """
    if len(runs_by_label) > len(COLOURS):
        raise ValueError(f"one plot shows at most {len(COLOURS)} curves apart, not {len(runs_by_label)}.")
    positions = np.asarray(x, dtype=float)
    for (label, runs), colour, style in zip(runs_by_label.items(), COLOURS, LINE_STYLES, strict=False):
        values = np.asarray(runs, dtype=float)
        if values.ndim != 2 or values.shape[1] != len(positions):
            raise ValueError(
                f"{label!r} needs an array of seeds x {len(positions)} points, not shape {values.shape}."
            )
        ax.plot(positions, values.mean(axis=0), color=colour, linestyle=style, label=label)
        ax.fill_between(
            positions, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2, linewidth=0
        )
    ax.set(xlabel=x_label, ylabel=y_label)
    ax.legend()


def confusion_heat_map(ax: Axes, confusion: ArrayLike, classes: Sequence[str]) -> None:
    """Draw a confusion matrix (C, C) of counts: rows are true classes, columns predicted ones.

    The number in a cell is its count; the colour is its share of the row, so that a rare class is
    as visible as a frequent one. A class without samples stays white. Raises ValueError for another shape.
    """
    counts = np.asarray(confusion)
    _need_shape(counts, len(classes), len(classes))
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    _draw_matrix(
        ax, shares, classes, classes, texts=[[f"{count:d}" for count in row] for row in counts.astype(int)]
    )
    ax.set(xlabel="predicted class", ylabel="true class")


def heat_map(
    ax: Axes,
    matrix: ArrayLike,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    numbers: bool = False,
    x_label: str = "",
    y_label: str = "",
) -> None:
    """Draw a matrix (R, C) of values from 0 to 1, white to dark blue, with a name for each row and column.

    For attention weights rows are queries and columns are keys. ``numbers`` writes the values in
    the cells. Raises ValueError for names that do not fit or values outside 0..1.
    """
    values = np.asarray(matrix, dtype=float)
    _need_shape(values, len(rows), len(columns))
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(
            f"a heat map shows values from 0 to 1, not {values.min():.3g} to {values.max():.3g}."
        )
    texts = [[f"{value:.2f}" for value in row] for row in values] if numbers else None
    _draw_matrix(ax, values, rows, columns, texts)
    ax.set(xlabel=x_label, ylabel=y_label)


def _need_shape(matrix: np.ndarray, n_rows: int, n_columns: int) -> None:
    if matrix.shape != (n_rows, n_columns):
        raise ValueError(f"{n_rows} row names and {n_columns} column names do not fit shape {matrix.shape}.")


def _draw_matrix(
    ax: Axes, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], texts: list[list[str]] | None
) -> None:
    ax.imshow(values, vmin=0, vmax=1, cmap="Blues")
    ax.grid(False)
    ax.set_yticks(range(len(rows)), rows)
    ax.set_xticks(range(len(columns)), columns)
    if len(columns) * max(map(len, columns), default=0) > 32:  # too many letters for one line
        ax.tick_params(axis="x", labelrotation=45)
        plt.setp(ax.get_xticklabels(), ha="right", rotation_mode="anchor")
    for row, line in enumerate(texts or []):
        for column, text in enumerate(line):
            # At 0.71 on this scale black and white read equally well. A zero count steps back.
            colour = "white" if values[row, column] > 0.71 else "#666666" if text == "0" else "black"
            ax.text(column, row, text, ha="center", va="center", color=colour, fontsize="small")


def image_grid(images: ArrayLike, titles: Sequence[str] | None = None, *, columns: int = 8) -> Figure:
    """Draw grey images (N, H, W) with values 0 to 1 side by side, black = 0, and return the figure.

    Raises ValueError for another shape or when the titles are not as many as the images.
    """
    pixels = np.asarray(images)
    if pixels.ndim != 3 or len(pixels) == 0:
        raise ValueError(f"image_grid needs images of shape (N, H, W), not {pixels.shape}.")
    if titles is not None and len(titles) != len(pixels):
        raise ValueError(f"there are {len(titles)} titles for {len(pixels)} images.")
    columns = min(columns, len(pixels))
    n_rows = -(-len(pixels) // columns)
    figure, axes = plt.subplots(n_rows, columns, figsize=(1.1 * columns, 1.3 * n_rows), squeeze=False)
    for place, ax in enumerate(axes.flat):
        ax.axis("off")
        if place < len(pixels):
            ax.imshow(pixels[place], vmin=0, vmax=1, cmap="gray")
            ax.set_title(titles[place] if titles is not None else "", fontsize="small")
    return figure


def text_heat_map(
    matrix: ArrayLike,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    caption: str,
    row_language: str = "en",
    column_language: str = "en",
) -> HTML:
    """Draw attention weights (R, C) as an HTML table: rows are queries, columns are keys, cells are percent.

    The names are real text, so the browser chooses the font: Chinese names need none where the figure is
    made, and a screen reader reads them. A weight below 0.5 % leaves its cell empty. The languages
    are those of the names, "en" or "zh-Hans". Raises ValueError for names that do not fit or values
    outside 0..1.
    """
    values = np.asarray(matrix, dtype=float)
    _need_shape(values, len(rows), len(columns))
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(
            f"a heat map shows values from 0 to 1, not {values.min():.3g} to {values.max():.3g}."
        )
    head = "".join(f'<th scope="col"{_PLAIN}>{escape(name)}</th>' for name in columns)
    lines = [f'<tr lang="{column_language}"><td{_PLAIN}></td>{head}</tr>']
    for name, line in zip(rows, values, strict=True):
        cells = "".join(_percent_cell(value) for value in line)
        lines.append(f'<tr><th scope="row" lang="{row_language}"{_PLAIN}>{escape(name)}</th>{cells}</tr>')
    return HTML(
        f'<div role="region" tabindex="0" aria-label="{escape(caption)}" style="overflow-x: auto">'
        f'<table class="heat-map"><caption style="color: #000000">{escape(caption)}</caption>'
        f"{''.join(lines)}</table></div>"
    )


_PLAIN = ' style="background: none; text-align: center; padding: 2px 5px"'


def _percent_cell(value: float) -> str:
    """Write one weight, white to dark blue, in the ink that can be read on it."""
    red, green, blue = (round(255 * part) for part in plt.get_cmap("Blues")(value)[:3])
    ink = "#ffffff" if value > 0.71 else "#000000"
    text = f"{100 * value:.0f}" if value >= 0.005 else ""
    style = f"background: rgb({red}, {green}, {blue}); color: {ink}; text-align: center; padding: 2px 5px"
    return f'<td style="{style}">{text}</td>'
