"""Algorithm 1, lines 1 to 3, for a transformers model: cut at block l, decomposed, filled; a small file a family.

Listed here is what speaks of models, halves and cuts. Doors of their own are `weights`, `lora`, `losses`, `decompose`,
`split_layer`, `seeding`, `configuration`, `checked_config`, `gone` and
`families.catalogue`; the other files are the room's own.
"""

from sft.models.built_anew import whole_name
from sft.models.calibration import Moments, output_moments
from sft.models.cut import (
    Cut,
    Undrawn,
    build_net_1,
    build_net_2,
    build_whole,
    ffn_out_name,
    last_of_edge,
    matrix_of,
    name_of_w,
)
from sft.models.families.catalogue import body_of, family_of, head_of, heads_of, max_positions
from sft.models.heads import HEADS, head_named, is_body
from sft.models.in_place import (
    check_live,
    cut_live,
    decompose_live,
    decomposed_by,
    has_fused_head,
    is_stock,
    layer_to_cut,
    live_parameters,
    what_is_own,
)
from sft.models.nets import Net, Net1, Net2, Output, TiedHead, Whole
from sft.models.split_layer import RESIDUALS

__all__ = [
    "HEADS",
    "RESIDUALS",
    "Cut",
    "Moments",
    "Net",
    "Net1",
    "Net2",
    "Output",
    "TiedHead",
    "Undrawn",
    "Whole",
    "body_of",
    "build_net_1",
    "build_net_2",
    "build_whole",
    "check_live",
    "cut_live",
    "decompose_live",
    "decomposed_by",
    "family_of",
    "ffn_out_name",
    "has_fused_head",
    "head_named",
    "head_of",
    "heads_of",
    "is_body",
    "is_stock",
    "last_of_edge",
    "layer_to_cut",
    "live_parameters",
    "matrix_of",
    "max_positions",
    "name_of_w",
    "output_moments",
    "what_is_own",
    "whole_name",
]
