"""Every option of every command. Imports nothing heavy, so that `--help` is quick."""

from sft_edge.options.budget import BudgetOptions
from sft_edge.options.commands import (
    AttachOptions,
    CompareOptions,
    DemoOptions,
    DoctorOptions,
    EnvOptions,
    EvaluateOptions,
    ExportOptions,
    PredictOptions,
    VerifyOptions,
)
from sft_edge.options.cut import CutOptions, PlanCutOptions
from sft_edge.options.link import LinkOptions
from sft_edge.options.lora import LoraOptions
from sft_edge.options.optimizer import OptimizerOptions
from sft_edge.options.plan import PLAN_OPTIONS, PlanOptions
from sft_edge.options.repeating import OPTIONS_FILE, repeatable
from sft_edge.options.reproduce import PAPER_TASKS, TIMING, ReproduceOptions
from sft_edge.options.train import (
    ACTIVATIONS,
    NEWEST,
    TRAIN_OPTIONS,
    DataOptions,
    LoggingOptions,
    ModelOptions,
    RunOptions,
    TrainingOptions,
    check_together,
)

__all__ = [
    "ACTIVATIONS",
    "NEWEST",
    "OPTIONS_FILE",
    "PAPER_TASKS",
    "PLAN_OPTIONS",
    "TIMING",
    "TRAIN_OPTIONS",
    "AttachOptions",
    "BudgetOptions",
    "CompareOptions",
    "CutOptions",
    "DataOptions",
    "DemoOptions",
    "DoctorOptions",
    "EnvOptions",
    "EvaluateOptions",
    "ExportOptions",
    "LinkOptions",
    "LoggingOptions",
    "LoraOptions",
    "ModelOptions",
    "OptimizerOptions",
    "PlanCutOptions",
    "PlanOptions",
    "PredictOptions",
    "ReproduceOptions",
    "RunOptions",
    "TrainingOptions",
    "VerifyOptions",
    "check_together",
    "repeatable",
]
