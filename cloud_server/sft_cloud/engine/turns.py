"""Whose turn it is to have a model built: one at a time, callers in turn, and a little at a time while others train.

A model of hundreds of blocks takes seconds of Python to build, and Python does one thing at a time: a thread of its own
would not be enough. So who builds pauses, in proportion to what it took, as long as sessions are worked on.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from torch.overrides import TorchFunctionMode

from sft.errors import ServerUnavailableError
from sft_cloud.engine.worker import Run

T = TypeVar("T")

SLICE_SECONDS = 0.001
"""After so long who builds looks whether others train."""

LONGEST_SLICE_SECONDS = 0.05

REST = 4.0
"""How long it then pauses, as a multiple of what it took: training keeps four fifths."""


class Gone:
    """Whether whoever asked has gone, and nobody wants what comes of it. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._has_gone = False
        self._wakes: threading.Event | None = None

    def goes(self) -> None:
        """From now on."""
        with self._lock:
            self._has_gone = True
            if self._wakes is not None:
                self._wakes.set()

    def wait(self, event: threading.Event) -> None:
        """For an event, or until whoever asked has gone. For one thread at a time."""
        with self._lock:
            self._wakes = event
            if self._has_gone:
                event.set()
        event.wait()

    def check(self) -> None:
        """Raises ServerUnavailableError, which nobody hears."""
        if self._has_gone:
            raise ServerUnavailableError("whoever asked for this session has gone")


class Turns:
    """One at a time. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_taken = False
        self._waiting: dict[str, deque[threading.Event]] = {}  # by caller; whose turn is next is first

    @contextmanager
    def of(self, caller: str, gone: Gone | None = None) -> Iterator[None]:
        """Waits until it is the turn of the caller, who has it for the block.

        Raises ServerUnavailableError where it has gone: it stands in nobody's way then.
        """
        gone = Gone() if gone is None else gone
        mine = threading.Event()
        with self._lock:
            if self._is_taken:
                self._waiting.setdefault(caller, deque()).append(mine)
            else:
                self._is_taken = True
                mine.set()
        gone.wait(mine)
        if self._left(caller, mine):
            gone.check()
        try:
            gone.check()
            yield
        finally:
            self._pass_on()

    def _left(self, caller: str, mine: threading.Event) -> bool:
        """Takes out of the line who has gone before its turn came; whether it was there."""
        with self._lock:
            waiting = self._waiting.get(caller, deque())
            if mine not in waiting:
                return False
            waiting.remove(mine)
            if not waiting:
                del self._waiting[caller]
            return True

    def _pass_on(self) -> None:
        with self._lock:
            if not self._waiting:
                self._is_taken = False
                return
            caller = next(iter(self._waiting))
            waiting = self._waiting.pop(caller)
            following = waiting.popleft()
            if waiting:
                self._waiting[caller] = waiting  # behind the others
        following.set()


class Paced(TorchFunctionMode):
    """Has what builds a model in the block pause while others train. For the thread that enters it."""

    def __init__(
        self, run: Run, others_train: Callable[[], bool], sleep: Callable[[float], object] = time.sleep
    ) -> None:
        """`run`: on the device's thread."""
        super().__init__()
        self._run = run
        self._others_train = others_train
        self._sleep = sleep
        self._began = time.thread_time()  # and not what others took of the processor meanwhile

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A library that builds a model asks torch for each of its parameters.
        took = time.thread_time() - self._began
        if took >= SLICE_SECONDS:
            self._rest(took)
        return function(*args, **(kwargs or {}))

    def run(self, work: Callable[[], T]) -> T:
        """As the `run` it was made with, and a pause after it."""
        took = 0.0

        def timed() -> T:
            nonlocal took
            began = time.thread_time()
            try:
                return work()
            finally:
                took = time.thread_time() - began

        result = self._run(timed)
        self._rest(took)
        return result

    def _rest(self, took: float) -> None:
        if self._others_train():
            self._sleep(REST * took)
        self._began = time.thread_time()


def in_pieces(run: Run, pieces: Generator[None, None, T]) -> T:
    """What a generator returns that does its work between its yields, where `run` runs it.

    In between others have their turn there. The longer these take, the longer is a piece: a session is not opened for
    ever because others compute large batches.
    """

    def work(asked: float) -> tuple[bool, Any]:
        began = time.perf_counter()
        seconds = min(max(SLICE_SECONDS, (began - asked) / REST), LONGEST_SLICE_SECONDS)
        while True:
            try:
                next(pieces)
            except StopIteration as end:
                return True, end.value
            if time.perf_counter() - began >= seconds:
                return False, None

    while True:
        is_done, result = run(partial(work, time.perf_counter()))
        if is_done:
            return result  # type: ignore[no-any-return]
