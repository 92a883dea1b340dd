"""Shut a submission in where namespaces cannot be had: Landlock, a longer filter for calls, and limits.

For Linux 6.12 or later. Nothing is mounted and nothing is asked of an administrator: the warm process and
each submission allow themselves less and less. Used only where the course asks for it by name, because it
is weaker than namespaces:

- A submission runs as the user who grades (as nobody, where root grades). Walls stand between the two, but
  there is no second line behind them.
- It can ask whether a file exists anywhere, and how large and how old it is. It cannot read it, or list
  the folder.
- It can see which process numbers are taken, but nothing about those processes.
- The limit for processes is the system's, for all processes of a user together. What this user starts
  elsewhere meanwhile, another submission included, takes from it.
- Its files lie on the disk. Their size is looked at several times a second, so for a moment there can be
  more than the limit allows; files that were deleted but are still open are not seen.
- Some honest things do not work: chmod, shared memory and what is built on it (a DataLoader with worker
  processes), writing to /tmp by name.
"""

import contextlib
import ctypes
import dataclasses
import errno
import json
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dianlib.grading.isolation import (
    ENDS,
    SET_DEATH_SIGNAL,
    SET_NO_NEW_PRIVILEGES,
    Limits,
    give_up_rights,
    prctl,
    prefer_for_killing,
)

# Of Landlock itself: the first one that keeps signals and abstract sockets apart, in Linux 6.12.
VERSION = 6

# Linux's own numbers, from <linux/landlock.h>, <linux/prctl.h> and <linux/fcntl.h>.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR, REMOVE_FILE = 1, 2, 4, 8, 16, 32
MAKE_DIR, MAKE_REG, MAKE_FIFO, MAKE_SYM, REFER, TRUNCATE = 1 << 7, 1 << 8, 1 << 10, 1 << 12, 1 << 13, 1 << 14
ALL_OF_FILES, ALL_OF_TCP, ALL_SCOPES = (1 << 16) - 1, 3, 3
SET_CHILD_SUBREAPER = 36
SET_LEASE = 1024

READ = EXECUTE | READ_FILE | READ_DIR
WRITE = WRITE_FILE | READ_FILE | READ_DIR | REMOVE_DIR | REMOVE_FILE | REFER | TRUNCATE
WRITE |= MAKE_DIR | MAKE_REG | MAKE_FIFO | MAKE_SYM
FOR_ONE_FILE = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE

DEVICES = {
    Path("/dev/null"): READ_FILE | WRITE_FILE | TRUNCATE,
    Path("/dev/full"): READ_FILE | WRITE_FILE | TRUNCATE,
    Path("/dev/zero"): READ_FILE,
    Path("/dev/random"): READ_FILE,
    Path("/dev/urandom"): READ_FILE,
}
# For processes that run no student's code: to look at their own memory, and to name who is killed first.
PROCESSES = {Path("/proc"): READ_FILE | READ_DIR | WRITE_FILE | TRUNCATE}

# System calls that reach what belongs to the same user, and that Landlock does not look at.
REFUSED_CALLS = (
    # Sockets: services of this machine, such as the session bus, do what their user asks for.
    *("socket", "connect", "bind", "listen", "accept", "accept4"),
    # Rights, owners and dates of files that cannot even be read; who opens them, and when.
    *("chmod", "fchmod", "fchmodat", "chown", "fchown", "lchown", "fchownat"),
    *("setxattr", "lsetxattr", "fsetxattr", "removexattr", "lremovexattr", "fremovexattr"),
    *("utime", "utimes", "futimesat", "utimensat"),
    *("inotify_init", "inotify_init1", "inotify_add_watch", "fanotify_init", "fanotify_mark"),
    # Shared memory, semaphores and queues, which are known by a number or a name and not by a path.
    *("shmget", "shmat", "shmctl", "semget", "semop", "semtimedop", "semctl"),
    *("msgget", "msgsnd", "msgrcv", "msgctl", "mq_open", "mq_unlink"),
    # Other processes.
    *("ioprio_set", "migrate_pages", "pidfd_open", "process_mrelease"),
)
# Calls whose first argument names a process: 0 is the one that calls.
OWN_PROCESS_ONLY = ("prlimit64", "sched_setaffinity", "sched_setattr", "sched_setparam", "sched_setscheduler")
# Linux 6.6 and later: some change files (fchmodat2, setxattrat, file_setattr), libraries do without all of
# them, and what comes after them nobody knows.
NEW_CALLS = range(452, 600)
TERMINAL = 0x5400  # the requests of ioctl() for terminals, and for files in general

