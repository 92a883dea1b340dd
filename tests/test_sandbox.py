"""The walls of the sandbox: what code in a box tries and gets, and what is said where there are no walls."""

import ast
import contextlib
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from assignment import ROOT
from traitlets.config import Config

from dianlib import data
from dianlib.checks.registry import CHAPTERS, open_modules
from dianlib.grading import sandbox as outside
from dianlib.grading import wire
from dianlib.grading.isolation import HOME
from dianlib.grading.sandbox import Box, Sandbox, SandboxError

pytestmark = pytest.mark.skipif(
    shutil.which("bwrap") is None or Path(sys.prefix).is_relative_to("/tmp"),
    reason="needs bubblewrap (Debian and Ubuntu: apt install bubblewrap), and Python outside of /tmp",
)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    made = Sandbox(open_modules(["mlp"]))
    yield made
    made.close()


@pytest.fixture
def box(sandbox: Sandbox) -> Iterator[Box]:
    opened = sandbox.open()
    yield opened
    opened.close()


# Folders with thousands of files that are bound read-only.
PROGRAMS = ["/usr", "/lib", sys.prefix, os.path.realpath(sys.base_prefix)]


def run(box: Box, code: str) -> Any:
    """Run a cell in a box; return the value of its last line of text, or the name of the error it raised."""
    request = {"do": "cell", "source": textwrap.dedent(code), "seconds": 20.0}
    answer, _ = box.ask(request, seconds=25.0)
    if answer["error"]:
        return answer["error"][0]
    return ast.literal_eval(answer["text"].splitlines()[-1])


# ----- what is seen --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        ROOT / "dianlib" / "checks" / "judging.py",
        ROOT / "dianlib" / "checks" / "mlp.py",
        ROOT / "dianlib" / "mlp.py",
        ROOT / "dianlib" / "grading" / "plugin.py",
        ROOT / "solutions" / "mlp" / "mlp.ipynb",
        ROOT / "nbgrader_config.py",
        Path("/etc/passwd"),
        Path("/sys/kernel"),
    ],
)
def test_a_box_does_not_see(box: Box, path: Path) -> None:
    assert path.exists()
    assert run(box, f"import os; print(os.path.exists({str(path)!r}))") is False


def test_a_box_sees_of_dianlib_what_is_meant_for_it(box: Box) -> None:
    found = run(
        box,
        """
        from pathlib import Path
        print([str(path) for path in Path("/course").rglob("*") if path.is_file()])
        """,
    )
    meant = {*outside.OWN_FILES, "data.py", "plotting.py", "metrics.py"}
    assert set(found) == {f"/course/dianlib/{name}" for name in meant}
    assert not meant & {f"checks/{name}.py" for name in ("judging", "task", "registry", *CHAPTERS)}


@pytest.mark.parametrize(
    ("module", "is_open"),
    [
        ("dianlib.data", True),
        ("dianlib.plotting", True),
        ("dianlib.metrics", True),
        ("dianlib.checks.running", True),
        ("dianlib.mlp", False),
        ("dianlib.training", False),
        ("dianlib.checks.mlp", False),
        ("dianlib.checks.judging", False),
        ("dianlib.checks.registry", False),
        ("dianlib.checks.task", False),
        ("dianlib.grading.plugin", False),
        ("dianlib.grading.session", False),
        ("dianlib.cli", False),
    ],
)
def test_a_box_imports_earlier_chapters_and_no_answers(box: Box, module: str, is_open: bool) -> None:
    assert run(box, f"import {module}; print(True)") == (True if is_open else "ModuleNotFoundError")


def test_each_chapter_opens_the_answers_of_those_before_it() -> None:
    tools = {"dianlib.data", "dianlib.plotting"}
    assert set(open_modules(["metrics"])) == tools
    assert set(open_modules(["mlp"])) == tools | {"dianlib.metrics"}
    assert set(open_modules(CHAPTERS)) == tools  # an assignment is as closed as its first chapter


