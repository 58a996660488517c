"""One attempt at a run: from a session of its own to the end of the run, or to where the session is lost."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Optional

import torch

from sft.cli.devices import find_device
from sft.cli.run import explained
from sft.errors import LinkError, NonFiniteLossError, ProtocolError, SessionLostError, SFTError, StorageError
from sft.tensors.stream import in_memory, safetensors_chunks
from sft_edge.checkpoints import Checkpointing, Stopped
from sft_edge.commands.train.budget import Budget, CapReached
from sft_edge.commands.train.job import Job, description_of
from sft_edge.files import write_file, write_json
from sft_edge.link import TRANSIENT
from sft_edge.model_files import model_card, save_model
from sft_edge.options import OPTIONS_FILE, RunOptions, repeatable
from sft_edge.systems import System, cut_of
from sft_edge.training import (
    Progress,
    TrainingLoop,
    all_results,
    ledger_lines,
    peak_memory_bytes,
    print_report,
)


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
    budget: Budget

    @property
    def steps(self) -> int:
        """So many are taken, those of attempts before included."""
        return self.loop.state.global_step

    def run(self) -> Dict[str, Any]:
        """Trains, evaluates, saves and reports; returns the content of `all_results.json`.

        Whatever goes wrong, the model as of the last whole step is saved, and the error says where; but not where the
        session is lost, which holds half of it. Raises any SFTError.
        """
        try:
            evaluation = self._train()
            self.progress.status("saving")
            results = self._save(evaluation)
        except LinkError:
            if self.steps:
                with contextlib.suppress(StorageError):
                    self._save_history(self.output_dir)
            raise
        self.progress.stop()
        print_report(self.system.ledger, results)
        sys.stdout.write(f"saved in {self.output_dir}\n")
        if self.budget.has_ended:
            sys.stdout.write(f"{self.budget.farewell(self.loop, self.checkpointing)}\n")
        return results

    def _train(self) -> Dict[str, float]:
        """Gives the last evaluation."""
        try:
            if not self.budget.has_ended:  # in a session that was lost on the way home
                with contextlib.suppress(CapReached):
                    self.loop.run()
            return self.loop.evaluate() if self.budget.fits_evaluation(self.loop) else {}
        except (Stopped, SessionLostError, *TRANSIENT):
            raise
        except (KeyboardInterrupt, SystemExit, Exception) as error:
            if self.system.makes_again:  # the cloud is further, and goes on
                raise
            told = self._rescue(error)
            if told is None:
                raise
            raise told from error

    def _rescue(self, error: BaseException) -> Optional[SFTError]:
        """Saves the model; gives the error that says so, or None where the one at hand is for whoever called."""
        with contextlib.suppress(OSError, ValueError):  # nobody may be there to read it, or the stream is closed
            self.progress.status(f"stopping: saving the model as of step {self.steps}")
        for_caller = not isinstance(error, Exception) or isinstance(error, BrokenPipeError)
        try:
            with contextlib.suppress(NonFiniteLossError):
                self.loop.catch_up()  # the cloud may be ahead of what is noted here
            self._save({})
            where = f"the model as of step {self.steps} is in {self.output_dir}"
        except SFTError as failure:
            if for_caller:  # in a session that is lost now, nobody is to go on
                return LinkError(str(failure)) if isinstance(failure, LinkError) else failure
            where = str(failure)
        if for_caller:
            return None
        assert isinstance(error, Exception)
        told = explained(error)
        return type(told)(f"{told}; {where}")

    def _results(self, evaluation: Dict[str, float]) -> Dict[str, Any]:
        cut = cut_of(self.options.cut, self.job.source)
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

    def _save(self, evaluation: Dict[str, float]) -> Dict[str, Any]:
        """Saves the model, and what there is to tell of the run, which it gives.

        Whatever the output directory does not take goes to a temporary one; the error says so.
        """
        is_saved = False
        try:
            self._save_model(self.output_dir)
            is_saved = True
            return self._save_results(self.output_dir, evaluation)
        except ProtocolError as error:  # who has the other half is not who it was, or does not mean well
            raise ProtocolError(f"{error}{self._own_half()}") from error
        except LinkError:
            raise
        except Exception as error:
            told, where = explained(error), f"the model is in {self.output_dir}"
            if isinstance(told, StorageError) or not is_saved:
                elsewhere = self._save_elsewhere(evaluation)
                if elsewhere is None:
                    raise told from error
                where = f"the model was saved in {elsewhere} instead"
            raise type(told)(f"{told}; {where}") from error

    def _own_half(self) -> str:
        """Saves what is here of the model, and says where; says nothing where that cannot be."""
        path = self.output_dir / "net_1.safetensors"
        with contextlib.suppress(StorageError):
            write_file(path, safetensors_chunks(in_memory(dict(self.system.own_parameters()))))
            return f"; the edge's half of the model is in {path}"
        return ""

    def _save_elsewhere(self, evaluation: Dict[str, float]) -> Optional[Path]:
        """In a temporary directory; None where that, on the same disk as a rule, does not take the model either."""
        try:
            directory = Path(tempfile.mkdtemp(prefix="sft-edge-"))
        except OSError:
            return None
        try:
            self._save_model(directory)
        except Exception:  # of any kind: what went wrong first is told
            shutil.rmtree(str(directory))
            return None
        with contextlib.suppress(Exception):
            self._save_results(directory, evaluation)
        return directory

    def _save_model(self, directory: Path) -> None:
        source = self.job.source
        save_model(
            directory, self.system.shards(), source.config, source.tokenizer, description_of(self.options, self.job)
        )

    def _save_results(self, directory: Path, evaluation: Dict[str, float]) -> Dict[str, Any]:
        results = {**self._results(evaluation), **self.budget.results(), **self.checkpointing.counts}
        write_file(directory / "README.md", [model_card(description_of(self.options, self.job), results).encode()])
        write_file(directory / "ledger.csv", ledger_lines(self.system.ledger))
        write_json(directory / "all_results.json", results)
        self._save_history(directory)
        return results

    def _save_history(self, directory: Path) -> None:
        write_json(directory / OPTIONS_FILE, repeatable(self.options))
        write_json(directory / "trainer_state.json", self.loop.state)
