"""User rewards, well-behaved and not. Run in scoring workers, so nothing heavy is imported."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rollout_server.scoring.frames import encode_frame

Metadata = dict[str, Any]


def length(
    prompt: str, completion: str, answer: str | None, metadata: Metadata, factor: float = 1.0
) -> tuple[float, Metadata]:
    detail = {"prompt": prompt, "answer": answer, "metadata": metadata}
    return factor * len(completion), detail


def raises(prompt: str, completion: str, answer: str | None, metadata: Metadata) -> float:
    raise RuntimeError("on purpose")


def hangs(prompt: str, completion: str, answer: str | None, metadata: Metadata) -> float:
    while True:
        pass


def waits(prompt: str, completion: str, answer: str | None, metadata: Metadata, path: str) -> float:
    """Tell the worker's pid, then do not return."""
    write_whole(path, os.getpid())
    time.sleep(600)
    return 0.0


def waits_with_child(
    prompt: str,
    completion: str,
    answer: str | None,
    metadata: Metadata,
    path: str,
    leaves: bool = False,
) -> float:
    """Tell the pid of a process it has started, maybe in its own session, then do not return."""
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    child = subprocess.Popen(sleep, start_new_session=leaves)
    write_whole(path, child.pid)
    time.sleep(600)
    return 0.0


def echoes(
    prompt: str, completion: str, answer: str | None, metadata: Metadata, fails: bool = False
) -> tuple[float, Metadata]:
    """Half a surrogate pair behind the completion, as detail or as the error."""
    text = completion + "\ud800"
    if fails:
        raise RuntimeError(text)
    return 1.0, {text: text}


def exits(prompt: str, completion: str, answer: str | None, metadata: Metadata) -> float:
    os._exit(7)


def segfaults(prompt: str, completion: str, answer: str | None, metadata: Metadata) -> float:
    os.kill(os.getpid(), signal.SIGSEGV)
    return 0.0


def signals(
    prompt: str, completion: str, answer: str | None, metadata: Metadata, number: int
) -> float:
    os.kill(os.getpid(), number)
    return 0.0


def meddles(prompt: str, completion: str, answer: str | None, metadata: Metadata) -> float:
    """Answer in the worker's place, with nonsense, through every descriptor there is."""
    for descriptor in range(3, 20):
        with contextlib.suppress(OSError):
            os.write(descriptor, encode_frame({}))
    return 0.0


def prints(prompt: str, completion: str, answer: str | None, metadata: Metadata) -> float:
    """1 when standard input is empty and standard output can be written to."""
    print("x" * 100_000)
    sys.stdout.flush()
    return float(sys.stdin.read() == "")


def pid(prompt: str, completion: str, answer: str | None, metadata: Metadata) -> int:
    return os.getpid()


def order(prompt: str, completion: str, answer: str | None, metadata: Metadata, path: str) -> float:
    with open(path, "a") as file:
        file.write(completion + " ")
    return 0.0


def obeys(prompt: str, completion: str, answer: str | None, metadata: Metadata, path: str) -> int:
    """Note that it was called, then do what the completion begins with."""
    with open(path, "a") as file:
        file.write(completion + "\n")
    command = completion.split()[0]
    if command == "hang":
        time.sleep(600)
    elif command == "exit":
        os._exit(7)
    elif command == "raise":
        raise RuntimeError("on purpose")
    return len(completion)


def meets(
    prompt: str,
    completion: str,
    answer: str | None,
    metadata: Metadata,
    path: str,
    num_workers: int,
) -> int:
    """Wait until as many workers are here; tell whose this one is. Never quick."""
    Path(path, str(os.getpid())).touch()
    time.sleep(0.02)
    while len(os.listdir(path)) < num_workers:
        time.sleep(0.01)
    return os.getpid()


def connects(
    prompt: str, completion: str, answer: str | None, metadata: Metadata, family: str = "AF_INET"
) -> float:
    """1 when a socket can be opened."""
    socket.socket(getattr(socket, family), socket.SOCK_STREAM).close()
    return 1.0


def connects_in_child(
    prompt: str, completion: str, answer: str | None, metadata: Metadata
) -> tuple[float, Metadata]:
    """1 when a process it starts can open a socket."""
    code = "import socket; socket.socket()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return float(done.returncode == 0), {"stderr": done.stderr}


def pairs(prompt: str, completion: str, answer: str | None, metadata: Metadata) -> float:
    """1 when processes can still talk to those they start."""
    ours, theirs = socket.socketpair()
    ours.sendall(b"x")
    return float(theirs.recv(1) == b"x")


def allocates(
    prompt: str, completion: str, answer: str | None, metadata: Metadata, mib: int
) -> float:
    return float(len(bytearray(mib * 1024 * 1024)))


def computes(
    prompt: str, completion: str, answer: str | None, metadata: Metadata, cpu_s: float
) -> float:
    """Use so much CPU time."""
    end_s = time.process_time() + cpu_s
    while time.process_time() < end_s:
        pass
    return cpu_s


def variables(
    prompt: str, completion: str, answer: str | None, metadata: Metadata
) -> tuple[float, Metadata]:
    """The environment and the limit on core files."""
    core, _ = resource.getrlimit(resource.RLIMIT_CORE)
    return float(core), {"names": sorted(os.environ)}


def write_whole(path: str, number: int) -> None:
    """Make a file that is complete as soon as it is there."""
    partial = Path(path + ".partial")
    partial.write_text(str(number))
    partial.rename(path)


USER_REWARDS = {
    function.__name__: f"{__name__}:{function.__name__}"
    for function in (
        length, raises, hangs, waits, waits_with_child, exits, segfaults, prints, pid, order,
        obeys, meets, echoes, signals, meddles,
        connects, connects_in_child, pairs, allocates, computes, variables,
    )
}  # fmt: skip
"""``scoring.rewards`` with all of the above."""
