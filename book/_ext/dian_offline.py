"""Serve MathJax from the built site instead of a content network, so that the book reads offline.

The files come from the Python package ``sphinx-mathjax-offline``, which carries MathJax whole (24 MB).
Only the part that a page can load is copied: the TeX reader, the HTML writer with its fonts, and the
accessibility tools of the formula menu.
"""

import shutil
from importlib.metadata import distribution
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.util.typing import ExtensionMetadata

CARRIER = "sphinx-mathjax-offline"
PARTS = ("tex-chtml.js", "output/chtml/fonts", "input/tex/extensions", "a11y", "sre")


def use_local_mathjax(app: Sphinx, config: Config) -> None:
    """Point every page at the copy; the path is relative to ``_static``."""
    config.mathjax_path = "mathjax/tex-chtml.js"


def copy_mathjax(app: Sphinx, error: Exception | None) -> None:
    """Copy the needed parts once into ``_static/mathjax`` of an HTML build."""
    if error is not None or app.builder.format != "html":
        return
    source = Path(str(distribution(CARRIER).locate_file(f"{CARRIER}/static/mathjax")))
    target = Path(app.outdir, "_static", "mathjax")
    for part in PARTS:
        if (target / part).exists():
            continue
        (target / part).parent.mkdir(parents=True, exist_ok=True)
        if (source / part).is_dir():
            shutil.copytree(source / part, target / part)
        else:
            shutil.copy2(source / part, target / part)


def setup(app: Sphinx) -> ExtensionMetadata:
    app.connect("config-inited", use_local_mathjax)
    app.connect("build-finished", copy_mathjax)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
