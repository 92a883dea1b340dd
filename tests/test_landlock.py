"""Grading where the system allows no namespaces: what the walls of Landlock and the filter keep out.

A grader runs in a container in which nobody can make namespaces, as an unprivileged user; so submissions have
the same user as the grader. It does there what the tests ask for.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nbformat
import pytest
from assignment import ROOT
from test_nbgrader import MISTAKES
from test_nbgrader import submission as filled_in

from dianlib.grading import landlock, records
from dianlib.grading.sandbox import Sandbox, SandboxError

needs_landlock = pytest.mark.skipif(
    shutil.which("bwrap") is None or landlock.version() < landlock.VERSION,
    reason="this test needs bubblewrap, for a container, and Linux 6.12 or later with Landlock",
)
NOBODY = 65534
HOME = Path("/home/grader")
COURSE = HOME / "course"
GRADEBOOK = COURSE / "gradebook.db"

# ----- a container without namespaces ---------------------------------------------------------------------


def container(folder: Path, namespaces: bool = False) -> list[str]:
    """Make the command that runs another one as nobody, with ``folder`` as its home and all it can write."""
    base = Path(sys.base_prefix).resolve()
    inside = ["bwrap", "--unshare-user", "--unshare-all", "--die-with-parent", "--new-session", "--clearenv"]
    inside += [] if namespaces else ["--disable-userns"]
    inside += ["--ro-bind", "/usr", "/usr", "--dir", "/etc", "--ro-bind", "/etc/passwd", "/etc/passwd"]
    for name in ("bin", "sbin", "lib", "lib64"):
        inside += ["--symlink", f"usr/{name}", f"/{name}"]
    for path in ("/etc/ld.so.cache", "/etc/alternatives"):
        inside += ["--ro-bind-try", path, path]
    for path in (base, Path(sys.prefix), ROOT / "dianlib", ROOT / "tests"):
        inside += ["--ro-bind", str(path), str(path)]
    inside += ["--proc", "/proc", "--dev", "/dev", "--perms", "1777", "--tmpfs", "/tmp"]
    inside += ["--bind", str(folder), str(HOME), "--chdir", str(HOME)]
    settings = {"HOME": HOME, "PATH": f"{sys.prefix}/bin:/usr/bin", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
    inside += [part for name, value in settings.items() for part in ("--setenv", name, str(value))]
    if os.getuid() != 0:
        return [*inside, "--"]
    for path in (folder, *folder.rglob("*")):
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    identity = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--"]
    return [*open_to_nobody(base, Path(sys.prefix), ROOT, folder), *identity, *inside, "--"]


def open_to_nobody(*needed: Path) -> list[str]:
    """Make a command of root after which everybody can enter the folders above what is needed."""
    command = ["bwrap", "--dev-bind", "/", "/"]
    closed = {p for path in needed for p in path.parents if not p.stat().st_mode & 0o001}
    for top in sorted(p for p in closed if not closed & set(p.parents)):
        command += ["--perms", "0755", "--tmpfs", str(top)]
        for path in needed:
            if path.is_relative_to(top):
                for parent in reversed([p for p in path.parents if p.is_relative_to(top) and p != top]):
                    command += ["--perms", "0755", "--dir", str(parent)]
                command += ["--bind", str(path), str(path)]
    return [*command, "--"]


# ----- the program in the container -----------------------------------------------------------------------


# Runs code as the tests ask for, and answers with what it prints.
SERVER = """
import contextlib, io, json, os, sys, traceback
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
here = {}
for line in sys.stdin:
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(json.loads(line), here)
        answer = {"printed": printed.getvalue()}
    except Exception:
        answer = {"error": traceback.format_exc()}
    print(json.dumps(answer), file=answers, flush=True)
"""


class Grader:
    """The program in a container, seen from the tests."""

    def __init__(self, command: Sequence[str]) -> None:
        command = [*command, sys.executable, "-c", SERVER]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, code: str) -> Any:
        """Run code as the grader; return what it printed last, read as a value."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(textwrap.dedent(code)), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        assert "error" not in answer, answer["error"]
        lines = answer["printed"].splitlines()
        return ast.literal_eval(lines[-1]) if lines else None

    def open(self) -> "Submission":
        self.run("boxes.append(sandbox.open())")
        number = self.run("print(len(boxes) - 1)")
        return Submission(self, number)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


