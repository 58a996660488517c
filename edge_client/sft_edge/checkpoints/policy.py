"""When a run saves a checkpoint, which are kept, and from which one it goes on."""

from __future__ import annotations

import secrets
import threading
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Dict, List, Mapping, Optional, Type

from sft.errors import CheckpointError, LinkError, ProtocolError, SessionLostError, StorageError, UsageError
from sft_edge.checkpoints.content import parts_of, read_state, restore
from sft_edge.checkpoints.directory import (
    EdgeCheckpoint,
    check_hashes,
    checkpoints_in,
    foreign,
    in_the_way,
    only_run_in,
    open_checkpoint,
    remove_all_but,
    remove_others,
    write_checkpoint,
)
from sft_edge.checkpoints.same_run import check_length, check_same_run
from sft_edge.link import TRANSIENT
from sft_edge.options import NEWEST, TrainingOptions
from sft_edge.systems import System
from sft_edge.training import Progress, TrainingLoop


class CloudStoppingError(SessionLostError):
    """The server ends in order, and a checkpoint is saved: the run goes on when it is back."""


class Stopped(Exception):
    """The run was asked to stop, and did, at `step`; `directory` is its newest checkpoint, if there is one."""

    def __init__(self, step: int, directory: Optional[Path]) -> None:
        super().__init__(step, directory)
        self.step, self.directory = step, directory


def options_before(training: TrainingOptions) -> Dict[str, str]:
    """By flag, as text, those of the cut and of all else that decides what comes of a run, as the checkpoint has them
    that it is to go on from; nothing where it begins at step 0. Raises CheckpointError."""
    wanted = training.resume_from_checkpoint
    if wanted == NEWEST:
        found = checkpoints_in(training.output_dir) if training.output_dir is not None else []
    else:
        found = [] if wanted is None else [open_checkpoint(Path(wanted))]
    for checkpoint in found:
        try:
            return dict(read_state(checkpoint)["likeness"])
        except (CheckpointError, KeyError, TypeError, ValueError) as error:
            if checkpoint is found[-1]:  # as with `offers`, an older one will do
                raise CheckpointError(f"{checkpoint.directory} does not say what it was trained with") from error
    return {}


