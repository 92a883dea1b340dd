"""The inside of the sandbox: a process with torch in memory, from which each submission is forked.

Started by dianlib.grading.sandbox, never by hand. After the fork everything here is in the student's
hands: no other module believes what it says without checking.
"""

import builtins
import contextlib
import ctypes
import gc
import importlib
import io
import json
import os
import selectors
import signal
import socket
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from IPython.core.displayhook import CapturingDisplayHook
from IPython.core.displaypub import CapturingDisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from torch import Tensor
from traitlets.config import Config

from dianlib.checks.running import Outcome, Probe, TimeLimit, describe, run
from dianlib.grading import wire
from dianlib.grading.isolation import ENDS, Isolation, Limits, Namespaces, die_with_parent, system_call_filter

# A child that does not end by itself when its time is up gets this much longer, in seconds.
GRACE = 1.0
KEPT_OUTPUTS = 50
KEPT_KINDS = ("image/png", "image/jpeg", "text/plain")


# ----- the warm process --------------------------------------------------------------------------------


def main(isolation: Isolation) -> None:
    """Import everything once, then fork a process for each submission that is asked for."""
    channels = [socket.socket(fileno=int(number)) for number in sys.argv[1].split(",")]
    modules = sys.argv[2].split(",")
    reader = _read_digits() if "dianlib.data" in modules else None
    for module in modules:
        importlib.import_module(module)
    shell = _warm_shell()
    if reader is not None:
        _remember_digits(reader)
    system_call_filter()
    memory = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    gc.collect()
    gc.freeze()  # what is here now is shared by all forks, and is not copied when garbage is looked for
    _gather_memory()
    selector = selectors.DefaultSelector()
    for channel in channels:
        selector.register(channel, selectors.EVENT_READ)
        wire.send(channel, {"ready": True, "threads": threading.active_count()})
    living: dict[socket.socket, set[int]] = {channel: set() for channel in channels}
    while living:
        ready = {key.fd for key, _ in selector.select()}
        for channel in [channel for channel in living if channel.fileno() in ready]:
            if not _answer(channel, living[channel], shell, memory, isolation):
                selector.unregister(channel)
                for process in living.pop(channel):
                    _close(process)


class _Shell(InteractiveShell):
    """IPython's shell for cells, without a terminal or a kernel around it."""

    def showtraceback(self, *details: Any, **more: Any) -> None:
        """Print nothing: an error is reported once, by us."""

    showsyntaxerror = showtraceback

    def enable_gui(self, gui: str | None = None) -> None:
        """Carry on: ``%matplotlib inline``, the first line of many notebooks, asks for this."""

    def ask_exit(self) -> None:
        """Carry on after ``exit()``, so that the cells below it can be graded."""


def _warm_shell() -> InteractiveShell:
    """Make the shell that runs cells, and have torch load now what it loads when it is first used."""
    settings = Config()
    settings.HistoryManager.enabled = False
    settings.InteractiveShell.colors = "nocolor"
    shell = _Shell.instance(config=settings)
    shell.run_line_magic("matplotlib", "inline")
    warnings.filterwarnings("ignore", "To exit: use")  # IPython's advice to whoever sits at a terminal
    torch.set_num_threads(1)
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.zeros(1, 2)).sum().backward()
    optimizer.step()
    return shell


DIGITS = "digits.pt"


def _read_digits() -> int:
    """Have a process of its own read the digits, for which most notebooks ask, and leave them in a file.

    The libraries that read them fill more of the memory's map than torch does, and every fork copies that
    map. Returns the number of the process; it works while this one goes on.
    """
    reader = os.fork()
    if reader == 0:
        try:
            data = importlib.import_module("dianlib.data")
            torch.save(vars(data.digits()), Path.home() / DIGITS)
        finally:
            os._exit(0)
    return reader


def _remember_digits(reader: int) -> None:
    data: Any = sys.modules["dianlib.data"]
    file = Path.home() / DIGITS
    os.waitpid(reader, 0)
    data.KNOWN_DIGITS[0] = data.ImageData(**torch.load(file))
    file.unlink()


def _gather_memory() -> None:
    """Have the system gather this process's memory in large pages: a fork copies 512 times fewer entries.

    Only worth its second because of the many forks to come. Kernels before 6.1 refuse, and nothing is lost.
    """
    libc, gather, large = ctypes.CDLL(None), 25, 1 << 21  # MADV_COLLAPSE, 2 MB
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, rights, *_ = words = line.split()
        is_own_memory = len(words) == 5 or words[5] == "[heap]"
        if is_own_memory and "w" in rights:
            first, last = (int(address, 16) for address in addresses.split("-"))
            first, last = -(-first // large) * large, last // large * large
            if first < last:
                libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), gather)


