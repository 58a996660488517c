"""Who owns the device: one thread, to which everything that touches a session's tensors is handed.

Torch's global generators, the default dtype and the current device belong to the process; with one thread they are
never shared.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

import torch

from sft.errors import ServerFullError, ServerUnavailableError

T = TypeVar("T")


class Run(Protocol):
    """Does work where the device may be touched, and waits for it."""

    def __call__(self, work: Callable[[], T]) -> T:
        """What the work returns; raises what it raises."""


def at_once(work: Callable[[], T]) -> T:
    """For whoever is on the right thread already."""
    return work()


class DeviceWorker:
    """A thread with a finite queue, first come, first served.

    That is fair between sessions, as each stream waits for its answer before it hands in the next message.
    """

    def __init__(self, device: torch.device, capacity: int, threads: int | None = None) -> None:
        """`capacity`: how many pieces may wait. `threads`: how many torch computes with; None is its own choice."""
        self.device = device
        self._queue: queue.Queue[tuple[Future[Any], Callable[[], Any]] | None] = queue.Queue(capacity)
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, args=(threads,), name=f"worker-{device}", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Queues `work`. Raises ServerFullError when the queue is full, ServerUnavailableError after `shutdown`."""
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise ServerUnavailableError("the server is shutting down")
            try:
                self._queue.put_nowait((future, work))
            except queue.Full:
                raise ServerFullError("the server's queue is full; try again later") from None
        return future

    def run(self, work: Callable[[], T]) -> T:
        """As `submit`, and waits for it; see Run."""
        return self.submit(work).result()

    def shutdown(self) -> None:
        """Lets the running piece finish, fails the waiting ones with ServerUnavailableError, and returns."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._fail_waiting()
                self._queue.put_nowait(None)
        self._thread.join()

    def _fail_waiting(self) -> None:
        while True:
            try:
                job = self._queue.get_nowait()
            except queue.Empty:
                return
            if job is not None and job[0].set_running_or_notify_cancel():
                job[0].set_exception(ServerUnavailableError("the server is shutting down"))

    def _run(self, threads: int | None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        while (job := self._queue.get()) is not None:
            future, work = job
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:
                    future.set_exception(error)
            del job, future, work  # an idle worker must not keep a closed session's memory
