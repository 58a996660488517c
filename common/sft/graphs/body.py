"""Cutting a module around a base model of the library: its own head stays whole, and goes with the upper blocks.

    net_1 (edge)                                net_2 (cloud)                        tail (edge)
    what the module does before the body,       upper blocks, and what the module
    the body's embeddings and lower blocks -->  does with what the body returns  --> what needs the other inputs,
                                                                                     without parameters

The graphs are of the module alone, with the body as one node, of which net_1 gives the arguments and net_2 takes the
result: the halves of the body itself are `sft.models`'s. The mask that the body is given may be used above it: the
cloud knows it by the lengths.
"""

from __future__ import annotations

import inspect
import itertools
import operator
from dataclasses import dataclass
from typing import Any, Dict, FrozenSet, List, Mapping, Optional, Set

import torch
from torch import Tensor, fx, nn
from transformers.utils.generic import ModelOutput

from sft.errors import CutError, UsageError
from sft.graphs.kept import add_constants, keep, other_names, owned, remove, stored_names, tensors_named
from sft.graphs.on_cloud import leave_modes
from sft.graphs.sentences import SentenceInputs, is_sentence_model
from sft.graphs.split import Parts, Splitter, split
from sft.graphs.tied import find_tied, in_words, names_of_each
from sft.graphs.trace import Inputs, trace
from sft.graphs.variants import Variants, find_variants
from sft.models import body_of

_MASK = "attention_mask"
_OF_TOKENS = ("input_ids", _MASK, "token_type_ids")
_READS_MASK = "activation[1]"
"""In the code that torch.fx writes."""


_ABOUT_OUTPUT = ("output_attentions", "output_hidden_states", "return_dict")
_ABSENT = ("hidden_states", "attentions", "cross_attentions", "past_key_values")
"""What a base model returns where it is asked for it, which a cut one cannot be."""


@dataclass(frozen=True)
class BodyCut(Variants):
    """What surrounds a body, in halves. Net_1 gives the body's arguments, by name; net_2 takes what it returns, and the
    mask (B, S) int64."""

    upper_names: FrozenSet[str]
    """Parameters and buffers of net_2, without the body's; buffers only if the model's `state_dict` has them."""

    other_names: Mapping[str, str]
    """As `GraphCut` has them."""

    @property
    def body_name(self) -> str:
        """The base model's."""
        return self.cut_at

    @property
    def body(self) -> Any:
        """The base model."""
        return self.model.get_submodule(self.body_name)

    def reads_mask(self, variant: int) -> bool:
        """Whether net_2 uses the mask."""
        return any(_READS_MASK in code for code in self.numbered[variant].net_2.code.values())

    def upper_tensors(self) -> Dict[str, Tensor]:
        """The tensors of `upper_names`, which are the model's own."""
        return tensors_named(self.model, self.upper_names)

    def keep_net_1(self) -> None:
        """Takes from the model, in place, what is net_2's beside the body, which the caller cuts; of modules the modes
        stay, but not in a bi-encoder, whose own methods look at the modules that it has."""
        halves = self.variants.values()
        lower = owned(self.model, [half for parts in halves for half in (parts.net_1, parts.tail)])
        upper = owned(self.model, [parts.net_2 for parts in halves]) - lower
        take = remove if is_sentence_model(self.model) else leave_modes
        take(self.model, upper)
        add_constants(self.model, [parts.net_1 for parts in halves])

    def keep_net_2(self) -> None:
        """Takes from the model, in place, all that is neither net_2's nor the body's."""
        halves = [parts.net_2 for parts in self.variants.values()]
        kept = owned(self.model, halves) | {id(one) for one in self.body.modules()}
        keep(self.model, kept | {id(parameter) for parameter in self.body.parameters()})
        add_constants(self.model, halves)


def find_body(model: nn.Module, name: Optional[str] = None) -> str:
    """The name of the base model of the library in a module, or of that part of it; of several it must be told.

    Raises CutError where there is none.
    """
    within = model if name is None else dict(model.named_modules()).get(name)
    kind = type(model).__name__
    if within is None:
        raise CutError(f"this {kind} has no module '{name}'; leave split_at out, or name the transformers model in it")
    found = [own for own, module in within.named_modules(prefix=name or "") if body_of(module) is not None]
    bodies: List[str] = [
        one for one in found if not any(one.startswith(f"{other}.") for other in found if other != one)
    ]
    if bodies == [""]:
        raise CutError(f"a {kind} gives hidden states, and no head: give the module around it that has one")
    if not bodies:
        raise CutError(
            f"split_layer is for transformers models, and for modules around a base model of transformers; cut a "
            f"{kind} with split_at='NAME'"
        )
    if len(bodies) > 1:
        raise CutError(f"this {kind} has several transformers models, {in_words(bodies)}: name one by split_at")
    return bodies[0]


def cut_around(model: nn.Module, body_name: str) -> BodyCut:
    """The halves of what surrounds the body. Raises CutError when something else would have to cross."""
    of_body = _Inputs(model, model.get_submodule(body_name))
    inputs = SentenceInputs(model, body_name) if is_sentence_model(model) else of_body
    if not inputs.required and not inputs.defaults:
        raise CutError(
            f"the forward method of this {type(model).__name__} takes whatever it is given: name its arguments"
        )

    check_single(model, body_name)

    def split_for(given: FrozenSet[str], others: List[Parts]) -> Parts:
        parts = split(model, body_name, trace(model, body_name, inputs, given), _Splitter)
        _check_apart(model, body_name, [*others, parts])
        return parts

    found = find_variants(model, body_name, inputs, split_for)
    names = stored_names(model, [parts.net_2 for parts in found.variants.values()])
    others = other_names(model, names)
    return BodyCut(**vars(found), upper_names=frozenset(names), other_names=others)


