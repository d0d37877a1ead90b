"""Separate hosts on one machine, made of namespaces and joined by a cable that can be cut.

A host has a network, a process table, a ``/dev/shm`` and a ``/tmp/ray`` of its own: what runs in it
reaches nothing but its own loopback and, through the cable, the other host. Files are shared, as by
a network disk. When a host is closed the kernel ends everything in it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import psutil

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("ip", "unshare", "nsenter", "mount", "bash")
UNSHARE = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
CLONE_NEWNET = 0x40000000
NETWORK = "10.213.77"
"""Of the cable; nothing outside the namespaces has an address in it."""
START_TIMEOUT_S = 30.0
MAX_CLIENTS = 4
# Process 1 of the host. Bash also collects orphans, or ended processes would seem to live on.
INIT = """
mount -t tmpfs tmpfs /dev/shm && mkdir -p /tmp/ray && mount --bind "$1" /tmp/ray && touch "$2" &&
while :; do sleep 0.5; done
"""
Answer = TypeVar("Answer")


def why_not() -> str | None:
    """Why this machine cannot have such hosts; None where it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "namespaces need Linux and root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not installed (iproute2, util-linux)"
    probe = f"slip-probe-{os.getpid()}"
    try:
        _run("ip", "netns", "add", probe)
        _run("ip", "-n", probe, "link", "add", "one", "type", "veth", "peer", "name", "two")
        enter = ("ip", "netns", "exec", probe)
        _run(
            *enter, "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "true"
        )
    except subprocess.CalledProcessError as exc:
        return f"this sandbox allows no namespaces: {exc.stderr.decode().strip()}"
    finally:
        subprocess.run(["ip", "netns", "del", probe], check=False, capture_output=True)
    return None


class Host:
    """Opened and closed by ``two_hosts``."""

    def __init__(self, name: str, address: str, directory: Path) -> None:
        self.name = name
        self.address = address
        self._directory = directory
        self._clients: ThreadPoolExecutor | None = None
        self._commands: list[subprocess.Popen[bytes]] = []
        self._unshare: subprocess.Popen[bytes] | None = None
        self._init_pid = 0

    def open(self) -> None:
        """Make it; there is nothing on it yet."""
        ray, ready = self._directory / "ray", self._directory / "ready"
        ray.mkdir(parents=True)
        _run("ip", "netns", "add", self.name)
        _run("ip", "-n", self.name, "link", "set", "lo", "up")
        self._unshare = subprocess.Popen(
            [
                *("ip", "netns", "exec", self.name),
                *UNSHARE,
                *("bash", "-c", INIT, "init", str(ray), str(ready)),
            ],
        )
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not ready.exists():
            assert self._unshare.poll() is None, f"host {self.name} did not start"
            assert time.monotonic() < deadline_s, (
                f"host {self.name} is not up after {START_TIMEOUT_S} s"
            )
            time.sleep(0.02)
        (init,) = psutil.Process(self._unshare.pid).children()
        self._init_pid = init.pid

    def run(
        self, command: Sequence[str], log: Path, environment: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        """Start a command on the host. The pid is of ``nsenter``, which waits for it."""
        entered = ["nsenter", "--target", str(self._init_pid), "--net", "--mount", "--pid"]
        with log.open("ab") as output:
            started = subprocess.Popen(
                # Entering the host's file systems forgets the working directory.
                [*entered, "env", f"--chdir={ROOT}", *command],
                stdout=output,
                stderr=output,
                env=environment,
            )
        self._commands.append(started)
        return started

    def end(self, command: subprocess.Popen[bytes], timeout_s: float) -> int:
        """SIGTERM to what ``run`` has started; its exit code."""
        if command.poll() is None:
            for process in psutil.Process(command.pid).children():
                process.send_signal(signal.SIGTERM)
        return command.wait(timeout_s)

    def submit(self, function: Callable[[], Answer]) -> Future[Answer]:
        """Run a function of this process in the host's network."""
        if self._clients is None:
            self._clients = ThreadPoolExecutor(
                MAX_CLIENTS, initializer=_enter_network, initargs=(self.name,)
            )
        return self._clients.submit(function)

    def processes(self) -> list[psutil.Process]:
        """Everything that runs on it, but for its first process and what that one waits with."""
        own = os.stat(f"/proc/{self._init_pid}/ns/pid").st_ino
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                is_inside = os.stat(f"/proc/{process.pid}/ns/pid").st_ino == own
                is_init = process.pid == self._init_pid or (
                    process.ppid() == self._init_pid and process.name() == "sleep"
                )
                if is_inside and not is_init:
                    found.append(process)
        return found

    def shared_memory(self) -> set[str]:
        """Names in its own ``/dev/shm``."""
        return set(os.listdir(f"/proc/{self._init_pid}/root/dev/shm"))

    def close(self) -> None:
        """End everything on it; its network goes with it."""
        if self._clients is not None:
            self._clients.shutdown(wait=False, cancel_futures=True)
        if self._unshare is not None:
            self._unshare.kill()
            self._unshare.wait(START_TIMEOUT_S)
        for command in self._commands:
            command.wait(START_TIMEOUT_S)
        subprocess.run(["ip", "netns", "del", self.name], check=False, capture_output=True)


class Cable:
    """Between two hosts."""

    def __init__(self, one: Host, two: Host) -> None:
        self._far_end = two
        ends = (one, two)
        _run(
            *("ip", "link", "add", "cable", "netns", one.name, "type", "veth"),
            *("peer", "name", "cable", "netns", two.name),
        )
        for host in ends:
            _run("ip", "-n", host.name, "addr", "add", f"{host.address}/24", "dev", "cable")
        self.join()
        _run("ip", "-n", one.name, "link", "set", "cable", "up")

    def cut(self) -> None:
        """Nothing passes any more; nobody is told."""
        _run("ip", "-n", self._far_end.name, "link", "set", "cable", "down")

    def join(self) -> None:
        """What is still tried passes again."""
        _run("ip", "-n", self._far_end.name, "link", "set", "cable", "up")


@contextlib.contextmanager
def two_hosts(directory: Path) -> Iterator[tuple[Host, Host, Cable]]:
    """Joined; all of it is gone afterwards."""
    with contextlib.ExitStack() as stack:
        hosts = []
        for number in (1, 2):
            name = f"slip-{os.getpid()}-{number}"
            host = Host(name, f"{NETWORK}.{number}", directory / f"host-{number}")
            stack.callback(host.close)
            host.open()
            hosts.append(host)
        yield hosts[0], hosts[1], Cable(*hosts)


def network_names() -> set[str]:
    """Of all network namespaces of this machine."""
    listed = _run("ip", "netns", "list").decode().split("\n")
    return {line.split()[0] for line in listed if line}


def _enter_network(name: str) -> None:
    """The calling thread's sockets are the namespace's from here on; other threads' are not."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{name}", "rb") as namespace:
        if libc.setns(namespace.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter the network of host {name}")


def _run(*command: str) -> bytes:
    return subprocess.run(command, check=True, capture_output=True, timeout=START_TIMEOUT_S).stdout