class Submission:
    """A box in the container, seen from the tests."""

    def __init__(self, grader: Grader, number: int) -> None:
        self._grader = grader
        self._number = number
        assert self.run(PREPARED) is None

    def run(self, code: str) -> Any:
        """Run a cell; return what it printed last, read as a value, or the error, or "gone"."""
        cell = {"do": "cell", "source": textwrap.dedent(code), "seconds": 15.0}
        return self._grader.run(f"print(repr(ask({self._number}, {cell!r})))")

    def close(self) -> None:
        self._grader.run(f"boxes[{self._number}].close()")


START = """
import ast, contextlib, ctypes, dianlib, os, shutil, signal, socket, time
from pathlib import Path
from dianlib.grading import sandbox as outside, wire
from dianlib.grading.isolation import Limits
from dianlib.grading.sandbox import Sandbox, SandboxError

libc = ctypes.CDLL(None, use_errno=True)
boxes = []

def ask(number, cell):
    try:
        answer, _ = boxes[number].ask(cell, seconds=20.0)
    except wire.WireError:
        return "gone"
    if answer["error"]:
        return answer["error"][0]
    lines = answer["text"].splitlines()
    return ast.literal_eval(lines[-1]) if lines else None

def others():
    "List the processes that came out of the sandbox."
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if "-m\\0dianlib.grading.landlock" in path.read_text():
                found.append(int(path.parent.name))
    return sorted(found)

"""
# The whole repository as data: so that dianlib lies within what may be read, as an installed one does.
START += f"""
os.environ["PASSWORD"] = "of the grader"
course = Path({str(COURSE)!r})
sandbox = Sandbox((), Limits(processes=30, disk=20 << 20), Path({str(ROOT)!r}), 2, [course], "landlock")
"""

# What a submission has at hand when it tries something. ``refused`` names the error, "" is success.
PREPARED = """
import contextlib, ctypes, errno, os, resource, signal, socket, sys, time
from pathlib import Path
libc = ctypes.CDLL(None, use_errno=True)

def refused(action, *arguments):
    try:
        action(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno]
    return ""

def made(result):
    "Raise what a function of the C library reports as an error."
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")

def call(number, *arguments):
    made(libc.syscall(number, *arguments))
"""


@pytest.fixture(scope="module")
def grader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grader]:
    folder = tmp_path_factory.mktemp("home")
    (folder / "course").mkdir()
    (folder / "course" / "gradebook.db").write_text("grades")
    started = Grader(container(folder))
    started.run(START)
    yield started
    started.close()


@pytest.fixture
def submission(grader: Grader) -> Iterator[Submission]:
    opened = grader.open()
    yield opened
    opened.close()


@pytest.fixture
def neighbour(grader: Grader) -> Iterator[Submission]:
    opened = grader.open()
    yield opened
    opened.close()


# ----- files ------------------------------------------------------------------------------------------


@needs_landlock
def test_only_programs_and_its_own_folder_can_be_read(
    grader: Grader, submission: Submission, neighbour: Submission
) -> None:
    neighbour.run("Path('answer.py').write_text('42')")
    closed = [
        *(str(GRADEBOOK), str(COURSE), str(HOME), "/", "/tmp", "/etc/passwd", "/proc", "/proc/self/mem"),
        *(f"/proc/{grader.run('print(os.getpid())')}/{name}" for name in ("environ", "mem", "maps", "fd")),
        *(neighbour.run("print(repr(os.getcwd()))") + name for name in ("", "/..", "/answer.py")),
        str(ROOT / "dianlib" / "checks" / "judging.py"),
        str(ROOT / "dianlib"),
    ]
    look = "print({path: refused(os.open, path, os.O_RDONLY) for path in " + repr(closed) + "})"
    assert submission.run(look) == dict.fromkeys(closed, "EACCES")
    opened = [
        "/usr/bin/env",
        f"{ROOT}/tests/test_landlock.py",
        f"{sys.prefix}/pyvenv.cfg",
        "/dev/urandom",
        ".",
    ]
    look = "print({path: refused(os.open, path, os.O_RDONLY) for path in " + repr(opened) + "})"
    assert submission.run(look) == dict.fromkeys(opened, "")


