"""A tensor as the bytes of its rows, and back."""

from __future__ import annotations

import math
from typing import NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from sft.errors import ProtocolError, UsageError
from sft.v1 import split_training_pb2 as pb
from sft.wire.codec.rows import CODES, NAMES

FLOATS = ("float32", "bfloat16", "float16")
"""Of the codecs' names those that `wire_data_type` may have: for all tensors."""

MAX_DIMENSIONS = 16
"""Of a tensor on the wire: the product of more sizes than that is not even computed."""


class Codecs(NamedTuple):
    """How a session's tensors are written, as its request says."""

    activation: pb.DataType
    gradient: pb.DataType
    """By the activation."""
    outputs: pb.DataType
    """For the gradient by the outputs, where labels stay on the edge. Outputs themselves are float32."""


IN_FULL = Codecs(pb.DATA_TYPE_FLOAT32, pb.DATA_TYPE_FLOAT32, pb.DATA_TYPE_FLOAT32)


def codecs_named(wire_dtype: str, codec: Optional[str] = None, gradient_codec: Optional[str] = None) -> Codecs:
    """What the options of these names mean; None is what the one before says. Raises UsageError for other names."""
    codec = codec or wire_dtype
    for option, name, names in (
        ("wire_dtype", wire_dtype, FLOATS),
        ("codec", codec, tuple(NAMES)),
        ("gradient_codec", gradient_codec or codec, tuple(NAMES)),
    ):
        if name not in names:
            raise UsageError(f"{option} must be one of {', '.join(names)}, not {name!r}")
    return Codecs(NAMES[codec], NAMES[gradient_codec or codec], NAMES[wire_dtype])


def codecs_of(request: pb.OpenSessionRequest) -> Codecs:
    """Raises ProtocolError for what is no codec of ours."""
    plain = request.wire_data_type
    if plain not in [NAMES[name] for name in FLOATS]:
        raise ProtocolError(f"unknown wire_data_type {int(plain)}")
    codecs = Codecs(request.activation_codec or plain, request.gradient_codec or plain, plain)
    for which, codec in (("activation", codecs.activation), ("gradient", codecs.gradient)):
        if codec not in CODES:
            raise ProtocolError(f"unknown {which}_codec {int(codec)}")
    return codecs


def encode_tensor(
    x: Tensor, data_type: pb.DataType = pb.DATA_TYPE_FLOAT32, rounding: Optional[int] = None
) -> pb.Tensor:
    """Any float tensor, as the wire has it. `rounding` as `RowCode.encode` has it."""
    width = _width(x.shape)
    if not x.numel():
        return pb.Tensor(data_type=data_type, shape=list(x.shape))
    rows_TX = CODES[data_type].encode(x.detach().float().reshape(-1, width), rounding)
    return pb.Tensor(data_type=data_type, shape=list(x.shape), data=rows_TX.cpu().numpy().tobytes())


def check_tensor(message: pb.Tensor) -> None:
    """Before anything is made of it: raises as `decode_tensor` does, so that its shape is no larger than its bytes."""
    if message.data_type not in CODES:
        raise ProtocolError(f"tensor of unknown element type {int(message.data_type)}")
    if len(message.shape) > MAX_DIMENSIONS:
        raise ProtocolError(f"tensor of {len(message.shape)} dimensions; at most {MAX_DIMENSIONS} are accepted")
    size = encoded_size(message.shape, message.data_type)
    if size != len(message.data):
        raise ProtocolError(f"tensor of shape {list(message.shape)} needs {size} bytes, {len(message.data)} came")


def decode_tensor(message: pb.Tensor, device: torch.device) -> Tensor:
    """Back to float32, on `device`. Raises ProtocolError when type, shape and length do not fit together."""
    check_tensor(message)
    if not message.data:
        return torch.zeros(_without_elements(message.shape), device=device)
    code, width = CODES[message.data_type], _width(message.shape)
    rows_TX = torch.frombuffer(bytearray(message.data), dtype=torch.uint8).reshape(-1, code.row_bytes(width))
    return code.decode(rows_TX.to(device), width).reshape(tuple(message.shape))


def encoded_size(shape: Sequence[int], data_type: pb.DataType) -> int:
    """Bytes of such a tensor."""
    return math.prod(shape[:-1]) * CODES[data_type].row_bytes(_width(shape))


def _width(shape: Sequence[int]) -> int:
    return shape[-1] if len(shape) else 1


def _without_elements(shape: Sequence[int]) -> Tuple[int, ...]:
    # Beside a 0, the other sizes may be any, and torch multiplies them for its strides.
    if max(shape) >= 1 << 31 or math.prod(size for size in shape if size) >= 1 << 31:
        raise ProtocolError(f"tensor of shape {list(shape)}; it is too large, though it has no elements")
    return tuple(shape)


def shown(shape: Sequence[int]) -> str:
    """For an error's sentence."""
    return str(list(shape[:MAX_DIMENSIONS])) + (" and more" if len(shape) > MAX_DIMENSIONS else "")
