"""`sft-edge train`: fine-tunes a model as one of the paper's three systems, and keeps the result."""

from __future__ import annotations

import contextlib
import math
import shutil
import sys
import tempfile
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional

import torch

from sft.batch import Batch
from sft.cli.devices import find_device
from sft.errors import LinkError, StorageError, TrainingError
from sft.models import build_whole
from sft.v1 import split_training_pb2 as pb
from sft_edge.checkpoints import Checkpointing, Stopped, likeness
from sft_edge.files import check_room, write_file, write_json
from sft_edge.link import retry_policy_of
from sft_edge.model_files import Description, Source, model_card, open_source, save_model
from sft_edge.options import (
    CutOptions,
    DataOptions,
    LinkOptions,
    LoggingOptions,
    LoraOptions,
    ModelOptions,
    OptimizerOptions,
    TrainingOptions,
)
from sft_edge.signals import Termination, terminations_noted
from sft_edge.systems import System, cut_of, open_system
from sft_edge.tasks import Feature, Task, batches_of, make_task
from sft_edge.training import (
    EvaluationSet,
    Progress,
    Recovery,
    TensorBoard,
    TrainingLoop,
    all_results,
    evaluate,
    ledger_lines,
    open_progress,
    peak_memory_bytes,
    print_report,
)

CALIBRATION_ROWS = 256
"""How many of the first training rows a low-rank residual is fitted to."""

CLOUD_STORE = "cloud-checkpoints"
"""Below the output directory: where a cloud of the run's own keeps its halves of checkpoints."""


class _Job(NamedTuple):
    """What is trained on what."""

    task: Task
    source: Source
    features: List[Feature]
    validation: EvaluationSet


