"""Interactive parts for a page: HTML elements that work without a kernel, a library or a network.

The element itself stands in ``book/_static/widgets``. Where its script is not loaded, as in JupyterLab, on
paper or without JavaScript, the table inside the element is shown.
"""

import json
from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import ArrayLike

from dianlib.plotting import text_heat_map


class AttentionMap:
    """A map of attention weights to look around in: one head or several, with a slider for the temperature.

    ``weights`` is (L, S), or (H, L, S) for H heads: rows are queries, columns are keys, and each row sums to
    1, or to 0 where a query may attend to nothing. ``tokens`` names the queries, and the keys too unless
    ``keys`` names those. ``head_names`` names the heads ("head 0", ... otherwise). ``head_dim`` is d, and
    ``d_model`` the width of the model: with them the reader can undo the division of the scores, or divide
    by something else. ``language`` and ``key_language`` are those of the names, "en" or "zh-Hans".

    Raises ValueError for names that do not fit, or rows that are no weights.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        weights: ArrayLike,
        *,
        caption: str,
        keys: Sequence[str] | None = None,
        head_names: Sequence[str] | None = None,
        head_dim: int | None = None,
        d_model: int | None = None,
        language: str = "en",
        key_language: str | None = None,
    ) -> None:
        values = np.asarray(weights, dtype=float)
        if values.ndim == 2:
            values = values[None]
        keys = tokens if keys is None else keys
        if values.ndim != 3 or values.shape[1:] != (len(tokens), len(keys)):
            raise ValueError(f"{len(tokens)} queries and {len(keys)} keys do not fit shape {values.shape}.")
        names = [f"head {number}" for number in range(len(values))] if head_names is None else head_names
        if len(names) != len(values):
            raise ValueError(f"there are {len(names)} names for {len(values)} heads.")
        sums = values.sum(axis=-1)
        if (values < 0).any() or not (np.isclose(sums, 1, atol=1e-3) | (sums == 0)).all():
            raise ValueError("each row of the weights must sum to 1, or be 0 everywhere.")
        self.tokens, self.keys, self.head_names = list(tokens), list(keys), list(names)
        self.weights, self.caption = values, caption
        self.head_dim, self.d_model = head_dim, d_model
        self.language, self.key_language = language, key_language or language

    def data(self) -> dict[str, object]:
        """Return what the element reads: names, and for each weight its logarithm, None for a weight of 0.

        The logarithms are the scores, up to a constant in each row; softmax of them gives the weights back.
        """
        found: dict[str, object] = {
            "queries": self.tokens,
            "keys": self.keys,
            "heads": self.head_names,
            "scores": [[[_logarithm(w) for w in row] for row in head] for head in self.weights],
        }
        sizes = {"headDim": self.head_dim, "modelDim": self.d_model}
        return found | {name: size for name, size in sizes.items() if size is not None}

    def _repr_html_(self) -> str:
        # "</script>" in a token would end the data; escaped, it is the same JSON.
        text = json.dumps(self.data(), ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
        tables = "".join(
            text_heat_map(
                head,
                self.tokens,
                self.keys,
                caption=self.caption if len(self.weights) == 1 else f"{self.caption}: {name}",
                row_language=self.language,
                column_language=self.key_language,
            ).data
            for head, name in zip(self.weights, self.head_names, strict=True)
        )
        languages = f'data-language="{self.language}" data-key-language="{self.key_language}"'
        return (
            f'<attention-map data-widget data-caption="{escape(self.caption)}" {languages}>'
            f'<script type="application/json">{text}</script>{tables}</attention-map>'
        )

    def __repr__(self) -> str:
        heads, n_queries, n_keys = self.weights.shape
        return f"AttentionMap of {heads} x {n_queries} x {n_keys} weights"


def _logarithm(weight: float) -> float | None:
    return round(float(np.log(weight)), 3) + 0.0 if weight > 0 else None
