"""The process group of a broadcast (``weights.transport: nccl``), in which every wait is bounded.

The one file of ``shared`` that imports torch: both ends of a wire have to be the same code. Nobody
but the two ends imports it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from threading import Thread
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from shared.collective import (
    SENDER_RANK,
    BroadcastBackend,
    BroadcastBrokenError,
    Seat,
    check_announcement,
)
from shared.errors import WeightTransferError

Bytes = npt.NDArray[np.uint8]

_POLL_S = 0.001
_WATCHDOG = "TORCH_NCCL_ASYNC_ERROR_HANDLING"


def usable_gpus() -> tuple[str, ...]:
    """UUIDs of the GPUs that this process sees."""
    if not torch.cuda.is_available():
        return ()
    return tuple(_gpu_uuid(index) for index in range(torch.cuda.device_count()))


def gpu_in_use() -> tuple[str, ...]:
    """The GPU that this process computes on; none if it uses none."""
    return (_gpu_uuid(torch.cuda.current_device()),) if torch.cuda.is_initialized() else ()


class Meeting:
    """Where the sender's members meet: a store on one address and a free port."""

    def __init__(self, address: str, timeout_s: float) -> None:
        """
        Raises:
            WeightTransferError: nothing can listen there.
        """
        try:
            family, *_, at = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, socket.SOCK_STREAM) as listener:
                listener.bind(at)
                listener.listen()
                self.port = int(listener.getsockname()[1])
                self.store = dist.TCPStore(
                    address,
                    self.port,
                    is_master=True,
                    wait_for_workers=False,
                    timeout=timedelta(seconds=timeout_s),
                    master_listen_fd=listener.detach(),
                )
        except (OSError, RuntimeError) as exc:
            raise WeightTransferError(
                f"no broadcast can be begun on the trainer's address {address}: {exc}"
            ) from exc


