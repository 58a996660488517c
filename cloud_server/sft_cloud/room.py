"""Memory for a step, asked for before the step is promised.

The answer to a micro-batch is the cloud's vote in a commit that the edge decides: when the edge takes its half of the
step, the cloud must be able to take its own. A device that has no room for it is found out here, while the step can
still be undone on both sides.
"""

from __future__ import annotations

import torch

_COPIES = 1
"""Of the trained parameters: what the step computes with."""

_FIRST_STEP_COPIES = 3
"""Of those that have not been stepped: what Adam keeps of each, twice, besides."""


def check_room_for_step(optimizer: torch.optim.Optimizer) -> None:
    """Raises what the device's allocator raises when `optimizer.step()` would not get the memory it takes.

    The memory is given back at once; torch's allocator keeps it for the step.
    """
    wanted, device = 0, torch.device("cpu")
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:  # whether its gradient is in .grad by now, or kept aside
                copies = _COPIES if optimizer.state.get(parameter) else _FIRST_STEP_COPIES
                wanted += copies * parameter.numel() * parameter.element_size()
                device = parameter.device
    if wanted:
        torch.empty(wanted, dtype=torch.uint8, device=device)