def test_the_environment_of_a_box_is_harmless(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    names = set(run(box, "import os; print(list(os.environ))"))
    ours = {"HOME", "PATH", "LANG", "PWD", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "OMP_NUM_THREADS"}
    ours |= {"NBGRADER_EXECUTION", "DIANLIB_PROGRESS", "DIANLIB_DATA"}
    of_torch = {"TORCHINDUCTOR_CACHE_DIR", "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"}
    assert names <= ours | of_torch


def test_a_box_holds_nothing_open_but_its_own_socket(box: Box) -> None:
    found = run(
        box,
        """
        import contextlib, os, stat
        found = {}
        for number in range(1024):
            with contextlib.suppress(OSError):
                status = os.fstat(number)
                found[number] = (stat.S_IFMT(status.st_mode), status.st_rdev)
        print(found)
        """,
    )
    nowhere = (stat.S_IFCHR, Path(os.devnull).stat().st_rdev)
    assert [found[number] for number in (0, 1, 2)] == [nowhere] * 3
    assert [kind for number, (kind, _) in found.items() if number > 2] == [stat.S_IFSOCK]


def test_a_box_is_alone(box: Box) -> None:
    assert run(box, "import os; print((os.getpid(), os.getppid(), os.listdir('/proc')))") == (1, 0, [])
    found = """
        import errno, os
        def answers(number):
            try:
                os.kill(number, 0)
            except ProcessLookupError:
                return False
            return True
        print([number for number in range(2, 40_000) if answers(number)])
    """
    assert run(box, found) == []


def test_nothing_is_left_for_the_next_submission(sandbox: Sandbox) -> None:
    everywhere = """
        import os
        found = []
        for folder, folders, _ in os.walk("/"):
            folders[:] = [] if folder in PROGRAMS else folders
            try:
                open(os.path.join(folder, "left-behind"), "w").close()
                found.append(folder)
            except OSError:
                pass
        print(found)
    """
    search = """
        import os
        print([folder for folder in FOLDERS if os.path.exists(f"{folder}/left-behind")])
    """
    first, second = sandbox.open(), sandbox.open()
    try:
        written = run(first, everywhere.replace("PROGRAMS", repr(PROGRAMS)))
        assert set(written) == {"/tmp", "/dev/shm", HOME}
        search = search.replace("FOLDERS", repr(written))
        assert run(first, search) == written
        assert run(second, search) == []
    finally:
        first.close()
        second.close()


def test_a_socket_of_one_submission_is_out_of_reach_for_the_next(sandbox: Sandbox) -> None:
    first, second = sandbox.open(), sandbox.open()
    listen = """
        import socket
        ear = socket.socket(socket.AF_UNIX)
        ear.bind("\\0meeting")
        ear.listen()
        socket.socket(socket.AF_UNIX).connect("\\0meeting")
        print(True)
    """
    connect = "import socket; socket.socket(socket.AF_UNIX).connect('\\0meeting'); print(True)"
    try:
        assert run(first, listen) is True
        assert run(second, connect) == "ConnectionRefusedError"
    finally:
        first.close()
        second.close()


# ----- what is tried -------------------------------------------------------------------------------------

PREPARED = """
import ctypes, os, signal, socket, sys
libc = ctypes.CDLL(None, use_errno=True)

def call(result):
    "Raise what a function of the C library reports as an error."
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return result

def system(number, *arguments):
    return call(libc.syscall(number, *arguments))
"""
IS_X86 = os.uname().machine == "x86_64"
# Numbers of system calls, x86-64.
CLONE, KEYCTL = 56, 250
CALLS = {
    "memfd_create": 319,
    "memfd_secret": 447,
    "add_key": 248,
    "bpf": 321,
    "perf_event_open": 298,
    "io_uring_setup": 425,
    "userfaultfd": 323,
    "clone3": 435,
    "fsopen": 430,
    "open_tree": 428,
    "pivot_root": 155,
    "kexec_load": 246,
    "init_module": 175,
    "modify_ldt": 154,
    "name_to_handle_at": 303,
    "syslog": 103,
}
UNSHARED = {"mounts": 0x20000, "users": 0x10000000, "network": 0x40000000, "cgroups": 0x2000000}

# Each ends in an OSError where the wall holds. What is only prepared is done before.
ATTEMPTS = {
    "write to the venv": f"open({str(Path(sys.prefix, 'planted'))!r}, 'w')",
    "write to dianlib": "open('/course/dianlib/data.py', 'a')",
    "write to the root": "open('/planted', 'w')",
    "write to the devices": "open('/dev/planted', 'w')",
    "make a device": "os.mknod('/tmp/disk', 0o660 | 0o060000, os.makedev(8, 0))",
    "open the memory": "open('/dev/mem', 'rb')",
    "raise a limit": (
        "import resource; resource.setrlimit(resource.RLIMIT_NPROC, (10_000, 10_000)); resource.getrlimit(6)"
    ),
    "trace": "call(libc.ptrace(0, 0, 0, 0))",
    "trace a child": """
child = os.fork()
if child == 0:
    signal.pause()
call(libc.ptrace(16, child, 0, 0))
""",
    "read a child's memory": """
child = os.fork()
if child == 0:
    signal.pause()
text = ctypes.create_string_buffer(8)
part = (ctypes.c_uint64 * 2)(ctypes.addressof(text), 8)
call(libc.process_vm_readv(child, part, 1, part, 1, 0))
""",
    "reach a neighbour by TCP": "socket.create_connection(('10.255.255.254', 80), timeout=3)",
    "send to a neighbour by UDP": "socket.socket(2, 2).sendto(b'x', ('10.255.255.254', 53))",
    "send to a neighbour by IPv6": "socket.socket(10, 2).sendto(b'x', ('2001:db8::1', 53))",
    "open a netlink socket": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)",
    "open a socket to the host": "socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)",
    "open a raw socket": "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
    "open a packet socket": "socket.socket(17, socket.SOCK_RAW)",
    "use the kernel's cryptography": "socket.socket(38, socket.SOCK_SEQPACKET)",
    "mount": "call(libc.mount(b'tmpfs', b'/tmp', b'tmpfs', 0, b''))",
    "make /usr writable": "call(libc.mount(b'none', b'/usr', b'', 32 | 4096, b''))",
    "take a cover away": "call(libc.umount2(b'/proc', 2))",
    "change the root": "os.chroot('/tmp')",
    **{f"unshare {name}": f"call(libc.unshare({flag:#x}))" for name, flag in UNSHARED.items()},
    "enter a namespace": "call(libc.setns(0, 0))",
    "become root": "os.setuid(0)",
    "become somebody else": "os.setresuid(1000, 1000, 1000)",
    "change the group": "os.setgid(0)",
    "join a group": "os.setgroups([0])",
    "give a file away": "open('/tmp/f', 'w').close(); os.chown('/tmp/f', 0, 0)",
    "set the clock": "import time; time.clock_settime(time.CLOCK_REALTIME, 0)",
    "rename the machine": "socket.sethostname('mine')",
    "keep memory that belongs to nobody": "call(libc.shmget(0, 1 << 20, 0o1600))",
    "keep messages": "call(libc.msgget(0, 0o1600))",
}
if IS_X86:
    for name, number in CALLS.items():
        ATTEMPTS[f"call {name}"] = f"system({number}, *[ctypes.create_string_buffer(256)] * 3)"
    ATTEMPTS["call keyctl"] = f"system({KEYCTL}, 0, -3, 0)"
    ATTEMPTS["clone into new namespaces"] = f"""
if system({CLONE}, 0x10000000 | 0x20000 | 17, 0, 0, 0, 0) == 0:
    os._exit(0)
"""


