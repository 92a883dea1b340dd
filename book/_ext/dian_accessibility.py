"""Repairs of the theme's HTML for which its templates offer no setting; each was found with axe-core.

They are edits of the finished text and may run twice on one page: a repaired place no longer matches.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util.typing import ExtensionMetadata


@dataclass(frozen=True)
class Repair:
    """One edit: what it is good for, what it looks for, what it writes."""

    reason: str
    pattern: re.Pattern[str]
    replacement: str


REPAIRS = (
    Repair(
        "The left side bar holds the name of the book and the search button: make it a landmark with a name.",
        re.compile(r'<div id="pst-primary-sidebar" class="'),
        '<div id="pst-primary-sidebar" role="region" aria-label="Book" class="',
    ),
    Repair(
        "The role of a bibliography entry is deprecated, and the entries stand in a list.",
        re.compile(r'(<div class="citation" id="[^"]*") role="doc-biblioentry"'),
        r'\1 role="listitem"',
    ),
    Repair(
        "The empty corner of a table names nothing: make it a cell in place of a heading.",
        re.compile(r"<th( [^>]*)?>\s*(<p>\s*</p>)?\s*</th>"),
        r"<td\1></td>",
    ),
)


def repair(text: str) -> str:
    """Return the HTML of a page with all repairs made."""
    for step in REPAIRS:
        text = step.pattern.sub(step.replacement, text)
    return text


def repair_pages(app: Sphinx, error: Exception | None) -> None:
    """Repair every page of a finished HTML build."""
    if error is not None or app.builder.format != "html":
        return
    for page in Path(app.outdir).rglob("*.html"):
        before = page.read_text(encoding="utf8")
        after = repair(before)
        if after != before:
            page.write_text(after, encoding="utf8")


def setup(app: Sphinx) -> ExtensionMetadata:
    """Connect the repairs to the end of the build."""
    app.connect("build-finished", repair_pages)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
