"""The graph of a script's module, with the modules around one layer opened up and all others closed.

What a module that does not contain the layer does inside is its own affair: it is one node. So only the forward methods
of modules on the way to the layer have to be traceable by torch.fx.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import inspect
import itertools
import linecache
import operator
import random
import sys
import threading
import warnings
from contextlib import contextmanager
from typing import Any, Callable, Dict, FrozenSet, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sft.errors import CutError
from sft.graphs.attributes import Attributes, proxies_in
from sft.graphs.nodes import describe
from sft.graphs.plain import PLAIN
from sft.models import body_of

_FACTORIES = ("arange", "empty", "full", "linspace", "ones", "rand", "randn", "zeros")
"""Functions of torch whose arguments may be sizes of the input; older releases do not trace them by themselves."""

_MOST_OPTIONAL = 3
"""Up to so many optional inputs every combination is traced; of more, none, each alone, and all."""

_TRIES = 3
"""Python's random numbers are the whole process's: another thread that draws now and then is no reason to refuse."""

_LOCK = threading.RLock()
"""Around whatever is replaced for the whole process while tracing."""


class Traced(NamedTuple):
    """What a module computes, given some of its optional inputs."""

    graphs: Mapping[bool, fx.Graph]
    """By `training`: functional dropout, for one, is fixed when it is traced."""

    constants: Dict[str, Tensor]
    """Tensors that are neither parameters nor buffers; the graphs read them from attributes of the module."""


class Inputs:
    """The arguments of a module's forward method."""

    def __init__(self, model: nn.Module) -> None:
        self.signature = inspect.signature(type(model).forward)
        named = list(self.signature.parameters.values())[1:]
        named = [p for p in named if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        self.required: List[str] = [p.name for p in named if p.default is p.empty]
        self.defaults: Dict[str, Any] = {p.name: p.default for p in named if p.default is not p.empty}
        self.forward: Optional[Callable[..., Any]] = None
        """What is traced in the place of the forward method, if that takes them otherwise."""

    def variants(self) -> List[FrozenSet[str]]:
        """Sets of optional inputs that a call may give, from none of them up."""
        return self.sets_of_optional()

    def sets_of_optional(self, without: Sequence[str] = ()) -> List[FrozenSet[str]]:
        """Of those that are not in `without`."""
        optional = [name for name, default in self.defaults.items() if default is None and name not in without]
        counts: Sequence[int] = range(len(optional) + 1)
        if len(optional) > _MOST_OPTIONAL:
            counts = (0, 1, len(optional))
        return [frozenset(some) for count in counts for some in itertools.combinations(optional, count)]

    def bind(self, model: nn.Module, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Dict[str, Any]:
        """The inputs of a call that are given, by name; TypeError as from the forward method itself.

        Raises CutError for an argument that was fixed when the model was cut.
        """
        given = {}
        for name, value in self.signature.bind(model, *args, **kwargs).arguments.items():
            if name in self.required:
                given[name] = value
            elif name in self.defaults and (value is self.defaults[name] or _equal(value, self.defaults[name])):
                continue
            elif name in self.defaults and self.defaults[name] is None:
                given[name] = value
            elif name in self.defaults:
                raise CutError(f"the argument {name} was fixed at {self.defaults[name]!r} when the model was cut")
            elif name != next(iter(self.signature.parameters)) and value:
                raise CutError(
                    f"the arguments in {name} cannot be given to a model that is cut; name them in forward()"
                )
        return given

    def returned(self, args: Tuple[Any, ...], kwargs: Dict[str, Any], output: Any) -> Any:
        """What a call gives back, of what was traced."""
        return output


def trace(model: nn.Module, layer_name: str, inputs: Inputs, given: FrozenSet[str]) -> Traced:
    """Traces a model twice, in training and in evaluation. It is left as it was. Raises CutError."""
    on_the_way = _modules_on_the_way(model, layer_name)
    attributes = Attributes(on_the_way)
    graphs, constants = {}, {}
    try:
        for training in (True, False):
            for module in on_the_way:
                module.training = training
            graphs[training] = _trace(model, on_the_way, inputs, given, layer_name)
            attributes.forget()
    finally:
        made = attributes.made()
        attributes.restore()
    tensors = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    for node in (node for graph in graphs.values() for node in graph.nodes):
        if node.op == "get_attr" and node.target not in tensors:
            # Made while tracing, or an attribute that is no buffer. By what it is, all graphs read the same one.
            tensor = made[node.target] if node.target in made else attribute_of(model, node.target)
            node.target = _constant_name(tensor)
            constants[node.target] = tensor
    return Traced(graphs, constants)


def _trace(
    model: nn.Module, on_the_way: Sequence[nn.Module], inputs: Inputs, given: FrozenSet[str], layer_name: str
) -> fx.Graph:
    start = random.getstate()
    try:
        with _LOCK, warnings.catch_warnings(), torch.set_grad_enabled(torch.is_grad_enabled()), _traceable_factories():
            warnings.simplefilter("ignore")  # about what is run with stand-ins for tensors
            for _ in range(_TRIES):
                before = random.getstate()
                with _Draws():
                    graph = _Tracer(on_the_way, inputs, given).trace(model)
                if random.getstate() == before:
                    return graph
            raise ValueError(_DRAWS)
    except CutError:
        raise
    except Exception as error:  # whatever a forward method raises that is given stand-ins for tensors
        random.setstate(start)
        reason = " ".join(str(error).split())[:200]
        if any(body_of(module) is not None for module in on_the_way):
            raise CutError(
                f"'{layer_name}' is in a transformers model, of which torch.fx makes no graph: give split_layer, the "
                "block, in the place of split_at"
            ) from error
        raise CutError(
            f"what leads to '{layer_name}' in this {type(model).__name__} cannot be traced by torch.fx "
            f"({type(error).__name__}: {reason}): move what decides by values or sizes of tensors, or draws, into a "
            "module that does not contain the layer, which is not looked into; of assertions about sizes those of "
            "plain comparisons in one line can stay"
        ) from error


_DRAWS = "it draws random numbers itself, which would be the same ones ever after"


class _Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises ValueError before this thread draws random numbers of torch's."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise ValueError(_DRAWS)
        return func(*args, **(kwargs or {}))


def _in_place(function: Callable[..., Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    return lambda left, right: left.tracer.create_proxy("call_function", function, (left, right), {})


class _Proxy(fx.Proxy):
    """`h += 1` changes h under its other names, too; fx takes it for `h = h + 1`."""

    __iadd__ = _in_place(operator.iadd)
    __iand__ = _in_place(operator.iand)
    __ifloordiv__ = _in_place(operator.ifloordiv)
    __imod__ = _in_place(operator.imod)
    __imul__ = _in_place(operator.imul)
    __ior__ = _in_place(operator.ior)
    __ipow__ = _in_place(operator.ipow)
    __isub__ = _in_place(operator.isub)
    __itruediv__ = _in_place(operator.itruediv)
    __ixor__ = _in_place(operator.ixor)


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, on_the_way: Sequence[nn.Module], inputs: Inputs, given: FrozenSet[str]) -> None:
        super().__init__()
        self._open = {id(module) for module in on_the_way}
        self._known = {id(module) for module in on_the_way[0].modules()}
        self._inputs = inputs
        self._given = given
        self._thread = threading.get_ident()
        self._context = _context()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Refuses what is computed within a context that a graph does not hold."""
        node = super().create_node(*args, **kwargs)
        changed = [what for what, value in _context().items() if value != self._context[what]]
        if changed:
            raise CutError(
                f"{describe(node)} is computed with {changed[0]} switched on or off in a forward method next to the "
                "layer: put it, with the `with` statement, into a module of its own that does not contain the layer"
            )
        return node

    def create_arg(self, a: Any) -> Any:
        """The library's output classes are dictionaries, of which fx keeps no more than that."""
        if isinstance(a, dict) and dataclasses.is_dataclass(a):
            fields = {name: self.create_arg(value) for name, value in a.items()}
            return self.create_node("call_function", type(a), (), fields)
        return super().create_arg(a)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A stand-in for a tensor."""
        return _Proxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """What is asserted holds while tracing; the halves assert it again."""
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("torch.fx"):
            frame = frame.f_back
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno, frame.f_globals).strip()
        if not _is_plain_assertion(line):
            return super().to_bool(obj)
        self.create_proxy("call_function", torch._assert, (obj, line), {})
        return True

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Dict[str, Any]) -> Any:
        """Other threads may run modules meanwhile."""
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Every module is one node but those that lead to the layer."""
        return id(m) not in self._open

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: Tuple[Any, ...], kwargs: Dict[str, Any]
    ) -> Any:
        """Torch's own encoders without their inference kernels, which look at shapes and values of tensors."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        if id(m) not in self._known and not any(True for _ in m.parameters()):
            return forward(*args, **kwargs)  # made in a forward method, as losses often are
        plain = None if has_hooks(m) else PLAIN.get(type(m))
        if plain is not None and id(m) in self._open:
            return plain(m, *args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> Tuple[Any, List[Any]]:
        """What is not given keeps its default, where fx would take it for a tensor."""
        root_fn = self._inputs.forward or PLAIN.get(type(self.root), root_fn)
        names = [*self._inputs.required, *(name for name in self._inputs.defaults if name in self._given)]
        fixed = {name: value for name, value in self._inputs.defaults.items() if name not in self._given}

        def forward(root: nn.Module, *proxies: Any) -> Any:
            return root_fn(root, **dict(zip(names, proxies)), **fixed)

        return forward, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in names)]


def _is_plain_assertion(line: str) -> bool:
    """Whether whatever is asked for its truth in this line has to be true."""
    try:
        (statement,) = ast.parse(line).body
    except (SyntaxError, ValueError):
        return False
    if not isinstance(statement, ast.Assert):
        return False
    other = (ast.Or, ast.Not, ast.In, ast.NotIn, ast.IfExp, ast.Lambda, ast.comprehension)
    return not any(
        isinstance(part, other) or (isinstance(part, ast.Call) and isinstance(part.func, ast.Name))  # any(), max()
        for part in ast.walk(statement.test)
    )


def _context() -> Dict[str, Any]:
    return {
        "torch.no_grad or the like": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "torch.autocast": (
            torch.is_autocast_enabled() and torch.get_autocast_gpu_dtype(),
            torch.is_autocast_cpu_enabled() and torch.get_autocast_cpu_dtype(),
        ),
    }


@contextmanager
def _traceable_factories() -> Iterator[None]:
    originals = {name: getattr(torch, name) for name in _FACTORIES}
    for name, original in originals.items():
        setattr(torch, name, _traceable(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)


def _traceable(factory: Callable[..., Any]) -> Callable[..., Any]:
    def traced(*args: Any, **kwargs: Any) -> Any:
        proxies = proxies_in((args, kwargs))
        if not proxies:
            return factory(*args, **kwargs)
        return proxies[0].tracer.create_proxy("call_function", factory, args, kwargs)

    return traced


def attribute_of(model: nn.Module, name: str) -> Any:
    """An attribute by its dotted name."""
    parent, _, own = name.rpartition(".")
    return getattr(model.get_submodule(parent), own)


def has_hooks(module: nn.Module) -> bool:
    """Whether something else than its forward method runs when it does, or on the way back."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind, None) for kind in kinds)


def _modules_on_the_way(model: nn.Module, layer_name: str) -> List[nn.Module]:
    parts = layer_name.split(".")
    return [model, *(model.get_submodule(".".join(parts[:count])) for count in range(1, len(parts)))]


def _equal(value: Any, default: Any) -> bool:
    return not isinstance(value, Tensor) and type(value) is type(default) and bool(value == default)


def _constant_name(tensor: Tensor) -> str:
    data = tensor.detach().to("cpu").contiguous().reshape(-1)
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} {tensor.device}".encode())
    if data.numel():
        digest.update(data.view(torch.uint8).numpy().tobytes())
    return f"_constant_{digest.hexdigest()[:16]}"