def _answer(
    channel: socket.socket, living: set[int], shell: InteractiveShell, memory: int, isolation: Isolation
) -> bool:
    """Carry out one request of the trusted side: open or close a submission. False when it has left."""
    try:
        request, descriptors, _, _ = socket.recv_fds(channel, 1 << 16, 1)
    except OSError:
        return False
    if not request:
        return False
    order = json.loads(request)
    if order["do"] == "open":
        process = _open(descriptors[0], Limits(**order["limits"]), shell, memory, isolation)
        living.add(process)
        answer = {"process": process}
    else:
        if order["process"] in living:
            living.remove(order["process"])
            _close(order["process"])
        answer = {"closed": True}
    with contextlib.suppress(wire.WireError):  # who asked may be gone, which shows at the next reading
        wire.send(channel, answer)
    return True


def _close(process: int) -> None:
    os.kill(process, signal.SIGTERM)
    os.waitpid(process, 0)


def _open(descriptor: int, limits: Limits, shell: InteractiveShell, memory: int, isolation: Isolation) -> int:
    """Fork a process that shuts itself in and forks the submission's first one; return its number.

    The outer process runs no student's code, and ends the inner one when it is told to end.
    """
    outer = os.fork()
    if outer:
        os.close(descriptor)
        return outer
    try:
        isolation.separate(limits)
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)
        inner = os.fork()
        if inner:
            os.close(descriptor)
            isolation.wait(inner)
            os._exit(0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDS)
        die_with_parent()
        os.setsid()
        connection = socket.socket(fileno=os.dup2(descriptor, 200, inheritable=False))
        os.closerange(3, 200)
        os.closerange(201, os.sysconf("SC_OPEN_MAX"))
        isolation.enter(limits, memory)
        sys.path.insert(0, "")  # a notebook may import what was handed in beside it
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)
        Submission(connection, shell, limits).serve()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


# ----- one submission ------------------------------------------------------------------------------------


class CellTimeLimit(BaseException):
    """Raised inside a cell that runs too long. No ``except Exception`` catches it."""


