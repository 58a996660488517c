"""An optimizer that a training script has made: whether it can be wrapped, and what its parameters are called."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping

import torch
from torch import nn

from sft.errors import UsageError


def names_in(optimizer: torch.optim.Optimizer, model: nn.Module) -> List[List[List[str]]]:
    """The names, in a model that is not cut yet, of every group's every parameter; one that is tied has several.

    Raises UsageError when it holds parameters of something else.
    """
    names_of: Dict[int, List[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    foreign = sum(id(parameter) not in names_of for parameter in held)
    if foreign:
        raise UsageError(
            f"{foreign} of the optimizer's {len(held)} parameters are not the model's; make the optimizer from "
            "model.parameters()"
        )
    return [[names_of[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def check_fresh(optimizer: torch.optim.Optimizer, advice: str = "") -> None:
    """Raises UsageError, which ends with the advice, for an optimizer that has taken a step."""
    if any(has_stepped(state) for state in optimizer.state.values()):
        raise UsageError(f"the optimizer has taken steps already; wrap a fresh one{advice}")


def has_stepped(state: Mapping[str, Any]) -> bool:
    """Whether an optimizer's state of one parameter is from after a step."""
    # Adagrad and others begin with a state, at step 0.
    return float(state["step"]) > 0 if "step" in state else any(value is not None for value in state.values())