@pytest.mark.parametrize("code", ATTEMPTS.values(), ids=ATTEMPTS.keys())
def test_it_is_refused_to(box: Box, code: str) -> None:
    body = textwrap.indent(code.strip(), "    ")
    caught = f"{PREPARED}\ntry:\n{body}\n    print(False)\nexcept (OSError, ValueError):\n    print(True)"
    assert run(box, caught) is True


def test_the_machine_s_servers_are_out_of_reach(box: Box) -> None:
    connect = """
        import socket
        kind, address = {kind}, {address!r}
        with socket.socket(kind) as mouth:
            mouth.settimeout(3)
            mouth.connect(address)
        print(True)
    """
    name = f"\0dianlib-{os.getpid()}"
    for kind, address in ((socket.AF_INET, ("127.0.0.1", 0)), (socket.AF_UNIX, name)):
        with socket.socket(kind) as ear:
            ear.bind(address)
            ear.listen()
            with socket.socket(kind) as mouth:
                mouth.connect(ear.getsockname())  # from here it can be reached
            found = ear.getsockname() if kind == socket.AF_INET else name
            assert run(box, connect.format(kind=int(kind), address=found)) in (
                "ConnectionRefusedError",
                "OSError",
            )


def test_a_box_has_no_rights_at_all(box: Box) -> None:
    rights = """
        import ctypes
        libc = ctypes.CDLL(None)
        capabilities = (ctypes.c_uint32 * 6)()
        libc.capget((ctypes.c_uint32 * 2)(0x20080522, 0), capabilities)
        bounding = [libc.prctl(23, number, 0, 0, 0) for number in range(40)]
        no_new_privileges = libc.prctl(39, 0, 0, 0, 0)
        print((any(capabilities), any(bounding), no_new_privileges))
    """
    assert run(box, rights) == (False, False, 1)


