"""Shut a process in: namespaces, private folders, limits and a filter for system calls. Linux only.

Used inside the sandbox, in the process that is about to run one student's code.
"""

import contextlib
import ctypes
import errno
import functools
import os
import resource
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

HOME = "/home/student"

# What ends an outer process. Waited for by name, and not handled: a signal just before waitpid would be
# noticed only after it.
ENDS = (signal.SIGTERM, signal.SIGCHLD)

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Limits:
    """What one submission may use, sizes in bytes. Memory is per process, on top of what torch needs."""

    memory: int = 2 << 30
    processes: int = 64
    open_files: int = 256
    file_size: int = 50 << 20
    disk: int = 100 << 20
    processor_seconds: int = 600
    output: int = 200_000  # characters that one cell may print


# Linux's own numbers, from <linux/sched.h>, <sys/mount.h> and <sys/prctl.h>.
NEW_CGROUP, NEW_MOUNTS, NEW_UTS, NEW_IPC = 0x02000000, 0x00020000, 0x04000000, 0x08000000
NEW_USER, NEW_PIDS, NEW_NETWORK, NEW_TIME = 0x10000000, 0x20000000, 0x40000000, 0x00000080
READ_ONLY, NO_SETUID, NO_DEVICES, NO_EXECUTION = 1, 2, 4, 8
BIND, RECURSIVE, PRIVATE = 1 << 12, 1 << 14, 1 << 18
SET_DEATH_SIGNAL, DROP_BOUNDING_CAPABILITY, SET_NO_NEW_PRIVILEGES = 1, 24, 38

