"""One submission in the sandbox: run its cells, ask for its answers, go on after a crash, keep the time."""

import base64
import binascii
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dianlib.checks.judging import Bench
from dianlib.checks.running import Outcome, Probe, Source
from dianlib.grading import wire
from dianlib.grading.records import Flag
from dianlib.grading.sandbox import Box, Sandbox

# The sandbox keeps its own time. This much later, in seconds, the trusted side stops waiting.
SLACK = 4.0
MAX_CALLS = 5_000  # of sealed functions in one task
MAX_PICTURE = 3 << 20
MAX_SHOWN = 20 << 20  # of all that the cells of a submission print and show
PICTURES = {"image/png": b"\x89PNG\r\n\x1a\n", "image/jpeg": b"\xff\xd8\xff"}


@dataclass(frozen=True)
class Times:
    """How long things may take, in seconds, and how often a submission whose process died is begun anew."""

    cell: float = 30.0
    submission: float = 300.0
    restarts: int = 6


@dataclass
class Shown:
    """What a cell printed, the pictures and values it showed (MIME type -> text), and the error it raised."""

    text: str = ""
    shown: list[dict[str, str]] = field(default_factory=list)
    error: tuple[str, str] | None = None


@dataclass(frozen=True)
class Answer:
    """What came of a task: "ready" with outcomes, or "missing", or "unusable" with the type of the answer."""

    state: str
    outcomes: list[Outcome] = field(default_factory=list)
    type_name: str = ""


class _TimeIsUp(Exception):
    """The submission has used all its time, or has died too often."""


