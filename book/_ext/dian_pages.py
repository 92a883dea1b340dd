"""What every page of the book gets: a description, the repository's address, marked Chinese, a front door."""

import html
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.typing import ExtensionMetadata

CHINESE = re.compile(r"[\u3007\u3400-\u9fff\uff08\uff09\u3001\u3002\uff0c]+")
DESCRIPTION_LENGTH = 200  # search engines cut longer descriptions


def fill_addresses(app: Sphinx, docname: str, source: list[str]) -> None:
    """Replace {{ repository }} and {{ colab }} in a page's text by addresses from ``_config.yml``.

    This works before the page is parsed, so the markers may stand in links and in code blocks too.
    """
    options = app.config.html_theme_options
    repository = options["repository_url"].rstrip("/")
    account_and_name = repository.removeprefix("https://github.com/")
    branch = options["repository_branch"]
    colab = f"https://colab.research.google.com/github/{account_and_name}/blob/{branch}"
    source[0] = source[0].replace("{{ repository }}", repository).replace("{{ colab }}", colab)


def describe(doctree: nodes.document) -> str:
    """Return the first paragraph of a page as plain text, cut at the end of a word."""
    for paragraph in doctree.findall(nodes.paragraph):
        text = " ".join(paragraph.astext().split())
        if not text:
            continue
        if len(text) <= DESCRIPTION_LENGTH:
            return text
        return text[:DESCRIPTION_LENGTH].rsplit(" ", 1)[0] + " …"
    return ""


def add_description(
    app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Write the description of a page into its head, unless the page brings its own."""
    tags = context.get("metatags", "")
    if 'name="description"' in tags:
        return
    text = describe(doctree) if doctree is not None else ""
    text = text or f"A page of the book: {app.config.html_title}"
    context["metatags"] = tags + f'<meta name="description" content="{html.escape(text)}" />\n'


class MarkChinese(SphinxPostTransform):
    """Give Chinese words inside English text their language, for screen readers, fonts and hyphenation."""

    default_priority = 900
    formats = ("html",)

    def run(self, **kwargs: Any) -> None:
        for text in list(self.document.findall(nodes.Text)):
            verbatim = isinstance(text.parent, (nodes.literal_block, nodes.raw, nodes.math))
            if verbatim or not CHINESE.search(text):
                continue
            # docutils writes class "language-xx" as the attribute lang="xx"
            pieces: list[nodes.Node] = []
            end = 0
            for match in CHINESE.finditer(text):
                if match.start() > end:
                    pieces.append(nodes.Text(text[end : match.start()]))
                pieces.append(nodes.inline("", match.group(), classes=["language-zh-Hans"]))
                end = match.end()
            if end < len(text):
                pieces.append(nodes.Text(text[end:]))
            text.parent.replace(text, pieces)


def write_front_door(app: Sphinx, error: Exception | None) -> None:
    """Write an ``index.html`` at the root of the site that leads to the first page."""
    if error is not None or app.builder.format != "html" or app.config.root_doc == "index":
        return
    title, language = html.escape(app.config.html_title), app.config.language
    target = html.escape(app.builder.get_target_uri(app.config.root_doc))
    Path(app.outdir, "index.html").write_text(
        f"""<!DOCTYPE html>
<html lang="{language}">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="description" content="{title}">
<meta http-equiv="refresh" content="0; url={target}">
<link rel="icon" href="_static/favicon.svg">
<title>{title}</title>
</head>
<body>
<main><h1>{title}</h1><p><a href="{target}">Open the book</a></p></main>
</body>
</html>
""",
        encoding="utf8",
    )


def setup(app: Sphinx) -> ExtensionMetadata:
    app.connect("source-read", fill_addresses)
    app.connect("html-page-context", add_description)
    app.connect("build-finished", write_front_door, priority=900)
    app.add_post_transform(MarkChinese)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