class Submission:
    """Runs the cells of one notebook, and answers the judge's questions with what they define."""

    def __init__(self, connection: socket.socket, shell: InteractiveShell, limits: Limits) -> None:
        self.connection = connection
        self.shell = shell
        self.limits = limits
        self.home = Path.cwd()
        self.specimens: dict[int, Any] = {}

    def serve(self) -> None:
        """Do what the trusted side asks for until it closes the connection."""
        wire.send(self.connection, {"ready": True})
        process = os.getpid()
        while True:
            request, buffers = wire.receive(self.connection)
            match request["do"]:
                case "cell":
                    shown = self.run_cell(request["source"], request["seconds"])
                    if os.getpid() != process:
                        os._exit(0)  # a copy, which the cell made by fork() and did not end
                    wire.send(self.connection, shown)
                case "task":
                    self.run_task(request, buffers)
                case "specimen":
                    wire.send(self.connection, *self.call_specimen(request, buffers))
                case "file":
                    self.write_file(request["name"], buffers[0])
                    wire.send(self.connection, {"written": True})

    # -- cells --

    def run_cell(self, source: str, seconds: float) -> dict[str, Any]:
        """Run one cell as Jupyter would, and describe what it printed, showed and raised."""
        text = _Text(self.limits.output)
        publisher = CapturingDisplayPublisher()
        shown: list[Any] = []
        trap = self.shell.display_trap
        hook, trap.hook = trap.hook, CapturingDisplayHook(shell=self.shell, outputs=shown)
        public, self.shell.display_pub = self.shell.display_pub, publisher
        error: BaseException | None = None
        try:
            with (
                contextlib.redirect_stdout(text),
                contextlib.redirect_stderr(text),
                _alarm(seconds, CellTimeLimit),
            ):
                done = self.shell.run_cell(source, store_history=False)
            error = done.error_before_exec or done.error_in_exec
        except BaseException as raised:  # SystemExit, or a shell that the student has changed
            error = raised
        finally:
            trap.hook, self.shell.display_pub = hook, public
        outputs = [output["data"] for output in [*publisher.outputs, *shown]]
        pictures = _fitting(outputs)
        return {
            "text": text.getvalue(),
            "cut": text.cut or len(pictures) < len(outputs),
            "shown": pictures,
            "error": None if error is None else [type(error).__name__, _describe(error)],
        }

    def write_file(self, name: str, content: bytes) -> None:
        """Put a file that was handed in into the working directory."""
        (self.home / name).write_bytes(content)

    # -- tasks --

    def run_task(self, request: dict[str, Any], buffers: wire.Buffers) -> None:
        """Run a candidate on all probes, and on the first one again, each outcome in a frame of its own.

        The candidate runs in a child process, so that a crash or a loop costs one probe and not the notebook.
        After a crash or a probe out of time another child goes on with the next one, twice at most.
        """
        names = self.shell.user_ns
        candidate = names.get(request["name"])
        if request["is_value"] and isinstance(candidate, dict):
            candidate = candidate.get
        state = "missing" if request["name"] not in names else "ready" if callable(candidate) else "unusable"
        wire.send(self.connection, {"state": state, "type": type(candidate).__name__})
        if state != "ready":
            return
        number, lost, again = 0, 0, False
        while number <= len(request["probes"]):
            if lost == 2:
                self._send_outcome(Outcome(error="TimeLimit"))
                number += 1
                continue
            finished, late, failure = self._in_a_child(candidate, request, buffers, number, 2 - lost)
            number, lost = number + finished, lost + late
            again = again and not finished
            if failure == "Died" and not again:
                again = True  # the same probe once more: its process may have been killed by somebody else
            elif failure:
                self._send_outcome(Outcome(error=failure))
                number, lost, again = number + 1, lost + 1, False

    def _in_a_child(
        self, candidate: Any, request: dict[str, Any], buffers: wire.Buffers, first: int, patience: int
    ) -> tuple[int, int, str]:
        """Run the probes from ``first`` on, until all are done or ``patience`` of them were out of time.

        Returns how many were finished, how many of these were out of time, and what stopped the child.
        """
        ours, its = socket.socketpair()
        child = os.fork()
        if child == 0:
            ours.close()
            self.connection.close()  # a candidate speaks to us, and not to the judge
            _candidate_process(its, candidate, request, buffers, first)
        its.close()
        finished, late, called = 0, 0, False
        try:
            while first + finished <= len(request["probes"]) and late < patience:
                header, answers = wire.receive(ours, request["limit"] + GRACE)
                wire.send(self.connection, header, answers)
                if "call" in header:  # of a sealed function: the trusted side knows where it runs
                    called = True
                    wire.send(ours, *wire.receive(self.connection))
                    continue
                finished += 1
                outcome = header.get("outcome")
                if isinstance(outcome, dict) and outcome.get("error") == "TimeLimit":
                    late += 1
                    if called:
                        break  # an answer that it did not wait for would be taken for the next one
        except wire.TooLate:
            return finished, late, "TimeLimit"
        except wire.WireError:
            return finished, late, "Died"
        finally:
            ours.close()
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        return finished, late, ""

    def _send_outcome(self, outcome: Outcome) -> None:
        buffers: wire.Buffers = []
        wire.send(self.connection, {"outcome": wire.pack_outcome(outcome, buffers)}, buffers)

    # -- specimens: implementations that other people's tests judge --

    def call_specimen(
        self, request: dict[str, Any], buffers: wire.Buffers
    ) -> tuple[dict[str, Any], wire.Buffers]:
        """Call one of our own functions for a student's test. Such a process runs no student's code.

        The answer holds the result and what the call left in its arguments. Where the gradient of the result
        is handed in, the gradients of the arguments take the place of the result.
        """
        answers: wire.Buffers = []
        try:
            number = request["number"]
            if number not in self.specimens:
                space: dict[str, Any] = {"torch": torch, "Tensor": Tensor}
                exec(request["text"], space)
                self.specimens[number] = space[request["name"]]
            positional, named, gradient = wire.unpack(request["arguments"], buffers)
            leaves = [
                value for value in positional if isinstance(value, Tensor) and value.is_floating_point()
            ]
            with _alarm(request["seconds"], TimeLimit), contextlib.redirect_stdout(io.StringIO()):
                if gradient is not None:
                    for leaf in leaves:
                        leaf.requires_grad_(True)
                result = self.specimens[number](*positional, **named)
                if gradient is not None:
                    result = torch.autograd.grad(result, leaves, gradient, allow_unused=True)
            return {"result": wire.pack((result, positional), answers)}, answers
        except BaseException as error:
            return {"raised": [type(error).__name__, str(error)[:300]]}, []


