"""Cutting any traceable module inside one `nn.Linear`, by its graph.

With W = u S v in the layer, and the bias with v,

    net_1 (edge)                                 net_2 (cloud)
    all that leads to the layer, u   -- a -->    v, S, all that comes after it

    tail (edge)  <-- one tensor --+
    what needs the other inputs, without parameters: a loss of targets

The residual connection around the layer, added to its very output, is dropped as in the paper. A parameter that is tied
across the cut becomes two. Anything else would have to cross beside the activation, and is refused.

Arguments of the forward method that are None by default are traced with and without: each set of them that a call may
give is a variant, with parts of its own.

Both halves are cut out of the module itself: what is left of it keeps its objects, its names and its modes.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Any, Dict, FrozenSet, List, Mapping, Optional, Tuple

import torch
from torch import Tensor, nn

from sft.errors import CutError, UsageError
from sft.graphs.kept import add_constants, keep, other_names, owned, stored_names, tensors_named
from sft.graphs.on_cloud import leave_modes
from sft.graphs.split import Parts, split
from sft.graphs.tied import Tied, find_tied, in_words, untie
from sft.graphs.trace import Inputs, has_hooks, trace
from sft.graphs.variants import Variants, find_variants

FACTORS = ("ffn1", "ffn2", "ffn3")
"""What stands in the place of the layer, on either side."""


class CutLayer(nn.Module):
    """Stands where the layer was, with one side's factors, which that half calls by their names."""

    def __init__(self, layer_name: str, factors: Mapping[str, nn.Linear], missing: str) -> None:
        """`missing`: what the other side has, in words."""
        super().__init__()
        self._advice = f"'{layer_name}' is cut, and {missing}: a part of the model does not run alone, call the model"
        for name, factor in factors.items():
            self.add_module(name, factor)

    def forward(self, *_: Any) -> Tensor:
        """Raises UsageError, as no half comes here: a script has called a part of the model that leads through it."""
        raise UsageError(self._advice)


@dataclass(frozen=True)
class GraphCut(Variants):
    """Where a module is cut, and what each half runs and holds. Made without touching the module."""

    split_rank: int
    tied: Tuple[Tied, ...]
    """Parameters that net_1 and net_2 share, until the model is cut."""
    upper_names: FrozenSet[str] = field(default=frozenset())
    """Parameters and buffers of net_2 without the factors, by names in the whole model; buffers only if its
    `state_dict` has them."""
    other_names: Mapping[str, str] = field(default_factory=dict)
    """Where `state_dict` has one of those by several names: each further one -> that of `upper_names`."""

    def __str__(self) -> str:
        """Where, and what is not computed any more."""
        without = f", without {' and '.join(self.dropped)}" if self.dropped else ""
        return f"{type(self.model).__name__} cut at '{self.layer_name}', rank {self.split_rank}{without}"

    @property
    def layer_name(self) -> str:
        """Where it is cut."""
        return self.cut_at

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
        names.update({tied.names[0]: list(tied.names) for tied in self.tied})
        return names

    def upper_tensors(self) -> Dict[str, Tensor]:
        """The tensors of `upper_names`, which are the model's own."""
        return tensors_named(self.model, self.upper_names)

    def keep_net_1(self) -> nn.Linear:
        """Takes from the model what is net_2's, in place. Returns FFN-1, which stands where the layer was, unset.

        What neither half needs stays, too, and so do the modes of net_2's modules.
        """
        linear = self._factor(self.layer.in_features, self.split_rank, self.layer.weight)
        untie(self.model, self.tied)
        halves = list(self.variants.values())
        lower = owned(self.model, [half for parts in halves for half in (parts.net_1, parts.tail)])
        upper = owned(self.model, [parts.net_2 for parts in halves])
        self._replace_layer({"ffn1": linear}, "the rest is on the cloud")
        leave_modes(self.model, upper - lower)
        add_constants(self.model, [parts.net_1 for parts in halves])
        return linear

    def keep_net_2(self) -> Tuple[nn.Linear, nn.Linear]:
        """Takes from the model all that is not net_2's, in place. Returns FFN-2 and FFN-3, unset."""
        ffn_2 = self._factor(self.split_rank, self.split_rank, self.layer.weight)
        ffn_3 = self._factor(self.split_rank, self.layer.out_features, self.layer.weight, self.layer.bias)
        factors = {"ffn2": ffn_2, "ffn3": ffn_3}
        untie(self.model, self.tied)
        halves = [parts.net_2 for parts in self.variants.values()]
        kept = owned(self.model, halves)
        holder = self._replace_layer(factors, "what leads to it is on the edge")
        keep(self.model, kept | {id(module) for module in holder.modules()} | {id(p) for p in holder.parameters()})
        add_constants(self.model, halves)
        return ffn_2, ffn_3

    def _factor(self, columns: int, rows: int, like: Tensor, bias: Optional[Tensor] = None) -> nn.Linear:
        linear = nn.Linear(columns, rows, bias=bias is not None, device=like.device)
        linear.weight.requires_grad_(like.requires_grad)
        if bias is not None:
            linear.bias.requires_grad_(bias.requires_grad)
        return linear

    def _replace_layer(self, factors: Dict[str, nn.Linear], missing: str) -> nn.Module:
        holder = CutLayer(self.layer_name, factors, missing)
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
    tied: List[Tied] = []

    def split_for(given: FrozenSet[str], others: List[Parts]) -> Parts:
        nonlocal tied
        parts = split(model, layer_name, trace(model, layer_name, inputs, given))
        tied = find_tied(model, [*others, parts])
        return parts

    found = find_variants(model, layer_name, inputs, split_for)
    names = stored_names(model, [parts.net_2 for parts in found.variants.values()])
    names -= {f"{layer_name}.{own}" for own, _ in layer.named_parameters()}
    for one in tied:
        names = {*names.difference(one.names), one.upper[0]}
    of_edge = {name for one in tied for name in one.names if name not in one.upper}
    others = {other: name for other, name in other_names(model, names).items() if other not in of_edge}
    return GraphCut(
        **vars(found),
        split_rank=split_rank,
        tied=tuple(tied),
        upper_names=frozenset(names),
        other_names=others,
    )


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
            raise CutError(f"{in_words(aliases)} are one parameter; a layer can be cut if its parameters are its own")
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


def _near(name: str, linears: List[str]) -> str:
    near = difflib.get_close_matches(name, linears, n=3, cutoff=0.4) or linears[:3]
    return f"it has {len(linears)} nn.Linear layers, such as {in_words(near)}"
