"""The paper's three systems behind one interface: where Algorithm 1 is on the edge."""

from sft_edge.systems.cache import is_ours
from sft_edge.systems.cloud_process import CloudProcess
from sft_edge.systems.crossing import Activation, Crossing, check_size
from sft_edge.systems.fit import FIT_TOKENS, fit_tables, mean_row_bytes, rows_to_fit
from sft_edge.systems.halves import Halves, halve, optimizer_spec, whole_tensors
from sft_edge.systems.kept_on_cloud import key_of
from sft_edge.systems.open import cut_of, open_system
from sft_edge.systems.split import SplitSystem, open_split_system
from sft_edge.systems.system import SentStep, System

__all__ = [
    "FIT_TOKENS",
    "Activation",
    "CloudProcess",
    "Crossing",
    "Halves",
    "SentStep",
    "SplitSystem",
    "System",
    "check_size",
    "cut_of",
    "fit_tables",
    "halve",
    "is_ours",
    "key_of",
    "mean_row_bytes",
    "open_split_system",
    "open_system",
    "optimizer_spec",
    "rows_to_fit",
    "whole_tensors",
]
