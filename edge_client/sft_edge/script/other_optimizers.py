"""Optimizers that nobody has wrapped, and that would train half a model, or nothing, without a word."""

from __future__ import annotations

import weakref
from typing import Any, Iterable

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sft.errors import UsageError


def refuse_others(
    own: torch.optim.Optimizer, gone: Iterable[nn.Parameter], stands_for: nn.Parameter, until_end_of: object
) -> None:
    """From now on `step()` of an optimizer raises UsageError if it is not `own`, or around it, and yet over its model.

    `gone`: parameters that the model had, and the cloud has now. `stands_for`: that of the cloud's gradients, which any
    optimizer over the parameters of a cut model holds.
    """
    by_id = {id(parameter): weakref.ref(parameter) for parameter in gone}
    mine, stand_in = weakref.ref(own), weakref.ref(stands_for)

    def check(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        still = mine()
        if still is None or optimizer.param_groups is still.param_groups:
            return
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            if parameter is stand_in():
                raise UsageError(
                    f"this {type(optimizer).__name__} was made of a model that is cut, and would train the edge's half "
                    "alone: step the SFTOptimizer; a Trainer takes it as optimizers=(optim, None)"
                )
            if id(parameter) in by_id and parameter is by_id[id(parameter)]():
                raise UsageError(
                    f"this {type(optimizer).__name__} is over parameters that are on the cloud: make one optimizer of "
                    "all that is trained, in as many groups as you like, and give SFTOptimizer that"
                )

    weakref.finalize(until_end_of, register_optimizer_step_pre_hook(check).remove)