def check_single(model: nn.Module, body_name: str) -> None:
    """Raises UsageError where something beside the body is not float32."""
    for name, parameter in model.named_parameters():
        is_own = not name.startswith(f"{body_name}.")
        if is_own and parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise UsageError(
                f"parameter '{name}' is {parameter.dtype}: call model.float() first; torch.autocast computes in half "
                "precision"
            )


class _Inputs(Inputs):
    """Of what the body takes, too, the usual sets alone: the library's models take a dozen."""

    def __init__(self, model: nn.Module, body: nn.Module) -> None:
        super().__init__(model)
        self._of_body = [*_OF_TOKENS, *inspect.signature(type(body).forward).parameters, *_ABOUT_OUTPUT]

    def variants(self) -> List[FrozenSet[str]]:
        """See Inputs."""
        optional = [name for name in _OF_TOKENS if self.defaults.get(name, name) is None]
        ids = [name for name in optional if name == "input_ids"]
        more = [name for name in optional if name not in ids]
        counts = range(len(more) + 1)
        of_tokens = [frozenset([*ids, *some]) for count in counts for some in itertools.combinations(more, count)]
        return [tokens | others for others in self.sets_of_optional(self._of_body) for tokens in of_tokens]


class _Splitter(Splitter):
    """One graph around the body."""

    _advice = "have the forward method call it once, for one text; call the model for each, and join that in the loop"

    def __init__(self, model: nn.Module, graph: fx.Graph, layer_name: str) -> None:
        super().__init__(model, _by_name(model, graph, layer_name), layer_name)
        for node in graph.nodes:
            if node.op == "call_module" and str(node.target).startswith(f"{layer_name}."):
                raise CutError(f"'{layer_name}' cannot be cut: the model calls its {node.target} by itself")

    def upper(self) -> fx.Graph:
        """See Splitter. The mask is left out where nothing reads it."""
        graph = super().upper()
        for node in graph.nodes:
            is_mask = node.target is operator.getitem and node.args[0].op == "placeholder" and node.args[1] == 1
            if is_mask and not node.users:
                graph.erase_node(node)
        return graph

    def _find_known(self) -> Set[fx.Node]:
        mask = self._arguments().get(_MASK)
        if not isinstance(mask, fx.Node):
            return set()
        is_item = mask.target is operator.getitem  # of a dictionary, read anew wherever it is used
        alike = (one for one in self._graph.nodes if is_item and (one.target, one.args) == (mask.target, mask.args))
        return {mask, *alike}

    def _arguments(self) -> Dict[str, Any]:
        signature = inspect.signature(type(self._layer).forward)
        try:
            named = dict(signature.bind(None, *self._cut.args, **self._cut.kwargs).arguments)
        except TypeError as error:
            raise CutError(f"'{self._name}' cannot be cut: {error}") from error
        del named[next(iter(signature.parameters))]
        for parameter in signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                named.update(named.pop(parameter.name, {}))
        return named

    def _end_lower(self, graph: fx.Graph, copies: Dict[fx.Node, fx.Node]) -> Any:
        return fx.node.map_arg(self._arguments(), lambda one: copies[one])

    def _begin_upper(self, graph: fx.Graph, activation: fx.Node) -> Dict[fx.Node, fx.Node]:
        returned = graph.call_function(operator.getitem, (activation, 0))
        as_dict = self._arguments().get("return_dict")
        config: Any = self._layer.config
        if not (config.return_dict if as_dict is None else as_dict):
            returned = graph.call_method("to_tuple", (returned,))
        copies = {self._cut: returned}
        if self._known:
            copies.update(dict.fromkeys(self._known, graph.call_function(operator.getitem, (activation, 1))))
        return copies

    def _may_cross(self, node: fx.Node) -> bool:
        return node is not self._cut and super()._may_cross(node)


def _by_name(model: nn.Module, graph: fx.Graph, body_name: str) -> fx.Graph:
    """What is read of the body's output as an attribute is an item, as which it is no size; or None."""
    for node in list(graph.nodes):
        if node.target not in (getattr, operator.getitem) or not isinstance(node.args[1], str):
            continue
        source = node.args[0]
        if source.op != "call_module" or str(source.target) != body_name or hasattr(ModelOutput, node.args[1]):
            continue
        node.target = operator.getitem
        if node.args[1] in _ABSENT:
            _put_none(node, body_name)
            graph.erase_node(node)
    return graph


def _put_none(node: fx.Node, body_name: str) -> None:
    """In its place, where it is but handed on."""

    def value(one: fx.Node) -> Optional[fx.Node]:
        return None if one is node else one

    for user in list(node.users):
        if user.op != "output" and not isinstance(user.target, type):
            raise CutError(
                f"'{body_name}' cannot be cut: the model reads its {node.args[1]}, of which those of the lower blocks "
                "stay on the edge: go on with last_hidden_state"
            )
        user.args = fx.node.map_arg(user.args, value)
        user.kwargs = fx.node.map_arg(user.kwargs, value)


def _check_apart(model: nn.Module, body_name: str, variants: List[Parts]) -> None:
    """Raises CutError where a half, beside the body, has a parameter of the body's, or of the other half."""
    shared = [one.names for one in find_tied(model, variants)]
    for names in names_of_each(model.named_parameters(remove_duplicate=False)):
        inside = [name.startswith(f"{body_name}.") for name in names]
        if any(inside) and not all(inside):
            shared.append(tuple(names))
    if shared:
        raise CutError(f"{in_words(shared[0])} are one parameter, which halves around a body cannot share: untie them")
