"""`--data-cap` and `--max-mbit` of a run: what is said before it begins, and how it ends in order."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Dict, Mapping, Optional

from sft.errors import StorageError, UsageError
from sft.printable import format_bytes, format_seconds
from sft_edge.checkpoints import Checkpointing
from sft_edge.commands.train.amounts import Amounts
from sft_edge.commands.train.job import Job
from sft_edge.commands.train.moved import Moved, read_moved, write_moved
from sft_edge.link import Meter, Pace
from sft_edge.options import NEWEST, RunOptions
from sft_edge.training import Progress, TrainingLoop

ENDED_BY_CAP = 9
"""Exit code of a run that --data-cap has ended: its result is whole, and it can be gone on with."""

_DATA_CAP = "data-cap"

_ENDING_BYTES = 32_000
"""For saying on both sides that a checkpoint is kept, and for closing."""

_WRITES = 100
"""Times that what was moved is written down while all of a cap is used."""


def exit_code_of(results: Mapping[str, Any]) -> int:
    """Of a run that has left these."""
    return ENDED_BY_CAP if results.get("ended_by") == _DATA_CAP else 0


class CapReached(Exception):
    """No step more fits."""


class Budget:
    """Of one run, however many sessions it has."""

    def __init__(self, options: RunOptions, output_dir: Path, job: Job, progress: Progress) -> None:
        """Without a wire nothing is counted, and nothing said."""
        self._options = options
        self._output_dir = output_dir
        self._job = job
        self._progress = progress
        self._cap: Optional[int] = options.budget.data_cap
        self.meter = Meter(self._cap, Pace(options.budget.max_mbit))
        self._crosses = options.cut.mode != "local"
        self._before = Moved()
        self._written = 0
        self._run_id = ""
        self.has_ended = False
        """Whether the cap has ended the run."""
        self._ended_after = 0  # steps
        if not self._crosses:
            return
        self._amounts = Amounts(options, job.source.config, job.task.head)
        self._lengths = [feature.length for feature in job.features]
        self._evaluation = self._amounts.evaluation([feature.length for feature in job.validation.features])
        self._step = {kept: self._amounts.step(self._lengths, kept) for kept in (False, True)}
        self._keep_step()
        if options.budget.max_mbit is not None:
            rate = format_bytes(options.budget.max_mbit * 1e6 / 8)
            progress.note(
                f"--max-mbit {options.budget.max_mbit:g}: at most {rate} a second are sent, and as many received"
            )

    def begin(self, run_id: str) -> None:
        """Before a session is opened: what a run of this id has moved before counts."""
        self._run_id = run_id
        directories = [self._output_dir]
        named = self._options.training.resume_from_checkpoint
        if named not in (None, NEWEST):
            directories.append(Path(str(named)).resolve().parent)
        self._before = read_moved(directories, run_id)
        self.meter.before = self._before.link_bytes

    def opened(self, loop: TrainingLoop) -> None:
        """A session is open, and nothing trained in it: says how far the cap will reach. Raises UsageError where that
        is nowhere."""
        if not self._crosses:
            return
        self.has_ended = self.has_ended and loop.state.global_step >= self._ended_after
        if self.has_ended:
            return
        self._keep_step()
        steps = loop.state.max_steps - loop.state.global_step
        if self._cap is not None and steps:
            if self.meter.room < self._next(loop):
                moved = format_bytes(self._before.link_bytes + self.meter.link_bytes)
                raise UsageError(
                    f"--data-cap {self._cap_text}: {moved} of it are moved, {format_bytes(self.meter.result)} are kept "
                    f"to bring the result home, and not one step fits; give more: {self._needs(loop)}"
                )
            self._progress.note(self._forecast(loop))
        if self._options.budget.max_mbit is not None and steps:
            seconds = (self._left(loop) + self.meter.result) / 2 / (self._options.budget.max_mbit * 1e6 / 8)
            self._progress.note(
                f"--max-mbit {self._options.budget.max_mbit:g}: what is to be moved takes at least "
                f"{format_seconds(seconds)}"
            )

    def pauses_after(self, steps: int, loop: TrainingLoop) -> bool:
        """Whether the cap is so near that no further step is sent before all that were sent are settled."""
        if self._cap is None:
            return False
        on_their_way = steps - loop.state.global_step
        evaluations = 2 * self._evaluation  # at most, before anything is looked up again
        return self.meter.room < (on_their_way + 1) * self._next(loop) + evaluations

    def after_step(self, loop: TrainingLoop, checkpointing: Checkpointing) -> None:
        """Between two steps. Where the next one does not fit a checkpoint is saved, and CapReached raised."""
        step, cap = loop.state.global_step, self._cap
        if cap is not None and step < loop.state.max_steps and self.meter.room < self._next(loop):
            self._end(loop, checkpointing)
        many = cap is not None and self.meter.link_bytes - self._written >= cap / _WRITES
        if many or checkpointing.is_saved(step):
            self.write(checkpointing)

    def write(self, checkpointing: Checkpointing) -> None:
        """Notes what was moved, once there is something that a run could go on from."""
        if not self._crosses:
            return
        self._written = self.meter.link_bytes
        if checkpointing.newest is not None:
            with contextlib.suppress(StorageError):  # a disk that is full ends no run here, nor hides why one ends
                write_moved(self._output_dir, self._run_id, self._before.and_by(self.meter))

    def fits_evaluation(self, loop: TrainingLoop) -> bool:
        """After the last step: whether one may be made before the result is brought home; says so where not."""
        fits = self._cap is None or self.meter.room >= self._evaluation
        self.meter.margin, self.meter.answers = _ENDING_BYTES, 0.0
        if fits:
            return True
        self.has_ended, self._ended_after = True, loop.state.global_step
        self._progress.note(
            f"--data-cap {self._cap_text} leaves no room to evaluate: sft-edge evaluate does, without a cloud"
        )
        return False

    def results(self) -> Dict[str, Any]:
        """For `all_results.json`."""
        if not self._crosses:
            return {}
        moved = self._before.and_by(self.meter)
        return {
            "run_wire_bytes_sent": moved.bytes_sent,
            "run_wire_bytes_received": moved.bytes_received,
            "run_link_bytes": moved.link_bytes,
            "ended_by": _DATA_CAP if self.has_ended else None,
        }

    def farewell(self, loop: TrainingLoop, checkpointing: Checkpointing) -> str:
        """What is said last of a run that the cap has ended."""
        step, newest = loop.state.global_step, checkpointing.newest
        is_saved = checkpointing.is_saved(step) and newest is not None
        where = f", which is saved in {newest}" if is_saved else "; no checkpoint of it is saved"
        goes_on = "so it cannot be gone on with from there"
        if newest is not None:
            named = "" if self._options.training.output_dir is not None else f"--output-dir {self._output_dir} "
            goes_on = f"the same command with a higher --data-cap and {named}--resume-from-checkpoint goes on"
            goes_on += "" if is_saved else f" from {newest}"
        joined = "; " if is_saved else ", "
        return (
            f"--data-cap {self._cap_text} ended the run after step {step} of {loop.state.max_steps}"
            f"{where}{joined}{goes_on}"
        )

    @property
    def _cap_text(self) -> str:
        return format_bytes(self._cap or 0)

    def _end(self, loop: TrainingLoop, checkpointing: Checkpointing) -> None:
        try:
            checkpointing.save_now(loop)
        except StorageError as error:
            self._progress.note(f"no checkpoint of step {loop.state.global_step}: {error}")
        # Not before: a session that is lost in there takes the steps since an older checkpoint with it.
        self.has_ended, self._ended_after = True, loop.state.global_step
        raise CapReached

    def _keep_step(self) -> None:
        """One step may have to be sent again, by a link that was mended or for a cloud that was short of memory."""
        self.meter.margin = self._step[False] + _ENDING_BYTES
        self.meter.answers = self._amounts.answers(self._lengths)

    def _next(self, loop: TrainingLoop) -> float:
        """At most what is moved until the run is between two steps again."""
        is_last = loop.state.global_step + 1 == loop.state.max_steps  # after which an evaluation ends the run
        return self._step[self._is_kept(loop)] + (loop.evaluates_next + is_last) * self._evaluation

    @staticmethod
    def _is_kept(loop: TrainingLoop) -> bool:
        return loop.system.sends_rows_once and loop.state.global_step >= loop.steps_per_epoch

    def _left(self, loop: TrainingLoop) -> float:
        """About what the steps and the evaluations that are left move."""
        first = loop.state.global_step
        return self._until(loop, loop.state.max_steps) - (self._until(loop, first) if first else 0.0)

    def _until(self, loop: TrainingLoop, steps: int) -> float:
        """About what so many steps of a run move, with the evaluations among them, and one at its end."""
        each, kept = (self._amounts.epoch(self._lengths, kept) / loop.steps_per_epoch for kept in (False, True))
        once = min(steps, loop.steps_per_epoch) if loop.system.sends_rows_once else steps
        evaluations = loop.evaluations_in(steps) + (steps == loop.state.max_steps)
        return once * each + (steps - once) * kept + evaluations * self._evaluation

    def _needs(self, loop: TrainingLoop) -> str:
        needed = self._before.link_bytes + self.meter.link_bytes + self._left(loop) + self.meter.result
        return f"about {format_bytes(needed + self.meter.margin)} are needed"

    def _forecast(self, loop: TrainingLoop) -> str:
        said, first, steps = f"--data-cap {self._cap_text}: ", loop.state.global_step, loop.state.max_steps
        if self._left(loop) <= self.meter.room:
            return f"{said}the run fits; {self._needs(loop)}"
        low, high = first, steps  # of which the first fits
        while high - low > 1:
            middle = (low + high) // 2
            fits = self._until(loop, middle) - (self._until(loop, first) if first else 0.0) <= self.meter.room
            low, high = (middle, high) if fits else (low, middle)
        return (
            f"{said}{self._needs(loop)}; training will end near step {low} of {steps}, and the model as of then is "
            f"brought home{self._less()}"
        )

    def _less(self) -> str:
        """How less would cross: other options make another run, so it is for whoever starts it to choose."""
        cut = self._options.cut
        ways = ["--codec int4"] if cut.codec not in ("int4", "fitted") else []
        ways += ["--mode frozen, whose activations cross once"] if cut.activations != "keep-on-cloud" else []
        return f" (less would cross with {', or '.join(ways)})" if ways else ""