# ----- the child that runs a candidate ---------------------------------------------------------------------


def _candidate_process(
    connection: socket.socket, candidate: Any, request: dict[str, Any], buffers: wire.Buffers, first: int
) -> None:
    """Run probes and send their outcomes; ends the process."""
    try:
        with contextlib.redirect_stdout(_Text(0)), contextlib.redirect_stderr(_Text(0)):
            warnings.simplefilter("ignore")

            def sealed(described: dict[str, Any]) -> Any:
                return _sealed_function(connection, described) if described.get("is") == "Sealed" else None

            forbidden = frozenset(request["forbidden"])
            for described in [*request["probes"], request["probes"][0]][first:]:
                probe = wire.unpack(described, buffers, sealed)
                assert isinstance(probe, Probe)
                with _alarm(request["limit"], TimeLimit):
                    outcome = run(candidate, probe, forbidden)
                answers: wire.Buffers = []
                wire.send(connection, {"outcome": wire.pack_outcome(outcome, answers)}, answers)
    except BaseException:  # the alarm at a bad moment, or a student's code that changed our tools
        pass
    finally:
        os._exit(0)


def _sealed_function(connection: socket.socket, described: dict[str, Any]) -> Callable[..., Any]:
    """Make a function that runs in another process: it can be called, and nothing else."""

    def ask(positional: tuple[Any, ...], named: dict[str, Any], gradient: Any) -> Any:
        buffers: wire.Buffers = []
        arguments = wire.pack((positional, named, gradient), buffers)
        wire.send(connection, {"call": described["number"], "arguments": arguments}, buffers)
        answer, answers = wire.receive(connection)
        if "raised" in answer:
            name, text = answer["raised"]
            kind = getattr(builtins, name, RuntimeError)
            known = isinstance(kind, type) and issubclass(kind, Exception)
            raise (kind if known else RuntimeError)(text)
        result, changed = wire.unpack(answer["result"], answers)
        for old, new in zip(positional, changed, strict=True):
            if isinstance(old, Tensor) and isinstance(new, Tensor) and not torch.equal(old.detach(), new):
                with torch.no_grad():
                    old.copy_(new)
        return result

    class Differentiable(torch.autograd.Function):
        """The call as a part of autograd's graph, for tests that look at gradients."""

        @staticmethod
        def forward(context: Any, *positional: Any) -> Any:
            context.positional = positional
            return ask(positional, {}, None)

        @staticmethod
        def backward(context: Any, *gradients: Any) -> Any:
            found = iter(ask(context.positional, {}, gradients[0]))
            return tuple(
                next(found) if isinstance(v, Tensor) and v.is_floating_point() else None
                for v in context.positional
            )

    def function(*positional: Any, **named: Any) -> Any:
        wants_graph = any(isinstance(value, Tensor) and value.requires_grad for value in positional)
        if wants_graph and not named and torch.is_grad_enabled():
            return Differentiable.apply(*positional)  # type: ignore[no-untyped-call]
        return ask(positional, named, None)

    function.__name__ = function.__qualname__ = str(described["name"])
    return function


def _describe(error: BaseException) -> str:
    """Say what a cell raised, and in which of its lines."""
    if isinstance(error, SyntaxError) and isinstance(error.text, str):
        return f'{type(error).__name__}: {error.msg}\n    in the line "{error.text.strip()[:200]}"'
    return describe(error)


def _fitting(outputs: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Keep the first outputs, in the kinds that are passed on, as far as one answer has room for them."""
    kept, room = [], wire.MAX_HEADER // 2
    for output in outputs[:KEPT_OUTPUTS]:
        data = {kind: str(output[kind]) for kind in KEPT_KINDS if kind in output}
        room -= len(json.dumps(data))
        if room < 0:
            break
        kept.append(data)
    return kept


# ----- small tools -----------------------------------------------------------------------------------------


class _Text(io.TextIOBase):
    """Collects what is printed, up to a limit."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.parts: list[str] = []
        self.size = 0

    @property
    def cut(self) -> bool:
        return self.size > self.limit

    def write(self, text: str) -> int:
        if self.size < self.limit:
            self.parts.append(text[: self.limit - self.size])
        self.size += len(text)
        return len(text)

    def getvalue(self) -> str:
        return "".join(self.parts)


@contextlib.contextmanager
def _alarm(seconds: float, error: type[BaseException]) -> Iterator[None]:
    """Raise an error in this process when the time is up, again and again if it is caught."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise error("out of time")

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.2)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main(Namespaces())