@needs_landlock
def test_only_its_own_folder_can_be_written(
    grader: Grader, submission: Submission, neighbour: Submission
) -> None:
    theirs = neighbour.run("print(repr(os.getcwd()))")
    code = """
    from tempfile import TemporaryDirectory
    places = ["/", "/tmp", "/dev/shm", "/usr", COURSE, HOME, THEIRS, THEIRS + "/..", sys.prefix]
    found = {place: refused(Path(place, "planted").touch) for place in places}
    found["an existing file"] = refused(open, GRADEBOOK, "a")
    found["cut"] = refused(os.truncate, GRADEBOOK, 0)
    found["delete"] = refused(os.unlink, GRADEBOOK)
    found["move away"] = refused(os.rename, GRADEBOOK, "mine")
    found["link"] = refused(os.link, GRADEBOOK, "mine")
    found["link the venv"] = refused(os.link, sys.prefix + "/pyvenv.cfg", "mine")
    os.symlink(GRADEBOOK, "way")
    found["through a link"] = refused(open, "way")
    with TemporaryDirectory() as folder:
        Path(folder, "own").write_text("text")
        os.rename(Path(folder, "own"), "own")
    found["own"] = Path("own").read_text()
    print(found)
    """
    for name, value in {"COURSE": COURSE, "HOME": HOME, "THEIRS": theirs, "GRADEBOOK": GRADEBOOK}.items():
        code = code.replace(name, repr(str(value)))
    found = submission.run(code)
    assert found.pop("own") == "text"
    assert set(found.values()) <= {"EACCES", "EXDEV", "EROFS"}, found
    assert grader.run("print(repr((course / 'gradebook.db').read_text()))") == "grades"


@needs_landlock
def test_rights_dates_and_attributes_of_files_cannot_be_changed(
    grader: Grader, submission: Submission
) -> None:
    # Landlock does not look at these calls, and the files belong to the user who also runs the submission.
    found = submission.run(f"""
    path = {str(GRADEBOOK)!r}
    own = os.open(sys.prefix, os.O_RDONLY)
    print({{
        "chmod": refused(os.chmod, path, 0),
        "fchmod": refused(os.fchmod, own, 0),
        "chown": refused(os.chown, path, os.getuid(), os.getgid()),
        "utime": refused(os.utime, path, (0, 0)),
        "setxattr": refused(os.setxattr, path, "user.mine", b"1"),
        "removexattr": refused(os.removexattr, path, "user.mine"),
        "fchmodat2": refused(call, 452, -100, path.encode(), 0, 0),
        "setxattrat": refused(call, 463, -100, path.encode(), 0, b"user.mine", None, 0),
        "file_setattr": refused(call, 469, -100, path.encode(), None, 0, 0),
        "inotify": refused(lambda: made(libc.inotify_init())),
    }})
    """)
    new = {name: found.pop(name) for name in ("fchmodat2", "setxattrat", "file_setattr")}
    assert set(new.values()) == {"ENOSYS"}
    assert set(found.values()) == {"EPERM"}, found
    status = grader.run("print(list((course / 'gradebook.db').stat()))")
    assert status[0] & 0o400
    assert status[8] > 0


@needs_landlock
def test_files_that_can_be_read_get_no_leases_and_flags(submission: Submission) -> None:
    found = submission.run("""
    import fcntl
    file = open(sys.prefix + "/pyvenv.cfg")
    print((
        refused(fcntl.fcntl, file, fcntl.F_SETLEASE, fcntl.F_RDLCK),
        refused(fcntl.ioctl, file, 0x40086602, bytes(8)),  # FS_IOC_SETFLAGS
        refused(fcntl.ioctl, file, 0x5450, 0),  # FIONCLEX, which Python itself uses
    ))
    """)
    assert found == ("EPERM", "ENOTTY", "")


@needs_landlock
def test_the_references_cannot_be_imported(submission: Submission) -> None:
    found = submission.run("""
    import importlib

    def problem(name):
        try:
            importlib.import_module(name)
        except (ImportError, OSError) as error:
            return error

    names = [f"dianlib.{name}" for name in ("mlp", "metrics", "checks.mlp", "checks.task", "cli")]
    print([name for name in (*names, "dianlib.checks.running") if not problem(name)])
    """)
    assert found == ["dianlib.checks.running"]


