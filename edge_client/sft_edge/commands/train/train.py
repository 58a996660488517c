"""`sft-edge train`: fine-tunes a model as one of the paper's three systems, and keeps the result."""

from __future__ import annotations

import contextlib
import math
import secrets
import sys
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence

from torch import Tensor

from sft.batch import Batch
from sft.errors import LinkError, ProtocolError, SessionLostError, StorageError, UsageError
from sft.models import build_whole
from sft.printable import printable
from sft.v1 import split_training_pb2 as pb
from sft.wire.codec.elements import FITTED
from sft_edge.checkpoints import Checkpointing, Stopped, keep_key_of, likeness, read_codec_tables
from sft_edge.commands.train.attempt import Attempt
from sft_edge.commands.train.budget import Budget
from sft_edge.commands.train.job import Job, try_end
from sft_edge.commands.train.leaving import Detached, Leaving, LeftRun, check_not_left, forget_left
from sft_edge.commands.train.start import open_start
from sft_edge.files import check_room
from sft_edge.link import GivenUpError, Link, retry_policy_of
from sft_edge.model_files import Source
from sft_edge.options import ACTIVATIONS, RunOptions
from sft_edge.signals import Termination, terminations_noted
from sft_edge.systems import cut_of, is_ours, open_system, rows_to_fit
from sft_edge.tasks import Task, batches_of
from sft_edge.training import EvaluationSet, Progress, Recovery, TensorBoard, TrainingLoop, ask, evaluate, open_progress

CALIBRATION_ROWS = 256
"""How many of the first training rows a low-rank residual is fitted to."""

KEEP_KEY_BYTES = 32
"""Of the key that the cloud keeps activations with, in memory alone: for AES-256."""

TEXT = (
    "what crosses between two blocks gives the text away more readily than the paper's rank-R activation, in whatever "
    "code it comes; the lower the cut, the more so (docs/what-leaves.md#text)"
)
"""Said when such a run begins."""

CLOUD_STORE = "cloud-checkpoints"
"""Below the output directory: where a cloud of the run's own keeps its halves of checkpoints."""


