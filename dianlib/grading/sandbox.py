"""The outside of the sandbox: start it, make sure that it holds, and open a box for each submission.

Linux with bubblewrap, or with Landlock where a course asks for it. A warm process waits inside, with torch
in memory; each submission is a fork of it that shuts itself in once more, so that submissions do not see
each other either.
"""

import contextlib
import dataclasses
import json
import os
import platform
import pwd
import shutil
import site
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import dianlib
from dianlib.grading import landlock, wire
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
    "grading/landlock.py": "grading/landlock.py",
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
    """A warm process that is shut in. Processes that share one each use a channel of their own.

    ``modules`` names the modules of dianlib that students may import; ``data`` is the folder with the data
    sets, and ``hidden`` are folders to cover where they lie within what is seen inside, a course for one.
    ``isolation`` is one of ISOLATIONS; another one is never tried. Raises SandboxError when it cannot be had,
    or does not hold what it must.
    """

    def __init__(
        self,
        modules: Sequence[str],
        limits: Limits | None = None,
        data: Path | None = None,
        channels: int = 1,
        hidden: Sequence[Path] = (),
        isolation: str = "namespaces",
    ) -> None:
        if isolation not in ISOLATIONS:
            known = " or ".join(map(repr, ISOLATIONS))
            raise SandboxError(f"{_ONLY}: c.Judge.isolation can be {known}, and is {isolation!r}.")
        self._isolation = ISOLATIONS[isolation]()
        self.modules = tuple(modules)
        self.limits = limits or Limits()
        self.data = data
        self.hidden = tuple({f.resolve() for f in (*_copies_of_dianlib(), *hidden) if f.is_dir()})
        self._channels: list[socket.socket] = []
        self._start(channels, self._test)

    def use(self, number: int) -> None:
        """Take one of the channels and leave the others to other processes."""
        for index, channel in enumerate(self._channels):
            if index != number:
                channel.close()
        self._channels = [self._channels[number]]

    @property
    def channels(self) -> int:
        """How many processes can still be given a channel of their own."""
        return len(self._channels)

    def leave(self) -> None:
        """Leave all channels to processes that were forked; the boxes of one that is killed end with it."""
        for channel in self._channels:
            channel.close()
        self._channels = []

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
        self.leave()
        if self._owner == os.getpid():
            try:
                self._process.wait(timeout=5)  # it leaves when nobody speaks to it any more
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._isolation.clear()

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

    def _start(self, channels: int, test: Callable[[], None] = lambda: None) -> None:
        """Start a warm process and test it, at the second attempt if need be."""
        try:
            self._launch(channels)
            test()
        except SandboxError:
            # Somebody may have killed a part of it. What fails for another reason fails again.
            self._launch(channels)
            test()

    def _launch(self, channels: int) -> None:
        pairs = [socket.socketpair() for _ in range(channels)]
        inner = [its.fileno() for _, its in pairs]
        command = [
            *self._isolation.command(self.modules, self.data, self.hidden),
            ",".join(map(str, inner)),
            ",".join(self._imports()),
        ]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (it lives as long as the sandbox)
        self._process = subprocess.Popen(
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
            raise SandboxError(self._isolation.why(self._said())) from None

    def _said(self) -> str:
        """Return what the warm process, or what started it, printed."""
        self._log.seek(0)
        return self._log.read(100_000)

    def _imports(self) -> Iterator[str]:
        yield from ("pyseccomp", "torch._dynamo", "numpy")
        yield from self.modules

    def _test(self) -> None:
        """Look from inside whether the walls stand, before the first student's code runs."""
        try:
            box = self.open()
            answer, _ = box.ask(
                {"do": "cell", "source": self._isolation.self_test, "seconds": 20.0}, seconds=25.0
            )
            box.close()
            found = json.loads(answer["text"])
        except (wire.WireError, ValueError, KeyError, TypeError):
            self.close()
            raise SandboxError(self._isolation.why(self._said())) from None
        broken = [what for what, holds in found.items() if not holds]
        if broken:
            self.close()
            raise SandboxError(
                f"{_ONLY}, and this one is not tight ({', '.join(broken)}): nothing was graded."
            )


def _copies_of_dianlib() -> set[Path]:
    """Find the package wherever it lies: a clone that is worked in may stand before an installed one."""
    entries = {Path(entry or ".") for entry in (*sys.path, *site.getsitepackages())}
    return {PACKAGE} | {entry / "dianlib" for entry in entries}


def _request(
    channel: socket.socket, order: dict[str, Any], descriptors: Sequence[int] = ()
) -> dict[str, Any]:
    try:
        channel.settimeout(60)
        socket.send_fds(channel, [json.dumps(order).encode()], list(descriptors))
    except OSError:
        raise wire.Closed from None
    try:
        return wire.receive(channel, 60)[0]
    except wire.TooLate:
        channel.close()  # the late answer would be taken for that to the next order
        raise


# ----- what all ways to shut students' code in share -------------------------------------------------------


class Isolation(Protocol):
    """A way to start a warm process behind walls."""

    @property
    def self_test(self) -> str:
        """Code that runs in a box and prints a JSON object: what must not be -> whether it is not."""

    def command(self, modules: Sequence[str], data: Path | None, hidden: Sequence[Path]) -> list[str]:
        """Return the command that starts the warm process, without its last two arguments."""

    def why(self, log: str) -> str:
        """Make one sentence of what was printed before it ended too early."""

    def clear(self) -> None:
        """Remove what the command has left behind."""


def _check_system() -> None:
    if sys.platform != "linux":
        raise SandboxError(
            f"{_ONLY}, which needs Linux. On macOS and Windows grade in a Linux container or a virtual "
            'machine: the chapter "Grading a class" shows how.'
        )


def _nobody() -> list[str]:
    """Return the command that goes on as the user nobody, without any right of root."""
    nobody = pwd.getpwnam("nobody")
    identity = [f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups"]
    return ["setpriv", *identity, "--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all", "--"]


def _environment(home: str, course: str, data: str | None) -> dict[str, str]:
    """Return the environment inside; nothing of the grader's own is in it."""
    environment = {
        "HOME": home,
        "PATH": "/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "PYTHONPATH": course,
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "NBGRADER_EXECUTION": "autograde",
        "DIANLIB_PROGRESS": "",
    }
    return environment if data is None else environment | {"DIANLIB_DATA": data}


def _files(modules: Sequence[str]) -> dict[str, Path]:
    """Return the files that dianlib consists of inside, by their names there."""
    named = {name: name for name in map(_file_of, modules)}
    return {target: PACKAGE / source for target, source in (OWN_FILES | named).items()}


def _file_of(module: str) -> str:
    return module.removeprefix("dianlib.").replace(".", "/") + ".py"


def _system_folders() -> list[Path]:
    named = [Path(name) for name in ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/lib32")]
    return [folder for folder in named if folder.is_dir() and not folder.is_symlink()]


SYSTEM_FILES = [Path("/etc/ld.so.cache"), Path("/etc/alternatives")]


def _last_line(log: str) -> str:
    lines = [line for line in log.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it ended without a word"


# ----- namespaces, with bubblewrap ------------------------------------------------------------------------

_ALLOW = (
    "Allow it (Debian: `sudo sysctl kernel.unprivileged_userns_clone=1`; Ubuntu 24.04: "
    "`sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0`; Docker: "
    "`--security-opt seccomp=unconfined --security-opt apparmor=unconfined --security-opt "
    "systempaths=unconfined`), or choose thinner walls without namespaces (`c.Judge.isolation = 'landlock'`, "
    'see the chapter "Grading a class"), then grade again.'
)


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


class Bubblewrap:
    """Namespaces: inside there are no other processes, networks and users, and only some files."""

    self_test = SELF_TEST

    def command(self, modules: Sequence[str], data: Path | None, hidden: Sequence[Path]) -> list[str]:
        """Return the command that makes the namespaces and starts the warm process in them."""
        _check_system()
        bubblewrap = shutil.which("bwrap")
        if bubblewrap is None:
            raise SandboxError(
                f"{_ONLY}, and bubblewrap is not installed: install it (Debian and Ubuntu: "
                "`sudo apt install bubblewrap`), then grade again."
            )
        command = [bubblewrap, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
        command += ["--unshare-cgroup-try", "--die-with-parent", "--new-session", "--clearenv"]
        # Never run students' code as root: whoever grades as root gives its rights away inside, as soon as
        # the folders are in place. Anybody else needs a user namespace to put them there.
        identity = _nobody() if os.geteuid() == 0 else []
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"] if identity else ["--unshare-user"]
        command += ["--proc", "/proc", "--dev", "/dev", "--perms", "1777", "--tmpfs", "/tmp"]
        command += ["--perms", "1777", "--tmpfs", HOME, "--chdir", HOME]
        for link in ("/bin", "/sbin", "/lib", "/lib64", "/lib32"):
            if Path(link).is_symlink():
                command += ["--symlink", str(Path(link).readlink()), link]
        command += _mounts(modules, data, hidden)
        environment = _environment(HOME, COURSE, None if data is None else "/data")
        for name, value in environment.items():
            command += ["--setenv", name, value]
        return [*command, "--", *identity, sys.executable, "-P", "-s", "-m", "dianlib.grading.inside"]

    def why(self, log: str) -> str:
        """Say what to do where the system does not let bubblewrap make namespaces."""
        last = _last_line(log)
        if any(words in log for words in ("namespace", "uid map", "make / slave", "not permitted")):
            return f"{_ONLY}, and this system does not let bubblewrap make one ({last}). {_ALLOW}"
        return f"{_ONLY}, and it did not start ({last})."

    def clear(self) -> None:
        """Do nothing: the folders were in memory."""


def _mounts(modules: Sequence[str], data: Path | None, hidden: Sequence[Path]) -> list[str]:
    """Return the part of the command that says what is seen inside: programs, Python, a part of dianlib."""
    # Python where it lies, and where it is called when a link leads there.
    python = [
        folder for name in (sys.base_prefix, sys.prefix) for folder in (Path(name), Path(name).resolve())
    ]
    for folder in python:
        if any(folder.is_relative_to(private) for private in ("/dev", HOME)):
            raise SandboxError(
                f"{_ONLY}, which has a {folder.parts[1]!r} folder of its own, and Python lies in {folder}: "
                "make its environment in another folder, then grade again."
            )
    visible = {folder: folder.resolve() for folder in (*_system_folders(), *python)}
    places = visible | {file: file for file in SYSTEM_FILES if file.exists()}
    places |= {Path(COURSE, "dianlib", target): source for target, source in _files(modules).items()}
    if data is not None:
        places[Path("/data")] = data.resolve()
    mounts = {target: ["--ro-bind", str(source), str(target)] for target, source in places.items()}
    # What lies among these places and is not for students: an installed dianlib with all its references, a
    # course that is kept in /usr/src, as containers often do, or beside the data.
    covered = [
        target / folder.resolve().relative_to(source)
        for target, source in {**visible, **({Path("/data"): data.resolve()} if data else {})}.items()
        for folder in hidden
        if folder.resolve().is_relative_to(source)
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


# ----- Landlock --------------------------------------------------------------------------------------------


class Confinement:
    """Landlock: the warm process is started as it is, and shuts itself in (see dianlib.grading.landlock)."""

    def __init__(self) -> None:
        self._base = Path()
        self._private: list[Path] = []

    @property
    def self_test(self) -> str:
        """The test, with the names of what must not be read: folders, and of a package its first file.

        Imports must look through a folder of packages, so that the names of the files in there are no secret.
        """
        first_files = [folder / "__init__.py" for folder in self._private]
        private = [file if file.exists() else file.parent for file in first_files]
        return LANDLOCK_SELF_TEST.replace("PRIVATE", json.dumps([str(place) for place in private]))

    def command(self, modules: Sequence[str], data: Path | None, hidden: Sequence[Path]) -> list[str]:
        """Prepare a folder with the files for the inside, and return the command that confines itself."""
        _check_system()
        _check_landlock()
        python = [Path(name).resolve() for name in (sys.base_prefix, sys.prefix)]
        readable = [*_system_folders(), *python, *SYSTEM_FILES, *([data.resolve()] if data else [])]
        identity = []
        if os.geteuid() == 0:
            identity = _nobody()
            _check_open_to_nobody(readable)
        self._private = [folder.resolve() for folder in hidden]
        self._base = Path(tempfile.mkdtemp(prefix="dianlib-")).resolve()
        course, rooms = self._base / "course", self._base / "rooms"
        for target, source in _files(modules).items():
            (course / "dianlib" / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, course / "dianlib" / target)
        rooms.mkdir(mode=0o700)
        if identity:
            for path in (self._base, course, *course.rglob("*")):
                path.chmod(0o755)
            shutil.chown(rooms, "nobody")
        places = {
            "readable": [str(place) for place in (*readable, course)],
            "hidden": [str(place) for place in (self._base, *self._private)],
            "rooms": str(rooms),
        }
        environment = _environment(str(rooms), str(course), str(data.resolve()) if data else None)
        command = ["env", "--ignore-environment", f"TMPDIR={rooms}"]
        command += [f"{name}={value}" for name, value in environment.items()]
        command += [*identity, sys.executable, "-P", "-s", "-m", "dianlib.grading.landlock"]
        return [*command, json.dumps(places)]

    def why(self, log: str) -> str:
        """Quote what Python said last."""
        return f"{_ONLY}, and it did not start ({_last_line(log)})."

    def clear(self) -> None:
        """Remove the folder."""
        if self._base.name:
            landlock.remove(self._base)


def _check_landlock() -> None:
    found = landlock.version()
    if found < landlock.VERSION:
        has = f"only version {found}" if found else "none, or has it switched off"
        raise SandboxError(
            f"{_ONLY}, and c.Judge.isolation = 'landlock' needs version {landlock.VERSION} of Landlock, that "
            f"is Linux 6.12 or later; this system, Linux {platform.release()}, has {has}."
        )


def _check_open_to_nobody(places: Sequence[Path]) -> None:
    for place in places:
        for folder in reversed(place.parents):
            if not folder.stat().st_mode & 0o001:
                raise SandboxError(
                    f"{_ONLY}, for root as the user nobody, who cannot enter {folder} and needs {place}: "
                    "have it elsewhere, in /opt for example, or do not grade as root."
                )


# Runs in a box, like the other one. PRIVATE stands for files and folders that must not be read.
LANDLOCK_SELF_TEST = f"""
import ctypes, importlib, json, os, socket
from pathlib import Path

def refused(action):
    try:
        action()
    except (OSError, ImportError):
        return True
    return False

print(json.dumps({{
    "it runs as root": os.getuid() != 0,
    "it reaches the network": refused(socket.socket),
    "it reads the course": all(refused(lambda: os.open(place, os.O_RDONLY)) for place in PRIVATE),
    "it reads other submissions": refused(lambda: os.listdir("../..")),
    "it sees other processes": refused(lambda: os.listdir("/proc")),
    "it signals other processes": refused(lambda: os.kill(os.getppid(), 0)),
    "it writes to the system": all(
        refused(Path(folder, ".dianlib").touch) for folder in ("/", "/usr", "/dev/shm", "/tmp", "../..")
    ),
    "it changes rights": refused(lambda: os.chmod(".", 0o700)),
    "it sees the references": all(
        refused(lambda: importlib.import_module(f"dianlib.checks.{{name}}"))
        and refused(Path({str(PACKAGE)!r}, "checks", f"{{name}}.py").read_bytes)
        for name in ("judging", "registry", "task")
    ),
    "it makes namespaces": ctypes.CDLL(None).unshare(0x10000000) == -1,
    "it becomes root": refused(lambda: os.setuid(0)),
    "it cannot start a process": not refused(lambda: os.fork() or os._exit(0)),
}}))
"""

ISOLATIONS: dict[str, Callable[[], Isolation]] = {"namespaces": Bubblewrap, "landlock": Confinement}
