"""The options of the edge's commands: one dataclass for one concern, put together as a command needs them.

Options that transformers' `TrainingArguments` has are spelled as there. This module imports nothing heavy, so that
`--help` is quick.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Optional, get_type_hints

from sft.cli.devices import check_device
from sft.cli.options import above_zero, at_least
from sft.errors import UsageError
from sft.files.names import is_utf8
from sft.files.room import nearest_existing
from sft_edge.options.budget import BudgetOptions
from sft_edge.options.cut import CutOptions
from sft_edge.options.link import LinkOptions
from sft_edge.options.lora import LoraOptions
from sft_edge.options.optimizer import OptimizerOptions

NEWEST = "newest"
"""What --resume-from-checkpoint without a directory means."""


@dataclass
class ModelOptions:
    """The model."""

    model: Optional[str] = field(default=None, metadata={"names_place": True})
    """a model on the hub, a directory, or `minilm` for the weights of the `demo` extra"""

    from_config: Optional[Path] = None
    """instead of --model: a config.json whose shape gets random weights drawn from the seed"""

    model_name: Optional[str] = None
    """what a cloud is told the model is called: a hub id, or a directory of its --model-dir; by default --model where
    that is on the hub, and nothing for a directory"""

    tokenizer_name: Optional[str] = field(default=None, metadata={"names_place": True})
    """tokenizer, where it is not the model's own; --from-config needs it"""

    max_seq_length: int = 128
    """tokens a sequence is cut to"""

    def __post_init__(self) -> None:
        if (self.model is None) == (self.from_config is None):
            raise UsageError("exactly one of --model and --from-config must be given")
        if self.from_config is not None and self.tokenizer_name is None:
            raise UsageError("--from-config needs --tokenizer-name: a shape has no tokenizer of its own")
        at_least(self, 1, "max_seq_length")


@dataclass
class DataOptions:
    """The data."""

    task: str
    """what to learn, such as sst2, mrpc, stsb or squad"""

    data_dir: Optional[Path] = None
    """directory with the task's files"""

    problem_type: Optional[Literal["regression", "single_label_classification", "multi_label_classification"]] = None
    """what the labels are, where the task does not say"""

    max_train_samples: Optional[int] = None
    """train on the first so many rows only"""

    max_eval_samples: Optional[int] = None
    """evaluate on the first so many rows only"""

    dataloader_num_workers: int = 0
    """processes that prepare batches; 0 prepares them in the training process"""

    def __post_init__(self) -> None:
        at_least(self, 1, "max_train_samples", "max_eval_samples")
        at_least(self, 0, "dataloader_num_workers")


