"""A script's optimizer: which of its parameters goes to which side, and with which settings."""

from __future__ import annotations

import inspect
from typing import Any, Dict, Iterable, List, Mapping, Sequence, Set

import torch
from torch import Tensor, nn

from sft.errors import UsageError
from sft.optim.listed import check_own, name_of
from sft.optim.script import check_fresh, names_in
from sft.optim.spec import GroupSpec, OptimizerSpec, make_optimizer
from sft_edge.script.cut_model import CutModel

_HOW_IT_COMPUTES = ("foreach", "fused", "capturable", "differentiable")  # each side for itself


class ScriptGroups:
    """The parameter groups of an optimizer over a model that is not cut yet, by names in the whole model."""

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        """Raises UsageError when the cloud could not make it, it is not fresh, or it holds parameters of others."""
        self._name = name_of(optimizer)
        check_fresh(optimizer, ", and load a state_dict afterwards")
        self._optimizer = optimizer
        self._names = [[name for names in group for name in names] for group in names_in(optimizer, model)]
        named = model.named_parameters(remove_duplicate=False)
        self._frozen = [name for name, parameter in named if not parameter.requires_grad]

    def spec(self, cut_model: CutModel) -> OptimizerSpec:
        """The optimizer for the cloud's half; what the script does not train is in none of its groups.

        Raises UsageError when the optimizer cannot be had on the cloud.
        """
        self._names = [self._in_whole(names, cut_model) for names in self._names]
        frozen = set(self._in_whole(self._frozen, cut_model)).difference(cut_model.trained_factors)
        held = {name for names in self._names for name in names}
        training = next((names for names in self._names if not frozen.issuperset(names)), self._names[0])
        training += [name for name in cut_model.trained_factors if name not in held]
        trained = set(cut_model.cloud_names).difference(frozen)
        groups = [
            GroupSpec([name for name in names if name in trained], arguments)
            for names, arguments in zip(self._names, _without_default_lists(self._optimizer))
        ]
        if any("lr" not in group.arguments for group in groups):
            raise UsageError(
                f"{self._name} with lr=None makes learning rates of its own, and the cloud takes those of its groups: "
                "make it with scale_parameter=False, relative_step=False, lr=1e-3 or another"
            )
        spec = OptimizerSpec(self._name, groups)
        twin = make_optimizer(spec.restricted_to([]), {})  # better here than on the cloud
        check_own(self._optimizer, twin, self._name)
        return spec

    def swap(self, parameters: Mapping[str, nn.Parameter], extra: nn.Parameter) -> None:
        """Puts the edge's half in the place of all parameters, group by group, and `extra` into the first group."""
        optimizer = self._optimizer
        for group, names in zip(optimizer.param_groups, self._names):
            group["params"] = [parameters[name] for name in names if name in parameters]
        if optimizer.state:  # Adagrad and others begin with one
            arguments = arguments_of(optimizer)
            make: Any = type(optimizer)
            groups = [{"params": g["params"], **own} for g, own in zip(optimizer.param_groups, arguments)]
            optimizer.state.clear()
            optimizer.state.update(make(groups, **arguments[0]).state)
        optimizer.param_groups[0]["params"].append(extra)

    @staticmethod
    def _in_whole(names: Iterable[str], cut_model: CutModel) -> List[str]:
        return _with_factors(map(cut_model.whole_name, names), cut_model.factor_names)


def arguments_of(optimizer: torch.optim.Optimizer) -> List[Dict[str, Any]]:
    """For every group, the arguments of the optimizer's constructor that both sides have to agree on."""
    known = set(inspect.signature(type(optimizer).__init__).parameters) & set(optimizer.defaults)
    known -= set(_HOW_IT_COMPUTES)
    return [
        {name: _plain(group[name]) for name in sorted(known) if group.get(name) is not None}
        for group in optimizer.param_groups
    ]


def _without_default_lists(optimizer: torch.optim.Optimizer) -> List[Dict[str, Any]]:
    """As `arguments_of`, without lists that hold None and are as the class has them: an older cloud takes no such."""
    arguments = arguments_of(optimizer)
    known = inspect.signature(type(optimizer).__init__).parameters
    left_out = {
        name
        for name, value in arguments[0].items()
        if isinstance(value, tuple) and None in value and all(g.get(name) == known[name].default for g in arguments)
    }
    return [{name: value for name, value in group.items() if name not in left_out} for group in arguments]


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):  # a learning rate may be one
        return float(value)
    if isinstance(value, (tuple, list)):
        return tuple(_plain(one) for one in value)
    return value


def _with_factors(names: Iterable[str], factor_names: Mapping[str, Sequence[str]]) -> List[str]:
    replaced: List[str] = []
    seen: Set[str] = set()
    for name in names:
        for one in factor_names.get(name, (name,)):
            if one not in seen:
                replaced.append(one)
                seen.add(one)
    return replaced
