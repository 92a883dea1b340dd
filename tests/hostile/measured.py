"""Measure a grader on the corpus: ``python -m hostile.measured plain``, or ``ours``, in the folder tests.

The results are kept in ``plain.toml`` and ``ours.toml``.
Only cases that have no result yet, or have changed since, are run.
"""

import datetime
import hashlib
import importlib.metadata
import json
import sys
import time
import tomllib
from collections.abc import Iterator
from typing import Any

from hostile.arena import Result, grade_plainly, grade_together, plain_template, verdict, workplace
from hostile.build import HERE, Case, load

HEADINGS = {
    "plain": "# What nbgrader alone does with each case. Written by `python -m hostile.measured plain`.\n",
    "ours": "# What the course's grader does with each case. Written by `python -m hostile.measured ours`.\n",
}


def digest(case: Case) -> str:
    """Tell whether a case has changed: what is handed in counts, not what is expected of it."""
    content = json.dumps([case.start, case.student, case.after, case.changes])
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def read(grader: str) -> dict[str, dict[str, Any]]:
    """Return all measurements of a grader: case -> points (absent: not graded), harm, flags, versions, ..."""
    file = HERE / f"{grader}.toml"
    return tomllib.loads(file.read_text()) if file.is_file() else {}


def result(entry: dict[str, Any]) -> Result:
    """Return a measurement as a result."""
    flags = tuple(entry["flags"]) if "flags" in entry else None
    return Result(entry.get("points"), tuple(entry["harm"]), flags)


def _write(grader: str, entries: dict[str, dict[str, Any]]) -> None:
    text = HEADINGS[grader]
    for name in sorted(entries):
        text += f"\n[{name}]\n"
        text += "".join(f"{key} = {json.dumps(value)}\n" for key, value in entries[name].items())
    (HERE / f"{grader}.toml").write_text(text)


def _plain(cases: dict[str, Case], wanted: list[str]) -> Iterator[tuple[str, Result]]:
    with workplace() as folder:
        plain_template(folder / "template")
        for name in wanted:
            yield name, grade_plainly(cases[name], cases, folder / "template", folder / name)


def _ours(cases: dict[str, Case], wanted: list[str]) -> Iterator[tuple[str, Result]]:
    with workplace() as folder:
        results, harm, _ = grade_together([cases[name] for name in wanted], folder / "all", seconds=3600)
        if harm:
            raise SystemExit(f"Harm was done beyond the cases, so nothing was written: {', '.join(harm)}.")
        yield from results.items()


def main(grader: str, *only: str) -> None:
    """Measure the cases that were named, or all that have no result for what they are now."""
    cases = load()
    entries = {name: entry for name, entry in read(grader).items() if name in cases}
    stale = [name for name in cases if entries.get(name, {}).get("case") != digest(cases[name])]
    wanted = list(only) or stale
    versions = (
        f"nbgrader {importlib.metadata.version('nbgrader')}, torch {importlib.metadata.version('torch')}"
    )
    start = time.monotonic()
    for number, (name, found) in enumerate({"plain": _plain, "ours": _ours}[grader](cases, wanted), 1):
        entries[name] = {
            **({} if found.points is None else {"points": found.points}),
            "harm": list(found.harm),
            **({} if found.flags is None else {"flags": sorted(set(found.flags))}),
            "measured": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "versions": versions,
            "case": digest(cases[name]),
        }
        _write(grader, entries)
        words = " ".join(verdict(cases[name], found)) or "ok"
        seconds = round(time.monotonic() - start)
        print(f"{number}/{len(wanted)} {name}: {found.points} {words} ({seconds} s)", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
