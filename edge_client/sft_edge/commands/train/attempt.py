"""One attempt at a run: from a session of its own to the end of the run, or to where the session is lost."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, NamedTuple

import torch

from sft.cli.devices import find_device
from sft.errors import LinkError, StorageError, TrainingError
from sft_edge.checkpoints import Checkpointing
from sft_edge.files import write_file, write_json
from sft_edge.model_files import Description, Source, model_card, save_model
from sft_edge.options import RunOptions
from sft_edge.systems import System, cut_of
from sft_edge.tasks import Feature, Task
from sft_edge.training import (
    EvaluationSet,
    Progress,
    TrainingLoop,
    all_results,
    ledger_lines,
    peak_memory_bytes,
    print_report,
)


class Job(NamedTuple):
    """What is trained on what."""

    task: Task
    source: Source
    features: List[Feature]
    validation: EvaluationSet


@dataclass(frozen=True)
class Attempt:
    """What one session trains with; it is open."""

    options: RunOptions
    output_dir: Path
    job: Job
    system: System
    loop: TrainingLoop
    progress: Progress
    checkpointing: Checkpointing

    @property
    def steps(self) -> int:
        """So many are taken, those of attempts before included."""
        return self.loop.state.global_step

    def run(self) -> Dict[str, Any]:
        """Trains, evaluates, saves and reports; returns the content of `all_results.json`. Raises any SFTError."""
        try:
            self.loop.run()
            evaluation = self.loop.evaluate()
            results = {**self._results(evaluation), **self.checkpointing.counts}
            self.progress.status("saving")
            self._save(results)
        except (KeyboardInterrupt, TrainingError, OSError, RuntimeError) as error:
            # The last two: a terminal that has gone, a data-loading worker that died, a device without memory.
            with contextlib.suppress(OSError):  # nobody may be there to read it
                self.progress.status(f"stopping: saving the model as of step {self.steps}")
            directory = self._save(self._results({}))
            if isinstance(error, TrainingError):
                raise type(error)(f"{error}; the model as of step {self.steps} is in {directory}") from error
            raise
        except LinkError:
            if self.steps:
                write_json(self.output_dir / "trainer_state.json", self.loop.state)
            raise
        self.progress.stop()
        print_report(self.system.ledger, results)
        sys.stdout.write(f"saved in {self.output_dir}\n")
        return results

    def _results(self, evaluation: Dict[str, float]) -> Dict[str, Any]:
        cut = cut_of(self.options.cut)
        return all_results(
            mode=self.options.cut.mode,
            split_layer=cut.split_layer if cut else None,
            split_rank=cut.split_rank or None if cut else None,
            ledger=self.system.ledger,
            train_loss=self.loop.train_loss,
            train_runtime=self.loop.seconds,
            evaluation=evaluation,
            edge_peak_memory_bytes=self._peak_memory(),
        )

    def _peak_memory(self) -> int:
        device = find_device(self.options.training.device)
        return peak_memory_bytes(torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0)

    def _save(self, results: Dict[str, Any]) -> Path:
        """Saves the run, and says where: in a temporary directory when the output directory does not take it."""
        try:
            self._save_to(self.output_dir, results)
        except StorageError as error:
            try:
                rescue = Path(tempfile.mkdtemp(prefix="sft-edge-"))
            except OSError:  # the same disk, as a rule
                raise error from None
            try:
                self._save_to(rescue, results)
            except StorageError:
                shutil.rmtree(str(rescue))
                raise error from None
            raise StorageError(f"{error}; the model was saved in {rescue} instead") from error
        return self.output_dir

    def _save_to(self, directory: Path, results: Dict[str, Any]) -> None:
        source, description = self.job.source, self._description()
        save_model(directory, self.system.shards(), source.config, source.tokenizer, description)
        results["edge_peak_memory_bytes"] = self._peak_memory()  # saving counts too
        write_file(directory / "README.md", [model_card(description, results).encode()])
        write_file(directory / "ledger.csv", ledger_lines(self.system.ledger))
        write_json(directory / "all_results.json", results)
        write_json(directory / "trainer_state.json", self.loop.state)

    def _description(self) -> Description:
        task, source, cut = self.job.task, self.job.source, cut_of(self.options.cut)
        return Description(
            task=task.name,
            text_fields=list(task.text_fields),
            head=task.head,
            problem_type=task.problem_type,
            label_names=task.label_names,
            max_seq_length=self.options.model.max_seq_length,
            base_model=source.name or ("" if source.checkpoint is None else "a model of the device"),
            mode=self.options.cut.mode,
            split_layer=cut.split_layer if cut else None,
            split_rank=cut.split_rank or None if cut else None,
            residual=self.options.cut.residual,
        )
