"""A script's optimizer, over net_2 in the place of the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sft.errors import UsageError
from sft.optim.script import check_fresh, names_in
from sft_cloud.script.hosted_model import HostedModel

Names = list[list[str]]
"""Of every group's parameters."""


def names_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> Names:
    """Names in the model, which is not cut yet; a tied parameter goes by its first.

    Raises UsageError when the optimizer is not fresh, or holds parameters of something else.
    """
    names = [[of_parameter[0] for of_parameter in group] for group in names_in(optimizer, model)]
    for group in optimizer.param_groups:
        if "lr" not in group:
            raise UsageError(f"{type(optimizer).__name__} has no learning rate, 'lr', that the edge could set")
    check_fresh(optimizer)
    return names


def swap(optimizer: torch.optim.Optimizer, names: Names, hosted: HostedModel) -> Names:
    """Puts net_2's parameters, group by group, in the place of the whole model's; settings stay.

    Returns the names of those that are trained.
    """
    parameters, trained = hosted.parameters, []
    begun = {name: optimizer.state.get(old, {}) for name, old in _old_parameters(optimizer, names)}
    optimizer.state.clear()
    for group, group_names in zip(optimizer.param_groups, names, strict=True):
        new: dict[str, nn.Parameter] = {}
        for name in group_names:
            for own in hosted.factor_names.get(name, (name,)):
                if own in parameters:
                    new[own] = parameters[own]
                    if begun[name]:
                        optimizer.state[parameters[own]] = _state_at_first(begun[name], parameters[own])
        group["params"] = list(new.values())
        trained.append([name for name, parameter in new.items() if parameter.requires_grad])
    return trained


def _old_parameters(optimizer: torch.optim.Optimizer, names: Names) -> list[tuple[str, nn.Parameter]]:
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return list(zip((name for group in names for name in group), held, strict=True))


def _state_at_first(state: Mapping[str, Any], parameter: nn.Parameter) -> dict[str, Any]:
    """What an optimizer begins with, as Adagrad does, for a parameter of another shape: the same all over."""
    return {
        key: torch.full_like(parameter, value.flatten()[0].item())
        if isinstance(value, Tensor) and value.dim()
        else value
        for key, value in state.items()
    }
