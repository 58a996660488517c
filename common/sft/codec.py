"""Tensors <-> bytes: element types, and the packing away of padding.

Shape suffixes: B batch, S padded sequence, T tokens left after packing, R width on the wire, C outputs of the head.

Packing is exact: attention ignores padded positions, the loss does not see them, and their gradient is zero.
"""

from __future__ import annotations

import math
from typing import Dict, List, Sequence, Tuple

import torch
from torch import Tensor
from transformers import PretrainedConfig

from sft.batch import attention_mask
from sft.errors import ProtocolError
from sft.losses import IGNORED
from sft.v1 import split_training_pb2 as pb

DATA_TYPES: Dict[str, pb.DataType] = {
    "float32": pb.DATA_TYPE_FLOAT32,
    "bfloat16": pb.DATA_TYPE_BFLOAT16,
    "float16": pb.DATA_TYPE_FLOAT16,
}
"""Names as options spell them."""

_TORCH = {
    pb.DATA_TYPE_FLOAT32: torch.float32,
    pb.DATA_TYPE_BFLOAT16: torch.bfloat16,
    pb.DATA_TYPE_FLOAT16: torch.float16,
}

MAX_DIMENSIONS = 16
"""Of a tensor on the wire: the product of more sizes than that is not even computed."""


def encode_tensor(x: Tensor, data_type: pb.DataType = pb.DATA_TYPE_FLOAT32) -> pb.Tensor:
    """Any float tensor, converted to the wire's type."""
    flat = x.detach().to("cpu", _TORCH[data_type]).contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return pb.Tensor(data_type=data_type, shape=list(x.shape), data=data)


def decode_tensor(message: pb.Tensor, device: torch.device) -> Tensor:
    """Back to float32, on `device`. Raises ProtocolError when type, shape and length do not fit together."""
    dtype = _TORCH.get(message.data_type)
    if dtype is None:
        raise ProtocolError(f"tensor of unknown element type {int(message.data_type)}")
    if len(message.shape) > MAX_DIMENSIONS:
        raise ProtocolError(f"tensor of {len(message.shape)} dimensions; at most {MAX_DIMENSIONS} are accepted")
    size = math.prod(message.shape) * (4 if dtype == torch.float32 else 2)
    if size != len(message.data):
        raise ProtocolError(f"tensor of shape {list(message.shape)} needs {size} bytes, {len(message.data)} came")
    if not size:
        return torch.zeros(_without_elements(message.shape), device=device)
    x = torch.frombuffer(bytearray(message.data), dtype=dtype).reshape(tuple(message.shape))
    return x.to(device, torch.float32)


def _without_elements(shape: Sequence[int]) -> Tuple[int, ...]:
    # Beside a 0, the other sizes may be any, and torch multiplies them for its strides.
    if max(shape) >= 1 << 31 or math.prod(size for size in shape if size) >= 1 << 31:
        raise ProtocolError(f"tensor of shape {list(shape)}; it is too large, though it has no elements")
    return tuple(shape)


def _shown(shape: Sequence[int]) -> str:
    """For an error's sentence."""
    return str(list(shape[:MAX_DIMENSIONS])) + (" and more" if len(shape) > MAX_DIMENSIONS else "")


def pack(x_BSR: Tensor, lengths: Sequence[int]) -> Tensor:
    """The rows of tokens, padding left out: (T, R), sequence after sequence."""
    return x_BSR[attention_mask(list(lengths), x_BSR.shape[1]).bool().to(x_BSR.device)]


def unpack(x_TR: Tensor, lengths: Sequence[int], padded_length: int) -> Tensor:
    """The inverse of `pack`: (B, S, R), zeros at padding."""
    x_BSR = x_TR.new_zeros(len(lengths), padded_length, x_TR.shape[-1])
    x_BSR[attention_mask(list(lengths), padded_length).bool().to(x_TR.device)] = x_TR
    return x_BSR