def test_killing_everything_kills_nobody(sandbox: Sandbox, box: Box) -> None:
    other = sandbox.open()
    killing = """
        import os, signal
        for target in (-1, 0, 1, os.getpid()):
            for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP):
                try:
                    os.kill(target, number)
                except OSError:
                    pass
        print(True)
    """
    try:
        assert run(box, killing) is True
        assert run(box, "print(True)") is True
        assert run(other, "print(True)") is True
    finally:
        other.close()


# ----- how much is used ----------------------------------------------------------------------------------


def test_memory_has_a_limit(box: Box) -> None:
    assert run(box, "kept = [bytes(100 << 20) for _ in range(60)]; print(True)") == "MemoryError"
    assert run(box, "kept = []; print(len(bytes(1 << 30)) >> 20)") == 1024


@pytest.mark.parametrize("folder", ["/tmp", "/dev/shm", HOME])
def test_the_disk_has_a_limit(box: Box, folder: str) -> None:
    write = """
        from pathlib import Path
        written = 0
        try:
            for number in range(10):
                with Path(FOLDER, str(number)).open("wb", buffering=0) as file:
                    for _ in range(20):
                        written += file.write(bytes(1 << 20))
        except OSError as error:
            print((written >> 20, error.strerror))
    """
    megabytes, reason = run(box, write.replace("FOLDER", repr(folder)))
    assert 90 <= megabytes <= 100
    assert reason == "No space left on device"


def test_a_file_has_a_limit(box: Box) -> None:
    assert run(box, "open('/tmp/f', 'wb').write(bytes(60 << 20)); print(True)") == "OSError"
    assert run(box, "print(open('/tmp/g', 'wb').write(bytes(40 << 20)) >> 20)") == 40


def test_the_number_of_files_has_a_limit(box: Box) -> None:
    make = """
        made = 0
        try:
            for number in range(100_000):
                open(f"/tmp/{number}", "w").close()
                made += 1
        except OSError:
            print(made)
    """
    assert 9_000 < run(box, make) <= 10_000


def test_the_number_of_open_files_has_a_limit(box: Box) -> None:
    make = """
        kept = []
        try:
            while True:
                kept.append(open("/dev/null"))
        except OSError:
            print(len(kept))
    """
    assert 200 < run(box, make) < 256


@pytest.mark.parametrize("kind", ["processes", "threads"])
def test_the_number_of_processes_has_a_limit(box: Box, kind: str) -> None:
    make = {
        "processes": """
            import os, signal
            made = []
            try:
                for _ in range(500):
                    child = os.fork()
                    if child == 0:
                        signal.pause()
                    made.append(child)
            except OSError:
                print(len(made))
        """,
        "threads": """
            import threading
            made = 0
            try:
                for _ in range(500):
                    threading.Thread(target=threading.Event().wait, daemon=True).start()
                    made += 1
            except RuntimeError:
                print(made)
        """,
    }
    assert 40 < run(box, make[kind]) < 64


# ----- the end -------------------------------------------------------------------------------------------


def descendants(process: int, part: str) -> list[int]:
    """Find the processes below one whose command has a part; the youngest first."""
    found = []
    for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
        found += descendants(int(child), part)
        if part in Path(f"/proc/{child}/cmdline").read_text():
            found.append(int(child))
    return found


def named(mark: str) -> int:
    """Count the processes of this machine that have given themselves a name."""
    found = 0
    for file in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            found += file.read_text().strip() == mark
    return found


