"""The precision that the edge computes in, and the cloud with it."""

from __future__ import annotations

import contextlib

import torch

from sft.errors import ProtocolError
from sft.v1 import split_training_pb2 as pb

_TYPES = {pb.DATA_TYPE_BFLOAT16: torch.bfloat16, pb.DATA_TYPE_FLOAT16: torch.float16}


def check_autocast(data_type: pb.DataType) -> None:
    """Raises ProtocolError for a type that nobody computes in."""
    if data_type and data_type not in _TYPES:
        raise ProtocolError("autocast must be of type bfloat16 or float16")


def autocast_to(data_type: pb.DataType, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """For the block that computes; of no type it changes nothing."""
    return torch.autocast(device.type, _TYPES[data_type]) if data_type else contextlib.nullcontext()
