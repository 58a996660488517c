"""What `--device` means: `auto`, `cpu`, `cuda` or `cuda:N`. Imports nothing heavy before a device is looked for."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sft.errors import UsageError

if TYPE_CHECKING:
    import torch


def check_device(name: str) -> None:
    """Raises UsageError for what names no device, be it here or not."""
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,4})?", name):
        raise UsageError(f"--device must be auto, cpu, cuda or cuda:N, not {name!r}")


def find_device(name: str) -> torch.device:
    """The device of that name; `auto` is the first GPU, or the CPU where there is none.

    Raises UsageError for what names no device, and for one that is not here.
    """
    import torch

    check_device(name)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not gpus):
        return torch.device("cpu")
    index = int(name.partition(":")[2] or 0)
    if index >= gpus:
        raise UsageError(f"--device {name}: this machine has {gpus} CUDA devices; try --device auto")
    return torch.device("cuda", index)
