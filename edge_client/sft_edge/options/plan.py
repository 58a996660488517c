"""The options of `sft-edge plan`, beside those of the run that is planned. Imports nothing heavy, either."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from sft.cli.durations import Duration
from sft.cli.options import above_zero, at_least
from sft.cli.sizes import Size
from sft.errors import UsageError
from sft_edge.options.cut import CutOptions, PlanCutOptions
from sft_edge.options.train import TRAIN_OPTIONS, TrainingOptions, check_output_file


@dataclass
class PlanOptions:
    """The limits: the fastest plan that keeps to them, and to --data-cap, is the best."""

    max_bytes_per_step: Optional[Size] = None
    """bytes of a step on the link, both ways, on average"""

    max_edge_memory: Optional[Size] = None
    """memory of the edge's process"""

    max_run_time: Optional[Duration] = None
    """time that training takes, with what the link carries before and after it; evaluation is not in it"""

    min_accuracy: Optional[float] = None
    """score to expect, in points against the whole model in one process, whatever that has: -1 is one point less; 0 or
    less. A plan that no record says anything of does not keep to it"""

    price_per_gb: Optional[float] = None
    """what a GB (1,000,000,000 bytes) on the link costs, in any currency: the price of each run is shown then"""

    all: bool = False
    """print every plan, not the best few of each mode"""

    json: bool = False
    """write it as JSON, with every plan and what was measured"""

    svg: Optional[Path] = None
    """file for a chart: seconds a step over the block that is cut"""

    overwrite: bool = False
    """replace the file of --svg where it is there already"""

    def __post_init__(self) -> None:
        above_zero(self, "max_bytes_per_step", "max_edge_memory", "max_run_time")
        at_least(self, 0, "price_per_gb")
        if self.min_accuracy is not None and not -100 <= self.min_accuracy <= 0:
            raise UsageError(
                f"--min-accuracy must be from -100 to 0, not {self.min_accuracy}: points against the whole model"
            )
        if self.svg is not None:
            check_output_file("--svg", self.svg, self.overwrite)


@dataclass
class PlanTrainingOptions(TrainingOptions):
    """The run, of which nothing is written: --output-dir and --resume-from-checkpoint say nothing here."""

    def __post_init__(self) -> None:
        self.output_dir = self.resume_from_checkpoint = None
        super().__post_init__()


_INSTEAD = {CutOptions: PlanCutOptions, TrainingOptions: PlanTrainingOptions}

PLAN_OPTIONS = (PlanOptions, *(_INSTEAD.get(group, group) for group in TRAIN_OPTIONS))
"""What it takes, in the order of its help: all that `train` takes, of which the cut may be left open."""
