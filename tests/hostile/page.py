"""Write the page of the book that shows what two graders do with the corpus: ``python -m hostile.page``."""

from hostile import measured
from hostile.arena import Result, verdict
from hostile.build import HERE, ROOT, Case, load

PAGE = ROOT / "book" / "hostile-cases.md"

# What the words of a verdict mean, as the table says them.
WORDS = {
    "BREACH": "points not earned",
    "LOST": "work lost",
    "NOT-REFUSED": "graded, though it cannot be",
    "UNNOTICED": "not noticed",
    "BYSTANDER": "others hurt",
    "LEAK": "secrets leaked",
    "SENT": "sent over the network",
    "PROCESS-LEFT": "process left",
    "PLANTED": "file planted",
    "TAMPERED": "course changed",
    "SCRIPT": "script in feedback",
    "HUGE": "huge notebook",
    "TERMINAL": "escape sequences in the terminal",
    "STUCK": "did not end",
}
GROUPS = {
    "honest": "Honest work in all its forms",
    "availability": "Endless, greedy and dying code",
    "tampering": "Tampering with the judge",
    "insiders": "Students who have read this repository",
    "reading": "Reading what is nobody's business",
    "files": "Files and names",
    "notebooks": "Edited and broken notebooks",
}


def page() -> str:
    """Return the whole page as Markdown."""
    cases, plain, ours = load(), measured.read("plain"), measured.read("ours")
    results = {name: measured.result(ours[name]) for name in cases}
    of_plain = {name: measured.result(plain[name]) for name in cases if name in plain}
    text = (
        (HERE / "intro.md")
        .read_text()
        .format(
            total=len(cases),
            honest=sum(case.group == "honest" for case in cases.values()),
            full=max(case.high for case in cases.values()),
            plain_total=len(of_plain),
            plain_well=sum(not verdict(cases[name], found) for name, found in of_plain.items()),
            plain_words=_count(cases, of_plain),
            ours_well=sum(not verdict(cases[name], found) for name, found in results.items()),
            versions=", ".join(sorted({entry["versions"] for entry in plain.values()})),
        )
    )
    for group, title in GROUPS.items():
        text += f"\n## {title}\n\n| case | what it does | allowed | nbgrader alone | this course |\n"
        text += "| --- | --- | --- | --- | --- |\n"
        for name, case in cases.items():
            if case.group == group:
                alone = _cell(case, of_plain[name]) if name in of_plain else "not run"
                cells = (_allowed(case), alone, _cell(case, results[name]))
                text += f"| `{name}` | {case.does} | {' | '.join(cells)} |\n"
    return text


def _allowed(case: Case) -> str:
    if case.graded == "no":
        return "—"
    points = f"{case.low:g}" if case.low == case.high else f"{case.low:g} to {case.high:g}"
    return f"{points} or —" if case.graded == "either" else points


def _cell(case: Case, result: Result) -> str:
    points = "—" if result.points is None else f"{result.points:g}"
    words = ", ".join(WORDS[word] for word in verdict(case, result))
    return f"{points}, **{words}**" if words else points


def _count(cases: dict[str, Case], results: dict[str, Result]) -> str:
    found = [verdict(cases[name], result) for name, result in results.items()]
    counts = {text: sum(word in words for words in found) for word, text in WORDS.items()}
    return ", ".join(f"{text}: {count}" for text, count in counts.items() if count).capitalize()


if __name__ == "__main__":
    PAGE.write_text(page())
