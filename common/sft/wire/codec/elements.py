"""A tensor as the bytes of its rows, and back."""

from __future__ import annotations

import math
from typing import Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from sft.errors import ProtocolError, UsageError
from sft.v1 import split_training_pb2 as pb
from sft.wire.codec.fitted import Fitted
from sft.wire.codec.rows import CODES, NAMES, Codes, Data

FLOATS = ("float32", "bfloat16", "float16")
"""Of the codecs' names those that `wire_data_type` may have: for all tensors."""

FITTED = "fitted"
"""The one codec that has tables, and is for activations alone."""

MAX_DIMENSIONS = 16
"""Of a tensor on the wire: the product of more sizes than that is not even computed."""


class Codecs(NamedTuple):
    """How a session's tensors are written, as its request says."""

    activation: pb.DataType
    gradient: pb.DataType
    """By the activation."""
    outputs: pb.DataType
    """For the gradient by the outputs, where labels stay on the edge. Outputs themselves are float32."""

    codes: Codes = CODES
    """How they are written; one that is fitted to data is among them once its tables are known."""

    @property
    def needs_tables(self) -> bool:
        """Whether activations are written in a code that is fitted, whose tables are not known yet."""
        return self.activation not in self.codes

    def with_tables(self, tables: Mapping[str, Tensor], device: torch.device) -> Codecs:
        """The same, for activations on `device`. Raises ProtocolError for what are no tables."""
        return self._replace(codes={**self.codes, pb.DATA_TYPE_FITTED: Fitted(tables, device)})

    @property
    def tables(self) -> Mapping[str, Tensor]:
        """Of a code that is fitted; nothing without."""
        code = self.codes.get(pb.DATA_TYPE_FITTED)
        return code.tables if isinstance(code, Fitted) else {}


IN_FULL = Codecs(pb.DATA_TYPE_FLOAT32, pb.DATA_TYPE_FLOAT32, pb.DATA_TYPE_FLOAT32)


def codecs_named(
    wire_dtype: Optional[str], codec: Optional[str] = None, gradient_codec: Optional[str] = None
) -> Codecs:
    """What the options of these names mean; None is what the one before says, of the first float32, and for gradients,
    which nothing is fitted to, `wire_dtype` beside `fitted`. Raises UsageError for other names.
    """
    wire_dtype = "float32" if wire_dtype is None else wire_dtype
    codec = codec or wire_dtype
    gradient_codec = gradient_codec or (wire_dtype if codec == FITTED else codec)
    for option, name, names in (
        ("wire_dtype", wire_dtype, FLOATS),
        ("codec", codec, tuple(NAMES)),
        ("gradient_codec", gradient_codec, tuple(name for name in NAMES if name != FITTED)),
    ):
        if name not in names:
            raise UsageError(f"{option} must be one of {', '.join(names)}, not {name!r}")
    return Codecs(NAMES[codec], NAMES[gradient_codec], NAMES[wire_dtype])


def codecs_of(request: pb.OpenSessionRequest) -> Codecs:
    """Raises ProtocolError for what is no codec of ours. The tables of one that is fitted are not looked for."""
    plain = request.wire_data_type
    if plain not in [NAMES[name] for name in FLOATS]:
        raise ProtocolError(f"unknown wire_data_type {int(plain)}")
    codecs = Codecs(request.activation_codec or plain, request.gradient_codec or plain, plain)
    for which, codec, known in (
        ("activation", codecs.activation, (*CODES, pb.DATA_TYPE_FITTED)),
        ("gradient", codecs.gradient, tuple(CODES)),
    ):
        if codec not in known:
            raise ProtocolError(f"unknown {which}_codec {int(codec)}")
    if bool(request.codec_tables_sha256) is not codecs.needs_tables:
        raise ProtocolError("codec_tables_sha256 must name a blob for the codec fitted, and be empty for others")
    return codecs


def encode_tensor(
    x: Tensor,
    data_type: pb.DataType = pb.DATA_TYPE_FLOAT32,
    rounding: Optional[int] = None,
    codes: Codes = CODES,
) -> pb.Tensor:
    """Any float tensor, as the wire has it, by one of `codes`. `rounding` as `RowCode.encode` has it."""
    width = _width(x.shape)
    if not x.numel():
        return pb.Tensor(data_type=data_type, shape=list(x.shape))
    data = codes[data_type].encode(x.detach().float().reshape(-1, width), rounding)
    return pb.Tensor(data_type=data_type, shape=list(x.shape), data=data)


def check_tensor(message: pb.Tensor, codes: Codes = CODES) -> None:
    """Before anything is made of it: raises as `decode_tensor` does, so that its shape is no larger than its bytes."""
    if message.data_type not in codes:
        raise ProtocolError(f"tensor of unknown element type {int(message.data_type)}")
    if len(message.shape) > MAX_DIMENSIONS:
        raise ProtocolError(f"tensor of {len(message.shape)} dimensions; at most {MAX_DIMENSIONS} are accepted")
    row_ends(message, message.data, math.prod(message.shape[:-1]), codes)


def decode_tensor(message: pb.Tensor, device: torch.device, codes: Codes = CODES) -> Tensor:
    """Back to float32, on `device`. Raises ProtocolError when type, shape and length do not fit together."""
    check_tensor(message, codes)
    if not message.data:
        return torch.zeros(_without_elements(message.shape), device=device)
    code, width = codes[message.data_type], _width(message.shape)
    x_TW = code.decode(message.data, math.prod(message.shape[:-1]), width, device)
    return x_TW.reshape(tuple(message.shape))


def row_ends(like: pb.Tensor, data: Data, rows: int, codes: Codes = CODES) -> Sequence[int]:
    """Where each of so many rows ends in `data`, if they are written as those of `like` are. Raises ProtocolError where
    they are not all that is in it."""
    return codes[like.data_type].ends(data, rows, _width(like.shape))


def encoded_size(shape: Sequence[int], data_type: pb.DataType, codes: Codes = CODES) -> int:
    """Bytes of such a tensor; the least, where rows differ. Raises ProtocolError for a width without tables."""
    return math.prod(shape[:-1]) * codes[data_type].row_bytes(_width(shape))


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