# ----- the network, and what is like it -------------------------------------------------------------------


@needs_landlock
def test_there_are_no_sockets_but_pairs(grader: Grader, submission: Submission) -> None:
    grader.run("""
    ear = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    ear.bind("\\0services")
    ear.settimeout(0.5)
    """)
    found = submission.run("""
    kinds = [(f, k) for f in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK, 40)
             for k in (socket.SOCK_STREAM, socket.SOCK_DGRAM)]
    ours, its = socket.socketpair()
    its.sendall(b"hello")
    print((
        {refused(socket.socket, *kind) for kind in kinds},
        {refused(socket.socketpair, socket.AF_UNIX, k) for k in (socket.SOCK_DGRAM, socket.SOCK_SEQPACKET)},
        refused(ours.connect, "\\0services"),
        refused(ours.sendto, b"hello", "\\0services") != "",
        ours.recv(5),
    ))
    """)
    assert found == ({"EPERM"}, {"EPERM"}, "EPERM", True, b"hello")
    heard = """
    try:
        print(ear.recv(10))
    except TimeoutError:
        print(None)
    """
    assert grader.run(heard) is None


@needs_landlock
def test_nothing_is_shared_with_the_user_s_other_programs(grader: Grader, submission: Submission) -> None:
    segment, queue = grader.run("print((libc.shmget(0, 4096, 0o1600), libc.msgget(0, 0o1600)))")
    assert min(segment, queue) >= 0
    found = submission.run(f"""
    libc.shmat.restype = ctypes.c_long
    print({{
        "attach": refused(lambda: made(libc.shmat({segment}, None, 0))),
        "destroy": refused(lambda: made(libc.shmctl({segment}, 0, None))),
        "send": refused(lambda: made(libc.msgsnd({queue}, bytes(16), 8, 0))),
        "semaphore": refused(lambda: made(libc.semget(0, 1, 0o1600))),
        "queue": refused(lambda: made(libc.mq_open(b"/mine", os.O_CREAT | os.O_RDWR, 0o600, None))),
    }})
    """)
    assert set(found.values()) == {"EPERM"}, found
    assert grader.run(f"print((libc.shmctl({segment}, 0, None), libc.msgctl({queue}, 0, None)))") == (0, 0)


# ----- processes --------------------------------------------------------------------------------------


@needs_landlock
def test_signals_reach_only_its_own_processes(
    grader: Grader, submission: Submission, neighbour: Submission
) -> None:
    aims = {
        "the grader": grader.run("print(os.getpid())"),
        "the warm process": grader.run("print(sandbox._process.pid)"),
        "the outer process": submission.run("print(os.getppid())"),
        "a neighbour": neighbour.run("print(os.getpid())"),
        "a neighbour's outer process": neighbour.run("print(os.getppid())"),
    }
    found = submission.run(f"""
    def ways(process):
        yield refused(os.kill, process, 0)
        yield refused(os.kill, process, signal.SIGKILL)
        yield refused(os.kill, process, signal.SIGSTOP)
        yield refused(lambda: made(libc.tgkill(process, process, 9)))
        yield refused(lambda: made(libc.sigqueue(process, 9, None)))
        yield refused(call, 434, process, 0)  # pidfd_open, for pidfd_send_signal
    child = os.fork()
    if child == 0:
        signal.pause()
    os.kill(child, signal.SIGTERM)
    print(({{name: list(ways(process)) for name, process in {aims!r}.items()}}, os.waitpid(child, 0)[1]))
    """)
    assert found == ({name: ["EPERM"] * 6 for name in aims}, 15)
    assert neighbour.run("print(True)") is True


@needs_landlock
def test_a_signal_to_everybody_ends_only_the_submission(grader: Grader, neighbour: Submission) -> None:
    attacker = grader.open()
    # The process that calls is left out by the system, so a child does it.
    assert (
        attacker.run("if os.fork() == 0: os.kill(-1, signal.SIGKILL); os._exit(0)\ntime.sleep(5)") == "gone"
    )
    attacker.close()
    assert neighbour.run("print(True)") is True
    assert grader.run("print(sandbox._process.poll())") is None