class Checkpointing:
    """Of one run, however often its session is lost. A context manager: meanwhile no other run may use its directory.

    Entering it raises UsageError where one does, and CheckpointError where `--resume-from-checkpoint` cannot be done.
    """

    def __init__(
        self,
        output_dir: Path,
        training: TrainingOptions,
        likeness: Mapping[str, str],
        progress: Progress,
        terminated: threading.Event,
    ) -> None:
        """`terminated`: the run is to stop after its step, with a checkpoint."""
        self._output_dir = output_dir
        self._every = training.save_steps or 0
        self._limit = training.save_total_limit
        self._likeness = dict(likeness)
        self._progress = progress
        self._terminated = terminated
        self._lock = ExitStack()
        self._wanted = training.resume_from_checkpoint
        self.counts = {"recoveries": 0, "steps_recomputed": 0}
        """For `all_results.json`; they survive with the checkpoints."""
        self._lost_at = 0
        self._named: Optional[EdgeCheckpoint] = None  # on the command line
        self._has_saved = False
        self.run_id = secrets.token_hex(16)
        self._newest_step = -1  # what is newer, the run was told to do without

    @property
    def can_go_on(self) -> bool:
        """Whether a run whose session is lost begins anew: it was asked to save, or did."""
        return bool(self._every or self._mine())

    @property
    def newest(self) -> Optional[Path]:
        """The run's newest checkpoint in its directory, if there is one."""
        mine = self._mine()
        return mine[0].directory if mine else None

    def recover(self, lost_at: int) -> None:
        """The session was lost when so many steps were taken: what is saved comes next."""
        self.counts["recoveries"] += 1
        self._lost_at = lost_at

    def offers(self) -> List[EdgeCheckpoint]:
        """From what the next attempt may go on, the newest first; nothing where it begins at step 0.

        The newest one was read, and is whole to the last bit. Raises CheckpointError, and UsageError for a run that
        would be another.
        """
        found, named = self._mine(), self._named
        if named is not None:  # that one and no other, until the run has saved one itself
            newer = [checkpoint for checkpoint in found if checkpoint.step > named.step]
            found = [*(newer if self._has_saved else []), named]
        for index, checkpoint in enumerate(found):
            try:
                check_hashes(checkpoint)
            except CheckpointError:
                if checkpoint is found[-1]:
                    raise
                continue
            check_same_run(self._likeness, read_state(checkpoint)["likeness"], checkpoint.directory)
            return found[index:]
        return []

    def choose(self, system: System, offered: List[EdgeCheckpoint]) -> Optional[EdgeCheckpoint]:
        """Of what `offers` gave, the one that a system which was opened with it goes on from."""
        if not offered:
            return None
        if offered[0].manifest.other_half is None:
            return offered[0]
        chosen = next((checkpoint for checkpoint in offered if checkpoint.step == system.first_step), None)
        if chosen is None:
            raise ProtocolError(f"the cloud goes on from step {system.first_step}, of which nothing was offered")
        if chosen is not offered[0]:
            check_hashes(chosen)
        return chosen

    def begin(self, system: System, loop: TrainingLoop, chosen: Optional[EdgeCheckpoint]) -> None:
        """Puts a new loop to where the chosen checkpoint is.

        Raises Stopped where the run was asked to stop already, UsageError where something is in the place of a
        checkpoint that is to come.
        """
        step = 0
        if chosen is not None:
            step, state = chosen.step, read_state(chosen)
            check_length(step, loop.state.max_steps, chosen.directory)
            restore(chosen, system, loop)
            saved = state["counts"]
            self.counts = {name: max(count, saved[name]) for name, count in self.counts.items()}  # of this process, too
            planned, length = state["loop"]["trainer_state"]["max_steps"], ""
            if planned != loop.state.max_steps:
                loop.take_up_schedule()
                length = (
                    f"; it was to have {planned} steps: learning rates are those of {loop.state.max_steps} from here on"
                )
            self._progress.status(f"going on from step {step}, as it is in {chosen.directory}{length}")
        self.counts["steps_recomputed"] += max(self._lost_at - step, 0)
        self._lost_at = 0
        # Had this run died before its first save, the next one would take them for its own.
        remove_others(self.run_id, self._output_dir)
        for path in (path for at, path in foreign(self._output_dir).items() if self._is_due(at, step, loop)):
            raise UsageError(in_the_way(path))
        self.check_stop(loop)

    def is_due(self, step: int, system: System) -> bool:
        """Whether a checkpoint is saved after so many steps, or the run is to stop then."""
        if system.makes_again:  # the cloud is further than this
            return self._terminated.is_set()
        return self._terminated.is_set() or system.stopping or bool(self._every and step % self._every == 0)

    def after_step(self, loop: TrainingLoop) -> None:
        """Saves where it is due. Raises Stopped, CloudStoppingError, StorageError where a last checkpoint fails."""
        step, asked = loop.state.global_step, self._terminated.is_set()
        if not self.is_due(step, loop.system):
            return
        if loop.system.makes_again:
            self.check_stop(loop)
        try:
            checkpoint = self._save(loop)
        except StorageError as error:
            if asked:
                last = f"the newest is {self.newest}" if self.newest else "there is none"
                raise StorageError(f"no checkpoint of step {step} could be saved ({error}); {last}") from error
            self._progress.status(f"no checkpoint of step {step}: {error}; training goes on")
            return
        if asked:
            raise Stopped(step, checkpoint.directory)
        if loop.system.stopping:
            raise CloudStoppingError("the server stops")

    def save_now(self, loop: TrainingLoop) -> None:
        """Between two steps; nothing is done where that is saved. Raises StorageError."""
        if not self.is_saved(loop.state.global_step):
            self._save(loop)

    def is_saved(self, step: int) -> bool:
        """Whether this process has saved a checkpoint after so many steps, the newest."""
        return self._has_saved and self._newest_step == step

    def check_lost(self, lost_at: int, error: LinkError) -> None:
        """The session was lost when so many steps were taken. Raises Stopped, or StorageError where nothing is saved,
        for a run that is to stop: nobody is left to save a checkpoint with.
        """
        if self._terminated.is_set() and isinstance(error, (SessionLostError, *TRANSIENT)):
            if lost_at and not self._mine():
                raise StorageError(f"no checkpoint of step {lost_at} could be saved ({error}); there is none")
            self.check_stop()

    def check_stop(self, loop: Optional[TrainingLoop] = None) -> None:
        """Raises Stopped where the run is to stop and nothing is to be saved first."""
        if self._terminated.is_set():
            mine = self._mine()
            step = loop.state.global_step if loop is not None else mine[0].step if mine else 0
            raise Stopped(step, mine[0].directory if mine else None)

    def __enter__(self) -> Checkpointing:
        with ExitStack() as stack:
            stack.enter_context(only_run_in(self._output_dir))
            newest = self._first(self._wanted)  # not before: until then another run may have written there
            if newest is not None:
                self.run_id, self._newest_step = newest.manifest.run_id, newest.step
            self._lock = stack.pop_all()
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self._lock.__exit__(kind, error, trace)

    def _first(self, wanted: Optional[str]) -> Optional[EdgeCheckpoint]:
        if wanted is None:
            return None
        if wanted != NEWEST:
            self._named = open_checkpoint(Path(wanted))
            return self._named
        found = checkpoints_in(self._output_dir)
        if not found:
            others = ", ".join(path.name for path in sorted(foreign(self._output_dir).values())[:3])
            not_ours = f" ({others}: none of ours)" if others else ""
            self._progress.status(f"no checkpoint in {self._output_dir} yet{not_ours}: beginning at step 0")
        return found[0] if found else None

    def _mine(self) -> List[EdgeCheckpoint]:
        """Of this run, in its directory, the newest first."""
        found = checkpoints_in(self._output_dir)
        return [c for c in found if c.manifest.run_id == self.run_id and c.step <= self._newest_step]

    def _is_due(self, at: int, now: int, loop: TrainingLoop) -> bool:
        return bool(self._every) and at % self._every == 0 and now < at <= loop.state.max_steps

    def _is_outside(self, checkpoint: EdgeCheckpoint) -> bool:
        return checkpoint.directory.resolve().parent != self._output_dir.resolve()

    def _save(self, loop: TrainingLoop) -> EdgeCheckpoint:
        """A new checkpoint. Where there is no room for it, those that it would take the place of go first."""
        step, system = loop.state.global_step, loop.system
        self._progress.status(f"saving a checkpoint of step {step}")
        try:
            checkpoint = self._write(loop)
        except StorageError:
            # Also halves that a save left on the cloud which failed here. The newest stays, whatever the limit.
            self._tidy(system, None if self._limit is None else max(self._limit - 1, 1))
            checkpoint = self._write(loop)
        self._newest_step, self._has_saved = step, True
        try:
            self._tidy(system, self._limit)
            self._progress.status("")
        except StorageError as error:
            self._progress.status(f"older checkpoints are still there: {error}")
        return checkpoint

    def _write(self, loop: TrainingLoop) -> EdgeCheckpoint:
        """Both halves, in an order that docs/checkpoints.md is about."""
        other_half = loop.system.save_other_half()
        files = parts_of(loop.system, loop, {"likeness": self._likeness, "counts": self.counts})
        return write_checkpoint(self._output_dir, self.run_id, loop.state.global_step, other_half, files)

    def _tidy(self, system: System, limit: Optional[int]) -> None:
        """Deletes what is not to be kept, the cloud's halves first: what is left here has its other half."""
        mine = self._mine()
        # One that is linked to is another run's, too: neither half of it is ours to delete.
        kept = [c for c in mine if not c.directory.is_symlink()][:limit]
        kept += [c for c in mine if c.directory.is_symlink()]
        steps = {checkpoint.step for checkpoint in kept}
        if self._named is not None and self._is_outside(self._named):
            steps.add(self._named.step)
        system.keep_checkpoints(sorted(steps))
        remove_all_but([checkpoint.directory for checkpoint in kept], self._output_dir)
