"""What forward methods keep in attributes of their modules while they are traced."""

from __future__ import annotations

from typing import Any, Dict, List, Sequence

from torch import Tensor, fx, nn

from sft.errors import CutError
from sft.graphs.nodes import is_of_sizes

_OF_TORCH = frozenset(vars(nn.Module()))
"""Attributes that every module has, such as its parameters and its mode."""


class Attributes:
    """Of modules, as they are before the forward methods of these are run with stand-ins for tensors."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._before = [dict(vars(module)) for module in modules]
        own = [x for before in self._before for name, x in before.items() if name not in _OF_TORCH]
        self._lists = [(one, list(one)) for one in own if isinstance(one, list)]
        self._dicts = [(one, dict(one)) for one in own if isinstance(one, dict)]

    def forget(self) -> None:
        """Takes back what was kept, such as a mask for the next call, which has to find what this one has found; what
        is new and no stand-in stays.

        Raises CutError for what is computed from more than sizes, and for a number that changed: halves keep nothing.
        """
        for module, before in zip(self._modules, self._before):
            for name in vars(module).keys() - _OF_TORCH:
                value, was = vars(module)[name], before.get(name)
                kept = proxies_in(value)
                if not all(is_of_sizes(proxy.node) for proxy in kept) or _is_another_number(value, was):
                    raise CutError(
                        f"the forward method of {type(module).__name__} keeps what it computes in its attribute "
                        f"'{name}', which a model that is cut would lose: return it, or keep it in a module that does "
                        "not contain the layer"
                    )
                if kept and value is not was:
                    del vars(module)[name]
        self._put_back()

    def made(self, module_index: int = 0) -> Dict[str, Any]:
        """What is new in a module."""
        before = self._before[module_index]
        return {name: value for name, value in vars(self._modules[module_index]).items() if name not in before}

    def restore(self) -> None:
        """Leaves the modules as they were."""
        for index, module in enumerate(self._modules):
            for name in self.made(index):
                del vars(module)[name]
        self._put_back()

    def _put_back(self) -> None:
        for module, before in zip(self._modules, self._before):
            vars(module).update(before)
        for some, contents in self._lists:
            some[:] = contents
        for by_key, items in self._dicts:
            by_key.clear()
            by_key.update(items)


def _is_another_number(value: Any, was: Any) -> bool:
    """Than an attribute was: one that counts or decays. A tensor may be made anew for other sizes, as masks are."""
    if value is was or not isinstance(was, (int, float, Tensor)):
        return False
    if isinstance(value, fx.Proxy):
        return not isinstance(was, Tensor)
    if isinstance(value, Tensor) and isinstance(was, Tensor):
        return not (value.dtype == was.dtype and value.device == was.device and value.equal(was))
    return isinstance(value, (int, float, Tensor)) and (type(value) is not type(was) or bool(value != was))


def proxies_in(value: Any) -> List[fx.Proxy]:
    """The stand-ins for tensors in a value."""
    proxies: List[fx.Proxy] = []
    fx.node.map_aggregate(value, lambda one: proxies.append(one) if isinstance(one, fx.Proxy) else None)
    return proxies
