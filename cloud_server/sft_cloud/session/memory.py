"""How much memory sessions may take together, and how much one batch would take, known before it is taken.

On a CPU nothing fails when memory runs out: the kernel ends the process, and everybody's session with it.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sft.errors import ProtocolError, ServerFullError
from sft.printable import format_bytes

_SHARE_OF_DEVICE = 0.8
_BEYOND_GRAPH = 1.5
"""What a backward pass takes beside what the forward has saved for it."""
_COPIES_OF_OUTPUT = 4
"""The outputs, what the loss makes of them, and the gradients of both."""

_STEP_COPIES = 1
"""Of the trained parameters: what the optimizer's step computes with."""
_FIRST_STEP_COPIES = 3
"""Of those that have not been stepped: what Adam keeps of each, twice, besides."""


class BatchMemory(NamedTuple):
    """Bytes of a training micro-batch of B sequences padded to S: B * (constant + linear * S + square * S^2)."""

    constant: float = 0.0
    linear: float = 0.0
    square: float = 0.0

    def of(self, sequences: int, padded_length: int) -> int:
        """As an upper estimate."""
        S = padded_length
        return int(_BEYOND_GRAPH * sequences * (self.constant + self.linear * S + self.square * S * S))


UNKNOWN = BatchMemory()


class MemoryBudget:
    """What all sessions of a device may take. Safe to use from several threads."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self._lock = threading.Lock()
        self._held = 0

    @property
    def held_bytes(self) -> int:
        """By the sessions that there are."""
        return self._held

    def open(self, fixed_bytes: int) -> MemoryShare:
        """Room for a session that takes so much before its first batch. Raises ServerFullError."""
        share = MemoryShare(self, fixed_bytes)
        if fixed_bytes > self.total_bytes:
            raise ServerFullError(
                f"this session would take {format_bytes(fixed_bytes)}, but all sessions of this server together may "
                f"take {format_bytes(self.total_bytes)}; choose a smaller model, a higher --split-layer, or LoRA"
            )
        if not self._add(fixed_bytes):
            raise ServerFullError(
                f"this session would take {format_bytes(fixed_bytes)}, but "
                f"{format_bytes(self.total_bytes - self._held)} of the server's memory are left; try again "
                "when another session has ended"
            )
        return share

    def _add(self, size: int, forced: bool = False) -> bool:
        with self._lock:
            if size > 0 and not forced and self._held + size > self.total_bytes:
                return False
            self._held += size
            return True


class MemoryShare:
    """One session's part of a budget. Not for several threads at once, but for its release."""

    def __init__(self, budget: MemoryBudget | None = None, fixed_bytes: int = 0) -> None:
        """Without a budget, everything fits."""
        self._budget = budget
        self._fixed = fixed_bytes
        self._held = [fixed_bytes]  # shared with `_give_back`, which must not hold on to the share

    def release(self) -> None:
        """Gives everything back."""
        if self._budget is not None:
            _give_back(self._budget, self._held)

    def release_with(self, owner: object) -> None:
        """Gives everything back when `owner` is no more."""
        if self._budget is not None:
            weakref.finalize(owner, _give_back, self._budget, self._held)

    def check(self, size: int) -> None:
        """Raises ProtocolError when so much could never fit, however few others there are."""
        if self._budget is not None and self._fixed + size > self._budget.total_bytes:
            raise ProtocolError(
                f"this batch, with what waits for a backward(), would take about {format_bytes(size)} on the cloud, "
                f"whose sessions may take {format_bytes(self._budget.total_bytes)} together: send smaller batches"
            )

    def hold(self, size: int) -> None:
        """From now on the session takes so much beside what it began with. Raises MemoryError if that is not there."""
        if self._budget is not None:
            if not self._budget._add(self._fixed + size - self._held[0]):
                held = format_bytes(self._budget.held_bytes)
                raise MemoryError(f"{format_bytes(size)} are wanted beside the {held} that are taken")
            self._held[0] = self._fixed + size

    def settle(self, size: int) -> None:
        """As `hold`, for what is taken already."""
        if self._budget is not None:
            self._budget._add(self._fixed + size - self._held[0], forced=True)
            self._held[0] = self._fixed + size


def _give_back(budget: MemoryBudget, held: list[int]) -> None:
    budget._add(-held[0])
    held[0] = 0


def default_budget(device: torch.device) -> int:
    """Bytes: a part of the device's memory, or of what this process may have of the machine's."""
    return int(_SHARE_OF_DEVICE * memory_bytes(device))


def memory_bytes(device: torch.device) -> int:
    """All that there is for this process."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):  # a container's
        try:
            return min(machine, int(Path(name).read_text()))
        except (OSError, ValueError):
            continue
    return machine


def session_bytes(weights: int, trained: int, optimizer: str) -> int:
    """Of a session without a batch, from numbers of elements: what is trained has a gradient and state."""
    states = 1 if optimizer.lower() == "sgd" else 2
    return 4 * (weights + (1 + states) * trained)


def measure(run: Callable[[int], Tensor], parameters: list[nn.Parameter], longest: int) -> BatchMemory:
    """Finds out what a batch takes from three short ones. `run(S)` does a forward pass of one sequence of S tokens."""
    one, two, four = (min(size, longest) for size in (4, 8, 16))
    if not one < two < four:
        return BatchMemory(constant=float(_saved(lambda: run(longest), parameters)))
    f, g, h = (_saved(lambda S=S: run(S), parameters) for S in (one, two, four))  # type: ignore[misc]
    first, second = (g - f) / (two - one), (h - g) / (four - two)
    square = max(0.0, (second - first) / (four - one))
    linear = max(0.0, first - square * (one + two))
    return BatchMemory(max(0.0, f - linear * one - square * one * one), linear, square)


def _saved(run: Callable[[], Tensor], parameters: list[nn.Parameter]) -> int:
    """Bytes that autograd keeps for the backward pass of `run`."""
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    sizes: dict[int, int] = {}
    kept: list[torch.UntypedStorage] = []  # or an address would be used again

    def pack(tensor: Tensor) -> None:  # a tensor in its place would hold its own graph, and that the tensor
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(storage)

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
        output = run()
    kept.clear()  # the graph holds on to `pack`
    return sum(sizes.values()) + _COPIES_OF_OUTPUT * output.numel() * output.element_size()


def check_room_for_step(optimizer: torch.optim.Optimizer) -> None:
    """Raises what the device's allocator raises when `optimizer.step()` would not get the memory it takes.

    The memory is given back at once; torch's allocator keeps it for the step.
    """
    wanted, device = 0, torch.device("cpu")
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:  # whether its gradient is in .grad by now, or kept aside
                copies = _STEP_COPIES if optimizer.state.get(parameter) else _FIRST_STEP_COPIES
                wanted += copies * parameter.numel() * parameter.element_size()
                device = parameter.device
    if wanted:
        torch.empty(wanted, dtype=torch.uint8, device=device)
