"""What `torch.autocast` is set to where the script calls its model: the cloud's half runs alike."""

from __future__ import annotations

import torch

from sft.v1 import split_training_pb2 as pb

_TYPES = {torch.bfloat16: pb.DATA_TYPE_BFLOAT16, torch.float16: pb.DATA_TYPE_FLOAT16}


def autocast_type(device: torch.device) -> pb.DataType:
    """The type that operations on `device` are cast to now; unspecified for none."""
    if hasattr(torch, "get_autocast_dtype"):
        enabled = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type)
    elif device.type == "cpu":  # before torch 2.4
        enabled, dtype = torch.is_autocast_cpu_enabled(), torch.get_autocast_cpu_dtype()
    else:
        enabled, dtype = torch.is_autocast_enabled(), torch.get_autocast_gpu_dtype()
    return _TYPES.get(dtype, pb.DATA_TYPE_UNSPECIFIED) if enabled else pb.DATA_TYPE_UNSPECIFIED
