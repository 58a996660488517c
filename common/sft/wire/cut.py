"""Heads and cuts as messages, and messages as heads and cuts."""

from __future__ import annotations

from sft.errors import ProtocolError
from sft.models import Cut
from sft.v1 import split_training_pb2 as pb

_HEADS = {
    "sequence-classification": pb.HEAD_SEQUENCE_CLASSIFICATION,
    "question-answering": pb.HEAD_QUESTION_ANSWERING,
    "causal-lm": pb.HEAD_CAUSAL_LM,
    "token-classification": pb.HEAD_TOKEN_CLASSIFICATION,
    "multiple-choice": pb.HEAD_MULTIPLE_CHOICE,
    "masked-lm": pb.HEAD_MASKED_LM,
}
_MODES = {"sft": pb.MODE_SFT, "sl": pb.MODE_SL}
_RESIDUALS = {"none": pb.RESIDUAL_NONE, "low-rank": pb.RESIDUAL_LOW_RANK}

_HEAD_NAMES = {head: name for name, head in _HEADS.items()}
_MODE_NAMES = {mode: name for name, mode in _MODES.items()}
_RESIDUAL_NAMES = {residual: name for name, residual in _RESIDUALS.items()}


def head_to_proto(head: str) -> pb.Head:
    """Of a head that `sft.models` has."""
    return _HEADS[head]


def head_from_proto(head: pb.Head) -> str:
    """As `sft.models` calls it. Raises ProtocolError for none that there is."""
    if head not in _HEAD_NAMES:
        raise ProtocolError(f"unknown head {int(head)}")
    return _HEAD_NAMES[head]


def cut_to_proto(cut: Cut) -> pb.Cut:
    """Of a transformers model's cut that halves can have."""
    return pb.Cut(
        mode=_MODES[cut.mode],
        split_layer=cut.split_layer,
        split_rank=cut.split_rank,
        residual=_RESIDUALS[cut.residual],
    )


def cut_from_proto(cut: pb.Cut) -> Cut:
    """Of a transformers model's cut. Raises ProtocolError for a mode or a residual that there is not."""
    if cut.mode not in _MODE_NAMES:
        raise ProtocolError(f"unknown mode {int(cut.mode)} of the cut")
    if cut.residual not in _RESIDUAL_NAMES:
        raise ProtocolError(f"unknown residual {int(cut.residual)} of the cut")
    return Cut(mode_name(cut.mode), cut.split_layer, cut.split_rank, residual_name(cut.residual))


def body_cut_to_proto(layer_name: str, cut: Cut) -> pb.Cut:
    """Of the cut of a transformers model inside another module, at the layer that the latter calls so."""
    message = cut_to_proto(cut)
    message.layer_name = layer_name
    return message


def layer_cut_to_proto(layer_name: str, split_rank: int) -> pb.Cut:
    """Of any other module's cut, at the layer of that name."""
    return pb.Cut(mode=pb.MODE_SFT, layer_name=layer_name, split_rank=split_rank, residual=pb.RESIDUAL_NONE)


def mode_name(mode: pb.Mode) -> str:
    """For people: the number, where there is no such mode."""
    return _MODE_NAMES.get(mode) or str(int(mode))


def residual_name(residual: pb.Residual) -> str:
    """For people: the number, where there is no such residual."""
    return _RESIDUAL_NAMES.get(residual) or str(int(residual))
