"""What a scoring worker forbids itself before it imports a reward: memory, CPU time, sockets.

All of it is inherited by what a reward starts, and none of it can be taken back but the CPU limit.
It contains code that runs away or calls out; it is no wall against code that means harm, which
still runs as the server's user and can read that user's files (see ``docs/security.md``).

Imported by workers: the standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import resource
import signal
import struct
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MIB = 1024 * 1024
MAX_PASSES = 16
"""Over descendants that are to be killed, for a tree that grows meanwhile."""

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_SET_SECCOMP = 22
SECCOMP_MODE_FILTER = 2
SECCOMP_RET_ALLOW = 0x7FFF0000
SECCOMP_RET_ERRNO = 0x00050000
# Instructions of classic BPF (linux/filter.h).
_LOAD_WORD = 0x20
_JUMP_EQUAL = 0x15
_JUMP_NOT_LESS = 0x35
_RETURN = 0x06
_INSTRUCTION = "HBBI"
"""struct sock_filter."""
_OFFSET_OF_NUMBER = 0
_OFFSET_OF_ARCHITECTURE = 4
_X32_BIT = 0x40000000
"""x86-64 has a second set of numbers for every call from here on."""


@dataclass(frozen=True)
class SystemCalls:
    """Numbers of what is denied, on one architecture (linux/audit.h, unistd.h)."""

    architecture: int
    socket: int
    ptrace: int
    process_vm_readv: int
    process_vm_writev: int
    io_uring_setup: int = 425
    """Its rings open sockets without the call."""
    pidfd_getfd: int = 438
    """Takes a socket from another process of the same user, as ptrace would."""

    def denied(self) -> tuple[int, ...]:
        """All of them."""
        return (
            *(self.socket, self.io_uring_setup, self.pidfd_getfd),
            *(self.ptrace, self.process_vm_readv, self.process_vm_writev),
        )


SYSTEM_CALLS = {
    "x86_64": SystemCalls(0xC000003E, 41, 101, 310, 311),
    "aarch64": SystemCalls(0xC00000B7, 198, 117, 270, 271),
}


@dataclass(frozen=True)
class WorkerLimits:
    """``scoring.max_cpu_s``, ``scoring.max_memory_mib`` and ``scoring.network``."""

    max_cpu_s: int | None = None
    max_memory_mib: int | None = None
    denies_network: bool = False

    def to_json(self) -> dict[str, Any]:
        """For the worker's first frame."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> WorkerLimits:
        """What ``to_json`` wrote."""
        return cls(**data)

    def apply(self) -> None:
        """Put everything but the CPU limit on this process.

        Raises:
            OSError: the system refuses; nothing of the user must run then.
        """
        # A core file would hold prompts and completions, and fill the disk.
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if self.max_memory_mib is not None:
            num_bytes = self.max_memory_mib * MIB
            try:
                resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
            except (ValueError, OverflowError) as exc:  # above a limit of the server's own
                raise OSError(errno.EPERM, f"{self.max_memory_mib} MiB: {exc}") from exc
        if self.denies_network:
            deny_sockets()

    def start_sample(self) -> None:
        """Give this process the CPU time of one more sample.

        Only the soft limit moves, as a hard one could not be raised for the next sample.
        """
        if self.max_cpu_s is None:
            return
        usage = resource.getrusage(resource.RUSAGE_SELF)
        used_s = int(usage.ru_utime + usage.ru_stime)
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        # The kernel counts whole seconds: one more, so that no sample gets less than its due.
        wanted = used_s + self.max_cpu_s + 1
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def end_with_parent(parent_pid: int) -> None:
    """Have the kernel end this process when its parent ends; end now if that has happened."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux: the end of the pipe remains
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it died before the signal was asked for
        sys.exit(0)


def adopt_orphans(is_on: bool) -> None:
    """Whether what loses its parent among our descendants becomes our child, and can be found."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, int(is_on), 0, 0, 0)


def child_pids(pid: int) -> set[int]:
    """Children of a process, ended ones that were not waited for included; none if it is gone."""
    found: set[int] = set()
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            found.update(int(word) for word in path.read_text().split())
    return found


def kill_descendants(pid: int) -> None:
    """What a process has started, and what that has, whatever their process groups. Those that are
    started meanwhile, or change their parent, are found as long as the process itself lives."""
    killed: set[int] = set()
    for _ in range(MAX_PASSES):
        found: set[int] = set()
        level = {pid}
        while level := set().union(*map(child_pids, level)) - found:
            found |= level
        for descendant in found - killed:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(descendant, signal.SIGKILL)
        if found <= killed:
            return
        killed |= found


def deny_sockets() -> None:
    """Make ``socket`` fail with EPERM, whatever the family, in this process and its descendants.

    A seccomp filter, because it needs no privilege and works in containers, where user and network
    namespaces are often refused. ``socketpair`` and pipes go on working. What could borrow a
    socket, or the memory, of another process of the same user is denied too.

    Raises:
        OSError: not Linux, an architecture without a table, or a kernel without seccomp.
    """
    calls = SYSTEM_CALLS.get(platform.machine()) if sys.platform == "linux" else None
    if calls is None:
        raise OSError(
            errno.ENOSYS,
            f"scoring.network deny is not available on {sys.platform} {platform.machine()}",
        )
    program = build_filter(calls)
    buffer = ctypes.create_string_buffer(program)
    # struct sock_fprog: number of instructions, and where they are.
    descriptor = ctypes.create_string_buffer(
        struct.pack(
            "HxxxxxxP", len(program) // struct.calcsize(_INSTRUCTION), ctypes.addressof(buffer)
        )
    )
    libc = ctypes.CDLL(None, use_errno=True)
    # Without it only root may install a filter; and it keeps setuid programs from shedding ours.
    # The kernel reads whole registers, and refuses leftovers in them.
    libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    _call(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
    address = ctypes.addressof(descriptor)
    _call(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, address, 0, 0), "PR_SET_SECCOMP")


def build_filter(calls: SystemCalls) -> bytes:
    """Deny the calls, and every call by another architecture's numbers."""
    denied = calls.denied()
    deny = SECCOMP_RET_ERRNO | errno.EPERM
    # The last two instructions are "allow" and "deny"; jumps are counted from the one after.
    instructions = [
        (_LOAD_WORD, 0, 0, _OFFSET_OF_ARCHITECTURE),
        (_JUMP_EQUAL, 0, len(denied) + 3, calls.architecture),
        (_LOAD_WORD, 0, 0, _OFFSET_OF_NUMBER),
        (_JUMP_NOT_LESS, len(denied) + 1, 0, _X32_BIT),
        *((_JUMP_EQUAL, len(denied) - index, 0, call) for index, call in enumerate(denied)),
        (_RETURN, 0, 0, SECCOMP_RET_ALLOW),
        (_RETURN, 0, 0, deny),
    ]
    return b"".join(struct.pack(_INSTRUCTION, *instruction) for instruction in instructions)


def read_filter(program: bytes) -> list[tuple[int, ...]]:
    """Instructions of a filter: code, jump if true, jump if false, constant."""
    return list(struct.iter_unpack(_INSTRUCTION, program))


def _call(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({what}) failed with {errno.errorcode.get(number, number)}")
