"""A run whose edge has left: the cloud goes on alone, and `sft-edge attach` comes back for what it has made.

What the edge knows of it is in OUTPUT_DIR/detached.json, beside the checkpoint of the step at which it left. Coming
back, it goes on from there as any run does from a checkpoint, in the session that it left; the messages that it makes
again are those that it left, so none is sent, and their answers are there. Where the session is gone it goes on in
another.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence

from sft.errors import CloudMemoryError, StorageError, UsageError
from sft.files.whole import whole_file
from sft_edge.checkpoints import Checkpointing, Stopped
from sft_edge.files import json_text, storage_errors
from sft_edge.link import Left
from sft_edge.training import Progress, TrainingLoop

FILE = "detached.json"


class Detached(Stopped):
    """The edge has left."""


class LeftRun(NamedTuple):
    """As `detached.json` has it."""

    left: Left
    step: int
    """Steps that were taken before the edge left; a checkpoint is of it."""
    arguments: List[str]
    """Of `sft-edge train`, as they were given in `directory`."""
    directory: str


class Leaving:
    """For a run that is to leave as soon as the cloud can go on alone."""

    def __init__(self, output_dir: Path, arguments: Sequence[str], checkpointing: Checkpointing, progress: Progress):
        self._output_dir = output_dir
        self._arguments = arguments
        self._checkpointing = checkpointing
        self._progress = progress

    def after_step(self, loop: TrainingLoop) -> None:
        """Leaves where an epoch has ended: the cloud has all rows. Raises Detached; returns where that cannot be."""
        step = loop.state.global_step
        if step % loop.steps_per_epoch or step == loop.state.max_steps:
            return
        try:
            if not loop.system.can_leave:
                raise CloudMemoryError("the cloud keeps no activations, or does not go on without its edge")
            self._checkpointing.save_now(loop)
            directory = working_directory()

            def announce(left: Left) -> None:
                # Before the cloud hears of it: whatever happens then, somebody can come back.
                write_left(self._output_dir, LeftRun(left, step, list(self._arguments), directory))

            loop.leave(announce)
        except (StorageError, CloudMemoryError) as error:
            forget_left(self._output_dir)
            self._progress.status(f"cannot leave after step {step}: {error}; staying")
            return
        raise Detached(step, self._output_dir)


def working_directory() -> str:
    """That of the process; empty where it was deleted."""
    try:
        return os.getcwd()
    except OSError:
        return ""


def check_not_left(output_dir: Path, overwrite: bool) -> None:
    """For a run that begins, or goes on, there. Raises UsageError where one has left that somebody may come back to."""
    path = output_dir / FILE
    if overwrite:
        forget_left(output_dir)
    elif path.exists():
        raise UsageError(
            f"{output_dir} is of a run that has left its session: sft-edge attach {output_dir} comes back to it; "
            f"without {path.name} there, this command would give it up"
        )


def write_left(output_dir: Path, run: LeftRun) -> None:
    """For nobody else to read: with a token, it is a key to the session. Raises StorageError."""
    path = output_dir / FILE
    content = {**run._asdict(), "left": run.left._asdict()}
    with storage_errors(path), whole_file(path, mode=0o600) as file:
        file.write(json_text(content).encode("utf-8"))


def read_left(output_dir: Path) -> LeftRun:
    """Raises UsageError where no run has left its session, or none is told of."""
    path = output_dir / FILE
    try:
        content: Dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        left = Left(
            session_id=str(content["left"]["session_id"]),
            number=int(content["left"]["number"]),
            last=int(content["left"]["last"]),
            sha256=str(content["left"]["sha256"]),
        )
        arguments = [str(argument) for argument in content["arguments"]]
        run = LeftRun(left, int(content["step"]), arguments, str(content["directory"]))
    except FileNotFoundError:
        raise UsageError(
            f"{output_dir} has no {FILE}: no run has left there, or what it made was fetched; sft-edge train --detach "
            "begins one"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} is not what sft-edge train --detach wrote: the same command as then, with "
            "--resume-from-checkpoint, goes on from the checkpoint beside it"
        ) from error
    if not (0 < left.number < left.last and run.step > 0):
        raise UsageError(f"{path} is not what sft-edge train --detach wrote")
    return run


def forget_left(output_dir: Path) -> None:
    """What the run has made is here."""
    with suppress(OSError):
        (output_dir / FILE).unlink()
