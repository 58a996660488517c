"""What is answered to a forward or an evaluation: of which kind it is, how large, and what fills it."""

from __future__ import annotations

import math

from torch import Tensor

from sft.errors import ProtocolError
from sft.v1 import split_training_pb2 as pb
from sft.wire.codec.packing import pack
from sft_cloud.session.upper_half import Given, UpperHalf

_EVALUATION_TAKES = 4
"""Of the memory of training, at most this part: nothing is kept for a backward pass."""

_OF_TOKENS = ("labels", "scored")

COPIES_OF_ANSWER = 4
"""Packed, as bytes, in the message, and on the way to the edge: until it has been sent."""


def asks_for_logits(asked: pb.Forward | pb.Evaluate) -> bool:
    """Whether the answer is to hold them. Raises ProtocolError for labels that are to be learned and scored at once."""
    has_labels, has_scored = asked.HasField("labels"), asked.HasField("scored")
    if has_labels and has_scored:
        raise ProtocolError("a message has labels or scored ones, not both")
    if has_scored and asked.scored.WhichOneof("kind") is None:
        raise ProtocolError("a message has scored labels without any; leave them out")
    return not has_scored and (not has_labels or (isinstance(asked, pb.Forward) and asked.want_logits))


def answer_bytes(half: UpperHalf, activation: pb.Activation, logits: bool, gradient: bool = False) -> int:
    """What the answer to an activation takes, seen before anything is made of it, while it is made and sent."""
    size = half.logits_bytes(activation) if logits else 0
    if gradient:
        size += 4 * math.prod(activation.packed.shape)
    return COPIES_OF_ANSWER * size


def evaluation_bytes(half: UpperHalf, evaluate: pb.Evaluate) -> int:
    """What an evaluation batch takes beside its answer.

    Raises ProtocolError for labels that are not of tokens: no other head's may go with an Evaluate.
    """
    size = half.training_bytes(evaluate.activation) // _EVALUATION_TAKES
    size += half.cast_bytes() if evaluate.autocast else 0
    if asks_for_logits(evaluate):
        return size
    if any(evaluate.HasField(one) and getattr(evaluate, one).WhichOneof("kind") != "tokens" for one in _OF_TOKENS):
        raise ProtocolError("an Evaluate has labels where they are of tokens; leave others out")
    # A loss takes about a copy of the logits, padding and all; scores three, of what has a label.
    lengths = evaluate.activation.lengths
    padded_tokens = len(lengths) * evaluate.activation.padded_length
    copies = 3 if evaluate.HasField("scored") else 1
    return size + copies * half.logits_bytes(evaluate.activation) * padded_tokens // max(1, sum(lengths))


def fill_evaluation(evaluation: pb.Evaluation, half: UpperHalf, labels: dict[str, Tensor], given: Given) -> None:
    """Logits; with the labels of a language model their loss, and the place of each token's largest logit."""
    outputs = half.outputs(given)
    if labels:
        evaluation.loss = float(half.loss(outputs, labels, given))
        evaluation.best_tokens.extend(pack(outputs.argmax(-1, keepdim=True), given.lengths).flatten().tolist())
    else:
        evaluation.logits.CopyFrom(half.encode_outputs(outputs, given))
