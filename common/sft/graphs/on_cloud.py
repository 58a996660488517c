"""What is left on the edge of a module that is on the cloud: its place in the model, and its mode, which the cloud's
follows. Everything else that a script may want of it says where it is."""

from __future__ import annotations

import types
from typing import Any, NoReturn, Set

from torch import nn

from sft.errors import UsageError

_KEPT = (
    "training",
    "_modules",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
"""Attributes by which torch walks through a model, sets modes, and loads and saves it."""


class OnCloudError(UsageError, AttributeError):
    """The latter, so that `hasattr` says no."""


class OnCloud(nn.Module):
    """A module, emptied in place: whoever holds it, or asks for its class, finds it."""

    def __init_subclass__(cls, **_: Any) -> None:
        """Nothing: the script's own classes may do something here."""

    # As torch has them: the module's own may need what it has no more.
    train, eval, _apply = nn.Module.train, nn.Module.eval, nn.Module._apply
    state_dict, load_state_dict = nn.Module.state_dict, nn.Module.load_state_dict
    _save_to_state_dict, _load_from_state_dict = nn.Module._save_to_state_dict, nn.Module._load_from_state_dict
    get_extra_state, set_extra_state = nn.Module.get_extra_state, nn.Module.set_extra_state

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return "on the cloud"

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        self._refuse("does not run here: call the model")

    forward = __call__

    def parameters(self, *_: Any, **__: Any) -> NoReturn:
        """Raises UsageError: what a script would do with them, the cloud would not hear of."""
        self._refuse("its parameters with it: freeze, group or count them before the model is cut")

    named_parameters = buffers = named_buffers = parameters

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("_modules", ()):
            return self._modules[name]
        self._refuse(f"'{name}' with it: read that before the model is cut, or weights of model.state_dict()")

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "training" and not name.startswith("_"):
            self._refuse(f"hears of nothing but train() and eval(): set '{name}' before the model is cut")
        super().__setattr__(name, value)

    def _refuse(self, text: str) -> NoReturn:
        raise OnCloudError(f"this {type(self).__name__} is on the cloud, and {text}")


def leave_modes(model: nn.Module, doomed: Set[int]) -> None:
    """Takes from a model, in place, the parameters, buffers and modules of these ids; of modules their modes stay."""
    for module in list(model.modules()):
        for registered in (module._parameters, module._buffers):
            for name, value in list(registered.items()):
                if id(value) in doomed:
                    delattr(module, name)
        if id(module) in doomed:
            _empty(module)


def _empty(module: Any) -> None:
    kept = {name: value for name, value in vars(module).items() if name in _KEPT}
    kind = type(module)
    module.__class__ = types.new_class(kind.__name__, (OnCloud, kind))
    vars(module).clear()
    vars(module).update(kept, _parameters={}, _buffers={}, _non_persistent_buffers_set=set())
