"""What single nodes of a traced graph do, and which of them belong together."""

from __future__ import annotations

import operator
from typing import Callable, List, Optional, Set

import torch
from torch import fx

_ADDITIONS = (operator.add, operator.iadd, torch.add)
_IN_PLACE = (
    operator.setitem, operator.iadd, operator.iand, operator.ifloordiv, operator.ilshift, operator.imatmul,
    operator.imod, operator.imul, operator.ior, operator.ipow, operator.irshift, operator.isub, operator.itruediv,
    operator.ixor,
)  # fmt: skip

_FRESH = (
    "add", "bmm", "cat", "clone", "div", "floordiv", "matmul", "mean", "mod", "mul", "pow", "stack", "sub", "sum",
    "truediv", "where",
)  # fmt: skip
"""What gives memory of its own, as losses do."""

_DRAWS = ("bernoulli", "dropout", "exponential", "multinomial", "normal", "poisson", "rand", "uniform")
"""In the names of functions that give something else each time."""

_SIZES = ("dim", "numel", "size", "stride")


def needed(ends: Set[fx.Node], nodes: List[fx.Node], needs: Callable[[fx.Node], List[fx.Node]]) -> Set[fx.Node]:
    """What must run for `ends`, of `nodes`: what they are computed from, and what changes that in place."""
    wanted: Set[fx.Node] = set()
    waiting = list(ends)
    while waiting:
        while waiting:
            node = waiting.pop()
            if node not in wanted:
                wanted.add(node)
                waiting.extend(needs(node))
        waiting = [node for node in nodes if node not in wanted and changes(node) in wanted]
    return wanted


def changes(node: fx.Node) -> Optional[fx.Node]:
    """What a node changes in place."""
    if not is_in_place(node):
        return None
    changed = node.kwargs.get("out", node.args[0] if node.args else node.kwargs.get("input"))
    return changed if isinstance(changed, fx.Node) else None


def is_in_place(node: fx.Node) -> bool:
    """Whether a node changes what it is given, as far as its name tells."""
    if node.op not in ("call_method", "call_function"):
        return False
    name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
    by_name = name.endswith("_") and not name.endswith("__")
    return by_name or node.target in _IN_PLACE or bool(node.kwargs.get("inplace")) or "out" in node.kwargs


def is_fresh(name: str) -> bool:
    """Whether what a function or module of this name gives shares no memory with what it is given."""
    return name in _FRESH or name.lower().endswith(("loss", "cross_entropy"))


def is_addition(node: fx.Node) -> bool:
    """Of two values as they are."""
    is_addition = node.op == "call_function" and node.target in _ADDITIONS
    is_addition |= node.op == "call_method" and node.target in ("add", "add_")
    return is_addition and len(node.args) == 2 and len(node.all_input_nodes) == 2 and not node.kwargs


def is_size(node: fx.Node) -> bool:
    """Whether a value is a size, or another attribute, of a tensor."""
    if node.op == "call_method":
        return node.target in _SIZES
    if node.target is operator.getitem:
        return is_size(node.all_input_nodes[0])
    return node.target is getattr


def is_of_sizes(node: fx.Node) -> bool:
    """Whether a value is the same for all tensors of the same sizes."""
    if node.target is getattr:
        return node.args[1] in ("device", "dtype", "ndim", "shape")
    draws = any(part in function_of(node) for part in _DRAWS)
    if node.op not in ("call_function", "call_method") or draws:
        return False
    return is_size(node) or all(map(is_of_sizes, node.all_input_nodes))


def asserts(node: fx.Node) -> bool:
    """Whether a node is there for what it raises."""
    return node.op == "call_function" and node.target is torch._assert


def ancestors(node: fx.Node) -> Set[fx.Node]:
    """What a value is computed from, itself included."""
    return needed({node}, [], lambda one: one.all_input_nodes)


def where(node: fx.Node) -> str:
    """A place of the model, in words."""
    return f"'{node.target}'" if node.op == "call_module" else f"'{node.name}' ({function_of(node)})"


def describe(node: fx.Node) -> str:
    """A value, in words."""
    if node.op == "placeholder":
        return f"the input '{node.target}'"
    if node.op == "call_module":
        return f"the output of '{node.target}'"
    return f"'{node.name}' ({function_of(node)})"


def function_of(node: fx.Node) -> str:
    """What a node calls."""
    if node.op == "call_method":
        return f"Tensor.{node.target}"
    return str(getattr(node.target, "__name__", node.target))
