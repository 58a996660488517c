"""A traced graph in two: what leads to one layer, and what comes after it."""

from __future__ import annotations

import hashlib
import linecache
import operator
from dataclasses import dataclass
from typing import Any, Callable, Dict, FrozenSet, List, Mapping, NamedTuple, Optional, Set, Tuple

import torch
from torch import Tensor, fx, nn

from sft.errors import CutError
from sft.graph_trace import Traced, attribute_of

_ADDITIONS = (operator.add, operator.iadd, torch.add)
_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)


@dataclass(frozen=True)
class Half:
    """What one side runs, on whatever is left of the module, and what it needs of it."""

    forwards: Mapping[bool, Callable[..., Any]]
    """By `training`; called with the module and the inputs."""
    code: Mapping[bool, str]
    modules: FrozenSet[str]
    tensors: FrozenSet[str]
    """Parameters and buffers that are used directly."""
    constants: Dict[str, Tensor]

    def run(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The forward pass, in the mode that the module is in."""
        return self.forwards[model.training](model, *args, **kwargs)

    def same_as(self, other: Half) -> bool:
        """Whether both compute the same."""
        return self.code == other.code

    def owned(self, model: nn.Module) -> Set[int]:
        """Ids of the parameters and buffers that it needs, and of the modules that hold them."""
        owned = {id(attribute_of(model, name)) for name in self.tensors}
        for name in self.modules:
            for one in model.get_submodule(name).modules():
                owned.add(id(one))
                owned |= {id(x) for x in (*one._parameters.values(), *one._buffers.values()) if x is not None}
        return owned


class Halves(NamedTuple):
    """Both, and which residual connections were dropped."""

    net_1: Half
    net_2: Half
    dropped: Tuple[str, ...]


def split(model: nn.Module, layer_name: str, traced: Traced) -> Halves:
    """Splits a model's graph at its layer. Raises CutError when more than the activation would have to cross."""
    parts = {training: _Splitter(model, graph, layer_name) for training, graph in traced.graphs.items()}
    return Halves(
        _half({training: part.lower() for training, part in parts.items()}, layer_name, traced.constants),
        _half({training: part.upper() for training, part in parts.items()}, layer_name, traced.constants),
        tuple(parts[True].dropped),
    )


class _Splitter:
    """One graph, and which of its nodes come after the layer."""

    def __init__(self, model: nn.Module, graph: fx.Graph, layer_name: str) -> None:
        self._graph = graph
        self._name = layer_name
        self._layer = model.get_submodule(layer_name)
        self._cut = self._find_layer(model)
        self._inputs: Dict[fx.Node, FrozenSet[fx.Node]] = {}  # placeholders that a node depends on
        self._above: Set[fx.Node] = set()
        for node in graph.nodes:
            sources = [self._inputs[one] for one in node.all_input_nodes]
            self._inputs[node] = frozenset({node} if node.op == "placeholder" else ()).union(*sources)
            if node is self._cut or any(one in self._above for one in node.all_input_nodes):
                self._above.add(node)
        self._output = next(node for node in graph.nodes if node.op == "output")
        self.dropped: List[str] = []

    def lower(self) -> fx.Graph:
        """From the inputs to the activation."""
        (x,) = self._cut.all_input_nodes
        nodes = list(self._graph.nodes)
        below = [node for node in nodes[: nodes.index(self._cut)] if node not in self._above]
        wanted = _needed({x}, below, lambda node: node.all_input_nodes)
        graph = fx.Graph()
        copies: Dict[fx.Node, fx.Node] = {}
        for node in below:
            if node in wanted or node.op == "placeholder":
                copies[node] = graph.node_copy(node, lambda one: copies[one])
        graph.output(graph.call_module(f"{self._name}.ffn1", (copies[x],)))
        return graph

    def upper(self) -> fx.Graph:
        """From the activation to the output."""
        y = self._output.args[0]
        if not isinstance(y, fx.Node) or y not in self._above:
            kind = type(y).__name__.replace("immutable_", "")  # fx's own lists and dicts
            what = f"{_describe(y)}, which comes from below it" if isinstance(y, fx.Node) else f"a {kind}"
            raise CutError(
                f"'{self._name}' cannot be cut: the model has to return one tensor, computed from that layer's output "
                f"without changing others in place; it returns {what}"
            )
        above = [node for node in self._graph.nodes if node in self._above and node is not self._output]
        wanted = _needed({y}, above, self._needs)
        graph = fx.Graph()
        copies: Dict[fx.Node, fx.Node] = {}
        activation = graph.placeholder("activation")
        middle = graph.call_module(f"{self._name}.ffn2", (activation,))
        copies[self._cut] = graph.call_module(f"{self._name}.ffn3", (middle,))

        def value(node: fx.Node) -> fx.Node:
            if node not in copies:
                if self._inputs[node]:
                    raise self._crossing(node)
                copies[node] = graph.node_copy(node, value)
            return copies[node]

        for node in above:
            if node is self._cut or node not in wanted:
                continue
            residual = self._residual(node)
            if residual is None:
                copies[node] = graph.node_copy(node, value)
            else:
                (kept,) = (one for one in node.all_input_nodes if one is not residual)
                copies[node] = value(kept)
                self.dropped.append(f"{_describe(residual)}, added in {_where(node)}")
        graph.output(copies[y])
        return graph

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
            raise CutError(f"'{self._name}' cannot be cut: the model {times}; choose a layer that is called once")
        call: fx.Node = calls[0]
        if len(call.all_input_nodes) != 1:
            raise CutError(f"'{self._name}' cannot be cut: nothing that is computed goes into it")
        return call

    def _needs(self, node: fx.Node) -> List[fx.Node]:
        residual = self._residual(node)
        return [one for one in node.all_input_nodes if one in self._above and one is not residual]

    def _residual(self, node: fx.Node) -> Optional[fx.Node]:
        """What an addition adds that comes around the layer, from the inputs that lead to it."""
        is_addition = node.op == "call_function" and node.target in _ADDITIONS
        is_addition |= node.op == "call_method" and node.target in ("add", "add_")
        if not is_addition or len(node.args) != 2 or node.kwargs:
            return None
        around = [one for one in node.all_input_nodes if one not in self._above]
        if len(around) != 1 or len(node.all_input_nodes) != 2 or not self._inputs[around[0]]:
            return None
        return around[0] if self._inputs[around[0]] <= self._inputs[self._cut] else None

    def _crossing(self, node: fx.Node) -> CutError:
        users = [user for user in node.users if user in self._above]
        where = _where(users[0]) if users else "the part above"
        what = _describe(node)
        if node.op == "placeholder":
            advice = "cut higher, where only layers below need it"
        elif node.target in ("size", "dim") or node.target is getattr or node.target is operator.getitem:
            advice = "take sizes from a value that comes after the layer, or cut elsewhere"
        else:
            advice = "cut elsewhere, or compute it from what comes after the layer"
        return CutError(
            f"{what} is used above the cut at '{self._name}', in {where}, but only the layer's output crosses to the "
            f"cloud: {advice}"
        )


def _half(graphs: Mapping[bool, fx.Graph], layer_name: str, constants: Mapping[str, Tensor]) -> Half:
    modules: Set[str] = set()
    tensors: Set[str] = set()
    for node in (node for graph in graphs.values() for node in graph.nodes):
        target = str(node.target)
        if node.op == "call_module" and not target.startswith(f"{layer_name}."):
            modules.add(target)
        elif node.op == "get_attr":
            tensors.add(target)
    code = {training: graph.python_code("self") for training, graph in graphs.items()}
    return Half(
        {training: _compile(one.src, one.globals, layer_name) for training, one in code.items()},
        {training: one.src for training, one in code.items()},
        frozenset(modules),
        frozenset(tensors.difference(constants)),
        {name: tensor for name, tensor in constants.items() if name in tensors},
    )


def _compile(source: str, names: Mapping[str, Any], layer_name: str) -> Callable[..., Any]:
    file = f"<half of a model cut at {layer_name}, {hashlib.sha256(source.encode()).hexdigest()[:8]}>"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)  # for tracebacks
    namespace = dict(names)
    exec(compile(source, file, "exec"), namespace)
    forward: Callable[..., Any] = namespace["forward"]
    return forward


