"""A traced graph in three: what leads to one layer, what comes after it, and what is done with that on the edge again.

    net_1 (edge)                      net_2 (cloud)                   tail (edge)
    all that leads to the layer  -->  from the layer to one value --> what the model returns, of that value and
                                                                      of what stayed below the layer, such as targets

The tail has no modules with parameters. It begins as late as it can: of a model that returns one tensor of net_2's, it
is that tensor.
"""

from __future__ import annotations

import operator
from typing import Any, Dict, FrozenSet, List, NamedTuple, Optional, Set, Tuple, Type

import torch
from torch import fx, nn

from sft.errors import CutError
from sft.graphs.half import Half, make_half
from sft.graphs.nodes import (
    ancestors,
    asserts,
    changes,
    describe,
    function_of,
    is_addition,
    is_fresh,
    is_in_place,
    is_size,
    needed,
    where,
)
from sft.graphs.trace import Traced

_KEEPING_FUNCTIONS = (
    nn.functional.dropout, nn.functional.alpha_dropout, torch.dropout, torch.flatten, torch.permute, torch.reshape,
    torch.squeeze, torch.transpose, torch.unsqueeze,
)  # fmt: skip
_KEEPING_METHODS = (
    "clone", "contiguous", "flatten", "permute", "reshape", "squeeze", "transpose", "unflatten", "unsqueeze", "view",
)  # fmt: skip
_KEEPING_MODULES = (nn.Identity, nn.Dropout, nn.AlphaDropout, nn.Dropout1d, nn.Dropout2d, nn.Flatten, nn.Unflatten)
_KEEPING_NAMES = ("DropPath", "StochasticDepth")
"""What may stand between a layer and the addition that closes its block."""


_NO_TENSOR = (
    "argmax", "argmin", "chunk", "hsplit", "max", "min", "sort", "split", "tensor_split", "topk", "unbind", "vsplit",
)  # fmt: skip
"""What may give several tensors, or integers, that do not cross."""


class Parts(NamedTuple):
    """What the sides run, and which residual connections were dropped."""

    net_1: Half
    """Of the inputs: what crosses, and a list of what stays for the tail."""

    net_2: Half
    """Of what crosses: one tensor."""

    tail: Half
    """Of that tensor, and of all in the list: what the model returns."""

    dropped: Tuple[str, ...]


def split(model: nn.Module, layer_name: str, traced: Traced, splitter: Optional[Type[Splitter]] = None) -> Parts:
    """Splits a model's graph at its layer. Raises CutError when more than one tensor would have to cross."""
    kind = splitter or Splitter
    parts = {training: kind(model, graph, layer_name) for training, graph in traced.graphs.items()}
    lower = {training: part.lower() for training, part in parts.items()}
    upper = {training: part.upper() for training, part in parts.items()}
    tails = {training: part.tail() for training, part in parts.items()}
    for part in parts.values():
        part.check_nothing_lost()
        part.check_order()
    return Parts(
        make_half(lower, layer_name, traced.constants),
        make_half(upper, layer_name, traced.constants),
        make_half(tails, layer_name, {}),
        tuple(dict.fromkeys(what for part in parts.values() for what in part.dropped)),
    )