class Session:
    """A submission that is being run. Whatever the student's code does, its methods return.

    When the process of the submission dies, a new one repeats the cells that went well. A cell or a task that
    ends its process twice is given up. ``files`` are what was handed in beside the notebook.
    """

    def __init__(self, sandbox: Sandbox, times: Times, files: Mapping[str, bytes] | None = None) -> None:
        self.flags: list[Flag] = []
        self._sandbox = sandbox
        self._times = times
        self._files = dict(files or {})
        self._end = time.monotonic() + times.submission
        self._restarts = times.restarts
        self._room = MAX_SHOWN
        self._done: list[str] = []
        self._box: Box | None = None
        self._specimens: dict[int, Source] = {}
        self._specimen_box: Box | None = None

    def close(self) -> None:
        """End all processes of the submission."""
        self._drop()
        if self._specimen_box is not None:
            self._specimen_box.close()
            self._specimen_box = None

    def flag(self, kind: str, text: str) -> None:
        """Note something for the instructor, once."""
        if Flag(kind, text) not in self.flags:
            self.flags.append(Flag(kind, text))

    # ----- cells -----------------------------------------------------------------------------------------

    def cell(self, source: str) -> Shown:
        """Run one cell."""
        for _ in range(2):
            try:
                box = self._ready_box()
                seconds = min(self._times.cell, self._left())
                request = {"do": "cell", "source": source, "seconds": seconds}
                answer, _ = box.ask(request, seconds=seconds + SLACK)
                shown = _read_shown(answer)
            except _TimeIsUp as reason:
                return Shown(error=("NotRun", f"This cell was not run: {reason}."))
            except wire.TooLate:
                self._drop()
                self.flag("timeout", f"A cell did not end within {self._times.cell:g} s: {_first(source)}")
                return Shown(error=("OutOfTime", f"This cell did not end within {self._times.cell:g} s."))
            except wire.WireError:
                self._drop()
                continue
            self._note(shown, answer, source)
            if shown.error is None or shown.error[0] != "CellTimeLimit":
                self._done.append(source)
            return shown
        self.flag("died", f"A cell ended its own process: {_first(source)}")
        return Shown(error=("ProcessEnded", "This cell ended the process that ran it, so it was left out."))

    def _note(self, shown: Shown, answer: dict[str, Any], source: str) -> None:
        size = len(shown.text) + sum(len(data) for picture in shown.shown for data in picture.values())
        is_too_much = size > self._room
        if is_too_much:
            shown.text, shown.shown = "What this cell showed is left out: it is too much.\n", []
        else:
            self._room -= size
        if is_too_much or answer.get("cut") is True:
            self.flag("output-limit", f"A cell printed more than is kept: {_first(source)}")
        if shown.error and shown.error[0] == "CellTimeLimit":
            self.flag("timeout", f"A cell did not end within {self._times.cell:g} s: {_first(source)}")
            shown.error = ("OutOfTime", f"This cell did not end within {self._times.cell:g} s.")
        if shown.error:
            self._note_limits(" ".join(shown.error), f"a cell, {_first(source)}")

    def _note_limits(self, error: str, place: str) -> None:
        for kind, pattern in {
            "memory": "MemoryError|can't allocate memory|Cannot allocate memory",
            "processes": "BlockingIOError|Resource temporarily unavailable|can't start new thread",
            "disk-limit": "No space left on device|File too large",
            "denied": "Operation not permitted|Permission denied|Read-only file|Network is unreachable",
        }.items():
            if re.search(pattern, error):
                self.flag(kind, f"The limits or the walls of the sandbox stopped something in {place}.")

    # ----- tasks -----------------------------------------------------------------------------------------

    def task(self, bench: Bench, name: str, forbidden: frozenset[str]) -> Answer:
        """Run the candidate called ``name`` on the probes of a bench."""
        for _ in range(2):
            outcomes: list[Outcome] = []
            try:
                answer = self._ask_for_task(bench, name, forbidden, outcomes)
                break
            except _TimeIsUp:
                answer = Answer("ready", _filled(outcomes, bench, "TimeLimit"))
                break
            except wire.TooLate:
                self._drop()
                answer = Answer("ready", _filled(outcomes, bench, "TimeLimit"))
                break
            except wire.WireError:
                self._drop()
                answer = Answer("ready", _filled(outcomes, bench, "Died"))
        for outcome in answer.outcomes:
            if outcome.error == "TimeLimit":
                self.flag("timeout", f"{bench.task.id}: the answer did not return in time.")
            elif outcome.error == "Died":
                self.flag("died", f"{bench.task.id}: the answer ended its own process.")
            elif outcome.error:
                self._note_limits(f"{outcome.error} {outcome.error_text}", bench.task.id)
        return answer

    def _ask_for_task(
        self, bench: Bench, name: str, forbidden: frozenset[str], outcomes: list[Outcome]
    ) -> Answer:
        task = bench.task
        buffers: wire.Buffers = []
        request = {
            "do": "task",
            "name": name,
            "is_value": task.is_value,
            "limit": task.limit,
            "forbidden": sorted(forbidden),
            "probes": [wire.pack(_blinded(probe, self._specimens), buffers) for probe in bench.probes],
        }
        box = self._ready_box()
        state, _ = box.ask(request, buffers, seconds=SLACK)
        if state.get("state") in ("missing", "unusable"):
            return Answer(str(state["state"]), type_name=wire.plain_text(state.get("type"), 80))
        # One probe may be tried twice, each time up to its limit.
        per_probe = 2 * task.limit + SLACK
        deadline = time.monotonic() + min(per_probe, self._left())
        calls, size = 0, 0
        while len(outcomes) <= len(bench.probes):
            header, answers = wire.receive(box.connection, deadline - time.monotonic())
            if "call" in header and calls < MAX_CALLS:
                calls += 1
                wire.send(box.connection, *self._call_specimen(header, answers))
                continue
            size += sum(map(len, answers))
            if size > wire.MAX_BYTES:
                raise wire.WireError("the outcomes are too large")
            outcomes.append(wire.unpack_outcome(header.get("outcome"), answers))
            deadline = time.monotonic() + min(per_probe, self._left())
        return Answer("ready", outcomes)

    def _call_specimen(
        self, header: dict[str, Any], buffers: wire.Buffers
    ) -> tuple[dict[str, Any], wire.Buffers]:
        """Pass a call on to a box that holds our own functions and no student's code, and its answer back."""
        number = header.get("call")
        source = self._specimens.get(number) if isinstance(number, int) else None
        if source is None:
            raise wire.WireError("a call of an unknown function")
        request = {"do": "specimen", "number": number, "text": source.text, "name": source.name}
        request |= {"arguments": header.get("arguments"), "seconds": 5.0}
        try:
            if self._specimen_box is None:
                self._specimen_box = self._sandbox.open()
            return self._specimen_box.ask(request, buffers, seconds=5.0 + SLACK)
        except wire.WireError:
            if self._specimen_box is not None:
                self._specimen_box.close()
                self._specimen_box = None
            return {"raised": ["TimeoutError", "the call did not return"]}, []

    # ----- the process -----------------------------------------------------------------------------------

    def _left(self) -> float:
        left = self._end - time.monotonic()
        if left <= 0:
            text = f"the submission has used its {self._times.submission:g} s"
            self.flag("timeout", f"Not all of it was run: {text}.")
            raise _TimeIsUp(text)
        return left

    def _ready_box(self) -> Box:
        """Return the submission's box; after a loss a new one, in which the good cells are repeated."""
        if self._box is not None:
            return self._box
        if self._restarts <= 0:
            self.flag("died", "Its process ended too often, so the rest was not run.")
            raise _TimeIsUp("its process ended too often")
        self._restarts -= 1
        self._box = self._sandbox.open()
        for name, content in self._files.items():
            self._box.ask({"do": "file", "name": name}, [content])
        for source in self._done:
            seconds = min(self._times.cell, self._left())
            self._box.ask({"do": "cell", "source": source, "seconds": seconds}, seconds=seconds + SLACK)
        return self._box

    def _drop(self) -> None:
        if self._box is not None:
            self._box.close()
            self._box = None


