"""Rules for a notebook of the book: what nbval and the build do not look at."""

import json
import re
from pathlib import Path
from typing import Any

import nbformat

IMAGE_FILE_NAME = re.compile(r"\S+\.(png|svg|jpe?g)", re.IGNORECASE)
SHORTEST_ALT_TEXT = 25  # characters; a sentence is longer, "a plot" is not
FOOTNOTE = re.compile(r"\[\^")
OWN_FOLDER = re.compile(r"(/home|/root|/tmp|/Users|/work)/")


def problems(path: Path) -> list[str]:
    """Return one line for each broken rule, an empty list for a sound notebook."""
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    found: list[str] = []
    try:
        nbformat.validate(notebook)
    except nbformat.ValidationError as error:
        found.append(f"not a valid notebook: {error.message}")
    if (notebook.nbformat, notebook.nbformat_minor) < (4, 5):
        found.append("format older than 4.5: cells have no stable ids")
    if "widgets" in notebook.metadata:
        found.append("holds the state of widgets, which needs a script from another host")
    # from the file itself: nbformat gives the second of two equal ids a new one while it reads
    identities = [cell.get("id") for cell in json.loads(path.read_text("utf8"))["cells"]]
    if len(set(identities)) < len(identities):
        found.append("two cells have the same id")
    counts = []
    for number, cell in enumerate(notebook.cells):
        name = f"cell {number}"
        if "execution" in cell.metadata:
            found.append(f"{name}: stores the time at which it ran")
        if cell.cell_type == "markdown" and FOOTNOTE.search(cell.source):
            found.append(f"{name}: a footnote; write a margin note")
        if cell.cell_type == "code" and cell.source.strip():
            counts.append(cell.execution_count)
            found += [f"{name}: {problem}" for problem in _code_problems(cell)]
    if counts != list(range(1, len(counts) + 1)):
        found.append("not run once, from the top to the bottom: run it with `dianlib run`")
    return found


def _code_problems(cell: Any) -> list[str]:
    found = []
    if cell.execution_count is None:
        found.append("never run")
    tags = cell.metadata.get("tags", [])
    for output in cell.outputs:
        if output.output_type == "stream" and output.name == "stderr":
            found.append("writes to stderr")
        if output.output_type == "error" and "raises-exception" not in tags:
            found.append("ends with an error, without the tag raises-exception")
        data = output.get("data", {})
        if {"image/svg+xml", "image/jpeg"} & data.keys():
            found.append("a figure that is no PNG")
        text = output.get("text", "") + "".join(
            str(value) for kind, value in data.items() if not kind.startswith("image/")
        )
        if OWN_FOLDER.search(text):
            found.append("shows a folder of the computer it ran on")
    if any("image/png" in output.get("data", {}) for output in cell.outputs):
        alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        if len(alt) < SHORTEST_ALT_TEXT or IMAGE_FILE_NAME.fullmatch(alt):
            found.append("a figure without a sentence of alt text in its metadata (mystnb.image.alt)")
    return found
