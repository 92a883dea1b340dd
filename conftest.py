"""Settings for every test run, of the suite in tests/ and of the notebooks in book/ alike.

They go through the environment, so that the kernels and the commands started by tests have them too.
"""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# What takes minutes begins first, so that no worker is left alone with it at the end.
LONG = ("test_checks", "test_nbgrader", "test_mutants", "test_book", "test_hostile", "test_sandbox")


def pytest_configure(config: pytest.Config) -> None:
    # One thread each: two workers share two cores, and sums come out the same everywhere.
    os.environ["OMP_NUM_THREADS"] = "1"
    # Where the larger data sets lie beside the repository, the tests that want them take them there.
    beside = HERE.parent / "shared" / "data"
    if beside.is_dir():
        os.environ.setdefault("DIANLIB_DATA", str(beside))
    # No test touches the progress of the person who runs it.
    folder = tempfile.mkdtemp(prefix="dianlib-progress-")
    os.environ["DIANLIB_PROGRESS"] = str(Path(folder, "progress.json"))
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