class TrainingRun:
    """One run, from options to a directory with a model that works."""

    def __init__(
        self,
        modeling: ModelOptions,
        cutting: CutOptions,
        reading: DataOptions,
        training: TrainingOptions,
        optimizing: OptimizerOptions,
        adapting: LoraOptions,
        logging: LoggingOptions,
        linking: LinkOptions,
    ) -> None:
        self.modeling, self.cutting, self.reading, self.training = modeling, cutting, reading, training
        self.optimizing, self.adapting, self.logging, self.linking = optimizing, adapting, logging, linking
        unnamed = Path("runs") / f"{reading.task}-{cutting.mode}-{datetime.now():%Y%m%d-%H%M%S}"
        self.output_dir = training.output_dir or unnamed

    def run(self) -> Dict[str, Any]:
        """Trains, evaluates, saves and prints the report; returns the content of `all_results.json`.

        A run that is interrupted, or whose loss is no longer finite, leaves the model of its last good step before the
        error goes on. One that is terminated leaves a checkpoint, and returns nothing. Raises any SFTError.
        """
        task = make_task(self.reading.task, self.reading.data_dir, self.reading.problem_type)
        source = open_source(self.modeling, task.config_overrides())
        self._check_room(source, task)
        train_rows = task.read("train", self.reading.max_train_samples)
        eval_rows = task.read("validation", self.reading.max_eval_samples)
        length = self.modeling.max_seq_length
        features = task.encode(train_rows, source.tokenizer, length)
        validation = EvaluationSet(eval_rows, task.encode(eval_rows, source.tokenizer, length))
        job = _Job(task, source, features, validation)
        with ExitStack() as stack:
            progress = stack.enter_context(open_progress(self.logging.logging_steps, self.logging.disable_tqdm))
            terminated = stack.enter_context(terminations_noted())
            checkpointing = Checkpointing(self.output_dir, self.training, self._likeness(job), progress, terminated)
            stack.enter_context(checkpointing)
            try:
                return self._with_recovery(job, progress, checkpointing, terminated)
            except Stopped as stopped:
                progress.stop()
                sys.stdout.write(self._farewell(stopped) + "\n")
                return {}

    def _likeness(self, job: _Job) -> Dict[str, str]:
        options = (self.cutting, self.reading, self.training, self.optimizing, self.adapting, self.linking)
        return likeness(*options, job.source.config, job.features)

    def _farewell(self, stopped: Stopped) -> str:
        if stopped.directory is None:
            when = f"after step {stopped.step}, and nothing is saved" if stopped.step else "before the first step"
            return f"stopped {when}; the same command begins anew"
        named = "" if self.training.output_dir is not None else f"--output-dir {self.output_dir} "
        return (
            f"stopped after step {stopped.step}, which is saved in {stopped.directory}; the same command with "
            f"{named}--resume-from-checkpoint goes on"
        )

    def _with_recovery(
        self, job: _Job, progress: Progress, checkpointing: Checkpointing, terminated: Termination
    ) -> Dict[str, Any]:
        """Attempts, each with a session of its own, until one gets to the end."""
        recovery = Recovery(self.linking.reconnect_timeout, retry_policy_of(self.linking).delays, terminated)

        def after_step(loop: TrainingLoop) -> None:
            recovery.reached(loop.state.global_step)
            checkpointing.after_step(loop)

        while True:
            self._loop: Optional[TrainingLoop] = None
            try:
                return self._attempt(job, progress, checkpointing, after_step, terminated)
            except LinkError as error:
                had_session = self._loop is not None
                checkpointing.check_lost(self._loop.state.global_step if self._loop else 0, error)
                if not (checkpointing.can_go_on and recovery.is_worth_trying(error, had_session)):
                    raise
                progress.status(f"{error}: going on in another session")
                if self._loop is not None:
                    checkpointing.recover(self._loop.state.global_step)
            recovery.wait()
            checkpointing.check_stop()

    def _attempt(
        self,
        job: _Job,
        progress: Progress,
        checkpointing: Checkpointing,
        after_step: Callable[[TrainingLoop], None],
        terminated: Termination,
    ) -> Dict[str, Any]:
        """From a new session to the end of the run."""
        offered = checkpointing.offers()
        progress.status(self._opening())
        with ExitStack() as stack:
            system = stack.enter_context(
                open_system(
                    job.source,
                    job.task.head,
                    self.cutting,
                    self.training,
                    self.optimizing,
                    self.linking,
                    self.adapting,
                    [] if offered else self._calibration(job.task, job.features),
                    progress.status,
                    run_id=checkpointing.run_id,
                    resume_from=[pb.CheckpointId(step=c.step, sha256=c.manifest.other_half or "") for c in offered],
                    checkpoint_store=self.output_dir / CLOUD_STORE,
                )
            )
            terminated.then = system.give_up_waiting
            chosen = checkpointing.choose(system, offered)
            report = None
            if self.logging.report_to == "tensorboard":
                directory = self.logging.logging_dir or self.output_dir / "runs"
                report = stack.enter_context(TensorBoard(directory, chosen.step if chosen else 0)).log
            batch_size = self.training.per_device_eval_batch_size
            loop = TrainingLoop(
                system,
                job.task,
                job.features,
                self.training,
                self.optimizing,
                self.logging.logging_steps,
                self.reading.dataloader_num_workers,
                progress,
                lambda step: evaluate(system, job.task, job.validation, batch_size, step),
                report,
                after_step,
            )
            checkpointing.begin(system, loop, chosen)
            self._loop = loop
            return self._train(loop, system, job.source, job.task, progress, checkpointing)

    def _calibration(self, task: Task, features: List[Feature]) -> List[Batch]:
        """The same for every system, so that all decompose alike."""
        if self.cutting.residual != "low-rank":
            return []
        return list(batches_of(task, features[:CALIBRATION_ROWS], self.training.per_device_train_batch_size))

    def _opening(self) -> str:
        if self.cutting.mode == "local":
            return "loading the model"
        return f"opening a session at {self.linking.server}" if self.linking.server else "starting a cloud here"

    def _train(
        self,
        loop: TrainingLoop,
        system: System,
        source: Source,
        task: Task,
        progress: Progress,
        checkpointing: Checkpointing,
    ) -> Dict[str, Any]:
        try:
            loop.run()
            evaluation = loop.evaluate()
            results = {**self._results(loop, system, evaluation), **checkpointing.counts}
            progress.status("saving")
            self._save(loop, system, source, task, results)
        except (KeyboardInterrupt, TrainingError, OSError, RuntimeError) as error:
            # The last two: a terminal that has gone, a data-loading worker that died, a device without memory.
            step = loop.state.global_step
            with contextlib.suppress(OSError):  # nobody may be there to read it
                progress.status(f"stopping: saving the model as of step {step}")
            directory = self._save(loop, system, source, task, self._results(loop, system, {}))
            if isinstance(error, TrainingError):
                raise type(error)(f"{error}; the model as of step {step} is in {directory}") from error
            raise
        except LinkError:
            if loop.state.global_step:
                write_json(self.output_dir / "trainer_state.json", loop.state)
            raise
        progress.stop()
        print_report(system.ledger, results)
        sys.stdout.write(f"saved in {self.output_dir}\n")
        return results

    def _results(self, loop: TrainingLoop, system: System, evaluation: Dict[str, float]) -> Dict[str, Any]:
        cut = cut_of(self.cutting)
        return all_results(
            mode=self.cutting.mode,
            split_layer=cut.split_layer if cut else None,
            split_rank=cut.split_rank or None if cut else None,
            ledger=system.ledger,
            train_loss=loop.train_loss,
            train_runtime=loop.seconds,
            evaluation=evaluation,
            edge_peak_memory_bytes=self._peak_memory(),
        )

    def _peak_memory(self) -> int:
        device = find_device(self.training.device)
        return peak_memory_bytes(torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0)

    def _save(self, loop: TrainingLoop, system: System, source: Source, task: Task, results: Dict[str, Any]) -> Path:
        """Saves the run, and says where: in a temporary directory when the output directory does not take it."""
        output_dir = self.output_dir
        try:
            self._save_to(output_dir, loop, system, source, task, results)
        except StorageError as error:
            try:
                rescue = Path(tempfile.mkdtemp(prefix="sft-edge-"))
            except OSError:  # the same disk, as a rule
                raise error from None
            try:
                self._save_to(rescue, loop, system, source, task, results)
            except StorageError:
                shutil.rmtree(str(rescue))
                raise error from None
            raise StorageError(f"{error}; the model was saved in {rescue} instead") from error
        return output_dir

    def _save_to(
        self, directory: Path, loop: TrainingLoop, system: System, source: Source, task: Task, results: Dict[str, Any]
    ) -> None:
        cut = cut_of(self.cutting)
        description = Description(
            task=task.name,
            text_fields=list(task.text_fields),
            head=task.head,
            problem_type=task.problem_type,
            label_names=task.label_names,
            max_seq_length=self.modeling.max_seq_length,
            base_model=source.name or ("" if source.checkpoint is None else "a model of the device"),
            mode=self.cutting.mode,
            split_layer=cut.split_layer if cut else None,
            split_rank=cut.split_rank or None if cut else None,
            residual=self.cutting.residual,
        )
        save_model(directory, system.shards(), source.config, source.tokenizer, description)
        results["edge_peak_memory_bytes"] = self._peak_memory()  # saving counts too
        write_file(directory / "README.md", [model_card(description, results).encode()])
        write_file(directory / "ledger.csv", ledger_lines(system.ledger))
        write_json(directory / "all_results.json", results)
        write_json(directory / "trainer_state.json", loop.state)

    def _check_room(self, source: Source, task: Task) -> None:
        """Raises StorageError now where the disk could not hold the result hours later."""
        whole = build_whole(source.config, task.head, cut_of(self.cutting))
        needed = sum(4 * math.prod(parameter.shape) for parameter in whole.parameters())
        check_room("--output-dir", self.output_dir, needed)
