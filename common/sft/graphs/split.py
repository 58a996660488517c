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
from sft.graphs.trace import Traced, attribute_of, describe, function_of

_ADDITIONS = (operator.add, operator.iadd, torch.add)
_IN_PLACE = (
    operator.setitem, operator.iadd, operator.iand, operator.ifloordiv, operator.ilshift, operator.imatmul,
    operator.imod, operator.imul, operator.ior, operator.ipow, operator.irshift, operator.isub, operator.itruediv,
    operator.ixor,
)  # fmt: skip
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

_SIZES = ("dim", "numel", "size", "stride")


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
    lower = {training: part.lower() for training, part in parts.items()}
    upper = {training: part.upper() for training, part in parts.items()}
    for part in parts.values():
        part.check_nothing_lost()
    return Halves(
        _half(lower, layer_name, traced.constants),
        _half(upper, layer_name, traced.constants),
        tuple(dict.fromkeys(what for part in parts.values() for what in part.dropped)),
    )


class _Splitter:
    """One graph, and which of its nodes come after the layer."""

    def __init__(self, model: nn.Module, graph: fx.Graph, layer_name: str) -> None:
        self._graph = graph
        self._model = model
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
        self._kept: Set[fx.Node] = set()  # by either half
        self._residual = self._find_residual()
        self.dropped: List[str] = []

    def lower(self) -> fx.Graph:
        """From the inputs to the activation."""
        (x,) = self._cut.all_input_nodes
        nodes = list(self._graph.nodes)
        below = [node for node in nodes[: nodes.index(self._cut)] if node not in self._above]
        wanted = _needed({x, *filter(_asserts, below)}, below, lambda node: node.all_input_nodes)
        self._kept |= wanted
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
            what = f"{describe(y)}, which comes from below it" if isinstance(y, fx.Node) else f"a {kind}"
            raise CutError(
                f"'{self._name}' cannot be cut: the model has to return one tensor, computed from that layer's output "
                f"without changing others in place; it returns {what}"
            )
        above = [node for node in self._graph.nodes if node in self._above and node is not self._output]
        wanted = _needed({y, *filter(_asserts, above)}, above, self._needs)
        self._kept |= wanted
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
            if self._residual is not None and self._residual[0] is node:
                residual = self._residual[1]
                (kept,) = (one for one in node.all_input_nodes if one is not residual)
                copies[node] = value(kept)
                self.dropped.append(f"{describe(residual)}, added in {_where(node)}")
            else:
                copies[node] = graph.node_copy(node, value)
        graph.output(copies[y])
        return graph

    def check_nothing_lost(self) -> None:
        """Raises CutError when something is in neither half that may be there for what it changes."""
        for node in self._graph.nodes:
            if node in self._kept or node.op in ("placeholder", "output"):
                continue
            module = self._model.get_submodule(str(node.target)) if node.op == "call_module" else None
            if module is not None and not node.users:
                what = f"the model calls '{node.target}' without using what it returns"
            elif _is_in_place(node) or getattr(module, "inplace", False):
                what = f"{_where(node)} changes a part of a value, or what no half returns, in place"
            else:
                continue
            raise CutError(
                f"'{self._name}' cannot be cut: {what}, which would be lost: go on with what it returns, compute a new "
                "value in the place of the change, or move it into a module that does not contain the layer"
            )

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
        residual = self._residual[1] if self._residual is not None and self._residual[0] is node else None
        return [one for one in node.all_input_nodes if one in self._above and one is not residual]

    def _find_residual(self) -> Optional[Tuple[fx.Node, fx.Node]]:
        """The addition that closes the block of the layer, and what it adds that comes around the layer."""
        value = self._cut
        while len(value.users) == 1:
            (user,) = value.users
            if not _is_addition(user):
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
        if node in self._above or not self._inputs[node] or _is_size(node):
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
        if any(one.op == "call_module" for one in _ancestors(node)):
            return not any(one.op == "call_module" and self._inputs[one] for one in beside)
        return not any(one.op == "placeholder" for one in beside)

    def _crossing(self, node: fx.Node) -> CutError:
        users = [user for user in node.users if user in self._above]
        where = _where(users[0]) if users else "the part above"
        what = describe(node)
        if node.op == "placeholder":
            advice = "cut higher, where only layers below need it"
        elif node.target in ("size", "dim") or node.target is getattr or node.target is operator.getitem:
            advice = "take sizes from a value that comes after the layer, or cut elsewhere"
        else:
            advice = "cut elsewhere, or compute it from what comes after the layer"
        if users and _is_addition(users[0]):
            advice += " (what is added is dropped only where it is the residual connection around this very layer)"
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
    exec(compile(source, file, "exec"), namespace)  # nosec B102 # torch.fx wrote it, of the script's own model
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
    if not _is_in_place(node):
        return None
    changed = node.kwargs.get("out", node.args[0] if node.args else node.kwargs.get("input"))
    return changed if isinstance(changed, fx.Node) else None


def _is_in_place(node: fx.Node) -> bool:
    if node.op not in ("call_method", "call_function"):
        return False
    name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
    by_name = name.endswith("_") and not name.endswith("__")
    return by_name or node.target in _IN_PLACE or bool(node.kwargs.get("inplace")) or "out" in node.kwargs


def _is_addition(node: fx.Node) -> bool:
    """Of two values as they are."""
    is_addition = node.op == "call_function" and node.target in _ADDITIONS
    is_addition |= node.op == "call_method" and node.target in ("add", "add_")
    return is_addition and len(node.args) == 2 and len(node.all_input_nodes) == 2 and not node.kwargs


def _is_size(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _SIZES
    if node.target is operator.getitem:
        return _is_size(node.all_input_nodes[0])
    return node.target is getattr


def _asserts(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is torch._assert


def _ancestors(node: fx.Node) -> Set[fx.Node]:
    return _needed({node}, [], lambda one: one.all_input_nodes)


def _where(node: fx.Node) -> str:
    return f"'{node.target}'" if node.op == "call_module" else f"'{node.name}' ({function_of(node)})"