CLINGING = """
import ctypes, os, signal, time
libc = ctypes.CDLL(None)
libc.prctl(1, 0, 0, 0, 0)  # it wants no signal when its parent dies
for number in range(1, 65):
    if number not in (signal.SIGKILL, signal.SIGSTOP, 32, 33, signal.SIGCHLD):
        signal.signal(number, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    libc.prctl(1, 0, 0, 0, 0)
    if os.fork() == 0:
        libc.prctl(1, 0, 0, 0, 0)
        libc.prctl(15, b"MARK", 0, 0, 0)
        while True:
            time.sleep(60)
    os._exit(0)
libc.prctl(15, b"MARK", 0, 0, 0)
print(True)
"""


def test_what_clings_to_life_ends_with_its_box(sandbox: Sandbox) -> None:
    mark = f"cling{os.getpid() % 100_000}"
    box = sandbox.open()
    assert run(box, CLINGING.replace("MARK", mark)) is True
    assert wait_for(lambda: named(mark) == 2)
    box.close()
    assert wait_for(lambda: named(mark) == 0)


def test_a_box_that_is_busy_is_closed_at_once(sandbox: Sandbox) -> None:
    box = sandbox.open()
    source = "while True:\n    try:\n        while True: pass\n    except BaseException: pass"
    wire.send(box.connection, {"do": "cell", "source": source, "seconds": 60.0})
    began = time.monotonic()
    box.close()
    assert time.monotonic() - began < 5


