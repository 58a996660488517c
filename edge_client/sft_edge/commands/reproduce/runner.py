"""Does the runs of a grid, each in a process of its own; what is done already is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, List, Mapping, NamedTuple, Sequence, Set, Union

from sft.cli.child import python_command
from sft.errors import StorageError
from sft.printable import format_bytes, format_seconds, printable
from sft_edge.commands.reproduce.grid import Run
from sft_edge.commands.reproduce.records import Directory, Finished
from sft_edge.signals import Termination, interrupts_deferred

_LOOK_SECONDS = 0.2
"""How long to wait for the end of one of several runs before the next is looked at."""


_AT_ITS_END = (0, -signal.SIGTERM)
"""Codes of runs that were asked to end, and may have left whole results: from its last line on a run is killed by that,
as long as it lives."""


class Failed(NamedTuple):
    """A run that has not got to its end, although nobody stopped it."""

    run: Run
    code: int
    """Of its process; 0 where it ended well, and left no results."""

    says: str
    """Its last line, and where the others are."""


class Stopped(Exception):
    """This command was asked to end; the runs that were on have ended, too."""


class _On(NamedTuple):
    """A run that is on."""

    run: Run
    directory: Directory
    child: subprocess.Popen[bytes]
    began: float
    called: str
    """What is told of it first."""


class Runner:
    """Runs that have one place."""

    def __init__(
        self,
        output_dir: Path,
        way: Sequence[str],
        made_with: Mapping[str, Any],
        keep_models: bool,
        asked: Termination,
        jobs: int = 1,
    ) -> None:
        """`way`: arguments for runs that need a cloud; `asked` stops runs that are on, which then save a checkpoint
        where they can; `jobs`: so many are on side by side."""
        self._output_dir = output_dir
        self._way = way
        self._made_with = made_with
        self._keep_models = keep_models
        self._asked = asked
        self._jobs = jobs
        self._told: Set[int] = set()
        self._life = -1
        self.failed: List[Failed] = []

    def do(self, runs: Sequence[Run]) -> None:
        """Those that are not finished; tells each on a line. Those that fail are in `failed`: the others go on.

        Raises KeyboardInterrupt and Stopped, after the runs that were on have ended, and StorageError.
        """
        left = [run for run in runs if Directory(self._output_dir, run).finished() is None]
        if len(left) < len(runs):
            _tell(f"{len(runs) - len(left)} of {len(runs)} runs are there already\n")
        digits = len(str(len(left)))
        waiting = [(run, f"{number:>{digits}}/{len(left)}  ") for number, run in enumerate(left, 1)]
        on: List[_On] = []
        # The standard input of all runs, to which nobody writes: when it ends, this process has, if only by kill -9.
        self._life, held = os.pipe()
        self._asked.then = lambda: self._ask_to_end(on)  # or they would go on, and nobody would know of it
        try:
            while waiting or on:
                while waiting and len(on) < self._jobs and not self._asked.is_set():
                    on.append(self._begin(*waiting.pop(0)))
                if not self._asked.is_set():
                    ended = _first_to_end(on)
                if self._asked.is_set():
                    raise Stopped
                with interrupts_deferred():  # a run that has ended is one
                    on.remove(ended)
                    self._tell_of(ended)
        except BaseException as error:
            self._stop(on)
            if isinstance(error, (KeyboardInterrupt, Stopped)):
                _tell("stopped\n")
            raise
        finally:
            self._asked.then = lambda: None
            os.close(held)
            os.close(self._life)

    def command(self, run: Run) -> List[str]:
        """What is run, as one would type it after `sft-edge`."""
        words = [word for flag in run.flags.items() for word in flag]
        way = self._way if run.system.mode != "local" else []
        return ["train", *words, *way, "--output-dir", str(Directory(self._output_dir, run).model)]

    def _begin(self, run: Run, number: str) -> _On:
        called = f"{number}{run.task:5}  {run.system.title}  seed {run.seed}: "
        if self._jobs == 1:
            _tell(called)
        directory = Directory(self._output_dir, run)
        goes_on = directory.begin(self._made_with)
        # It begins anew where no checkpoint is there; a torn result of its own is in nobody's way.
        arguments = [*self.command(run), *(["--resume-from-checkpoint"] if goes_on else [])]
        began = time.monotonic()
        with directory.log.open("ab") as told, _ignoring_ctrl_c():
            command = [*python_command("sft_edge.cli", ends_with_stdin=True), *arguments]
            child = subprocess.Popen(command, stdin=self._life, stdout=told, stderr=subprocess.STDOUT)
        return _On(run, directory, child, began, called)

    def _tell_of(self, ended: _On) -> None:
        """What came of a run that has ended."""
        outcome = self._outcome(ended)
        if isinstance(outcome, Finished):
            self._tell_of_finished(ended, outcome)
        else:
            self.failed.append(outcome)
            self._tell_on(ended, f"failed: {outcome.says}")

    def _tell_of_finished(self, ended: _On, finished: Finished) -> None:
        crossed = f", {format_bytes(finished.wire_bytes)}" if finished.wire_bytes else ""
        took = format_seconds(finished.seconds)
        self._tell_on(ended, f"{finished.metric} {finished.score:.2f}, {took}{crossed}")

    def _tell_on(self, ended: _On, text: str) -> None:
        """On the line of a run, which side by side begins with its end."""
        _tell(f"{'' if self._jobs == 1 else ended.called}{text}\n")

    def _outcome(self, ended: _On) -> Union[Finished, Failed]:
        code, directory = ended.child.returncode, ended.directory
        if code == 0:
            finished = directory.end(time.monotonic() - ended.began, self._keep_models)
            if finished is not None:
                return finished
        said = printable(directory.last_line())[:400] or "it said nothing"
        how = f"killed by signal {-code}: " if code < 0 else "" if code else "it left no whole results: "
        return Failed(ended.run, code, f"{how}{said} ({directory.log})")

    def _ask_to_end(self, on: Sequence[_On]) -> None:
        """Once: who is asked twice saves nothing."""
        for one in on:
            if one.child.pid not in self._told:
                self._told.add(one.child.pid)
                one.child.terminate()

    def _stop(self, on: Sequence[_On]) -> None:
        """Has the runs end, and waits for that; a second Ctrl-C kills them. Those that got to their end count."""
        try:
            self._ask_to_end(on)
            for one in on:
                one.child.wait()
        except KeyboardInterrupt:
            for one in on:
                one.child.kill()
            for one in on:
                one.child.wait()
        with interrupts_deferred():
            for one in on:
                try:
                    self._keep(one)
                except StorageError as error:  # the others' time counts, too, and that it was a stop
                    self._tell_on(one, f"failed: {error}")

    def _keep(self, one: _On) -> None:
        """What is to be kept of a run that was stopped. Raises StorageError."""
        seconds = time.monotonic() - one.began
        if one.child.returncode not in _AT_ITS_END:
            one.directory.took(seconds)
            return
        finished = one.directory.end(seconds, self._keep_models)
        if finished is not None:
            self._tell_of_finished(one, finished)


def _first_to_end(on: Sequence[_On]) -> _On:
    while True:
        for one in on:
            try:
                one.child.wait(_LOOK_SECONDS if len(on) > 1 else None)
            except subprocess.TimeoutExpired:
                continue
            return one


@contextmanager
def _ignoring_ctrl_c() -> Iterator[None]:
    """What is started in the block goes on doing so: a terminal sends it to all of the group, and a run that got it
    would save its model and be over, where SIGTERM has it leave a checkpoint."""
    if threading.current_thread() is not threading.main_thread():  # which alone may
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _tell(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
