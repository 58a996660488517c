"""What a commit says, checked and done: everything of it but the optimizer's step."""

from __future__ import annotations

import math
from typing import Any

import torch

from sft.errors import ProtocolError, TrainingError, UsageError
from sft.optim.spec import arguments_from_proto, check_change
from sft.v1 import split_training_pb2 as pb
from sft_cloud.errors import is_out_of_memory


def check_commit(commit: pb.Commit, optimizer: torch.optim.Optimizer) -> None:
    """Raises ProtocolError for numbers that an optimizer cannot step with."""
    groups, rates = len(optimizer.param_groups), commit.learning_rates
    if len(rates) != groups or not all(math.isfinite(rate) and rate >= 0 for rate in rates):
        raise ProtocolError(f"a commit needs {groups} learning rates, finite and not negative; got {list(rates)[:8]}")
    if not math.isfinite(commit.clip_scale):  # negative ones go uphill, as a script may want
        raise ProtocolError(f"clip_scale must be finite, not {commit.clip_scale}")
    if len(commit.group_arguments) not in (0, groups):
        raise ProtocolError(f"a commit has group_arguments for each of the {groups} groups, or none")
    for group, message in zip(optimizer.param_groups, commit.group_arguments, strict=False):  # there may be none
        for name, value in arguments_from_proto(message.arguments).items():
            try:
                check_change(group, name, value)
            except UsageError as error:
                raise ProtocolError(str(error)) from error


def take_step(optimizer: torch.optim.Optimizer) -> None:
    """The step itself. Raises TrainingError when the optimizer cannot take it with the settings that the edge chose."""
    try:
        optimizer.step()
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise TrainingError(f"{type(optimizer).__name__} cannot take this step with its settings: {reason}") from error


def apply_group_arguments(commit: pb.Commit, optimizer: torch.optim.Optimizer) -> None:
    """Settings that the edge has changed, of a commit that was checked."""
    for group, message in zip(optimizer.param_groups, commit.group_arguments, strict=False):  # there may be none
        group.update(arguments_from_proto(message.arguments))


def groups_after(commit: pb.Commit, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]] | None:
    """The optimizer's groups with the settings of a commit that was checked; None where what the optimizer keeps stays
    the same: momentum, for one, counts by whether there is any.
    """
    changes = [arguments_from_proto(message.arguments) for message in commit.group_arguments]
    pairs = list(zip(optimizer.param_groups, changes, strict=False))  # there may be none
    if all(bool(group[name]) == bool(value) for group, new in pairs for name, value in new.items()):
        return None
    return [{**group, **new} for group, new in pairs]
