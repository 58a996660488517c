"""One optimizer over both halves: the same class and settings, each half with its own parameters of every group."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Dict, Iterable, List, Mapping, Sequence, Type, Union

import torch
from torch import Tensor, nn

from sft.errors import ProtocolError, UsageError
from sft.models import Net
from sft.optim.listed import check_arguments, listed_class
from sft.v1 import split_training_pb2 as pb

_NEED_MORE = {
    "lbfgs": "it evaluates the loss several times a step",
    "sparseadam": "it wants sparse gradients",
    "optimizer": "it is the base class",
}


_FACTORS = (".ffn1.weight", ".ffn2.weight", ".ffn3.weight")
"""How the names of u, S and v end."""


@dataclass(frozen=True)
class GroupSpec:
    """Parameters that share their settings."""

    parameter_names: List[str]
    """Names in the whole model."""

    arguments: Dict[str, Any]
    """Keyword arguments of the optimizer's constructor, `lr` among them."""


@dataclass(frozen=True)
class OptimizerSpec:
    """Everything needed to make the same optimizer on either side."""

    name: str
    """A class of torch.optim; case does not matter. Or a name of `sft.optim.listed`."""

    groups: List[GroupSpec]

    def restricted_to(self, names: Iterable[str]) -> OptimizerSpec:
        """The same groups, with only those parameters; a group may become empty, none disappears."""
        kept = set(names)
        groups = [replace(g, parameter_names=[n for n in g.parameter_names if n in kept]) for g in self.groups]
        return replace(self, groups=groups)


def decay_groups(net: Net, arguments: Mapping[str, Any]) -> List[GroupSpec]:
    """The two groups that transformers' Trainer makes: biases and norms get no weight decay.

    What is frozen is in neither.

    `net` may be on the meta device. The other half makes the same split, as it goes by module. `arguments` hold
    `weight_decay` if the optimizer knows it.
    """
    undecayed = set()
    for module_name, module in net.named_modules():
        is_norm = type(module).__name__.endswith("Norm")  # the library's families have RMS norms of their own
        for name, _ in module.named_parameters(prefix=module_name, recurse=False):
            if is_norm or name.endswith("bias"):
                undecayed.add(net.whole_names.get(name))
    names = sorted(name for name, parameter in net.whole_parameters().items() if parameter.requires_grad)
    without_decay = {"weight_decay": 0.0} if "weight_decay" in arguments else {}  # Rprop, for one, has none
    return [
        GroupSpec([name for name in names if name not in undecayed], dict(arguments)),
        GroupSpec([name for name in names if name in undecayed], {**arguments, **without_decay}),
    ]


def factors_apart(groups: Sequence[GroupSpec], learning_rate: float) -> List[GroupSpec]:
    """The groups of `decay_groups`, and behind them one of u, S and v, with a rate of its own: empty where there are
    none, or they are not trained."""
    first = groups[0]
    factors = [name for name in first.parameter_names if name.endswith(_FACTORS)]
    rest = [name for name in first.parameter_names if name not in factors]
    apart = GroupSpec(factors, {**first.arguments, "lr": learning_rate})
    return [replace(first, parameter_names=rest), *groups[1:], apart]


