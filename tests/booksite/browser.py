"""A headless Chromium for tests: a local server, a log of the requests that leave it, axe-core."""

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, BrowserContext, Page, Route, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
)
ALL_RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
COLOUR_RULES = ["color-contrast", "link-in-text-block"]
# What the theme sets in dark mode, for a page made of an element alone.
DARK = """html[data-theme=dark] { background: #14181e; color: #ced6dd; --pst-color-text-base: #ced6dd;
    --pst-color-surface: #222832; --pst-color-border: #8c96a0; --pst-color-primary: #3fb1c5 }"""


def chromium_path() -> str | None:
    """Return the Chromium (or Chrome) of this computer, None when there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Run a headless browser."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


class _QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        """Keep the requests out of the output of the tests."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder on a free port of this computer and give its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_QuietHandler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class Visit:
    """A browser context without a network: requests that leave this computer are refused and noted."""

    def __init__(self, browser: Browser, *, colour_scheme: str = "light", width: int = 1280) -> None:
        self.left: list[str] = []
        self.failed: list[str] = []
        self.errors: list[str] = []
        self.context: BrowserContext = browser.new_context(
            color_scheme=colour_scheme, viewport={"width": width, "height": 900}, reduced_motion="reduce"
        )
        self.context.set_default_timeout(90_000)  # a busy machine is slow, not wrong
        self.context.route("**/*", self._guard)
        self.page: Page = self.context.new_page()
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("response", self._note)

    def _guard(self, route: Route) -> None:
        address = route.request.url
        if address.startswith(("data:", "blob:", "file:", "http://127.0.0.1:")):
            route.continue_()
        else:
            self.left.append(address)
            route.abort()

    def _note(self, response: Any) -> None:
        if response.status >= 400:
            self.failed.append(f"{response.status} {response.url}")

    def open(self, address: str) -> Page:
        """Go to a page and wait until its formulas are set."""
        self.page.goto(address, wait_until="load")
        self.page.evaluate("() => window.MathJax?.startup?.promise")
        return self.page

    def close(self) -> None:
        self.context.close()


# Code is thousands of coloured words in a few colours: axe-core looks at each word, so it gets each colour of
# each kind of block once. It does not read MathML, which screen readers do: a table heading that is a
# formula is not empty.
RUN_AXE = """async tags => {
    const seen = new Set();
    for (const word of document.querySelectorAll('.highlight span')) {
        const block = word.closest('.highlight').parentElement;
        const kind = [word, block, block.parentElement].map(element => element.className).join('|');
        if (seen.has(kind)) word.replaceWith(...word.childNodes);
        seen.add(kind);
    }
    const result = await axe.run(document, {runOnly: tags, resultTypes: ['violations']});
    const isFormula = node => document.querySelector(node.target[0])?.querySelector('math');
    return result.violations.flatMap(rule => rule.nodes
        .filter(node => !(rule.id === 'empty-table-header' && isFormula(node)))
        .map(node => `${rule.impact} ${rule.id}: ${node.target.join(' ')} ${node.html.slice(0, 120)}`
            + ` (${node.failureSummary.split('\\n').pop().trim()})`));
}"""


def axe_violations(page: Page, rules: list[str]) -> list[str]:
    """Run axe-core on an open page: one line for each element that breaks a rule."""
    page.evaluate(files("axe_playwright_python").joinpath("axe.min.js").read_text("utf8"))
    found: list[str] = page.evaluate(RUN_AXE, rules)
    return found