def wait_for(condition: Any, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


# ----- an ordinary user, an installed package, a course among the programs -------------------------------

# Runs as an ordinary user. Its dianlib lies in /usr/src, as an installed one lies among the packages, a
# course lies beside it, and Python is called through a link. Prints what submissions find, one by one.
ELSEWHERE = """
import json, os, sys
from pathlib import Path
from dianlib.grading import sandbox

made = sandbox.Sandbox(("dianlib.data", "dianlib.plotting"), hidden=[Path("/usr/src/course")])
found = {"place": str(sandbox.PACKAGE), "prefix": sys.prefix, "grader": os.getuid()}
for name, source in json.load(sys.stdin):
    box = made.open()
    found[name] = box.ask({"do": "cell", "source": source, "seconds": 20.0}, seconds=25.0)[0]
    box.close()
made.close()
print(json.dumps(found))
"""
PLANT = f"""
import os
planted = []
for folder, folders, _ in os.walk("/"):
    folders[:] = [] if folder in {PROGRAMS} else folders
    try:
        with open(os.path.join(folder, "colorful.py"), "w") as file:
            file.write("print('planted')")
        planted.append(folder)
    except OSError:
        pass
print(planted)
"""
QUESTIONS = {
    "plant": PLANT,
    "import": "import colorful",
    "package": "import os; print(sorted(os.listdir('/usr/src')), os.listdir('/usr/src/dianlib'))",
    "course": "import os; print(os.listdir('/usr/src/course'))",
    "module": "import dianlib.data; print(dianlib.data.__file__)",
    "references": "import dianlib.metrics",
    "user": "import os; print(os.getuid())",
}


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What submissions find in a sandbox that was started in other surroundings."""
    folder = tmp_path_factory.mktemp("src")
    folder.chmod(0o755)
    shutil.copytree(ROOT / "dianlib", folder / "dianlib")
    (folder / "course" / "records").mkdir(parents=True)
    (folder / "course" / "records" / "secret").write_text("hush")
    command = ["bwrap", "--dev-bind", "/", "/", "--bind", str(folder), "/usr/src"]
    command += ["--tmpfs", "/mnt", "--symlink", sys.prefix, "/mnt/python"]
    # Folders that only root may enter, with Python in them: give the ordinary user a way.
    base = Path(os.path.realpath(sys.base_prefix))
    closed = [folder for folder in reversed(base.parents) if not folder.stat().st_mode & stat.S_IXOTH]
    if closed:
        command += ["--perms", "0755", "--tmpfs", str(closed[0])]
        below = [folder for folder in reversed(base.parents) if closed[0] in folder.parents]
        command += [part for folder in below for part in ("--perms", "0755", "--dir", str(folder))]
        command += ["--ro-bind", str(base), str(base)]
    as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    command += ["--", *as_nobody, "/mnt/python/bin/python", "-c", ELSEWHERE]
    environment = {**os.environ, "PYTHONPATH": "/usr/src", "HOME": "/mnt"}
    questions = json.dumps(list(QUESTIONS.items()))
    done = subprocess.run(
        command, env=environment, input=questions, capture_output=True, text=True, timeout=180, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_submission_leaves_no_module_for_the_next_one(elsewhere: dict[str, Any]) -> None:
    assert set(ast.literal_eval(elsewhere["plant"]["text"])) == {"/tmp", "/dev/shm", HOME}
    assert elsewhere["import"]["error"][0] == "ModuleNotFoundError"
    assert elsewhere["import"]["text"] == ""


def test_an_installed_package_and_a_course_among_the_programs_are_covered(elsewhere: dict[str, Any]) -> None:
    assert elsewhere["place"] == "/usr/src/dianlib"
    assert elsewhere["package"]["text"] == "['course', 'dianlib'] []\n"
    assert elsewhere["course"]["text"] == "[]\n"


def test_python_may_be_called_through_a_link(elsewhere: dict[str, Any]) -> None:
    assert elsewhere["prefix"] == "/mnt/python"
    assert elsewhere["module"]["text"] == "/course/dianlib/data.py\n"


def test_the_first_chapter_sees_no_reference(elsewhere: dict[str, Any]) -> None:
    assert elsewhere["references"]["error"][0] == "ModuleNotFoundError"


def test_an_ordinary_user_stays_an_ordinary_user(elsewhere: dict[str, Any]) -> None:
    assert elsewhere["grader"] != 0
    assert elsewhere["user"]["text"] == f"{elsewhere['grader']}\n"


# ----- where there is no wall ----------------------------------------------------------------------------


def fake_bubblewrap(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a program called bwrap first on PATH."""
    program = folder / "bwrap"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def refusal() -> str:
    """Start a sandbox that must not start; return the sentence."""
    with pytest.raises(SandboxError) as refused:
        Sandbox(("dianlib.data",)).close()
    return str(refused.value)


def test_without_bubblewrap_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refusal() == (
        "Students' code runs only in a sandbox, and bubblewrap is not installed: install it "
        "(Debian and Ubuntu: `sudo apt install bubblewrap`), then grade again."
    )


@pytest.mark.parametrize(
    "message",
    [
        "bwrap: Creating new namespace failed: Operation not permitted",
        "bwrap: No permissions to creating new namespace, likely because the kernel does not allow "
        "non-privileged user namespaces. On e.g. debian this can be enabled with 'sysctl "
        "kernel.unprivileged_userns_clone=1'.",
        "bwrap: setting up uid map: Permission denied",
        "bwrap: Failed to make / slave: Permission denied",
    ],
)
def test_without_namespaces_it_says_what_to_allow(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, message: str
) -> None:
    (tmp_path / "message").write_text(message)
    fake_bubblewrap(tmp_path, monkeypatch, f"cat {tmp_path / 'message'} >&2; exit 1")
    found = refusal()
    assert found.startswith(
        "Students' code runs only in a sandbox, and this system does not let bubblewrap make"
    )
    assert message in found
    assert "sysctl" in found
    assert found.endswith("then grade again.")
    assert "\n" not in found


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'bwrap: execvp python: No such file or directory' >&2; exit 1", "No such file or directory"),
        ("exit 0", "it ended without a word"),
    ],
)
def test_any_other_failure_is_passed_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, reason: str
) -> None:
    fake_bubblewrap(tmp_path, monkeypatch, script)
    found = refusal()
    assert found.startswith("Students' code runs only in a sandbox, and it did not start (")
    assert reason in found


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_other_systems_are_told_what_works(monkeypatch: pytest.MonkeyPatch, system: str) -> None:
    monkeypatch.setattr(sys, "platform", system)
    found = refusal()
    assert "needs Linux" in found
    assert "container" in found