def make_optimizer(spec: OptimizerSpec, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of one half. `parameters` go by whole-model names.

    Raises UsageError when there is no such optimizer here, it does not fit, it refuses an argument, or a name is
    unknown.
    """
    listed = listed_class(spec.name)
    made_of: Any = listed or optimizer_class(spec.name)
    groups = []
    for group in spec.groups:
        unknown = [name for name in group.parameter_names if name not in parameters]
        if unknown:
            raise UsageError(f"the optimizer names a parameter '{unknown[0]}' that this half does not have")
        if len(set(group.parameter_names)) < len(group.parameter_names):
            raise UsageError("the optimizer names a parameter twice in one group")
        groups.append({"params": [parameters[name] for name in group.parameter_names], **group.arguments})
    try:
        for group in spec.groups:  # torch checks the arguments of the constructor, not those of groups
            if listed is not None:
                check_arguments(listed, group.arguments)
            made_of([torch.zeros(1, requires_grad=True)], **group.arguments)
        optimizer: torch.optim.Optimizer = made_of(groups, **(spec.groups[0].arguments if spec.groups else {}))
        return optimizer
    except (AssertionError, TypeError, ValueError, RuntimeError, LookupError, SystemExit) as error:
        reason = str(error) or f"it refuses a setting of {spec.groups[0].arguments}"  # Lion says nothing of a rate of 0
        raise UsageError(f"optimizer {made_of.__name__}: {reason}") from error


def optimizer_class(name: str) -> Type[torch.optim.Optimizer]:
    """The class of torch.optim; case does not matter. Raises UsageError for none, and for one that cannot be used."""
    wanted = name.lower()
    if wanted in _NEED_MORE:
        raise UsageError(f"optimizer {name} cannot train a split model: {_NEED_MORE[wanted]}")
    for attribute in vars(torch.optim).values():
        is_optimizer = isinstance(attribute, type) and issubclass(attribute, torch.optim.Optimizer)
        if is_optimizer and attribute.__name__.lower() == wanted:
            found: Type[torch.optim.Optimizer] = attribute
            return found
    raise UsageError(f"torch.optim has no optimizer '{name[:80]}'; try AdamW, Adam or SGD")


def set_learning_rates(optimizer: torch.optim.Optimizer, learning_rates: Sequence[float]) -> None:
    """One rate for each group. A rate that is a tensor (`capturable`) is changed in place."""
    for group, rate in zip(optimizer.param_groups, learning_rates):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def check_change(group: Mapping[str, Any], name: str, value: Any) -> None:
    """Raises UsageError where a setting of a parameter group cannot become `value`, as it may cross the wire."""
    if name not in group or name in ("params", "lr"):
        raise UsageError(f"the optimizer has no setting '{name[:80]}' that a commit could change")
    numbers = value if isinstance(value, tuple) else (value,)
    if not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
        raise UsageError(f"the optimizer's setting '{name}' must be finite, not {value}")
    now = group[name]
    if isinstance(now, (tuple, list)) != isinstance(value, tuple) or (
        isinstance(value, tuple) and len(now) != len(value)
    ):
        raise UsageError(f"the optimizer's setting '{name}' is {now}; it cannot become {value}")
    if isinstance(value, str) != isinstance(now, str) or isinstance(value, bool) != isinstance(now, (bool, type(None))):
        raise UsageError(f"the optimizer's setting '{name}' is {now}; it cannot become {value}")


def spec_to_proto(spec: OptimizerSpec) -> pb.Optimizer:
    """For the wire. Raises UsageError when an argument has a type that does not travel."""
    groups = []
    for group in spec.groups:
        arguments = {name: _argument_to_proto(name, value) for name, value in group.arguments.items()}
        groups.append(pb.ParameterGroup(parameter_names=group.parameter_names, arguments=arguments))
    return pb.Optimizer(name=spec.name, groups=groups)


def groups_to_proto(groups: Sequence[Mapping[str, Any]]) -> List[pb.GroupArguments]:
    """Settings of each group for the wire. Raises UsageError as `spec_to_proto`."""
    return [
        pb.GroupArguments(arguments={name: _argument_to_proto(name, value) for name, value in group.items()})
        for group in groups
    ]


def holds_mixed(groups: Iterable[Union[pb.ParameterGroup, pb.GroupArguments]]) -> bool:
    """Whether a setting has None among its numbers, which not every release of the cloud takes."""
    return any(argument.HasField("mixed") for group in groups for argument in group.arguments.values())


def arguments_from_proto(arguments: Mapping[str, pb.OptimizerArgument]) -> Dict[str, Any]:
    """From the wire; arguments without a value are left out. Raises ProtocolError for lists of anything but numbers."""
    values = {name: _argument_from_proto(value) for name, value in arguments.items()}
    return {name: value for name, value in values.items() if value is not None}


def spec_from_proto(message: pb.Optimizer) -> OptimizerSpec:
    """From the wire; names and arguments are checked by `make_optimizer`. Raises as `arguments_from_proto`."""
    groups = [GroupSpec(list(group.parameter_names), arguments_from_proto(group.arguments)) for group in message.groups]
    return OptimizerSpec(message.name, groups)


def _argument_to_proto(name: str, value: Any) -> pb.OptimizerArgument:
    if isinstance(value, bool):
        return pb.OptimizerArgument(flag=value)
    if isinstance(value, int):
        return pb.OptimizerArgument(integer=value)
    if isinstance(value, float):
        return pb.OptimizerArgument(number=value)
    if isinstance(value, str):
        return pb.OptimizerArgument(text=value)
    if isinstance(value, (tuple, list)) and all(isinstance(number, (int, float)) for number in value):
        return pb.OptimizerArgument(numbers=pb.OptimizerArgument.Numbers(values=value))
    if isinstance(value, (tuple, list)) and all(isinstance(number, (int, float, type(None))) for number in value):
        mixed = [pb.OptimizerArgument(number=number) for number in value]
        return pb.OptimizerArgument(mixed=pb.OptimizerArgument.Mixed(values=mixed))
    raise UsageError(f"optimizer argument {name}={value!r} cannot be sent: not a number, flag, text or list of numbers")


def _argument_from_proto(message: pb.OptimizerArgument) -> Any:
    kind = message.WhichOneof("value")
    if kind == "numbers":
        return tuple(message.numbers.values)
    if kind == "mixed":
        if any(value.WhichOneof("value") not in (None, "number") for value in message.mixed.values):
            raise ProtocolError("an optimizer's argument holds a list of something else than numbers and None")
        return tuple(map(_argument_from_proto, message.mixed.values))
    return getattr(message, kind) if kind else None