MAX_ENTRIES = 10_000
LOOK_SECONDS = 0.2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _Rule(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("place", ctypes.c_int32))


def version() -> int:
    """Return the version of this kernel's Landlock; 0 where there is none, or where it is switched off."""
    return max(0, int(_libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))))


def confine(rules: Mapping[Path, int]) -> None:
    """Allow this process, and all that come from it, only what the rules say. It cannot be taken back.

    A rule for a folder holds for everything below it. TCP, and signals and abstract sockets to processes
    that are not confined in the same way, are refused altogether.
    """
    handled = (ctypes.c_uint64 * 3)(ALL_OF_FILES, ALL_OF_TCP, ALL_SCOPES)
    ruleset = _call(CREATE_RULESET, ctypes.byref(handled), ctypes.c_size_t(ctypes.sizeof(handled)), 0)
    for place, allowed in rules.items():
        try:
            descriptor = os.open(place, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # not on this system, or a link to nowhere
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            allowed &= FOR_ONE_FILE
        _call(ADD_RULE, ruleset, 1, ctypes.byref(_Rule(allowed, descriptor)), 0)
        os.close(descriptor)
    prctl(SET_NO_NEW_PRIVILEGES, 1)
    _call(RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _call(number: int, *arguments: object) -> int:
    result = int(_libc.syscall(number, *arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"Landlock: {os.strerror(ctypes.get_errno())}")
    return result


def refuse_more_calls() -> None:
    """Refuse what reaches beyond a submission although it passes Landlock and the other filter."""
    import pyseccomp as seccomp

    filtered = seccomp.SyscallFilter(defaction=seccomp.ALLOW)
    refuse = seccomp.ERRNO(errno.EPERM)
    for name in REFUSED_CALLS:
        with contextlib.suppress(RuntimeError, OSError):  # this kind of processor has no such call
            filtered.add_rule(refuse, name)
    for name in OWN_PROCESS_ONLY:
        filtered.add_rule(refuse, name, seccomp.Arg(0, seccomp.NE, 0))
    for argument in (0, 1):  # its own process is kind 0, number 0
        filtered.add_rule(refuse, "setpriority", seccomp.Arg(argument, seccomp.NE, 0))
    # A pair of another type than this one could still be connected to a service.
    filtered.add_rule(refuse, "socketpair", seccomp.Arg(0, seccomp.NE, socket.AF_UNIX))
    for kind in range(16):
        if kind != socket.SOCK_STREAM:
            filtered.add_rule(refuse, "socketpair", seccomp.Arg(1, seccomp.MASKED_EQ, 15, kind))
    # A lease makes others wait for up to a minute when they open the file.
    filtered.add_rule(refuse, "fcntl", seccomp.Arg(1, seccomp.EQ, SET_LEASE))
    # Any other request, such as those of file systems: it differs from TERMINAL in one of these bits.
    for bit in range(8, 16):
        different = seccomp.Arg(1, seccomp.MASKED_EQ, 1 << bit, ~TERMINAL & 1 << bit)
        filtered.add_rule(seccomp.ERRNO(errno.ENOTTY), "ioctl", different)
    for number in NEW_CALLS:
        filtered.add_rule(seccomp.ERRNO(errno.ENOSYS), number)
    filtered.load()


# ----- one submission ------------------------------------------------------------------------------------


class Landlock:
    """Shuts submissions in without namespaces; ``rooms`` is where each of them gets a folder.

    The warm process, the outer process of a submission and its inner one are confined each within the one
    before. So a submission's processes can send signals to each other only, and the outer one to all of them.
    """

    def __init__(self, readable: Mapping[Path, int], rooms: Path) -> None:
        self._readable = dict(readable)
        self._rooms = rooms
        self._room = rooms
        self._limits = Limits()

    def separate(self, limits: Limits) -> None:
        """Confine the outer process; whoever the submission leaves behind becomes its child."""
        self._limits = limits
        self._room = Path(tempfile.mkdtemp(dir=self._rooms))
        prctl(SET_CHILD_SUBREAPER, 1)
        prctl(SET_DEATH_SIGNAL, signal.SIGTERM)  # not SIGKILL: there is something to clear up
        confine(self.rules())
        with contextlib.suppress(PermissionError):
            os.kill(os.getppid(), 0)
            raise OSError("Landlock lets signals through")

    def rules(self) -> dict[Path, int]:
        """Return what a process may do that runs no student's code."""
        return {**self._readable, **PROCESSES, self._rooms: WRITE}

    def enter(self, limits: Limits, warm_memory: int) -> None:
        """Confine the inner process to its folder."""
        prefer_for_killing()
        processes = limits.processes + _taken()
        for name, folder in {"HOME": "home", "TMPDIR": "tmp"}.items():
            (self._room / folder).mkdir()
            os.environ[name] = str(self._room / folder)
        tempfile.tempdir = None  # to be looked up anew
        os.chdir(self._room / "home")
        confine({**self._readable, self._room: WRITE})
        give_up_rights(dataclasses.replace(limits, processes=processes), warm_memory)
        refuse_more_calls()

    def wait(self, inner: int) -> None:
        """Wait for the end of a submission, or end it when its files grow too large; leave nothing of it."""
        while _fits(self._room, self._limits.disk):
            notice = signal.sigtimedwait(ENDS, LOOK_SECONDS)
            if (notice and notice.si_signo == signal.SIGTERM) or _has_ended(inner):
                break
        end_all()
        remove(self._room)


def _taken() -> int:
    """Find out how many processes and threads this user has, by trying which limit leaves room for one more.

    Counting them would miss those of other containers, and the system's limit is one for all of them.
    """
    most = resource.getrlimit(resource.RLIMIT_NPROC)[1]

    def has_room(limit: int) -> bool:
        resource.setrlimit(resource.RLIMIT_NPROC, (limit, most))
        try:
            child = os.posix_spawn("/bin/true", ["true"], {})
        except BlockingIOError:
            return False
        os.waitpid(child, 0)
        return True

    return bisect_left(range(most if most > 0 else 1 << 22), True, key=has_room)


def _has_ended(inner: int) -> bool:
    """Take leave of all processes that have ended, and tell whether the inner one is among them."""
    while True:
        process, _ = os.waitpid(-1, os.WNOHANG)
        if process in (0, inner):
            return process == inner


def end_all() -> None:
    """End all processes that are confined within this one, however they hide; none can be forked meanwhile.

    The signal goes to all processes of the system, and Landlock holds it back from all others.
    """
    while True:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(-1, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _fits(folder: Path, size: int) -> bool:
    """Tell whether what lies in a folder keeps to a size, and to a number of entries."""
    used = entries = 0
    waiting = [str(folder)]
    try:
        while waiting:
            with os.scandir(waiting.pop()) as found:
                for entry in found:
                    with contextlib.suppress(FileNotFoundError):
                        used += entry.stat(follow_symlinks=False).st_blocks * 512
                    entries += 1
                    if used > size or entries > MAX_ENTRIES:
                        return False
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
    except FileNotFoundError:
        return True  # a folder was deleted just now; the next look sees the rest
    except OSError:
        return False  # a folder that was closed, or lies too deep
    return True


def remove(folder: Path) -> None:
    """Delete a folder and what somebody else has put there: too deep for Python, or closed to its owner."""
    for command in (["rm", "-rf"], ["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
        if folder.exists():
            subprocess.run([*command, "--", str(folder)], stderr=subprocess.DEVNULL, check=False)


# ----- the warm process ----------------------------------------------------------------------------------


def _entries_without(folder: Path, hidden: Sequence[Path]) -> Iterator[Path]:
    """Yield a folder, or entry by entry what is in it and not to be hidden: a rule holds for all below."""
    if not any(place.is_relative_to(folder) for place in hidden):
        yield folder
    elif folder not in hidden:
        for entry in folder.iterdir():
            if not entry.is_symlink():  # a rule would hold for the place where it leads
                yield from _entries_without(entry, hidden)


def main() -> None:
    """Confine this process before anything is imported, then start as the warm process."""
    os.setsid()  # Ctrl-C in the terminal is not meant for this process
    places = json.loads(sys.argv.pop(1))
    hidden = [Path(place) for place in places["hidden"]]
    readable = dict(DEVICES)
    for folder in map(Path, sys.path):
        if any(place.is_relative_to(folder) for place in hidden):
            readable[folder] = READ_DIR  # imports look through it
    for folder in map(Path, places["readable"]):
        readable |= dict.fromkeys(_entries_without(folder, hidden), READ)
    isolation = Landlock(readable, Path(places["rooms"]))
    prctl(SET_CHILD_SUBREAPER, 1)
    confine(isolation.rules())
    from dianlib.grading import inside  # only now: this imports torch

    inside.main(isolation)
    end_all()


if __name__ == "__main__":
    main()