@pytest.mark.parametrize("prefix", ["/dev/shm/.venv", f"{HOME}/course/.venv"])
def test_python_must_not_lie_in_a_folder_that_boxes_have_for_themselves(
    monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    monkeypatch.setattr(sys, "prefix", prefix)
    found = refusal()
    assert f"Python lies in {prefix}" in found
    assert found.endswith("then grade again.")


def test_a_wall_with_holes_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "dianlib"
    shutil.copytree(outside.PACKAGE, package)
    isolation = package / "grading" / "isolation.py"
    text = isolation.read_text()
    assert text.count("    filter_system_calls()\n") == 1
    isolation.write_text(text.replace("    filter_system_calls()\n", ""))
    monkeypatch.setattr(outside, "PACKAGE", package)
    monkeypatch.setitem(outside.OWN_FILES, "checks/registry.py", "checks/registry.py")
    found = refusal()
    assert "is not tight" in found
    assert "it makes namespaces" in found
    assert "it sees the references" in found
    assert found.endswith("nothing was graded.")


def test_a_warm_process_that_was_killed_is_replaced(sandbox: Sandbox) -> None:
    box = sandbox.open()
    warm = descendants(os.getpid(), "dianlib.grading.inside")
    assert warm
    for process in warm:
        os.kill(process, signal.SIGKILL)
    with pytest.raises(wire.Closed):
        run(box, "print(True)")
    again = sandbox.open()
    assert run(again, "print(True)") is True
    again.close()


# ----- what lies among the programs and is not for students -------------------------------------------------


def test_the_exchange_where_submissions_wait_is_covered(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """nbgrader's exchange lies in /usr/local by default, and the grader owns what is handed in there."""
    plugin = pytest.importorskip("dianlib.grading.plugin")
    asked: list[Any] = []
    monkeypatch.setattr(plugin, "_sandboxes", {})
    monkeypatch.setattr(plugin, "Sandbox", lambda *arguments: asked.append(arguments))
    plugin.Judge().sandbox(tmp_path, ("dianlib.data",))
    plugin.Judge(config=Config({"Exchange": {"root": "/srv/exchange"}})).sandbox(tmp_path, ("dianlib.data",))
    assert [arguments[4] for arguments in asked] == [
        [tmp_path, Path("/usr/local/share/nbgrader/exchange")],
        [tmp_path, Path("/srv/exchange")],
    ]


def test_a_folder_among_the_programs_is_empty_inside() -> None:
    made = Sandbox((), hidden=[Path("/usr/share")])
    box = made.open()
    try:
        answer, _ = box.ask(
            {"do": "cell", "source": "import os; print(os.listdir('/usr/share'))", "seconds": 9.0}
        )
        assert answer["text"] == "[]\n"
    finally:
        box.close()
        made.close()


def test_the_digits_are_at_hand_without_the_libraries_that_read_them(box: Box) -> None:
    source = """
import sys
from dianlib.data import digits
print("sklearn" in sys.modules, digits().test_images.sum().item(), "sklearn" in sys.modules)
print(digits(seed=1).test_images.sum().item())
"""
    answer, _ = box.ask({"do": "cell", "source": source, "seconds": 30.0}, seconds=35.0)
    ours = [data.digits(seed).test_images.sum().item() for seed in (0, 1)]
    assert answer["text"] == f"False {ours[0]} False\n{ours[1]}\n"


def test_a_course_beside_the_data_is_empty_inside(tmp_path: Path) -> None:
    (tmp_path / "course").mkdir()
    (tmp_path / "course" / "solution.txt").write_text("right")
    (tmp_path / "images.txt").write_text("seen")
    tmp_path.chmod(0o755)
    made = Sandbox((), data=tmp_path, hidden=[tmp_path / "course"])
    box = made.open()
    try:
        source = "import os; print(sorted(os.listdir('/data')), os.listdir('/data/course'))"
        answer, _ = box.ask({"do": "cell", "source": source, "seconds": 9.0})
        assert answer["text"] == "['course', 'images.txt'] []\n"
    finally:
        box.close()
        made.close()


def test_every_copy_of_the_package_is_covered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a clone as working folder, the references of an installed dianlib must not be seen either."""
    (tmp_path / "dianlib").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    asked: list[Any] = []

    def command(self: Any, modules: Any, data: Any, hidden: tuple[Path, ...]) -> list[str]:
        asked.extend(hidden)
        raise SandboxError("enough")

    monkeypatch.setattr(outside.Bubblewrap, "command", command)
    with pytest.raises(SandboxError, match="enough"):
        Sandbox(())
    assert {tmp_path / "dianlib", outside.PACKAGE.resolve()} <= set(asked)
