"""How much memory a session and a batch would take, known before it is taken; `sft_cloud.memory` has it then."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sft.errors import ProtocolError
from sft.optim.state import state_bytes
from sft_cloud.memory import machine_bytes

_SHARE_OF_DEVICE = 0.8
_BEYOND_GRAPH = 1.5
"""What a backward pass takes beside what the forward has saved for it."""
_COPIES_OF_OUTPUT = 4
"""The outputs, what the loss makes of them, and the gradients of both."""

_COPIES_OF_LARGEST = 2
"""Of the largest parameter: what a step computes with that goes from one to the next."""
_COPIES_TOGETHER = 1
"""Of all parameters, where a step takes them at once: on a GPU, and where it is asked to."""
_MOST_STATES = 3
"""For each number that is trained, of an optimizer of which nothing can be found out."""
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


def default_budget(device: torch.device) -> int:
    """Bytes: a part of the device's memory, or of what this process may have of the machine's."""
    return int(_SHARE_OF_DEVICE * memory_bytes(device))


def memory_bytes(device: torch.device) -> int:
    """All that there is for this process."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return machine_bytes()


def half_precision_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Of a copy in half precision of those that are multiplied with."""
    return sum(2 * parameter.numel() for parameter in parameters if parameter.dim() > 1)


def session_bytes(weights: int, optimizer: torch.optim.Optimizer) -> int:
    """Of a session without a batch, from the number of its weights: what is trained has a gradient, too.

    Parameters may be on the meta device.
    """
    trained: int = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    return 4 * (weights + trained) + optimizer_bytes(optimizer)


def optimizer_bytes(optimizer: torch.optim.Optimizer, changed: Sequence[dict[str, Any]] | None = None) -> int:
    """What an optimizer keeps, and what its step computes with. `changed`: its groups with other settings."""
    groups = optimizer.param_groups if changed is None else changed
    largest = together = 0
    for group in groups:
        sizes = [parameter.numel() for parameter in group["params"]]
        if group.get("foreach") or (group.get("foreach") is None and any(p.is_cuda for p in group["params"])):
            together += sum(sizes)
        elif not group.get("fused"):
            largest = max([largest, *sizes])
    try:
        states = state_bytes(optimizer, groups)
    except ProtocolError:  # it cannot step with these settings; a session may be opened with them all the same
        states = 4 * _MOST_STATES * sum(parameter.numel() for group in groups for parameter in group["params"])
    return states + 4 * (_COPIES_TOGETHER * together + _COPIES_OF_LARGEST * largest)


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
