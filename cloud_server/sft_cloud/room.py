"""Memory for a step, asked for before the step is promised.

The answer to a micro-batch is the cloud's vote in a commit that the edge decides: when the edge takes its half of the
step, the cloud must be able to take its own. A device that has no room for it is found out here, while the step can
still be undone on both sides.
"""

from __future__ import annotations

import torch

_FIRST_STEP_COPIES = 3
"""Of the trained parameters: what Adam keeps of each, twice, and one that the step computes with."""


def check_room_for_step(optimizer: torch.optim.Optimizer) -> None:
    """Raises what the device's allocator raises when `optimizer.step()` would not get the memory it takes.

    The memory is given back at once; torch's allocator keeps it for the step.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    copies = 1 if optimizer.state else _FIRST_STEP_COPIES
    wanted = copies * sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    if wanted:
        torch.empty(wanted, dtype=torch.uint8, device=parameters[0].device)