class TrainingRun:
    """One run, from options to a directory with a model that works."""

    def __init__(self, options: RunOptions, arguments: Sequence[str] = (), left: Optional[LeftRun] = None) -> None:
        """`arguments`: which `options` are of, for a run that leaves; `left`: as it did, where it comes back."""
        self.options = options
        self._arguments = arguments
        self._left = left
        unnamed = Path("runs") / f"{options.data.task}-{options.cut.mode}-{datetime.now():%Y%m%d-%H%M%S}"
        self.output_dir = options.training.output_dir or unnamed
        self._keep_key = secrets.token_bytes(KEEP_KEY_BYTES)
        self._codec_tables: Mapping[str, Tensor] = {}  # fitted by an attempt, or before

    def run(self) -> Dict[str, Any]:
        """Trains, evaluates, saves and prints the report; returns the content of `all_results.json`.

        A run that is interrupted, or whose loss is no longer finite, leaves the model of its last good step before the
        error goes on. One that is terminated leaves a checkpoint, and returns nothing. Raises any SFTError.
        """
        options = self.options
        if self._left is None:
            check_not_left(self.output_dir, options.training.overwrite_output_dir)
        job = self._job()
        with ExitStack() as stack:
            progress = stack.enter_context(open_progress(options.logging.logging_steps, options.logging.disable_tqdm))
            for note in [*job.notes, *([TEXT] if options.cut.cuts_between_blocks else [])]:
                progress.status(note)
            terminated = stack.enter_context(terminations_noted())
            same = likeness(options, job.source, job.features)
            checkpointing = Checkpointing(self.output_dir, options.training, same, progress, terminated)
            budget = Budget(options, self.output_dir, job, progress)
            stack.enter_context(checkpointing)
            try_end(job, options, self.output_dir)
            budget.begin(checkpointing.run_id)
            stack.callback(budget.write, checkpointing)
            try:
                return self._with_recovery(job, progress, checkpointing, terminated, budget)
            except Stopped as stopped:
                progress.stop()
                sys.stdout.write(self._farewell(stopped) + "\n")
                return {}

    def _job(self) -> Job:
        data, length = self.options.data, self.options.model.max_seq_length
        task, source, notes = open_start(data, self.options.model)
        self._check_room(source, task)
        train_rows = task.read("train", data.max_train_samples)
        eval_rows = task.read("validation", data.max_eval_samples)
        features = task.encode(train_rows, source.tokenizer, length)
        if task.inferred:
            sys.stderr.write(f"{printable(task.inferred)}\n")
        validation = EvaluationSet(eval_rows, task.encode(eval_rows, source.tokenizer, length))
        return Job(task, source, features, validation, notes)

    def _check_room(self, source: Source, task: Task) -> None:
        """Raises StorageError now where the disk could not hold the result hours later."""
        whole = build_whole(source.config, task.head, cut_of(self.options.cut, source))
        needed = sum(4 * math.prod(parameter.shape) for parameter in whole.parameters())
        check_room("--output-dir", self.output_dir, needed)

    def _farewell(self, stopped: Stopped) -> str:
        if isinstance(stopped, Detached) or self._left is not None:
            return (
                f"after step {stopped.step} the cloud goes on alone: sft-edge attach {self.output_dir} has the result"
            )
        if stopped.directory is None:
            when = f"after step {stopped.step}, and nothing is saved" if stopped.step else "before the first step"
            return f"stopped {when}; the same command begins anew"
        named = "" if self.options.training.output_dir is not None else f"--output-dir {self.output_dir} "
        return (
            f"stopped after step {stopped.step}, which is saved in {stopped.directory}; the same command with "
            f"{named}--resume-from-checkpoint goes on"
        )

    def _with_recovery(
        self, job: Job, progress: Progress, checkpointing: Checkpointing, terminated: Termination, budget: Budget
    ) -> Dict[str, Any]:
        """Attempts, each with a session of its own, until one gets to the end."""
        link = self.options.link
        recovery = Recovery(link.reconnect_timeout, retry_policy_of(link).delays, terminated)

        leaving = None
        if self.options.training.detach and self._left is None:
            leaving = Leaving(self.output_dir, self._arguments, checkpointing, progress)

        def after_step(loop: TrainingLoop) -> None:
            recovery.reached(loop.state.global_step)
            checkpointing.after_step(loop)
            if leaving is not None:
                leaving.after_step(loop)
            budget.after_step(loop, checkpointing)

        while True:
            attempt: Optional[Attempt] = None
            try:
                with ExitStack() as stack:
                    attempt = self._begin(stack, job, progress, checkpointing, terminated, budget, after_step)
                    results = attempt.run()
                with contextlib.suppress(OSError, StorageError):
                    if is_ours(self.output_dir / ACTIVATIONS):  # those of a run that was given up, too
                        (self.output_dir / ACTIVATIONS).unlink()
                forget_left(self.output_dir)
                return results
            except LinkError as error:
                had_session = attempt is not None or self._left is not None
                if self._left is not None:
                    if isinstance(error, GivenUpError) or not isinstance(error, (SessionLostError, ProtocolError)):
                        raise  # the cloud may still be at it
                    # It is gone, or none that this run can come back to: its checkpoint is.
                    error, self._left = SessionLostError(str(error)), None
                    forget_left(self.output_dir)
                steps = attempt.steps if attempt is not None else 0
                checkpointing.check_lost(steps, error)
                if not (checkpointing.can_go_on and recovery.is_worth_trying(error, had_session)):
                    raise
                progress.status(f"{error}: going on in another session")
                if had_session:
                    checkpointing.recover(steps)
            recovery.wait()
            checkpointing.check_stop()

    def _begin(
        self,
        stack: ExitStack,
        job: Job,
        progress: Progress,
        checkpointing: Checkpointing,
        terminated: Termination,
        budget: Budget,
        after_step: Callable[[TrainingLoop], None],
    ) -> Attempt:
        """Opens a session, and what else ends with `stack`; the loop is where the run goes on."""
        options = self.options
        offered = checkpointing.offers()
        if self._left is not None and not any(checkpoint.step == self._left.step for checkpoint in offered):
            raise SessionLostError(
                f"no checkpoint of step {self._left.step}, after which the session was left, is here"
            )
        keep_key = b""
        if options.cut.activations == "keep-on-cloud":
            keep_key = next(filter(None, map(keep_key_of, offered)), self._keep_key)
        progress.status(self._opening())
        if offered:
            self._codec_tables = read_codec_tables(offered[0])

        def stops_waiting(link: Link) -> None:
            terminated.then = link.give_up_waiting

        system = stack.enter_context(
            open_system(
                job.source,
                job.task.head,
                options,
                [] if offered else self._calibration(job),
                progress.status,
                run_id=checkpointing.run_id,
                resume_from=[pb.CheckpointId(step=c.step, sha256=c.manifest.other_half or "") for c in offered],
                checkpoint_store=self.output_dir / CLOUD_STORE,
                on_link=stops_waiting,
                keep_in=self._kept_activations(),
                keep_key=keep_key,
                tables=self._codec_tables,
                left=None if self._left is None else (self._left.left, self._left.step),
                meter=budget.meter,
            )
        )
        self._codec_tables = system.codec_tables
        chosen = checkpointing.choose(system, offered)
        report = None
        if options.logging.report_to == "tensorboard":
            directory = options.logging.logging_dir or self.output_dir / "runs"
            report = stack.enter_context(TensorBoard(directory, chosen.step if chosen else 0)).log
        batch_size, detach = options.training.per_device_eval_batch_size, options.training.detach
        loop = TrainingLoop(
            system,
            job.task,
            job.features,
            options,
            progress,
            lambda step: evaluate(system, job.task, job.validation, batch_size, step),
            report,
            after_step,
            lambda steps: (
                checkpointing.is_due(steps, system)
                or (detach and steps % loop.steps_per_epoch == 0)
                or budget.pauses_after(steps, loop)
            ),
            lambda step: ask(system, job.task, job.validation, batch_size, step),
        )
        checkpointing.begin(system, loop, chosen)
        budget.opened(loop)
        return Attempt(options, self.output_dir, job, system, loop, progress, checkpointing, budget)

    def _kept_activations(self) -> Optional[Path]:
        """The file of a frozen edge's activations, if any are kept. Raises UsageError where it is somebody else's."""
        if self.options.cut.activations != "keep-on-edge":
            return None
        path = self.output_dir / ACTIVATIONS
        if not is_ours(path):
            raise UsageError(f"{path} holds no activations of a run: move it away, or name another --output-dir")
        return path

    def _calibration(self, job: Job) -> List[Batch]:
        """The same for every system, so that all decompose alike."""
        batch_size = self.options.training.per_device_train_batch_size
        if self.options.cut.codec == FITTED:
            drawn = rows_to_fit([feature.length for feature in job.features], self.options.training.seed)
            return list(batches_of(job.task, [job.features[row] for row in drawn], batch_size))
        if self.options.cut.residual != "low-rank" or job.source.cut is not None:
            return []
        return list(batches_of(job.task, job.features[:CALIBRATION_ROWS], batch_size))

    def _opening(self) -> str:
        if self.options.cut.mode == "local":
            return "loading the model"
        if self._left is not None:
            return f"coming back to the session at {self.options.link.server}"
        server = self.options.link.server
        return f"opening a session at {server}" if server else "starting a cloud here"
