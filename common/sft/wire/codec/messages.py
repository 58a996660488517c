"""Activations, logits and labels as messages, without their padding, and back; whatever comes is checked.

Shape suffixes: B batch, S padded sequence, T tokens left after packing, R width on the wire, C outputs of the head.

Packing is exact: attention ignores padded positions, the loss does not see them, and their gradient is zero.
"""

from __future__ import annotations

from typing import Dict, List, Sequence, Tuple

import torch
from torch import Tensor
from transformers import PretrainedConfig

from sft.batch import IGNORED, attention_mask
from sft.errors import ProtocolError
from sft.models import HEADS
from sft.v1 import split_training_pb2 as pb
from sft.wire.codec.elements import decode_tensor, encode_tensor, shown
from sft.wire.codec.packing import pack, unpack
from sft.wire.codec.rows import CODES, Codes


def is_packed(head: str) -> bool:
    """Whether the logits of a head are one row a token, so that those of padding do not travel."""
    return HEADS[head].per_token


def encode_logits(logits: Tensor, lengths: Sequence[int], head: str, data_type: pb.DataType) -> pb.Tensor:
    """Logits, or their gradient: (B, C) as they are, (B, S, C) without padding."""
    return encode_tensor(pack(logits, lengths) if is_packed(head) else logits, data_type)


def decode_logits(
    message: pb.Tensor, lengths: Sequence[int], padded_length: int, columns: int, head: str, device: torch.device
) -> Tensor:
    """The inverse of `encode_logits`, with `columns` C; zeros at padding. Raises ProtocolError for another shape."""
    rows = sum(lengths) if is_packed(head) else len(lengths)
    if len(message.shape) != 2 or list(message.shape) != [rows, columns]:
        raise ProtocolError(
            f"logits, or their gradient, of shape {shown(message.shape)} came; it has to be {[rows, columns]}"
        )
    logits = decode_tensor(message, device)
    return unpack(logits, lengths, padded_length) if is_packed(head) else logits


def outputs_of(config: PretrainedConfig, head: str) -> int:
    """C: how many logits a row has."""
    if head == "multiple-choice":
        return 1
    return int(config.vocab_size) if HEADS[head].of_vocabulary else int(config.num_labels or 0)


def encode_activation(
    packed: Tensor,
    data_type: pb.DataType,
    lengths: Sequence[int] = (),
    padded_length: int = 0,
    codes: Codes = CODES,
) -> pb.Activation:
    """What the edge sends of a micro-batch: (T, R) with the `lengths` of its sequences, or any (..., R) without."""
    tensor = encode_tensor(packed, data_type, codes=codes)
    return pb.Activation(packed=tensor, lengths=lengths, padded_length=padded_length)


def decode_activation(
    message: pb.Activation, width: int, max_length: int, device: torch.device, codes: Codes = CODES
) -> Tuple[Tensor, List[int]]:
    """What the cloud feeds to net_2: a_BSR with zeros at padding, and the lengths.

    Raises ProtocolError when the fields contradict each other or the model; sizes are checked before memory is taken.
    """
    padded_length, shape = message.padded_length, message.packed.shape
    if padded_length > max_length:
        raise ProtocolError(f"padded length {padded_length} is more than the model's {max_length} positions")
    if message.lengths and (len(shape) != 2 or len(message.lengths) > shape[0]):
        raise ProtocolError(
            f"the activation has shape {shown(shape)}, which is not a row for each token of "
            f"{len(message.lengths)} sequences"
        )
    lengths = list(message.lengths)
    if not lengths or min(lengths) < 1 or max(lengths) > padded_length:
        raise ProtocolError(f"lengths must be from 1 to the padded length {padded_length}, and at least one")
    expected = [sum(lengths), width]
    if list(shape) != expected:
        raise ProtocolError(f"the activation has shape {list(shape)}, the lengths say {expected}")
    return unpack(decode_tensor(message.packed, device, codes), lengths, padded_length), lengths


def encode_labels(labels: Dict[str, Tensor], lengths: Sequence[int] = ()) -> pb.Labels:
    """Labels as `sft.batch.Batch` holds them; those of tokens, (B, S) int64, need the `lengths`."""
    if "start_positions" in labels:
        spans = pb.Labels.Spans(starts=labels["start_positions"].tolist(), ends=labels["end_positions"].tolist())
        return pb.Labels(spans=spans)
    y = labels["labels"]
    if y.dtype == torch.int64 and y.dim() == 2:
        return pb.Labels(tokens=pb.Labels.Tokens(ids=pack(y, lengths).tolist()))
    if y.dtype == torch.int64:
        return pb.Labels(classes=pb.Labels.Classes(ids=y.tolist()))
    columns = y.shape[1] if y.dim() == 2 else 0
    return pb.Labels(values=pb.Labels.Values(values=y.reshape(-1).tolist(), columns=columns))


def decode_labels(
    message: pb.Labels, lengths: List[int], padded_length: int, config: PretrainedConfig, head: str
) -> Dict[str, Tensor]:
    """The labels of a micro-batch, as the library's heads take them.

    Raises ProtocolError when they are of another kind than the head predicts, of another number, or out of range.
    """
    kind = message.WhichOneof("kind")
    if kind != _kind_for(config, head):
        raise ProtocolError(f"this head learns from {_kind_for(config, head)}, but the labels are {kind}")
    B, num_labels = len(lengths), outputs_of(config, head)
    if kind == "spans":
        _check_count(len(message.spans.starts), B)
        _check_count(len(message.spans.ends), B)
        starts, ends = list(message.spans.starts), list(message.spans.ends)
        if max(starts + ends) >= padded_length:
            raise ProtocolError(f"an answer span reaches beyond the padded length {padded_length}")
        return {"start_positions": torch.tensor(starts), "end_positions": torch.tensor(ends)}
    if kind == "classes":
        ids = list(message.classes.ids)
        if head == "multiple-choice" and ids and B % len(ids) == 0:
            num_labels = B // len(ids)
        else:
            _check_count(len(ids), B)
        return {"labels": _ids(ids, num_labels)}
    if kind == "tokens":
        _check_count(len(message.tokens.ids), sum(lengths))
        tokens_T = _ids(list(message.tokens.ids), num_labels)
        labels_BS = torch.full((B, padded_length), IGNORED)
        labels_BS[attention_mask(lengths, padded_length).bool()] = tokens_T
        return {"labels": labels_BS}
    columns = message.values.columns
    if columns != (0 if num_labels == 1 and config.problem_type == "regression" else num_labels):
        raise ProtocolError(f"label rows have {columns} columns, the head has {num_labels} outputs")
    _check_count(len(message.values.values), B * max(columns, 1))
    y = torch.tensor(list(message.values.values), dtype=torch.float32)
    if not bool(torch.isfinite(y).all()):
        raise ProtocolError("a label is not a finite number")
    return {"labels": y.reshape(B, columns) if columns else y}


def _kind_for(config: PretrainedConfig, head: str) -> str:
    if head == "sequence-classification" and config.problem_type != "single_label_classification":
        return "values"
    return HEADS[head].learns


def _ids(ids: List[int], end: int) -> Tensor:
    y = torch.tensor(ids)
    if bool(((y != IGNORED) & ((y < 0) | (y >= end))).any()):
        raise ProtocolError(f"labels must be from 0 to {end - 1}, or {IGNORED}")
    return y


def _check_count(count: int, expected: int) -> None:
    if count != expected:
        raise ProtocolError(f"{expected} labels expected, {count} came")
