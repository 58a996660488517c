"""What one side runs of a traced module, compiled, and which of the module's parts it needs for that."""

from __future__ import annotations

import hashlib
import linecache
from dataclasses import dataclass
from typing import Any, Callable, Dict, FrozenSet, Mapping, Set

from torch import Tensor, fx, nn

from sft.graphs.trace import attribute_of


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

    def names(self, model: nn.Module) -> Set[str]:
        """Of the parameters and buffers that it needs, by the paths that it takes to them."""
        names = set(self.tensors)
        for name in self.modules:
            module = model.get_submodule(name)
            names |= {f"{name}.{own}" for own, _ in module.named_parameters(remove_duplicate=False)}
            names |= {f"{name}.{own}" for own, _ in module.named_buffers(remove_duplicate=False)}
        return names


def make_half(graphs: Mapping[bool, fx.Graph], layer_name: str, constants: Mapping[str, Tensor]) -> Half:
    """Of graphs by `training`. `constants` are tensors that no module has, by the names that the graphs read."""
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