class Splitter:
    """One graph, and which of its nodes come after the layer."""

    _advice = "choose a layer that is called once"

    def __init__(self, model: nn.Module, graph: fx.Graph, layer_name: str) -> None:
        self._graph = graph
        self._model = model
        self._name = layer_name
        self._layer = model.get_submodule(layer_name)
        self._cut = self._find_layer(model)
        self._known = self._find_known()
        self._inputs: Dict[fx.Node, FrozenSet[fx.Node]] = {}  # placeholders that a node depends on
        self._above: Set[fx.Node] = set()
        for node in graph.nodes:
            sources = [self._inputs[one] for one in node.all_input_nodes if one not in self._known]
            self._inputs[node] = frozenset({node} if node.op == "placeholder" else ()).union(*sources)
            if node is self._cut or any(one in self._above for one in node.all_input_nodes):
                self._above.add(node)
        self._output = next(node for node in graph.nodes if node.op == "output")
        self._residual = self._find_residual()
        self._order = {node: place for place, node in enumerate(graph.nodes)}
        self._upper = [node for node in graph.nodes if node in self._above and node is not self._output]
        self._foreign: Set[fx.Node] = set()  # above, but not to be had of the activation alone
        for node in self._upper:
            if node is not self._cut and any(one in self._foreign or self._stays(one) for one in self._sources(node)):
                self._foreign.add(node)
        self._crosses = self._find_crossing()
        self._cloud = self._needed_for(self._crosses)
        self._tail = self._tail_after(self._crosses, self._cloud)
        ends = [self._output, *sorted(self._tail, key=self._order.__getitem__)]
        below = (one for node in ends for one in self._sources(node) if one not in self._above)
        self._stay = list(dict.fromkeys(below))
        self._kept = self._cloud | self._tail  # by any part
        self.dropped: List[str] = []

    def lower(self) -> fx.Graph:
        """From the inputs to the activation, and to what stays."""
        below = [node for node in self._graph.nodes if node not in self._above and node is not self._output]
        wanted = needed(
            {*self._cut.all_input_nodes, *self._stay, *filter(asserts, below)}, below, lambda node: node.all_input_nodes
        )
        self._kept |= wanted
        graph = fx.Graph()
        copies: Dict[fx.Node, fx.Node] = {}
        for node in self._graph.nodes:
            if node is self._cut:
                copies[node] = self._end_lower(graph, copies)
            elif node in wanted or node.op == "placeholder":
                copies[node] = graph.node_copy(node, lambda one: copies[one])
        graph.output((copies[self._cut], [copies[one] for one in self._stay]))
        return graph

    def upper(self) -> fx.Graph:
        """From the activation to what crosses back."""
        graph = fx.Graph()
        copies = self._begin_upper(graph, graph.placeholder("activation"))
        self._copy(self._cloud, graph, copies)
        graph.output(copies[self._crosses])
        return graph

    def _end_lower(self, graph: fx.Graph, copies: Dict[fx.Node, fx.Node]) -> Any:
        """What crosses: the activation (..., R)."""
        (x,) = self._cut.all_input_nodes
        return graph.call_module(f"{self._name}.ffn1", (copies[x],))

    def _begin_upper(self, graph: fx.Graph, activation: fx.Node) -> Dict[fx.Node, fx.Node]:
        """What the cloud makes of what crosses, in the places of what the whole model has there."""
        middle = graph.call_module(f"{self._name}.ffn2", (activation,))
        return {self._cut: graph.call_module(f"{self._name}.ffn3", (middle,))}

    def tail(self) -> fx.Graph:
        """From what crosses back, and what stays, to the output."""
        graph = fx.Graph()
        copies = {node: graph.placeholder(name) for node, name in [(self._crosses, "crosses")]}
        copies.update({node: graph.placeholder(f"stays_{index}") for index, node in enumerate(self._stay)})
        self._copy(self._tail, graph, copies)
        graph.output(fx.node.map_arg(self._output.args[0], lambda one: copies[one]))
        return graph

    def _copy(self, nodes: Set[fx.Node], graph: fx.Graph, copies: Dict[fx.Node, fx.Node]) -> None:
        def value(node: fx.Node) -> fx.Node:
            if node not in copies:  # a parameter, or what is computed of one
                copies[node] = graph.node_copy(node, value)
            return copies[node]

        for node in self._upper:
            if node not in nodes or node in copies:
                continue
            if self._residual is not None and self._residual[0] is node:
                (kept,) = self._sources(node)
                copies[node] = value(kept)
                self.dropped.append(f"{describe(self._residual[1])}, added in {where(node)}")
            else:
                copies[node] = graph.node_copy(node, value)

    def _find_crossing(self) -> fx.Node:
        """The last value that all that is returned can be computed from without parameters, but for what stays."""
        ends = {one for one in self._output.all_input_nodes if one in self._above}
        if not ends:
            returned = ", ".join(describe(one) for one in self._output.all_input_nodes) or "no tensor"
            raise CutError(
                f"'{self._name}' cannot be cut: the model has to return something that is computed from that layer's "
                f"output without changing others in place; it returns {returned}, which comes from below it"
            )
        wanted = needed({*ends, *filter(asserts, self._upper)}, self._upper, self._needs)
        node: fx.Node
        for node in reversed(self._upper):
            if node in wanted and node not in self._foreign and self._may_cross(node):
                cloud = self._needed_for(node)
                tail = self._tail_after(node, cloud)
                if self._cut not in tail and self._fit(cloud, tail):
                    return node
        for node in self._upper:
            if node in wanted and node in self._foreign and self._has_parameters(node):
                raise self._crossing(self._first_that_stays(node))
        raise CutError(
            f"'{self._name}' cannot be cut: what the model returns ({', '.join(map(describe, self._returned(ends)))}) "
            "needs several tensors of the cloud, and one comes back: return one, or join them by torch.cat and return "
            "parts of that, or cut at a later layer"
        )

    def _needed_for(self, crosses: fx.Node) -> Set[fx.Node]:
        """Of the nodes above, what the cloud has to run."""
        own = [node for node in self._upper if node not in self._foreign]
        return needed({crosses, *filter(asserts, own)}, own, self._needs)

    def _tail_after(self, crosses: fx.Node, cloud: Set[fx.Node]) -> Set[fx.Node]:
        """Of the nodes above, what the edge has to run; with the layer where that does not suffice."""
        ends = {one for one in self._output.all_input_nodes if one in self._above}
        ends.update(node for node in filter(asserts, self._upper) if node in self._foreign)
        others = [node for node in self._upper if node not in cloud]
        return needed(ends, others, lambda node: [] if node is crosses else self._needs(node)) - {crosses}

    def _fit(self, cloud: Set[fx.Node], tail: Set[fx.Node]) -> bool:
        """Whether the edge can run the tail after all that the cloud runs."""
        first = min((self._order[node] for node in tail), default=len(self._order))
        too_late = any(is_in_place(node) and self._order[node] >= first for node in cloud)
        return not too_late and not any(map(self._has_parameters, tail))

    def _may_cross(self, node: fx.Node) -> bool:
        """Whether it can be one tensor, as far as its name tells."""
        if node.op == "call_module":
            return not isinstance(self._model.get_submodule(str(node.target)), (nn.RNNBase, nn.MultiheadAttention))
        if isinstance(node.target, type):  # the class of what the model returns
            return False
        return not (is_size(node) or asserts(node) or function_of(node).rpartition(".")[2] in _NO_TENSOR)

    def _has_parameters(self, node: fx.Node) -> bool:
        return node.op == "call_module" and any(True for _ in self._model.get_submodule(str(node.target)).parameters())

    def _stays(self, node: fx.Node) -> bool:
        """Whether a value is computed from the inputs without the layer."""
        return node not in self._above and node not in self._known and bool(self._inputs[node])

    def _first_that_stays(self, node: fx.Node) -> fx.Node:
        """The value from below that a foreign node needs first."""
        above = needed({node}, [], self._needs)
        first = min(above & self._foreign, key=self._order.__getitem__)
        source: fx.Node = next(one for one in self._sources(first) if self._stays(one))
        return source

    def _returned(self, ends: Set[fx.Node]) -> List[fx.Node]:
        return sorted(ends, key=self._order.__getitem__)

    def check_nothing_lost(self) -> None:
        """Raises CutError when something is in neither half that may be there for what it changes."""
        for node in self._graph.nodes:
            if node in self._kept or node.op in ("placeholder", "output"):
                continue
            module = self._model.get_submodule(str(node.target)) if node.op == "call_module" else None
            if module is not None and not node.users:
                what = f"the model calls '{node.target}' without using what it returns"
            elif is_in_place(node) or getattr(module, "inplace", False):
                what = f"{where(node)} changes a part of a value, or what no half returns, in place"
            else:
                continue
            raise CutError(
                f"'{self._name}' cannot be cut: {what}, which would be lost: go on with what it returns, compute a new "
                "value in the place of the change, or move it into a module that does not contain the layer"
            )

    def check_order(self) -> None:
        """Raises CutError when a value from below may be changed in place before or after its time: all of net_1 runs
        before the tail."""
        below = {one for one in self._stay if not is_size(one)}
        readers = (node for node in self._tail if not below.isdisjoint(self._sources(node)))
        first = min((self._order[node] for node in readers), default=len(self._order))
        for node in self._graph.nodes:
            if node not in self._kept or not self._may_change(node):
                continue
            too_early = node not in self._above and self._order[node] > first
            if too_early or (node in self._tail and self._may_be_from_below(_first_input(node))):
                raise CutError(
                    f"'{self._name}' cannot be cut: {where(node)} may change a value from below the layer in place, in "
                    "another order with what reads it than the whole model does: compute a new value in the place of "
                    "the change (y = y + x for y += x, inplace=False)"
                )

    def _may_change(self, node: fx.Node) -> bool:
        """Whether a node may change what it is given in place."""
        if node.op != "call_module":
            return is_in_place(node)
        return any(getattr(one, "inplace", False) for one in self._model.get_submodule(str(node.target)).modules())

    def _may_be_from_below(self, node: Optional[fx.Node]) -> bool:
        """Whether a value that the tail has may share memory with one that stayed: as a view of it, say."""
        while node in self._tail:
            module = self._model.get_submodule(str(node.target)) if node.op == "call_module" else None
            name = function_of(node).rpartition(".")[2] if module is None else type(module).__name__
            if is_fresh(name) and not is_in_place(node):
                return False
            node = _first_input(node)
        return node is not None and node is not self._crosses and not is_size(node)

    def _find_layer(self, model: nn.Module) -> fx.Node:
        calls = [
            node
            for node in self._graph.nodes
            if node.op == "call_module" and model.get_submodule(str(node.target)) is self._layer
        ]
        reads = [n for n in self._graph.nodes if n.op == "get_attr" and str(n.target).startswith(f"{self._name}.")]
        if reads:
            raise CutError(f"'{self._name}' cannot be cut: the model uses its {reads[0].target} by itself")
        if len(calls) != 1:
            times = "never calls it" if not calls else f"calls it {len(calls)} times"
            raise CutError(f"'{self._name}' cannot be cut: the model {times}; {self._advice}")
        call: fx.Node = calls[0]
        if not call.all_input_nodes:
            raise CutError(f"'{self._name}' cannot be cut: nothing that is computed goes into it")
        return call

    def _find_known(self) -> Set[fx.Node]:
        """Values from below that the cloud has, too: none."""
        return set()

    def _sources(self, node: fx.Node) -> List[fx.Node]:
        """What goes into a node, without the residual connection."""
        residual = self._residual[1] if self._residual is not None and self._residual[0] is node else None
        return [one for one in node.all_input_nodes if one is not residual]

    def _needs(self, node: fx.Node) -> List[fx.Node]:
        return [] if node is self._cut else [one for one in self._sources(node) if one in self._above]

    def _find_residual(self) -> Optional[Tuple[fx.Node, fx.Node]]:
        """The addition that closes the block of the layer, and what it adds that comes around the layer."""
        value = self._cut
        while len(value.users) == 1:
            (user,) = value.users
            if not is_addition(user):
                if user.args[:1] != (value,) or not self._keeps(user):
                    return None
                value = user
                continue
            around = [one for one in user.all_input_nodes if one is not value]
            return (user, around[0]) if around and self._leads_here(around[0]) else None
        return None

    def _keeps(self, node: fx.Node) -> bool:
        """Whether a value stays what it is but for its shape and dropout."""
        if any(one in self._above for one in node.all_input_nodes[1:]):
            return False
        if node.op == "call_module":
            module = self._model.get_submodule(str(node.target))
            return type(module) in _KEEPING_MODULES or type(module).__name__ in _KEEPING_NAMES
        if node.op == "call_method":
            return node.target in _KEEPING_METHODS
        return node.op == "call_function" and node.target in _KEEPING_FUNCTIONS

    def _leads_here(self, node: fx.Node) -> bool:
        """Whether the layer's input is computed from this value, and but for masks and sizes from nothing else."""
        while node.op != "placeholder" and node.args and self._keeps(node):
            node = node.all_input_nodes[0]
        if node in self._above or not self._inputs[node] or is_size(node):
            return False
        from_it, seen = {node}, {node}
        beside: Set[fx.Node] = set()
        waiting = list(self._cut.all_input_nodes)
        while waiting:
            one = waiting.pop()
            if one not in seen:
                seen.add(one)
                waiting.extend(one.all_input_nodes)
        for one in self._graph.nodes:
            if one in seen and one is not node:
                (from_it if any(i in from_it for i in one.all_input_nodes) else beside).add(one)
        if self._cut.all_input_nodes[0] not in from_it:
            return False
        if any(one.op == "call_module" for one in ancestors(node)):
            return not any(one.op == "call_module" and self._inputs[one] for one in beside)
        return not any(one.op == "placeholder" for one in beside)

    def _crossing(self, node: fx.Node) -> CutError:
        users = [user for user in node.users if user in self._above]
        place = where(users[0]) if users else "the part above"
        what = describe(node)
        if node.op == "placeholder":
            advice = "cut higher, where only layers below need it"
        elif node.target in ("size", "dim") or node.target is getattr or node.target is operator.getitem:
            advice = "take sizes from a value that comes after the layer, or cut elsewhere"
        else:
            advice = "cut elsewhere, or compute it from what comes after the layer"
        if users and is_addition(users[0]):
            advice += " (what is added is dropped only where it is the residual connection around this very layer)"
        return CutError(
            f"{what} is used above the cut at '{self._name}', in {place}, but only the layer's output crosses to the "
            f"cloud: {advice}"
        )


def _first_input(node: fx.Node) -> Optional[fx.Node]:
    """What a node changes, or gives a view of, if it does."""
    return changes(node) or next(iter(node.all_input_nodes), None)
