"""Check the files of a built site: links arrive, nothing comes from another host, images are described."""

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bs4 import BeautifulSoup, Tag

LOADING_TAGS = ("a", "link", "script", "img", "source", "iframe", "video", "audio", "object", "embed")
IMAGE_FILE_NAME = re.compile(r"^\S*\.(png|svg|jpe?g|gif|webp)$", re.IGNORECASE)
FOOTNOTE = re.compile(r"\[\^[^\]\s]+\]")  # what an undefined footnote leaves in the text


def pages(site: Path) -> list[Path]:
    """Return the pages of a site; the parts that the theme keeps in ``_static`` are no pages."""
    return sorted(page for page in site.rglob("*.html") if "_static" not in page.relative_to(site).parts)


def _loads(element: Tag) -> bool:
    """Tell whether a browser fetches the address of an element by itself."""
    if element.name == "a":
        return False
    if element.name == "link":
        return not set(element.get("rel") or ()) & {
            "canonical",
            "alternate",
            "next",
            "prev",
            "search",
            "index",
        }
    return True


def problems(site: Path) -> list[str]:
    """Return one line for each fault of the site, an empty list for a sound one."""
    site = site.resolve()
    soups = {page: BeautifulSoup(page.read_text("utf8"), "html.parser") for page in pages(site)}
    anchors = {
        page: {str(element["id"]) for element in soup.find_all(id=True)}
        | {str(element["name"]) for element in soup.find_all("a", attrs={"name": True})}
        for page, soup in soups.items()
    }
    found: list[str] = []
    for page, soup in soups.items():
        name = page.relative_to(site).as_posix()
        found += [f"{name}: {problem}" for problem in _page_problems(soup)]
        for element in soup.find_all(LOADING_TAGS):
            address = str(element.get("href") or element.get("src") or element.get("data") or "")
            problem = _address_problem(page, address, _loads(element), anchors)
            if problem:
                found.append(f"{name}: {problem}: {address}")
    return found


def _page_problems(soup: BeautifulSoup) -> list[str]:
    found = []
    for image in soup.find_all("img"):
        alt = image.get("alt")
        if alt is None:
            found.append(f"image without alt text: {image.get('src')}")
        elif IMAGE_FILE_NAME.match(str(alt)):
            found.append(f"image described by its file name: {alt}")
        elif not alt and image.find_parent("article"):
            found.append(f"image of the text with an empty alt text: {image.get('src')}")
    html = soup.find("html")
    if not (isinstance(html, Tag) and html.get("lang")):
        found.append("page without a language")
    if not (soup.title and soup.title.get_text(strip=True)):
        found.append("page without a title")
    if not soup.find("meta", attrs={"name": "description", "content": True}):
        found.append("page without a description")
    for text in soup.find_all(string=FOOTNOTE):
        if not text.find_parent(["pre", "code", "script"]):
            found += [f"undefined footnote: {mark}" for mark in FOOTNOTE.findall(text)]
    return found


def _address_problem(page: Path, address: str, loads: bool, anchors: dict[Path, set[str]]) -> str:
    """Return what is wrong with an address on a page, an empty string when nothing is."""
    parts = urlsplit(address)
    if not address or parts.scheme in ("mailto", "data", "javascript"):
        return ""
    if parts.scheme or parts.netloc:
        return "loads from another host" if loads else ""
    target = page if not parts.path else (page.parent / unquote(parts.path)).resolve()
    if target.is_dir():
        target = target / "index.html"
    if not target.exists():
        return "missing file"
    if parts.fragment and target in anchors and unquote(parts.fragment) not in anchors[target]:
        return "missing anchor"
    return ""