def _blinded(probe: Probe, specimens: dict[int, Source]) -> Probe:
    """Take from a probe what is the judge's business, and replace code by a function that can be called."""
    arguments = dict(probe.args)
    for name, value in arguments.items():
        if isinstance(value, Source):
            number = len(specimens) + 1
            specimens[number] = value
            arguments[name] = wire.Sealed(number, value.name)
    return replace(probe, name="", core=False, weight=1.0, args=arguments)


def _filled(outcomes: list[Outcome], bench: Bench, error: str) -> list[Outcome]:
    missing = len(bench.probes) + 1 - len(outcomes)
    return outcomes + [Outcome(error=error) for _ in range(missing)]


def _first(source: str) -> str:
    """Name a cell by its first line of code."""
    lines = [line.strip() for line in source.splitlines() if line.strip()]
    return f'"{wire.plain_text(lines[0], 80)}"' if lines else "an empty cell"


# ----- what students see of their output ---------------------------------------------------------------


def _read_shown(answer: dict[str, Any]) -> Shown:
    """Read what a cell showed: plain text and real pictures, nothing that a browser could run."""
    shown = []
    pictures = answer.get("shown")
    for output in pictures[:100] if isinstance(pictures, list) else []:
        if isinstance(output, dict) and (data := _harmless(output)):
            shown.append(data)
    error = answer.get("error")
    named = None
    if isinstance(error, list) and len(error) == 2:
        named = (wire.plain_text(error[0], 80), wire.plain_text(error[1], 2_000))
    return Shown(wire.plain_text(answer.get("text"), 200_000), shown, named)


def _harmless(output: dict[str, Any]) -> dict[str, str]:
    kept = {}
    for kind, first_bytes in PICTURES.items():
        if isinstance(output.get(kind), str) and len(output[kind]) <= MAX_PICTURE:
            try:
                content = base64.b64decode("".join(output[kind].split()), validate=True)
            except (binascii.Error, ValueError):
                continue
            if content.startswith(first_bytes):
                kept[kind] = base64.b64encode(content).decode()
    if "text/plain" in output:
        kept["text/plain"] = wire.plain_text(output["text/plain"], 50_000)
    return kept