@dataclass
class TrainingOptions:
    """The run."""

    output_dir: Optional[Path] = None
    """where the model, its card and the results go; without it a new directory runs/TASK-MODE-TIME"""

    overwrite_output_dir: bool = False
    """write into --output-dir although it holds something"""

    per_device_train_batch_size: int = 32
    """sequences in a micro-batch"""

    per_device_eval_batch_size: int = 32
    """sequences in an evaluation batch"""

    gradient_accumulation_steps: int = 1
    """micro-batches in a step"""

    num_train_epochs: float = 3.0
    """passes over the training rows"""

    max_steps: int = -1
    """steps in all, instead of --num-train-epochs; -1 leaves it to the epochs"""

    eval_strategy: Literal["no", "steps", "epoch"] = "no"
    """when to evaluate besides at the end"""

    eval_steps: Optional[int] = None
    """steps between evaluations with --eval-strategy steps; without it --logging-steps"""

    save_steps: Optional[int] = None
    """steps between checkpoints in --output-dir and on the cloud, of which a run that was broken off goes on; without
    it, or with 0, one is saved on SIGTERM only"""

    save_total_limit: Optional[int] = None
    """checkpoints that are kept, the newest; without it all are"""

    resume_from_checkpoint: Optional[str] = field(default=None, metadata={"alone": NEWEST, "names_place": True})
    """go on from this directory; without one, or with true, from the newest checkpoint in --output-dir, or from the
    beginning while there is none"""

    detach: bool = False
    """leave as soon as the cloud has every row, which is after the first epoch: it goes on alone, and `sft-edge attach
    OUTPUT_DIR` comes back for the result; needs --activations keep-on-cloud and a server that keeps checkpoints"""

    seed: int = 42
    """draws new weights, the order of the rows and dropout"""

    device: str = "auto"
    """where the edge's half runs: cpu, cuda, cuda:N, or auto for CUDA where there is some"""

    def __post_init__(self) -> None:
        at_least(self, 1, "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
        at_least(self, 1, "eval_steps", "save_total_limit")
        at_least(self, 0, "save_steps")
        above_zero(self, "num_train_epochs")
        if self.max_steps != -1 and self.max_steps < 1:
            raise UsageError(f"--max-steps must be 1 or more, or -1 to count epochs, not {self.max_steps}")
        if self.eval_steps is not None and self.eval_strategy != "steps":
            raise UsageError("--eval-steps needs --eval-strategy steps")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed must be 0 or more and below 2^63, not {self.seed}")
        check_device(self.device)
        said = str(self.resume_from_checkpoint).lower()
        if said in ("true", "false") and not Path(str(self.resume_from_checkpoint)).exists():
            self.resume_from_checkpoint = NEWEST if said == "true" else None
        resumes = self.resume_from_checkpoint
        if resumes == NEWEST and self.output_dir is None:
            raise UsageError("--resume-from-checkpoint needs --output-dir, or the directory of a checkpoint")
        if resumes not in (None, NEWEST) and self.output_dir is None:
            self.output_dir = Path(str(resumes)).resolve().parent
        if self.output_dir is not None:
            check_output_dir(self.output_dir, self.overwrite_output_dir, resumes is not None)


@dataclass
class LoggingOptions:
    """What is told during the run."""

    logging_steps: int = 50
    """steps between lines of the log history"""

    report_to: Literal["none", "tensorboard"] = "none"
    """who gets the log history besides trainer_state.json"""

    logging_dir: Optional[Path] = None
    """directory of TensorBoard's files; without it OUTPUT_DIR/runs"""

    disable_tqdm: bool = False
    """plain lines instead of a progress bar, as when stderr is not a terminal"""

    def __post_init__(self) -> None:
        at_least(self, 1, "logging_steps")
        if self.logging_dir is not None:
            check_name("--logging-dir", self.logging_dir)


class RunOptions(NamedTuple):
    """What `sft-edge train` was given."""

    model: ModelOptions
    cut: CutOptions
    data: DataOptions
    training: TrainingOptions
    optimizer: OptimizerOptions
    lora: LoraOptions
    logging: LoggingOptions
    link: LinkOptions
    budget: BudgetOptions


TRAIN_OPTIONS = tuple(get_type_hints(RunOptions).values())
"""What it takes, in the order of its help."""


def check_together(
    cut: CutOptions,
    link: LinkOptions,
    training: TrainingOptions,
    lora: LoraOptions,
    budget: BudgetOptions = BudgetOptions(),  # noqa: B008  # nobody changes it
) -> None:
    """Raises UsageError where options of the link would do nothing, as there is none, or cannot be left, and where
    adapters are asked for of a half that is not trained.
    """
    if cut.freeze_edge and lora.on_edge:
        frozen = "--mode frozen" if cut.mode == "frozen" else "--freeze-edge"
        raise UsageError(f"{frozen} trains nothing of the edge's half: add --lora-half cloud, or leave out --lora-r")
    is_known = cut.mode != "auto"  # or it is when one is chosen
    if training.detach and cut.activations != "keep-on-cloud" and is_known:
        raise UsageError("--detach needs --activations keep-on-cloud: what the cloud goes on with has to be there")
    if training.detach and link.labels == "local":
        raise UsageError("--detach needs labels that travel: with --labels local every step needs the edge")
    if training.detach and link.server is None:
        raise UsageError("--detach needs --server: a cloud that is started for the run ends with it")
    if training.detach and budget.data_cap is not None:
        raise UsageError("--detach does not go with --data-cap: what an edge that has left will fetch is not known yet")
    if cut.mode != "local":
        return
    for option, value in (("--data-cap", budget.data_cap), ("--max-mbit", budget.max_mbit)):
        if value is not None:
            raise UsageError(f"{option} {value} needs --mode sft, sl or frozen: one process has no wire")
    if link.server is not None:
        raise UsageError(f"--server {link.server} needs --mode sft, sl or frozen: one process has no cloud")
    if link.labels == "local":
        raise UsageError("--labels local needs --mode sft, sl or frozen: in one process labels are local as it is")


ACTIVATIONS = "activations.bin"
"""In the output directory: a frozen edge's, while the run is on. Those that a killed run leaves are in nobody's way."""

_RESULTS = ("model.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json", "README.md")
"""What a run writes at its end, in the place of what is there."""


def check_output_dir(output_dir: Path, overwrite: bool, resumes: bool = False) -> None:
    """Raises UsageError where a run, hours later, could not write its results or would mix them with others."""
    check_name("--output-dir", output_dir)
    if output_dir.is_dir() and any(path.name != ACTIVATIONS for path in output_dir.iterdir()) and not overwrite:
        if not resumes:
            raise UsageError(
                f"--output-dir {output_dir} is not empty; name another, or add --overwrite-output-dir, or "
                "--resume-from-checkpoint to go on where a run was broken off"
            )
        theirs = [name for name in _RESULTS if os.path.lexists(str(output_dir / name))]
        ours = (output_dir / "sft.json").exists() or any(output_dir.glob("checkpoint-*/manifest.json"))
        if theirs and not ours:
            raise UsageError(
                f"--output-dir {output_dir} holds {theirs[0]}, and neither a model nor a checkpoint of sft-edge; name "
                "another, or add --overwrite-output-dir"
            )
    _check_place("--output-dir", output_dir, output_dir)


def check_output_file(option: str, path: Path, overwrite: bool) -> None:
    """Raises UsageError where a file could not be written, or would replace one unasked."""
    if path.is_dir():
        raise UsageError(f"{option} {path} is a directory; name a file")
    if os.path.lexists(str(path)) and not overwrite:
        raise UsageError(f"{option} {path} is there already; name another, or add --overwrite")
    _check_place(option, path, path.parent)


def _check_place(option: str, path: Path, directory: Path) -> None:
    """Raises UsageError where `path` could not be written, which is or will be in that directory."""
    existing = nearest_existing(directory)
    if not existing.is_dir():
        raise UsageError(f"{option} {path}: {existing} is not a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"{option} {path}: no permission to write in {existing}")


def check_name(option: str, path: Path) -> None:
    """Raises UsageError for a name that packages which know UTF-8 alone, as tokenizers is one, could not write to."""
    if is_utf8(path):
        return
    encoding = sys.getfilesystemencoding()
    how = "choose another" if encoding == "utf-8" else f"choose another, or a UTF-8 locale; this one has {encoding}"
    raise UsageError(f"{option} {str(path)!a}: its name is not UTF-8, which what writes there needs; {how}")