def is_packed(head: str) -> bool:
    """Whether the logits of a head are one row a token, so that those of padding do not travel."""
    return head != "sequence-classification"


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
            f"logits, or their gradient, of shape {_shown(message.shape)} came; it has to be {[rows, columns]}"
        )
    logits = decode_tensor(message, device)
    return unpack(logits, lengths, padded_length) if is_packed(head) else logits


def outputs_of(config: PretrainedConfig, head: str) -> int:
    """C: how many logits a row has."""
    return int(config.vocab_size) if head == "causal-lm" else int(config.num_labels or 0)


def encode_activation(a_BSR: Tensor, lengths: List[int], data_type: pb.DataType) -> pb.Activation:
    """What the edge sends of a micro-batch."""
    packed = encode_tensor(pack(a_BSR, lengths), data_type)
    return pb.Activation(packed=packed, lengths=lengths, padded_length=a_BSR.shape[1])


def decode_activation(
    message: pb.Activation, width: int, max_length: int, device: torch.device
) -> Tuple[Tensor, List[int]]:
    """What the cloud feeds to net_2: a_BSR with zeros at padding, and the lengths.

    Raises ProtocolError when the fields contradict each other or the model; sizes are checked before memory is taken.
    """
    padded_length, shape = message.padded_length, message.packed.shape
    if padded_length > max_length:
        raise ProtocolError(f"padded length {padded_length} is more than the model's {max_length} positions")
    if message.lengths and (len(shape) != 2 or len(message.lengths) > shape[0]):
        raise ProtocolError(
            f"the activation has shape {_shown(shape)}, which is not a row for each token of "
            f"{len(message.lengths)} sequences"
        )
    lengths = list(message.lengths)
    if not lengths or min(lengths) < 1 or max(lengths) > padded_length:
        raise ProtocolError(f"lengths must be from 1 to the padded length {padded_length}, and at least one")
    expected = [sum(lengths), width]
    if list(shape) != expected:
        raise ProtocolError(f"the activation has shape {list(shape)}, the lengths say {expected}")
    return unpack(decode_tensor(message.packed, device), lengths, padded_length), lengths


def encode_labels(labels: Dict[str, Tensor], lengths: Sequence[int] = ()) -> pb.Labels:
    """Labels as `sft.batch.Batch` holds them; those of a language model, (B, S) int64, need the `lengths`."""
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
    B, num_labels = len(lengths), int(config.num_labels or 0)
    if kind == "spans":
        _check_count(len(message.spans.starts), B)
        _check_count(len(message.spans.ends), B)
        starts, ends = list(message.spans.starts), list(message.spans.ends)
        if max(starts + ends) >= padded_length:
            raise ProtocolError(f"an answer span reaches beyond the padded length {padded_length}")
        return {"start_positions": torch.tensor(starts), "end_positions": torch.tensor(ends)}
    if kind == "classes":
        _check_count(len(message.classes.ids), B)
        ids = list(message.classes.ids)
        if min(ids) < 0 or max(ids) >= num_labels:
            raise ProtocolError(f"class ids must be from 0 to {num_labels - 1}")
        return {"labels": torch.tensor(ids)}
    if kind == "tokens":
        _check_count(len(message.tokens.ids), sum(lengths))
        tokens_T = torch.tensor(list(message.tokens.ids))
        if bool(((tokens_T != IGNORED) & ((tokens_T < 0) | (tokens_T >= config.vocab_size))).any()):
            raise ProtocolError(f"token ids must be from 0 to {config.vocab_size - 1}, or {IGNORED}")
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
    if head == "question-answering":
        return "spans"
    if head == "causal-lm":
        return "tokens"
    return "classes" if config.problem_type == "single_label_classification" else "values"


def _check_count(count: int, expected: int) -> None:
    if count != expected:
        raise ProtocolError(f"{expected} labels expected, {count} came")
