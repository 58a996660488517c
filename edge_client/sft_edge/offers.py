"""What an edge tells and offers the cloud when it opens a session."""

from __future__ import annotations

from typing import Dict, List

from sft.models import Cut
from sft.tensor_stream import StoredTensor, safetensors_chunks, safetensors_size, sha256_of
from sft.v1 import split_training_pb2 as pb
from sft_edge.link import Blob

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


def offer(tensors: List[StoredTensor], blobs: Dict[str, Blob]) -> str:
    """Adds the tensors to `blobs`, as one blob; returns its hash, which is empty for no tensors."""
    if not tensors:
        return ""
    sha256 = sha256_of(tensors)
    blobs[sha256] = Blob(safetensors_size(tensors), lambda: safetensors_chunks(tensors))
    return sha256
