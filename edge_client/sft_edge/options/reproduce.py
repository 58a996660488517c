"""The options of `sft-edge reproduce`. This module, too, imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import List, Literal, Optional

from sft.cli.devices import check_device
from sft.cli.options import above_zero, at_least, flag
from sft.errors import CutError, UsageError
from sft_edge.options.train import check_name

PAPER_TASKS = ("sst2", "qnli", "mnli", "qqp", "cola", "rte", "stsb", "mrpc", "squad")
"""In the order of the columns of Table I."""

TIMING = "timing"

_OF_RUNS = (
    "tasks",
    "split_ranks",
    "split_layers",
    "seeds",
    "data_dir",
    "max_train_samples",
    "max_eval_samples",
    "num_train_epochs",
    "learning_rate",
    "per_device_train_batch_size",
    "max_seq_length",
    "keep_models",
    "jobs",
    "dry_run",
)


@dataclass
class ReproduceOptions:
    """What is reproduced."""

    figure: Literal["table1", "fig2", "fig3", "timing"]
    """of the paper: its name alone will do, without the option, before all others"""

    output_dir: Optional[Path] = None
    """where each run, the table and the plot go; called again with it, what is finished is not run again (default:
    reproduced/FIGURE)"""

    model: Optional[str] = field(default=None, metadata={"names_place": True})
    """a model on the hub, a directory, or minilm, which is what the runs have without it; timing then has BERT-base's
    shape, with random weights"""

    data_dir: Optional[Path] = None
    """directory with the tasks' files, as the official downloads are laid out"""

    tasks: List[str] = field(default_factory=list)
    """of the nine of Table I; by default all of them for table1, and sst2 qnli for fig2 and fig3"""

    split_ranks: List[int] = field(default_factory=list)
    """ranks R of split fine-tuning; by default the paper's, 8 16 32 for table1, 1 for fig2, 8 for fig3"""

    split_layers: List[int] = field(default_factory=list)
    """blocks to cut, counted from 1; by default the last but one for table1, and every one for fig2 and fig3"""

    seeds: List[int] = field(default_factory=list)
    """a run for each; by default 0 alone. The paper has three runs"""

    max_train_samples: Optional[int] = None
    """train on the first so many rows of each task, 0 for all; by default as many as should take a core about 100
    seconds a run of MiniLM, which differ from task to task"""

    max_eval_samples: Optional[int] = None
    """evaluate on the first so many rows, 0 for all (default: 1000 at most, and 300 of SQuAD)"""

    num_train_epochs: Optional[float] = None
    """passes over the training rows (default: 2)"""

    learning_rate: Optional[float] = None
    """the highest learning rate (default: 2e-4, and 1e-4 of RTE and SQuAD, for MiniLM on so few rows)"""

    per_device_train_batch_size: Optional[int] = None
    """sequences in a micro-batch (default: 32; on samples 16 of QNLI, MNLI, QQP, CoLA and MRPC, 8 of RTE and SQuAD)"""

    max_seq_length: Optional[int] = None
    """tokens a sequence is cut to (default: 128, and 384 of SQuAD; on samples 64 of QNLI and MNLI, 96 of RTE)"""

    device: str = "auto"
    """where the edge's half runs, and the whole model: cpu, cuda, cuda:N, or auto for CUDA where there is some"""

    keep_models: bool = False
    """keep the model of each run, in RUN/model; without it only what is told of the run stays"""

    jobs: Optional[int] = None
    """so many runs side by side (default: 1); torch takes all cores for each unless OMP_NUM_THREADS says how many"""

    dry_run: bool = False
    """print the runs with their commands, and how long they will take as far as earlier ones tell; run nothing"""

    def __post_init__(self) -> None:
        check_device(self.device)
        if self.output_dir is None:
            self.output_dir = Path("reproduced") / self.figure
        check_name("--output-dir", self.output_dir)
        if self.figure == TIMING:
            for name in _OF_RUNS:
                if getattr(self, name) not in (None, [], False):
                    raise UsageError(f"{flag(name)} is for table1, fig2 and fig3: timing trains nothing")
            return
        if self.data_dir is None:
            raise UsageError("--data-dir must be given: the directory with the tasks' files")
        for task in self.tasks:
            if task not in PAPER_TASKS:
                raise UsageError(f"--tasks: the paper has no {task!r}; it has {', '.join(PAPER_TASKS)}")
        if any(rank < 1 for rank in self.split_ranks):
            raise CutError(f"--split-ranks must be 1 or more, not {min(self.split_ranks)}")
        if any(layer < 1 for layer in self.split_layers):
            raise CutError(f"--split-layers counts blocks from 1, not {min(self.split_layers)}")
        if any(not 0 <= seed < 2**63 for seed in self.seeds):
            raise UsageError("--seeds must be 0 or more and below 2^63")
        at_least(self, 0, "max_train_samples", "max_eval_samples", "learning_rate")
        at_least(self, 1, "per_device_train_batch_size", "max_seq_length", "jobs")
        above_zero(self, "num_train_epochs")