@needs_landlock
def test_limits_and_priorities_of_other_processes_stay(grader: Grader, submission: Submission) -> None:
    found = submission.run(f"""
    grader = {grader.run("print(os.getpid())")}
    print({{
        "limit": refused(resource.prlimit, grader, resource.RLIMIT_CPU, (0, 0)),
        "look at a limit": refused(resource.prlimit, grader, resource.RLIMIT_CPU),
        "cores": refused(os.sched_setaffinity, grader, [0]),
        "scheduler": refused(os.sched_setscheduler, grader, os.SCHED_IDLE, os.sched_param(0)),
        "priority": refused(os.setpriority, os.PRIO_PROCESS, grader, 19),
        "of the user": refused(os.setpriority, os.PRIO_USER, 0, 19),
        "trace": refused(lambda: made(libc.ptrace(16, grader, 0, 0))),
        "own limit": refused(resource.setrlimit, resource.RLIMIT_NOFILE, (100, 100)),
        "own priority": refused(os.nice, 1),
        "own cores": refused(os.sched_setaffinity, 0, os.sched_getaffinity(0)),
    }})
    """)
    assert [found.pop(name) for name in ("own limit", "own priority", "own cores")] == ["", "", ""]
    assert set(found.values()) == {"EPERM"}, found
    assert submission.run("print(libc.unshare(0x10000000))") == -1


@needs_landlock
@pytest.mark.parametrize("end", ["by the grader", "by itself", "by a crash"])
def test_no_process_survives_its_submission(grader: Grader, end: str) -> None:
    before = grader.run("print(others())")
    submission = grader.open()
    # A daemon: forked twice, in a session of its own, deaf to signals, and it forks again and again.
    submission.run("""
    if os.fork() == 0:
        os.setsid()
        for number in range(1, 65):
            with contextlib.suppress(OSError, ValueError):
                signal.signal(number, signal.SIG_IGN)
        if os.fork() == 0:
            while True:
                if os.fork():
                    os._exit(0)
                time.sleep(0.001)
        os._exit(0)
    time.sleep(0.2)
    print(True)
    """)
    assert len(grader.run("print(others())")) > len(before)
    if end != "by the grader":
        code = "os._exit(0)" if end == "by itself" else "os.kill(os.getpid(), signal.SIGSEGV)"
        assert submission.run(code) == "gone"
    submission.close()
    assert grader.run("print(others())") == before


@needs_landlock
def test_no_process_survives_a_grader_that_is_killed(grader: Grader) -> None:
    before = grader.run("print(others())")
    daemon = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(600)"
    # A worker as `dianlib grade` has them: forked, with one of the channels to the warm process.
    grader.run(f"""
    reading, writing = os.pipe()
    worker = os.fork()
    if worker == 0:
        sandbox.use(1)
        boxes.append(sandbox.open())
        ask(-1, {{"do": "cell", "source": {daemon!r}, "seconds": 15.0}})
        os.write(writing, b"ready")
        time.sleep(600)
    sandbox.use(0)
    os.read(reading, 5)
    """)
    assert len(grader.run("print(others())")) >= len(before) + 3  # outer, inner, the daemon
    grader.run("os.kill(worker, signal.SIGKILL); os.waitpid(worker, 0)")
    deadline = time.monotonic() + 20
    while grader.run("print(others())") != before:
        assert time.monotonic() < deadline
        time.sleep(0.1)


# ----- limits, and what is left ---------------------------------------------------------------------------


@needs_landlock
def test_a_submission_has_a_share_of_processes_and_of_the_disk(grader: Grader, neighbour: Submission) -> None:
    bomb = grader.open()
    started = bomb.run("""
    children = []
    try:
        while len(children) < 200:
            child = os.fork()
            if child == 0:
                time.sleep(60)
            children.append(child)
    except BlockingIOError:
        pass
    print(len(children))
    """)
    assert 20 <= started < 40
    bomb.close()
    assert neighbour.run("print(os.waitpid(os.fork() or os._exit(0), 0)[1])") == 0
    filler = grader.open()
    assert filler.run("print(Path('small').write_bytes(bytes(5_000_000)))") == 5_000_000
    fill = "for number in range(50):\n    Path(f'f{number}').write_bytes(bytes(1_000_000)); time.sleep(0.1)"
    assert filler.run(fill) == "gone"
    filler.close()
    many = grader.open()
    assert many.run("for n in range(12_000): Path(f'f{n}').touch()\ntime.sleep(5)") == "gone"
    many.close()


