"""A tensor as the bytes of its elements, and back."""

from __future__ import annotations

import math
from typing import Dict, Sequence, Tuple

import torch
from torch import Tensor

from sft.errors import ProtocolError
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


def shown(shape: Sequence[int]) -> str:
    """For an error's sentence."""
    return str(list(shape[:MAX_DIMENSIONS])) + (" and more" if len(shape) > MAX_DIMENSIONS else "")