class BroadcastGroup:
    """One member's end. Made by all members at the same time; ``close`` ends it for all of them."""

    def __init__(self, seat: Seat, store: Any = None) -> None:
        """
        Args:
            store: the sender's (``Meeting.store``); receivers look for it.

        Raises:
            WeightTransferError: not all members come within ``weights.bucket_timeout_s``.
        """
        self._seat = seat
        self._plan = plan = seat.invitation
        self._group: Any = None
        self._device: torch.device | None = None
        limit = timedelta(seconds=plan.bucket_timeout_s)
        with self._naming(f"its {plan.num_members} members did not meet", plan.bucket_timeout_s):
            if store is None:
                store = dist.TCPStore(plan.address, plan.port, is_master=False, timeout=limit)
            store = dist.PrefixStore(plan.key, store)
            if plan.backend is BroadcastBackend.GLOO:
                self._group = _gloo_group(seat, store, limit)
            else:
                self._device = _gpu(seat.gpu)
                _within(plan.bucket_timeout_s, lambda: self._join_nccl(store))

    def send(self, offset: int, bucket: Bytes) -> Callable[[], None]:
        """Announce a bucket and send it. Returns what waits until it is sent: until then it must
        not change.

        Raises:
            WeightTransferError: a member is gone. So does what is returned, also when the bucket
                does not get through within ``weights.bucket_timeout_s``.
        """
        what = f"bytes from {offset} did not get through"
        limit_s = self._plan.bucket_timeout_s
        with self._naming(what, limit_s):
            parts = [
                self._start(self._sent(part), limit_s)
                for part in (np.array([offset, len(bucket)], np.int64).view(np.uint8), bucket)
            ]

        def wait() -> None:
            with self._naming(what, limit_s):
                while parts:
                    self._finish(parts.pop(0), limit_s)

        return wait

    def receive(self, position: int, into: Bytes) -> int:
        """Fill the beginning of ``into`` with the next bucket; its length.

        Args:
            position: how much has come so far.

        Raises:
            WeightTransferError: a member is gone, nothing comes in time, or it is not what is due.
        """
        plan = self._plan
        header = np.empty(16, np.uint8)
        with self._naming(f"no bucket came after byte {position}", plan.transfer_timeout_s):
            self._receive(header, plan.transfer_timeout_s)
        offset, length = (int(value) for value in header.view(np.int64))
        check_announcement(plan, position, offset, length)
        what = f"bytes {offset} to {offset + length} did not arrive"
        with self._naming(what, plan.bucket_timeout_s):
            self._receive(into[:length], plan.bucket_timeout_s)
        return length

    def close(self) -> None:
        """Leave. The others notice if they still wait for something. May be called again."""
        group, self._group = self._group, None
        if group is None:
            return
        with contextlib.suppress(RuntimeError):  # a group that is broken already
            group.abort()

    def _receive(self, into: Bytes, limit_s: float) -> None:
        if self._device is None:
            self._finish(self._start(torch.from_numpy(into), limit_s), limit_s)
            return
        there = torch.empty(len(into), dtype=torch.uint8, device=self._device)
        self._finish(self._start(there, limit_s), limit_s)
        torch.from_numpy(into).copy_(there)

    def _sent(self, data: Bytes) -> torch.Tensor:
        tensor = torch.from_numpy(data)
        return tensor if self._device is None else tensor.to(self._device)

    def _start(self, tensor: torch.Tensor, limit_s: float) -> Any:
        if self._group is None:
            raise RuntimeError("this member has left")
        options = dist.BroadcastOptions()
        options.rootRank = SENDER_RANK
        options.rootTensor = 0
        options.timeout = timedelta(seconds=limit_s)
        return self._group.broadcast([tensor], options)

    def _finish(self, work: Any, limit_s: float) -> None:
        if self._device is None:
            work.wait()  # as long as the timeout that it was started with
            return
        deadline_s = time.monotonic() + limit_s
        while not work.is_completed():
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"not complete after {limit_s:g} s")
            time.sleep(_POLL_S)
        work.wait()
        torch.cuda.synchronize(self._device)

    def _join_nccl(self, store: Any) -> None:
        assert self._device is not None, "set for nccl"
        torch.cuda.set_device(self._device)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=2 * self._plan.transfer_timeout_s)
        # torch's own watchdog would end the process, trainer included, where we end the push.
        before = os.environ.get(_WATCHDOG)
        os.environ[_WATCHDOG] = "0"
        try:
            plan = self._plan
            self._group = dist.ProcessGroupNCCL(store, self._seat.rank, plan.num_members, options)
        finally:
            if before is None:
                del os.environ[_WATCHDOG]
            else:
                os.environ[_WATCHDOG] = before
        # NCCL connects with the first broadcast, and cannot be told how long that may take.
        first = torch.zeros(1, dtype=torch.uint8, device=self._device)
        self._finish(self._start(first, self._plan.bucket_timeout_s), self._plan.bucket_timeout_s)

    @contextlib.contextmanager
    def _naming(self, what: str, limit_s: float) -> Iterator[None]:
        plan = self._plan
        try:
            yield
        except (RuntimeError, OSError) as exc:
            name = "bucket" if limit_s == plan.bucket_timeout_s else "transfer"
            raise BroadcastBrokenError(
                f"the broadcast of version {plan.version} over {plan.backend.value} broke off: "
                f"{what} within weights.{name}_timeout_s {limit_s:g}, or a member is gone ({exc})"
            ) from exc


def _gloo_group(seat: Seat, store: Any, limit: timedelta) -> Any:
    plan = seat.invitation
    # By address: gloo would look up the host's name, which often means the loopback.
    own = plan.address if seat.rank == SENDER_RANK else _address_towards(plan.address, plan.port)
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=own)]
    options._timeout = limit
    options._threads = 1  # in order
    return dist.ProcessGroupGloo(store, seat.rank, plan.num_members, options)


def _address_towards(address: str, port: int) -> str:
    """The address of this host from which another one is reached; nothing is sent."""
    family, kind, protocol, _, at = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(at)
        return str(probe.getsockname()[0])


def _gpu_uuid(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)


def _gpu(uuid: str | None) -> torch.device:
    for index in range(torch.cuda.device_count()):
        if _gpu_uuid(index) == uuid:
            return torch.device("cuda", index)
    raise RuntimeError(f"there is no GPU {uuid} here")


def _within(limit_s: float, call: Callable[[], None]) -> None:
    """For a call that knows no timeout. If it is late, its thread is left to its end."""
    errors: list[Exception] = []

    def run() -> None:
        try:
            call()
        except Exception as exc:  # noqa: BLE001  the thread that waits raises it, whatever it is
            errors.append(exc)

    thread = Thread(target=run, name="broadcast-join", daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        raise RuntimeError(f"not complete after {limit_s:g} s")
    if errors:
        raise errors[0]