@needs_landlock
def test_nothing_stays_on_the_disk(grader: Grader) -> None:
    submission = grader.open()
    room = submission.run("print(repr(os.path.dirname(os.getcwd())))")
    assert grader.run(f"print(Path({room!r}).exists())")
    submission.run("""
    os.umask(0)
    os.mkdir("closed", 0o700)
    Path("closed", "file").touch()
    os.umask(0o777)
    os.mkdir("sealed")
    os.umask(0o477)
    os.mkdir("unlisted")
    Path("unlisted", "file").touch()
    os.umask(0)
    for _ in range(1500):
        os.mkdir("deep")
        os.chdir("deep")
    """)
    submission.close()
    assert not grader.run(f"print(Path({room!r}).exists())")


@needs_landlock
def test_honest_work_goes_on_as_usual(submission: Submission) -> None:
    code = """
    import random, subprocess, tempfile, threading
    import matplotlib.pyplot as plt, numpy as np, torch
    from torch.utils.data import DataLoader, TensorDataset
    model = torch.nn.Linear(3, 1)
    loader = DataLoader(TensorDataset(torch.randn(16, 3)), batch_size=4, shuffle=True)
    optimizer = torch.optim.Adam(model.parameters())
    for (batch,) in loader:
        model(batch).square().mean().backward()
        optimizer.step()
    torch.save(model.state_dict(), "model.pt")
    model.load_state_dict(torch.load("model.pt"))
    plt.plot([1, 2]); plt.savefig("figure.png"); plt.close()
    np.save("array.npy", np.arange(3))
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"text")
    thread = threading.Thread(target=time.sleep, args=[0.01]); thread.start(); thread.join()
    said = subprocess.run(["echo", "hello"], capture_output=True, text=True).stdout
    print((said, sorted(os.listdir("."))))
    """
    assert submission.run(code) == ("hello\n", ["array.npy", "figure.png", "model.pt"])


# ----- a class --------------------------------------------------------------------------------------------


# What an instructor does in a course, where namespaces cannot be had.
CONFINED = """
import sys
from pathlib import Path
from dianlib.cli import main
from dianlib.grading.driver import Course

assert Course(Path.cwd()).api.generate_assignment("mlp")["success"]
# Nobody asked for Landlock: nothing is graded, although it could be had.
assert main(["grade", "mlp"]) == 2
assert not list(Path("records").glob("mlp/*.json"))
with open("nbgrader_config.py", "a") as settings:
    settings.write("c.Judge.isolation = 'landlock'")
sys.exit(main(["grade", "mlp"]))
"""


