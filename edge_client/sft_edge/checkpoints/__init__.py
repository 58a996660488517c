"""How a run survives: when it is saved, what is in it, whether two attempts are one run."""

from sft_edge.checkpoints.content import keep_key_of, read_codec_tables
from sft_edge.checkpoints.directory import only_run_in
from sft_edge.checkpoints.policy import Checkpointing, Stopped, options_before
from sft_edge.checkpoints.same_run import likeness

__all__ = [
    "Checkpointing",
    "Stopped",
    "keep_key_of",
    "likeness",
    "only_run_in",
    "options_before",
    "read_codec_tables",
]
