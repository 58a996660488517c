"""Cutting a transformers model at block l: `cut` has the algorithm, one small file per family the names of modules."""

from sft.models.cut import (
    HEADS,
    Cut,
    Net,
    Net1,
    Net2,
    Output,
    Whole,
    build_net_1,
    build_net_2,
    build_whole,
    family_of,
    ffn_out_name,
    max_positions,
)

__all__ = [
    "HEADS",
    "Cut",
    "Net",
    "Net1",
    "Net2",
    "Output",
    "Whole",
    "build_net_1",
    "build_net_2",
    "build_whole",
    "family_of",
    "ffn_out_name",
    "max_positions",
]
