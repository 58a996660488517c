"""Optimizers that nobody has wrapped, and that would train half a model, or nothing, without a word."""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Callable, Dict, Iterable

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sft.errors import UsageError

_checks: Dict[int, Callable[[torch.optim.Optimizer], None]] = {}
"""One for each cut model that is alive."""

_numbers = itertools.count()


def refuse_others(
    own: torch.optim.Optimizer, gone: Iterable[nn.Parameter], stands_for: nn.Parameter, until_end_of: object
) -> None:
    """From now on `step()` raises UsageError of an optimizer over the same model that is not the SFTOptimizer's.

    `own` is what that has wrapped. `gone`: parameters that the model had, and the cloud has now. `stands_for`: that of
    the cloud's gradients, which is among the parameters of a model that is cut.
    """
    by_id = {id(parameter): weakref.ref(parameter) for parameter in gone}
    mine, stand_in = weakref.ref(own), weakref.ref(stands_for)

    def check(optimizer: torch.optim.Optimizer) -> None:
        wrapped, cloud = mine(), stand_in()
        if optimizer is wrapped and cloud is not None and cloud.grad is not None:  # hidden where we step it
            raise UsageError(f"this {type(optimizer).__name__} steps the edge alone: step the SFTOptimizer around it")
        if wrapped is not None and optimizer.param_groups is wrapped.param_groups:
            return
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            if parameter is cloud:
                raise UsageError(
                    f"this {type(optimizer).__name__} was made of a model that is cut, and would train the edge's half "
                    "alone: step the SFTOptimizer; a Trainer takes it as optimizers=(optim, None)"
                )
            if id(parameter) in by_id and parameter is by_id[id(parameter)]():
                raise UsageError(
                    f"this {type(optimizer).__name__} is over parameters that are on the cloud: make one optimizer of "
                    "all that is trained, in as many groups as you like, and give SFTOptimizer that"
                )

    number = next(_numbers)
    if number == 0:  # once and for good: a hook that goes may go while torch walks through all of them
        register_optimizer_step_pre_hook(_check)
    _checks[number] = check
    weakref.finalize(until_end_of, _checks.pop, number, None).atexit = False


def _check(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for check in list(_checks.values()):
        check(optimizer)
