"""The outside of the sandbox: start it, make sure that it holds, and open a box for each submission.

Linux with bubblewrap. A warm process waits inside, with torch in memory; each submission is a fork of it
that shuts itself in once more, so that submissions do not see each other either.
"""

import contextlib
import dataclasses
import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import dianlib
from dianlib.grading import wire
from dianlib.grading.isolation import HOME, Limits

PACKAGE = Path(dianlib.__file__).parent
COURSE = "/course"  # where dianlib lies inside

# What the inside consists of: no reference, no known mistake, no judge.
OWN_FILES = {
    "__init__.py": "__init__.py",
    "checks/__init__.py": "grading/checks_inside.py",
    "checks/running.py": "checks/running.py",
    "grading/__init__.py": "grading/__init__.py",
    "grading/wire.py": "grading/wire.py",
    "grading/isolation.py": "grading/isolation.py",
    "grading/inside.py": "grading/inside.py",
}
START_SECONDS = 180.0

_ONLY = "Students' code runs only in a sandbox"


class SandboxError(Exception):
    """Isolation cannot be had; the text is the sentence that the instructor reads."""


# ----- one submission ------------------------------------------------------------------------------------


class Box:
    """A process of its own for one submission. Its methods raise wire.WireError when it is gone or silent."""

    def __init__(self, connection: socket.socket, channel: socket.socket, process: int) -> None:
        self.connection = connection
        self._channel = channel
        self._process = process

    def ask(
        self, request: dict[str, Any], buffers: Sequence[bytes] = (), seconds: float = 10.0
    ) -> tuple[dict[str, Any], wire.Buffers]:
        """Send a request and wait some seconds for one answer. Nothing in the answer was checked yet."""
        self.connection.settimeout(seconds)
        wire.send(self.connection, request, list(buffers))
        return wire.receive(self.connection, seconds)

    def close(self) -> None:
        """End all processes of the submission."""
        self.connection.close()
        with contextlib.suppress(wire.WireError):
            _request(self._channel, {"do": "close", "process": self._process})


# ----- the sandbox -----------------------------------------------------------------------------------------


class Sandbox:
    """A warm process in bubblewrap. Processes that share one each use a channel of their own.

    ``modules`` names the modules of dianlib that students may import; ``data`` is the folder with the data
    sets, and ``hidden`` are folders to cover where they lie within what is seen inside, a course for one.
    Raises SandboxError when the isolation cannot be had, or does not hold what it must.
    """

    def __init__(
        self,
        modules: Sequence[str],
        limits: Limits | None = None,
        data: Path | None = None,
        channels: int = 1,
        hidden: Sequence[Path] = (),
    ) -> None:
        self.modules = tuple(modules)
        self.limits = limits or Limits()
        self.data = data
        self.hidden = tuple(hidden)
        self._channels: list[socket.socket] = []
        self._start(channels)
        self._test()

    def use(self, number: int) -> None:
        """Take one of the channels and leave the others to other processes."""
        for index, channel in enumerate(self._channels):
            if index != number:
                channel.close()
        self._channels = [self._channels[number]]

    def open(self) -> Box:
        """Fork a box. If the warm process is gone, somebody killed it: a new one is started, once."""
        try:
            return self._open()
        except wire.WireError:
            self.renew()
            return self._open()

    def renew(self) -> None:
        """Start a warm process of one's own, in place of one that is gone or shared."""
        self.close()
        self._start(1)

    def close(self) -> None:
        """End the warm process, if it was started here, and everything in it."""
        for channel in self._channels:
            channel.close()
        if self._owner == os.getpid():
            try:
                self._bubblewrap.wait(timeout=5)  # it leaves when nobody speaks to it any more
            except subprocess.TimeoutExpired:
                self._bubblewrap.kill()
                self._bubblewrap.wait()

    def _open(self) -> Box:
        ours, its = socket.socketpair()
        channel = self._channels[0]
        try:
            order = {"do": "open", "limits": dataclasses.asdict(self.limits)}
            answer = _request(channel, order, [its.fileno()])
        except wire.WireError:
            ours.close()
            raise
        finally:
            its.close()
        box = Box(ours, channel, answer["process"])
        try:
            wire.receive(ours, 30)
        except wire.WireError:
            box.close()
            raise
        return box

    def _start(self, channels: int) -> None:
        pairs = [socket.socketpair() for _ in range(channels)]
        inner = [its.fileno() for _, its in pairs]
        command = [
            *_command(self.modules, self.data, self.hidden),
            ",".join(map(str, inner)),
            ",".join(self._imports()),
        ]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (it lives as long as the sandbox)
        self._bubblewrap = subprocess.Popen(
            command, pass_fds=inner, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._log
        )
        self._owner = os.getpid()
        self._channels = [ours for ours, _ in pairs]
        for _, its in pairs:
            its.close()
        try:
            for channel in self._channels:
                wire.receive(channel, START_SECONDS)
        except wire.WireError:
            self.close()
            raise SandboxError(_why(self._said())) from None

    def _said(self) -> str:
        """Return what bubblewrap, or Python inside it, printed."""
        self._log.seek(0)
        return self._log.read(100_000)

    def _imports(self) -> Iterator[str]:
        yield from ("pyseccomp", "torch._dynamo", "numpy", "sklearn.datasets")
        yield from self.modules

    def _test(self) -> None:
        """Look from inside whether the walls stand, before the first student's code runs."""
        try:
            box = self.open()
            answer, _ = box.ask({"do": "cell", "source": SELF_TEST, "seconds": 20.0}, seconds=25.0)
            box.close()
            found = json.loads(answer["text"])
        except (wire.WireError, ValueError, KeyError, TypeError):
            self.close()
            raise SandboxError(_why(self._said())) from None
        broken = [what for what, holds in found.items() if not holds]
        if broken:
            self.close()
            raise SandboxError(
                f"{_ONLY}, and this one is not tight ({', '.join(broken)}): nothing was graded."
            )