@needs_landlock
def test_a_submission_is_graded_as_with_namespaces(tmp_path: Path) -> None:
    root = tmp_path / "course"
    for folder in ("solutions/mlp", "submitted/somebody/mlp"):
        (root / folder).mkdir(parents=True)
    shutil.copy(ROOT / "solutions" / "mlp" / "mlp.ipynb", root / "solutions" / "mlp")
    settings = (ROOT / "nbgrader_config.py").read_text()
    (root / "nbgrader_config.py").write_text(settings)
    wrong = {task: source for task, (_, source) in list(MISTAKES.items())[::2]}
    nbformat.write(filled_in("mlp", wrong), root / "submitted" / "somebody" / "mlp" / "mlp.ipynb")

    def run(*words: str, namespaces: bool = False) -> str:
        command = [*container(tmp_path, namespaces), "env", f"--chdir={COURSE}", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        return done.stderr

    def judged() -> list[records.TaskRecord]:
        (record,) = records.read_all(root / "records", "mlp")
        return list(record.tasks)

    said = run("python", "-c", CONFINED)
    assert "this system does not let bubblewrap make one" in said
    confined = judged()
    (root / "nbgrader_config.py").write_text(settings)
    run("dianlib", "grade", "mlp", "--force", namespaces=True)
    assert judged() == confined
    assert {task.task: task.state == "right" for task in confined} == {
        task: task not in wrong for task in MISTAKES if task.startswith("mlp.")
    }


@needs_landlock
@pytest.mark.skipif(os.getuid() != 0, reason="only root can become nobody")
def test_root_has_submissions_run_as_nobody() -> None:
    place = open_to_nobody(Path(sys.base_prefix).resolve(), ROOT)[:-1]
    place += ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--proc", "/proc", "--cap-add", "ALL", "--"]
    root = Grader(place)
    root.run(START)
    submission = root.open()
    assert submission.run("print((os.getresuid(), os.getresgid(), os.getgroups()))") == (
        (NOBODY,) * 3,
    ) * 2 + ([],)
    assert submission.run("print(repr(refused(os.setuid, 0)))") == "EPERM"
    base = Path(root.run("print(repr(str(sandbox._isolation._base)))"))
    assert list(base.glob("rooms/tmp*/home"))
    submission.close()
    assert not list(base.glob("rooms/tmp*"))
    root.run("sandbox.close()")
    assert root.run("print(others())") == []
    assert not base.exists()
    root.close()


# ----- where it cannot be had -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "has"), [(0, "has none, or has it switched off."), (4, "has only version 4.")]
)
def test_an_older_system_is_refused(monkeypatch: pytest.MonkeyPatch, version: int, has: str) -> None:
    monkeypatch.setattr(landlock, "version", lambda: version)
    with pytest.raises(SandboxError) as refused:
        Sandbox((), isolation="landlock")
    assert str(refused.value).startswith("Students' code runs only in a sandbox, and c.Judge.isolation")
    assert "Linux 6.12 or later" in str(refused.value)
    assert str(refused.value).endswith(has)


def test_another_name_is_refused() -> None:
    with pytest.raises(SandboxError, match=r"can be 'namespaces' or 'landlock', and is 'docker'\.$"):
        Sandbox((), isolation="docker")


@needs_landlock
def test_a_warm_process_that_is_killed_takes_its_submissions_along(grader: Grader) -> None:
    submission = grader.open()
    submission.run("if os.fork() == 0:\n    os.setsid()\n    time.sleep(600)")
    grader.run("sandbox._process.kill()")
    deadline = time.monotonic() + 20
    while grader.run("print(others())"):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@needs_landlock
def test_root_is_told_where_nobody_cannot_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "closed" / "venv").mkdir(parents=True)
    (tmp_path / "closed").chmod(0o700)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "closed" / "venv"))
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    monkeypatch.setattr(landlock, "version", lambda: landlock.VERSION)
    with pytest.raises(SandboxError) as refused:
        Sandbox((), isolation="landlock")
    assert f"needs {tmp_path / 'closed' / 'venv'}" in str(refused.value)


@needs_landlock
def test_a_wall_with_holes_is_noticed(grader: Grader) -> None:
    found = grader.run(r"""
    outside.PACKAGE = Path(shutil.copytree(outside.PACKAGE, "holes/dianlib"))
    file = outside.PACKAGE / "grading" / "landlock.py"
    text = file.read_text()
    assert text.count("        refuse_more_calls()\n") == 1
    file.write_text(text.replace("        refuse_more_calls()\n", ""))
    try:
        Sandbox((), hidden=[course], isolation="landlock")
    except SandboxError as error:
        print(repr(str(error)))
    outside.PACKAGE = Path(dianlib.__file__).parent
    """)
    assert "is not tight (it reaches the network, it changes rights)" in found


def test_entries_are_named_one_by_one_around_what_is_hidden(tmp_path: Path) -> None:
    hidden = tmp_path / "lib" / "packages" / "dianlib"
    for folder in ("bin", "lib/packages/dianlib/checks", "lib/packages/torch"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "lib64").symlink_to("lib")  # it would open the hidden folder as well
    found = set(landlock._entries_without(tmp_path, [hidden, Path("/elsewhere")]))
    assert found == {tmp_path / "bin", tmp_path / "lib" / "packages" / "torch"}
    assert list(landlock._entries_without(tmp_path, [Path("/elsewhere")])) == [tmp_path]
