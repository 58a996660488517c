"""Does the runs of a grid, one after the other, each in a process of its own; what is done already is left."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, List, Mapping, NamedTuple, Sequence, Union

from sft.cli.child import python_command
from sft.printable import format_bytes, format_seconds, printable
from sft_edge.commands.reproduce.grid import Run
from sft_edge.commands.reproduce.records import Directory, Finished
from sft_edge.signals import Termination


class Failed(NamedTuple):
    """A run that has not got to its end, although nobody stopped it."""

    run: Run
    code: int
    """Of its process; 0 where it ended well, and left no results."""

    says: str
    """Its last line, and where the others are."""


class Stopped(Exception):
    """This command was asked to end; the run that was on has ended, too."""


class Runner:
    """Runs that have one place."""

    def __init__(
        self, output_dir: Path, way: Sequence[str], made_with: Mapping[str, Any], keep_models: bool, asked: Termination
    ) -> None:
        """`way`: arguments for runs that need a cloud; `asked` stops a run that is on, which then saves a checkpoint
        where it can."""
        self._output_dir = output_dir
        self._way = way
        self._made_with = made_with
        self._keep_models = keep_models
        self._asked = asked
        self.failed: List[Failed] = []

    def do(self, runs: Sequence[Run]) -> None:
        """Those that are not finished; tells each on a line. Those that fail are in `failed`: the others go on.

        Raises KeyboardInterrupt and Stopped, after the run that was on has ended, and StorageError.
        """
        left = [run for run in runs if Directory(self._output_dir, run).finished() is None]
        if len(left) < len(runs):
            _tell(f"{len(runs) - len(left)} of {len(runs)} runs are there already\n")
        for number, run in enumerate(left, 1):
            _tell(f"{number:>{len(str(len(left)))}}/{len(left)}  {run.task:5}  {run.system.title}  seed {run.seed}: ")
            try:
                outcome = self._one(run)
            except (KeyboardInterrupt, Stopped):
                _tell("stopped\n")
                raise
            if isinstance(outcome, Failed):
                self.failed.append(outcome)
                _tell(f"failed: {outcome.says}\n")
            else:
                crossed = f", {format_bytes(outcome.wire_bytes)}" if outcome.wire_bytes else ""
                _tell(f"{outcome.metric} {outcome.score:.2f}, {format_seconds(outcome.seconds)}{crossed}\n")

    def command(self, run: Run) -> List[str]:
        """What is run, as one would type it after `sft-edge`."""
        words = [word for flag in run.flags.items() for word in flag]
        way = self._way if run.system.mode != "local" else []
        return ["train", *words, *way, "--output-dir", str(Directory(self._output_dir, run).model)]

    def _one(self, run: Run) -> Union[Finished, Failed]:
        directory = Directory(self._output_dir, run)
        goes_on = directory.begin()
        # It begins anew where no checkpoint is there; a torn result of its own is in nobody's way.
        arguments = [*self.command(run), *(["--resume-from-checkpoint"] if goes_on else [])]
        began = time.monotonic()
        try:
            code = self._wait_for([*python_command("sft_edge.cli"), *arguments], directory.log)
        except (KeyboardInterrupt, Stopped):
            directory.took(time.monotonic() - began)
            raise
        finished = None
        if code == 0:
            finished = directory.end(time.monotonic() - began, self._made_with, self._keep_models)
        if finished is not None:
            return finished
        said = printable(directory.last_line())[:400] or "it said nothing"
        ended = f"killed by signal {-code}: " if code < 0 else "" if code else "it left no whole results: "
        return Failed(run, code, f"{ended}{said} ({directory.log})")

    def _wait_for(self, command: Sequence[str], log: Path) -> int:
        """Its exit code. When this command is to end, the run is asked to, and waited for; a second Ctrl-C kills it."""
        with log.open("ab") as told, _ignoring_ctrl_c():
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=told, stderr=subprocess.STDOUT)
        with child:
            self._asked.then = child.terminate  # or the run would go on, and nobody would know of it
            try:
                if self._asked.is_set():
                    child.terminate()
                code = child.wait()
            except KeyboardInterrupt:
                child.terminate()
                try:
                    child.wait()
                except KeyboardInterrupt:
                    child.kill()
                raise
            finally:
                self._asked.then = lambda: None
        if self._asked.is_set():
            raise Stopped
        return code


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