def _needed(ends: Set[fx.Node], nodes: List[fx.Node], needs: Callable[[fx.Node], List[fx.Node]]) -> Set[fx.Node]:
    """What must run for `ends`, of `nodes`: what they are computed from, and what changes that in place."""
    wanted: Set[fx.Node] = set()
    waiting = list(ends)
    while waiting:
        while waiting:
            node = waiting.pop()
            if node not in wanted:
                wanted.add(node)
                waiting.extend(needs(node))
        waiting = [node for node in nodes if node not in wanted and _changes(node) in wanted]
    return wanted


def _changes(node: fx.Node) -> Optional[fx.Node]:
    """What a node changes in place."""
    if node.op == "call_method":
        is_in_place = str(node.target).endswith("_") and not str(node.target).endswith("__")
    else:
        name = getattr(node.target, "__name__", "")
        is_in_place = node.op == "call_function" and (
            node.target in _IN_PLACE or (name.endswith("_") and not name.startswith("_")) or "inplace" in node.kwargs
        )
    changed = node.args[0] if is_in_place and node.args else None
    return changed if isinstance(changed, fx.Node) else None


def _describe(node: fx.Node) -> str:
    if node.op == "placeholder":
        return f"the input '{node.target}'"
    if node.op == "call_module":
        return f"the output of '{node.target}'"
    return f"'{node.name}' ({_function(node)})"


def _where(node: fx.Node) -> str:
    return f"'{node.target}'" if node.op == "call_module" else f"'{node.name}' ({_function(node)})"


def _function(node: fx.Node) -> str:
    if node.op == "call_method":
        return f"Tensor.{node.target}"
    return str(getattr(node.target, "__name__", node.target))