# System calls that no notebook needs: other processes' memory, mounts, kernel modules, keys, tracing.
FORBIDDEN_CALLS = (
    *("ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "kcmp", "pidfd_getfd"),
    *("mount", "umount2", "pivot_root", "chroot", "unshare", "setns", "move_mount", "open_tree", "fsopen"),
    *("fsconfig", "fsmount", "fspick", "mount_setattr", "open_by_handle_at", "name_to_handle_at", "quotactl"),
    *("init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load", "reboot", "acct"),
    *("add_key", "request_key", "keyctl", "bpf", "perf_event_open", "userfaultfd", "move_pages", "syslog"),
    # Memory that no process owns, so that no limit counts it.
    *("memfd_create", "memfd_secret", "shmget", "msgget"),
    *("io_uring_setup", "io_uring_enter", "io_uring_register", "swapon", "swapoff", "iopl", "ioperm"),
    *("sethostname", "setdomainname", "settimeofday", "clock_settime", "adjtimex", "vhangup", "modify_ldt"),
)


class Isolation(Protocol):
    """A way to shut a submission in. Its outer process runs no student's code, its inner one does."""

    def separate(self, limits: Limits) -> None:
        """Prepare the outer process, before the inner one is forked."""

    def enter(self, limits: Limits, warm_memory: int) -> None:
        """In the inner process: go to a folder of its own and give up all rights, for good."""

    def wait(self, inner: int) -> None:
        """In the outer process: wait for SIGTERM or the end of the inner one, and end all that is left."""


class Namespaces:
    """A submission has processes, files, networks and users of its own; nobody else's exist for it."""

    def separate(self, limits: Limits) -> None:
        """Enter the namespaces: the next process that is forked is process 1 in there."""
        die_with_parent()
        prefer_for_killing()
        enter_namespaces(limits)

    def enter(self, limits: Limits, warm_memory: int) -> None:
        """Give up all rights."""
        os.chdir(HOME)
        give_up_rights(limits, warm_memory)

    def wait(self, inner: int) -> None:
        """Wait. When process 1 is killed, all others of the submission die with it."""
        signal.sigwait(ENDS)
        os.kill(inner, signal.SIGKILL)
        os.waitpid(inner, 0)


def die_with_parent() -> None:
    """Have the system kill this process when its parent ends."""
    prctl(SET_DEATH_SIGNAL, 9)


def enter_namespaces(limits: Limits) -> None:
    """Leave the other processes, files, networks and users behind. The next fork is process 1 in there."""
    user, group = os.getuid(), os.getgid()
    kinds = NEW_USER | NEW_MOUNTS | NEW_PIDS | NEW_IPC | NEW_NETWORK | NEW_UTS
    _check(_libc.unshare(kinds), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    _mount("none", "/", "", PRIVATE | RECURSIVE)
    # Python itself may lie in /tmp, in a clone that was made there to try something.
    python = {Path(place) for place in (sys.prefix, sys.base_prefix)}
    covered = {place: os.open(place, os.O_PATH) for place in python if place.is_relative_to("/tmp")}
    for folder in ("/tmp", "/dev/shm", HOME):
        _mount("tmpfs", folder, f"size={limits.disk},nr_inodes=10000", NO_SETUID | NO_DEVICES)
    for place, descriptor in covered.items():
        place.mkdir(parents=True, exist_ok=True)
        _mount(f"/proc/self/fd/{descriptor}", str(place), "", BIND | RECURSIVE)
        os.close(descriptor)
    _mount("tmpfs", "/proc", "size=0", READ_ONLY | NO_SETUID | NO_DEVICES | NO_EXECUTION)


def give_up_rights(limits: Limits, warm_memory: int) -> None:
    """Set the limits, drop all capabilities and install the filter. None of it can be taken back."""
    for name, value in {
        "AS": warm_memory + limits.memory,
        "NPROC": limits.processes,
        "NOFILE": limits.open_files,
        "FSIZE": limits.file_size,
        "CPU": limits.processor_seconds,
        "CORE": 0,
    }.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    prctl(SET_NO_NEW_PRIVILEGES, 1)
    for capability in range(64):
        _libc.prctl(DROP_BOUNDING_CAPABILITY, capability, 0, 0, 0)  # fails beyond the last one
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of the interface, this process
    _check(_libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")
    filter_system_calls()


def prefer_for_killing() -> None:
    """When the machine runs out of memory, let the system end this process and not the grader."""
    Path("/proc/self/oom_score_adj").write_text("1000")


def filter_system_calls() -> None:
    """Refuse what is not needed, and what could open a new namespace or reach another machine."""
    system_call_filter().load()


@functools.cache  # made once, before the forks
def system_call_filter() -> Any:
    """Return the filter of pyseccomp, which is not in force before it is loaded."""
    import pyseccomp as seccomp

    filtered = seccomp.SyscallFilter(defaction=seccomp.ALLOW)
    refuse = seccomp.ERRNO(errno.EPERM)
    for name in FORBIDDEN_CALLS:
        with contextlib.suppress(RuntimeError, OSError):  # this kind of processor has no such call
            filtered.add_rule(refuse, name)
    for kind in (NEW_CGROUP, NEW_MOUNTS, NEW_UTS, NEW_IPC, NEW_USER, NEW_PIDS, NEW_NETWORK, NEW_TIME):
        filtered.add_rule(refuse, "clone", seccomp.Arg(0, seccomp.MASKED_EQ, kind, kind))
    # Its arguments lie in memory, where a filter cannot look. The C library then uses clone.
    filtered.add_rule(seccomp.ERRNO(errno.ENOSYS), "clone3")
    # Not all kinds of sockets belong to a network namespace: AF_VSOCK reaches the host of a virtual machine.
    filtered.add_rule(refuse, "socket", seccomp.Arg(0, seccomp.GT, socket.AF_INET6))
    return filtered


def _mount(source: str, target: str, options: str, flags: int) -> None:
    arguments = (source.encode(), target.encode(), source.encode(), flags, options.encode())
    _check(_libc.mount(*arguments), f"mount {target}")


def prctl(option: int, value: int) -> None:
    """Change a setting of this process."""
    _check(_libc.prctl(option, value, 0, 0, 0), f"prctl {option}")


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
