"""All tasks of the course, in the order of the book."""

import functools
import importlib
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from dianlib.checks.task import Task

# The chapters that have an assignment. A new chapter adds its slug here.
CHAPTERS = (
    "metrics",
    "mlp",
    "search",
    "rnn",
    "lstm",
    "seq2seq",
    "attention",
    "multihead",
    "positions",
    "grouped_query",
)

# The modules that hold the answers of a chapter. Students may import them in the chapters after it.
REFERENCES = {
    "metrics": ("dianlib.metrics",),
    "mlp": ("dianlib.mlp", "dianlib.training"),
    "search": ("dianlib.search",),
    "rnn": ("dianlib.rnn",),
    "lstm": ("dianlib.lstm",),
    "seq2seq": ("dianlib.seq2seq",),
    "attention": ("dianlib.attention",),
    "multihead": ("dianlib.multihead",),
    "positions": ("dianlib.positions",),
    "grouped_query": ("dianlib.grouped_query",),
}
TOOLS = ("dianlib.data", "dianlib.plotting")


def open_modules(chapters: Iterable[str]) -> tuple[str, ...]:
    """Return the modules of dianlib that an assignment with tasks of these chapters may use."""
    first = min(CHAPTERS.index(chapter) for chapter in chapters)
    return TOOLS + tuple(module for earlier in CHAPTERS[:first] for module in REFERENCES[earlier])


@functools.cache
def tasks() -> Mapping[str, Task]:
    """Return every task by its id, for example "metrics.accuracy"."""
    found: dict[str, Task] = {}
    for chapter in CHAPTERS:
        for task in importlib.import_module(f"dianlib.checks.{chapter}").TASKS:
            found[task.id] = task
    return MappingProxyType(found)
