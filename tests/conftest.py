"""The browser, for every test that looks at a page."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import pytest
from booksite import browser as chromium_tools
from playwright.sync_api import Browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium for the tests of one file."""
    if chromium_tools.chromium_path() is None:
        pytest.skip(
            "Chromium is not installed: install it to test pages (Debian, Ubuntu: apt install chromium)."
        )
    with chromium_tools.chromium() as running:
        yield running


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., chromium_tools.Visit]]:
    """Start visits that end with the test."""
    with ExitStack() as stack:

        def start(**settings: object) -> chromium_tools.Visit:
            return stack.enter_context(closing(chromium_tools.Visit(browser, **settings)))

        yield start
