"""A cut as the message that says so."""

from __future__ import annotations

from sft.models import Cut
from sft.v1 import split_training_pb2 as pb

HEADS = {
    "sequence-classification": pb.HEAD_SEQUENCE_CLASSIFICATION,
    "question-answering": pb.HEAD_QUESTION_ANSWERING,
    "causal-lm": pb.HEAD_CAUSAL_LM,
}
"""Heads as the wire calls them."""

_MODES = {"sft": pb.MODE_SFT, "sl": pb.MODE_SL}

_RESIDUALS = {"none": pb.RESIDUAL_NONE, "low-rank": pb.RESIDUAL_LOW_RANK}


def cut_to_proto(cut: Cut) -> pb.Cut:
    """Of a transformers model's cut that halves can have."""
    return pb.Cut(
        mode=_MODES[cut.mode],
        split_layer=cut.split_layer,
        split_rank=cut.split_rank,
        residual=_RESIDUALS[cut.residual],
    )
