"""Cutting any traceable module inside one `nn.Linear`, by its graph.

With W = u S v in the layer, and the bias with v,

    net_1 (edge)                                 net_2 (cloud)
    all that leads to the layer, u   -- a -->    v, S, all that comes after it

The residual connection around the layer, added to its very output, is dropped as in the paper. Anything else would have
to cross beside the activation, and is refused.

Both halves are cut out of the module itself: what is left of it keeps its objects, its names and its modes.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Any, Dict, FrozenSet, List, Mapping, Optional, Set, Tuple

import torch
from torch import Tensor, nn

from sft.errors import CutError, UsageError
from sft.graphs.split import Half, split
from sft.graphs.trace import Inputs, has_hooks, trace

FACTORS = ("ffn1", "ffn2", "ffn3")
"""What stands in the place of the layer, on either side."""


@dataclass(frozen=True)
class GraphCut:
    """Where a module is cut, and what each half runs and holds. Made without touching the module."""

    model: nn.Module
    layer_name: str
    split_rank: int
    inputs: Inputs
    net_1: Mapping[FrozenSet[str], Half]
    """By the optional inputs that a call gives; those that cannot be given are missing."""
    net_2: Half
    dropped: Tuple[str, ...]
    """The residual connection around the layer, in words, if there is one."""
    upper_names: FrozenSet[str] = field(default=frozenset())
    """Parameters and buffers of net_2 without the factors, by names in the whole model; buffers only if its
    `state_dict` has them."""

    def __str__(self) -> str:
        """Where, and what is not computed any more."""
        without = f", without {' and '.join(self.dropped)}" if self.dropped else ""
        return f"{type(self.model).__name__} cut at '{self.layer_name}', rank {self.split_rank}{without}"

    @property
    def layer(self) -> nn.Linear:
        """W and its bias, until the model is cut."""
        layer = self.model.get_submodule(self.layer_name)
        assert isinstance(layer, nn.Linear)  # `cut` has seen to it
        return layer

    @property
    def factor_names(self) -> Dict[str, List[str]]:
        """Parameter of the layer -> those that take its place."""
        weights = [f"{self.layer_name}.{factor}.weight" for factor in FACTORS]
        names = {f"{self.layer_name}.weight": weights}
        if self.layer.bias is not None:
            names[f"{self.layer_name}.bias"] = [f"{self.layer_name}.ffn3.bias"]
        return names

    def upper_tensors(self) -> Dict[str, Tensor]:
        """The tensors of `upper_names`, which are the model's own."""
        tensors: Dict[str, Tensor] = {**dict(self.model.named_buffers()), **dict(self.model.named_parameters())}
        return {name: tensors[name] for name in sorted(self.upper_names)}

    def keep_net_1(self) -> nn.Linear:
        """Takes from the model what is net_2's, in place. Returns FFN-1, which stands where the layer was, unset.

        What neither half needs stays, too.
        """
        linear = self._factor(self.layer.in_features, self.split_rank, self.layer.weight)
        lower: Set[int] = set()
        constants: Dict[str, Tensor] = {}
        for half in self.net_1.values():
            lower |= half.owned(self.model)
            constants.update(half.constants)
        self._replace_layer({"ffn1": linear})
        _remove(self.model, self.net_2.owned(self.model) - lower)
        _add_constants(self.model, constants)
        return linear

    def keep_net_2(self) -> Tuple[nn.Linear, nn.Linear]:
        """Takes from the model all that is not net_2's, in place. Returns FFN-2 and FFN-3, unset."""
        ffn_2 = self._factor(self.split_rank, self.split_rank, self.layer.weight)
        ffn_3 = self._factor(self.split_rank, self.layer.out_features, self.layer.weight, self.layer.bias)
        factors = {"ffn2": ffn_2, "ffn3": ffn_3}
        kept = self.net_2.owned(self.model)
        holder = self._replace_layer(factors)
        _keep(self.model, kept | {id(module) for module in holder.modules()} | {id(p) for p in holder.parameters()})
        _add_constants(self.model, self.net_2.constants)
        return ffn_2, ffn_3

    def run_net_1(self, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Tensor:
        """The activation (..., R), with the model as it is after `keep_net_1`. Raises CutError for other arguments."""
        given = self.inputs.bind(self.model, args, kwargs)
        optional = frozenset(given).difference(self.inputs.required)
        half = self.net_1.get(optional)
        if half is None:
            which = " and ".join(sorted(optional)) or "no optional input"
            raise CutError(
                f"this {type(self.model).__name__} was cut for calls without {which}: they reach above the cut"
            )
        a: Tensor = half.run(self.model, **given)
        return a

    def run_net_2(self, a: Tensor) -> Any:
        """The model's output, with the model as it is after `keep_net_2`. `a`: (..., R)."""
        return self.net_2.run(self.model, a)

    def _factor(self, columns: int, rows: int, like: Tensor, bias: Optional[Tensor] = None) -> nn.Linear:
        linear = nn.Linear(columns, rows, bias=bias is not None, device=like.device)
        linear.weight.requires_grad_(like.requires_grad)
        if bias is not None:
            linear.bias.requires_grad_(bias.requires_grad)
        return linear

    def _replace_layer(self, factors: Dict[str, nn.Linear]) -> nn.Module:
        holder = nn.Module()
        for name, factor in factors.items():
            holder.add_module(name, factor)
        parent, _, child = self.layer_name.rpartition(".")
        setattr(self.model.get_submodule(parent), child, holder)
        return holder


def cut(model: nn.Module, layer_name: str, split_rank: int) -> GraphCut:
    """Where to cut `model` in its `nn.Linear` called `layer_name`, such as "blocks.5.mlp.fc2".

    Raises CutError when there is no such layer, its ranks are others, or something but the activation would cross, and
    UsageError for a model that is not float32.
    """
    layer = _check_layer(model, layer_name, split_rank)
    inputs = Inputs(model)
    halves, refused = {}, []
    for given in inputs.variants():
        try:
            halves[given] = split(model, layer_name, trace(model, layer_name, inputs, given))
        except CutError as error:
            refused.append(error)
    if not halves:
        raise refused[0]
    first = next(iter(halves.values()))
    # The cloud has one net_2, whatever inputs a call gives.
    same = {given: one.net_1 for given, one in halves.items() if one.net_2.same_as(first.net_2)}
    lower = set().union(*(half.owned(model) for half in same.values()))
    upper_names = _check_shared(model, layer, lower, first.net_2.owned(model))
    return GraphCut(model, layer_name, split_rank, inputs, same, first.net_2, first.dropped, upper_names)


def _check_layer(model: nn.Module, name: str, split_rank: int) -> nn.Linear:
    modules = dict(model.named_modules(remove_duplicate=False))
    linears = [one for one, module in modules.items() if one and isinstance(module, nn.Linear)]
    kind = type(model).__name__
    if not linears:
        raise CutError(f"this {kind} has no nn.Linear inside that it could be cut at")
    if name not in modules or not name:
        raise CutError(f"this {kind} has no layer '{name}' to cut; {_near(name, linears)}")
    layer = modules[name]
    if not isinstance(layer, nn.Linear):
        raise CutError(f"'{name}' is a {type(layer).__name__}, not an nn.Linear; {_near(name, linears)}")
    if "weight" not in layer._parameters:
        raise CutError(f"the weight of '{name}' is computed (a parametrization), and cannot be decomposed; remove that")
    if type(layer).forward is not nn.Linear.forward or "forward" in vars(layer):
        raise CutError(
            f"'{name}' is a {type(layer).__name__} with a forward method of its own, which the factors would not have; "
            "cut at a plain nn.Linear"
        )
    if has_hooks(layer) or any(parameter._backward_hooks for parameter in layer.parameters()):
        raise CutError(f"'{name}' has hooks, which the factors would not have; remove them, or cut at another layer")
    for own in ("weight", "bias"):
        aliases = [n for n, p in model.named_parameters(remove_duplicate=False) if p is getattr(layer, own)]
        if len(aliases) > 1:
            raise CutError(f"{_list(aliases)} are one parameter; a layer can be cut if its parameters are its own")
    largest = min(layer.in_features, layer.out_features)
    if not 1 <= split_rank <= largest:
        raise CutError(f"split_rank is {split_rank}, but '{name}' has ranks 1 to {largest}; choose one")
    for own, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise UsageError(
                f"parameter '{own}' is {parameter.dtype}; make the model in float32 and run it under torch.autocast to "
                "compute in half precision"
            )
    return layer


def _check_shared(model: nn.Module, layer: nn.Linear, lower: Set[int], upper: Set[int]) -> FrozenSet[str]:
    """Names of what is net_2's. Raises CutError when something is net_1's, too."""
    for kind, named in (
        ("parameter", model.named_parameters(remove_duplicate=False)),
        ("buffer", model.named_buffers(remove_duplicate=False)),
    ):
        names: Dict[int, List[str]] = {}
        for name, tensor in named:
            if id(tensor) in lower and id(tensor) in upper:
                names.setdefault(id(tensor), []).append(name)
        for shared in names.values():
            raise CutError(
                f"both halves need the {kind} {_list(shared)}: give each its own copy, or cut where only one needs it"
            )
    stored = set(model.state_dict(keep_vars=True))
    tensors: Dict[str, Tensor] = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    own = {id(parameter) for parameter in layer.parameters()}
    return frozenset(n for n, x in tensors.items() if id(x) in upper and id(x) not in own and n in stored)


def _remove(module: nn.Module, doomed: Set[int]) -> None:
    """Removes modules, parameters and buffers from wherever they are registered."""
    for registered in (module._modules, module._parameters, module._buffers):
        for name, value in list(registered.items()):
            if id(value) in doomed:
                delattr(module, name)
    for child in module.children():
        _remove(child, doomed)


def _keep(module: nn.Module, kept: Set[int]) -> bool:
    """Removes all but these; returns whether anything is left."""
    for registered in (module._parameters, module._buffers):
        for name, value in list(registered.items()):
            if id(value) not in kept:
                delattr(module, name)
    for name, child in list(module._modules.items()):
        if child is None or not (id(child) in kept or _keep(child, kept)):
            delattr(module, name)
    return any((module._modules, module._parameters, module._buffers))


def _add_constants(model: nn.Module, constants: Mapping[str, Tensor]) -> None:
    for name, tensor in constants.items():
        model.register_buffer(name, tensor, persistent=False)  # so that they follow the model to its device


def _near(name: str, linears: List[str]) -> str:
    near = difflib.get_close_matches(name, linears, n=3, cutoff=0.4) or linears[:3]
    return f"it has {len(linears)} nn.Linear layers, such as {_list(near)}"


def _list(names: List[str]) -> str:
    quoted = [f"'{name}'" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"
