"""All tasks of the course, in the order of the book."""

import functools
import importlib
from collections.abc import Mapping
from types import MappingProxyType

from dianlib.checks.task import Task

# The chapters that have an assignment. A new chapter adds its slug here.
CHAPTERS = ("metrics", "mlp")


@functools.cache
def tasks() -> Mapping[str, Task]:
    """Return every task by its id, for example "metrics.accuracy"."""
    found: dict[str, Task] = {}
    for chapter in CHAPTERS:
        for task in importlib.import_module(f"dianlib.checks.{chapter}").TASKS:
            found[task.id] = task
    return MappingProxyType(found)
