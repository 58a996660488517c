"""What a commit says, checked and done: everything of it but the optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from sft.errors import ProtocolError, TrainingError, UsageError
from sft.optim.gradients import clip_scale
from sft.optim.listed import check_counted, counted, has_modes, is_training, set_training
from sft.optim.spec import arguments_from_proto, check_change, set_learning_rates
from sft.v1 import split_training_pb2 as pb
from sft_cloud.errors import PreconditionError, is_out_of_memory
from sft_cloud.session.micro_batches import MicroBatches


def check_commit(commit: pb.Commit, optimizer: torch.optim.Optimizer) -> None:
    """Raises ProtocolError for numbers that an optimizer cannot step with, PreconditionError for one in eval mode."""
    if not is_training(optimizer):
        raise PreconditionError(f"{type(optimizer).__name__} is in eval mode, and takes no step: call train() before")
    groups, rates = len(optimizer.param_groups), commit.learning_rates
    if len(rates) != groups or not all(math.isfinite(rate) and rate >= 0 for rate in rates):
        raise ProtocolError(f"a commit needs {groups} learning rates, finite and not negative; got {list(rates)[:8]}")
    if not math.isfinite(commit.clip_scale):  # negative ones go uphill, as a script may want
        raise ProtocolError(f"clip_scale must be finite, not {commit.clip_scale}")
    if commit.HasField("max_grad_norm") and not (math.isfinite(commit.max_grad_norm) and commit.max_grad_norm >= 0):
        raise ProtocolError(f"max_grad_norm must be finite and not negative, not {commit.max_grad_norm}")
    if len(commit.group_arguments) not in (0, groups):
        raise ProtocolError(f"a commit has group_arguments for each of the {groups} groups, or none")
    for counts, message in zip(counted(optimizer), commit.group_arguments, strict=False):  # there may be none
        if names := sorted(counts.keys() & message.arguments.keys()):
            raise ProtocolError(f"the optimizer counts '{names[0]}' itself, and a commit cannot change it")
    _check_changes(optimizer, commit.group_arguments)


def check_counts(optimizer: torch.optim.Optimizer, counts: Sequence[pb.GroupArguments]) -> None:
    """Raises ProtocolError for what the groups of this optimizer cannot have counted."""
    _check_changes(optimizer, counts)
    try:
        check_counted(optimizer, [arguments_from_proto(message.arguments) for message in counts])
    except UsageError as error:
        raise ProtocolError(str(error)) from error


def _check_changes(optimizer: torch.optim.Optimizer, changes: Sequence[pb.GroupArguments]) -> None:
    for group, message in zip(optimizer.param_groups, changes, strict=False):  # there may be none
        for name, value in arguments_from_proto(message.arguments).items():
            try:
                check_change(group, name, value)
            except UsageError as error:
                raise ProtocolError(str(error)) from error


def check_switch(message: pb.EdgeMessage, optimizer: torch.optim.Optimizer, micro_batches: MicroBatches) -> None:
    """Of weights to their average, or back, where the message asks for one. Raises ProtocolError, PreconditionError."""
    if not message.HasField("averaged"):
        return
    if message.WhichOneof("body") in ("evaluate", "load_state"):
        raise ProtocolError("averaged rides on a forward or a backward, or comes without a body")
    if not has_modes(optimizer):
        raise ProtocolError(f"{type(optimizer).__name__} has no average that weights could be at")
    if not message.HasField("commit"):  # which lets go of all that waits
        micro_batches.check_nothing_waits(message.weights)


def refusal(commit: pb.Commit, micro_batches: MicroBatches) -> str:
    """Why a step is not taken: where the edge leaves that to the cloud, and numbers are not finite; else nothing."""
    if not commit.HasField("max_grad_norm"):
        return ""
    if micro_batches.losses_are_finite and math.isfinite(micro_batches.squared_norm()):
        return ""
    return f"the loss, or the norm of the gradients, of step {commit.step} is not a finite number"


def clip_scale_of(commit: pb.Commit, micro_batches: MicroBatches) -> float:
    """What the gradients are multiplied by: as the edge says, or as their norm does, where it has none of its own."""
    if not commit.HasField("max_grad_norm"):
        return commit.clip_scale
    return clip_scale(math.sqrt(micro_batches.squared_norm()), commit.max_grad_norm)


def take_step(optimizer: torch.optim.Optimizer) -> None:
    """The step itself. Raises TrainingError when the optimizer cannot take it with the settings that the edge chose."""
    with _tells_settings(optimizer):
        optimizer.step()


def switch(message: pb.EdgeMessage, optimizer: torch.optim.Optimizer) -> bool:
    """Whether it was asked for, and done. Raises TrainingError as `take_step`."""
    if not message.HasField("averaged"):
        return False
    with _tells_settings(optimizer):
        set_training(optimizer, not message.averaged)
    return True


@contextmanager
def _tells_settings(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    try:
        yield
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise TrainingError(f"{type(optimizer).__name__} cannot take this step with its settings: {reason}") from error


def apply_settings(commit: pb.Commit, optimizer: torch.optim.Optimizer) -> None:
    """Learning rates, and what else the edge has changed, of a commit that was checked."""
    set_learning_rates(optimizer, list(commit.learning_rates))
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
