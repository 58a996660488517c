"""How large the halves are, and what this device has room for."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch

from sft.errors import UsageError
from sft.models import Cut, build_net_1, build_net_2, build_whole
from sft.plan.grid import Grid
from sft.printable import format_bytes
from sft_edge.commands.plan.ways import ends
from sft_edge.options import CutOptions

_TRAINED_BYTES, _FROZEN_BYTES = 16, 4
"""Of a number that is trained, with its gradient and what Adam keeps; of one that is not."""

_MOST = 0.7
"""Of the memory that is free: steps need some beside the model."""


class Sizes:
    """Numbers, that is elements of parameters, of the halves."""

    def __init__(self, config: Any, head: str, layers: Sequence[int]) -> None:
        """`layers`: all cuts that are asked about; none where that is the whole model alone."""
        self.whole = sum(one.numel() for one in build_whole(config, head).parameters())
        on_edge: Dict[Tuple[int, int], float] = {}
        on_cloud: Dict[Tuple[int, int], float] = {}
        for layer in dict.fromkeys(ends(layers)) if layers else []:
            net_1, net_2 = build_net_1(config, head, Cut("sl", layer)), build_net_2(config, head, Cut("sl", layer))
            names = set(net_1.whole_names.values())
            on_edge[layer, 0] = sum(one.numel() for one in net_1.parameters())
            on_cloud[layer, 0] = sum(one.numel() for name, one in net_2.whole_parameters().items() if name not in names)
        self._edge, self._cloud = Grid(on_edge or {(0, 0): 0.0}), Grid(on_cloud or {(0, 0): 0.0})

    def edge(self, layer: int) -> float:
        """Of net_1, cut after that block."""
        return self._edge.at(layer, 0)

    def cloud(self, layer: int) -> float:
        """Of what net_2 has alone: the result that comes home."""
        return self._cloud.at(layer, 0)


def with_room(ways: Sequence[CutOptions], sizes: Sizes, room: Optional[int], adapted: bool = False) -> List[CutOptions]:
    """Those of which the edge's half, as it is trained, takes no more than most of `room`, bytes that are free, None
    where that is not known. `adapted`: adapters are trained in the place of its weights, and are next to nothing beside
    them. Raises UsageError where it is none."""
    fitting = [way for way in ways if room is None or _bytes_of(way, sizes, adapted) <= _MOST * room]
    if not fitting:
        needed = min(_bytes_of(way, sizes, adapted) for way in ways)
        raise UsageError(
            f"this device has {format_bytes(room or 0)} of memory free, and the edge's half takes at least "
            f"{format_bytes(needed)} beside what steps need: free some, or leave more ways to choose from"
        )
    return fitting


def free_bytes() -> Optional[int]:
    """What the system says that a program may have; None where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None


def begin_peak() -> None:
    """What `peak_memory_bytes` says is from here on, where the system lets a process begin anew; otherwise it may be
    too much."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc keeps what was freed, musl has no such function
        trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _bytes_of(way: CutOptions, sizes: Sizes, adapted: bool) -> float:
    numbers = sizes.whole if way.mode == "local" else sizes.edge(int(way.split_layer or 0))
    return numbers * (_FROZEN_BYTES if way.freeze_edge or adapted else _TRAINED_BYTES)