def _request(
    channel: socket.socket, order: dict[str, Any], descriptors: Sequence[int] = ()
) -> dict[str, Any]:
    try:
        channel.settimeout(60)
        socket.send_fds(channel, [json.dumps(order).encode()], list(descriptors))
    except OSError:
        raise wire.Closed from None
    return wire.receive(channel, 60)[0]


# ----- bubblewrap ------------------------------------------------------------------------------------------

_ALLOW = (
    "Allow it (Debian: `sudo sysctl kernel.unprivileged_userns_clone=1`; Ubuntu 24.04: "
    "`sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0`; Docker: "
    "`--security-opt seccomp=unconfined --security-opt systempaths=unconfined`), then grade again."
)


def _command(modules: Sequence[str], data: Path | None, hidden: Sequence[Path]) -> list[str]:
    """Return the command that starts the warm process, without its two arguments."""
    if sys.platform != "linux":
        raise SandboxError(
            f"{_ONLY}, which needs Linux. On macOS and Windows grade in a Linux container or a virtual "
            'machine: the chapter "Grading a class" shows how.'
        )
    bubblewrap = shutil.which("bwrap")
    if bubblewrap is None:
        raise SandboxError(
            f"{_ONLY}, and bubblewrap is not installed: install it (Debian and Ubuntu: "
            "`sudo apt install bubblewrap`), then grade again."
        )
    command = [bubblewrap, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    command += ["--unshare-cgroup-try", "--die-with-parent", "--new-session", "--clearenv"]
    # Never run students' code as root: whoever grades as root gives its rights away inside, as soon as the
    # folders are in place. Anybody else needs a user namespace to put them there.
    identity = _nobody() if os.geteuid() == 0 else []
    command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"] if identity else ["--unshare-user"]
    command += ["--proc", "/proc", "--dev", "/dev", "--perms", "1777", "--tmpfs", "/tmp"]
    command += ["--perms", "1777", "--tmpfs", HOME, "--chdir", HOME]
    environment = {
        "HOME": HOME,
        "PATH": "/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "PYTHONPATH": COURSE,
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "NBGRADER_EXECUTION": "autograde",
        "DIANLIB_PROGRESS": "",
    }
    if data is not None:
        environment["DIANLIB_DATA"] = "/data"
    for link in ("/bin", "/sbin", "/lib", "/lib64", "/lib32"):
        if Path(link).is_symlink():
            command += ["--symlink", str(Path(link).readlink()), link]
    command += _mounts(modules, data, hidden)
    for name, value in environment.items():
        command += ["--setenv", name, value]
    return [*command, "--", *identity, sys.executable, "-P", "-s", "-m", "dianlib.grading.inside"]


def _nobody() -> list[str]:
    """Return the command that goes on as the user nobody, without any right of root."""
    nobody = pwd.getpwnam("nobody")
    identity = [f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups"]
    return ["setpriv", *identity, "--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all", "--"]


def _mounts(modules: Sequence[str], data: Path | None, hidden: Sequence[Path]) -> list[str]:
    """Return the part of the command that says what is seen inside: programs, Python, a part of dianlib."""
    # Python where it lies, and where it is called when a link leads there.
    python = [
        folder for name in (sys.base_prefix, sys.prefix) for folder in (Path(name), Path(name).resolve())
    ]
    for folder in python:
        if any(folder.is_relative_to(private) for private in ("/tmp", "/dev", HOME)):
            raise SandboxError(
                f"{_ONLY}, which has a {folder.parts[1]!r} folder of its own, and Python lies in {folder}: "
                "make its environment in another folder, then grade again."
            )
    visible = {folder: folder.resolve() for folder in (*_system_folders(), *python)}
    files = [Path(name) for name in ("/etc/ld.so.cache", "/etc/alternatives")]
    places = visible | {file: file for file in files if file.exists()}
    for target, source in [*OWN_FILES.items(), *((name := _file_of(m), name) for m in modules)]:
        places[Path(COURSE, "dianlib", target)] = PACKAGE / source
    if data is not None:
        places[Path("/data")] = data.resolve()
    mounts = {target: ["--ro-bind", str(source), str(target)] for target, source in places.items()}
    # What lies among these places and is not for students: an installed dianlib with all its references, and
    # a course that is kept in /usr/src, as containers often do.
    covered = [
        folder.resolve()
        for folder in (PACKAGE, *hidden)
        if any(folder.resolve().is_relative_to(source) for source in visible.values())
    ]
    mounts |= {folder: ["--perms", "0755", "--tmpfs", str(folder)] for folder in covered}
    # bubblewrap would make the folders above these places for their owner only.
    for parent in {parent for place in places for parent in place.parents} - mounts.keys():
        mounts[parent] = ["--perms", "0755", "--dir", str(parent)]
    command = [part for place in sorted(mounts, key=lambda p: len(p.parts)) for part in mounts[place]]
    # Some of these folders belong to whoever grades. What one submission could write there, the next one
    # would find, and import.
    for folder in (*covered, Path("/dev"), Path("/")):
        command += ["--remount-ro", str(folder)]
    return command


def _system_folders() -> list[Path]:
    named = [Path(name) for name in ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/lib32")]
    return [folder for folder in named if folder.is_dir() and not folder.is_symlink()]


def _file_of(module: str) -> str:
    return module.removeprefix("dianlib.").replace(".", "/") + ".py"


def _why(log: str) -> str:
    """Make one sentence of what bubblewrap, or Python inside it, printed before it ended."""
    lines = [line for line in log.splitlines() if line.strip()]
    last = lines[-1].strip() if lines else "it ended without a word"
    if "namespace" in log or "uid map" in log or "Operation not permitted" in log:
        return f"{_ONLY}, and this system does not let bubblewrap make one ({last}). {_ALLOW}"
    return f"{_ONLY}, and it did not start ({last})."


# Runs in a box. Prints a JSON object: what must hold -> whether it does.
SELF_TEST = """
import ctypes, importlib.util, json, os, socket
from pathlib import Path

def refused(action):
    try:
        action()
    except OSError:
        return True
    return False

print(json.dumps({
    "it runs as root": os.getuid() != 0,
    "it reaches the network": refused(lambda: socket.create_connection(("192.0.2.1", 80), timeout=2)),
    "it sees other processes": not list(Path("/proc").iterdir()) and os.getpid() == 1,
    "it writes to the system": all(
        refused(Path(folder, ".dianlib").touch) for folder in ("/", "/usr", "/dev", "/course/dianlib")
    ),
    "it sees the references": all(
        importlib.util.find_spec(f"dianlib.checks.{name}") is None for name in ("judging", "registry", "task")
    ),
    "it makes namespaces": ctypes.CDLL(None).unshare(0x10000000) == -1,
    "it becomes root": refused(lambda: os.setuid(0)),
}))
"""
