"""What is left on the edge of a module that is on the cloud: its place in the model, and its mode, which the cloud's
follows. Who counts parameters finds stand-ins without memory, as Lightning's summary of a model does, whose hooks are
never called; everything else that a script may want of it says where it is."""

from __future__ import annotations

from typing import Any, Dict, Iterator, NoReturn, Set, Tuple

from torch import nn

from sft.models.gone import Gone, OnCloudError, StandIn

_KEPT = ("training", "_modules")
"""Attributes by which torch walks through a model, and sets modes."""

_STAND_INS = "_stand_ins"


class OnCloud(nn.Module):
    """A module, emptied in place: whoever holds it, or asks for its class, finds it."""

    def __init_subclass__(cls, **_: Any) -> None:
        """Nothing: the script's own classes may do something here."""

    # As torch has them: the module's own may need what it has no more.
    train, eval, _apply = nn.Module.train, nn.Module.eval, nn.Module._apply
    _save_to_state_dict, _load_from_state_dict = nn.Module._save_to_state_dict, nn.Module._load_from_state_dict
    get_extra_state, set_extra_state = nn.Module.get_extra_state, nn.Module.set_extra_state

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return "on the cloud"

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        self._refuse("does not run here: call the model")

    forward = __call__

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Of the whole model, which has this one's weights of the cloud; raises UsageError where it is asked alone."""
        if not args and kwargs.get("destination") is None:
            self._refuse("its weights with it: they are in model.state_dict()")
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, *_: Any, **__: Any) -> NoReturn:
        """Raises UsageError."""
        self._refuse("its weights with it: load them with model.load_state_dict()")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        self._refuse("can be neither copied nor pickled")

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[Tuple[str, nn.Parameter]]:
        """Stand-ins for those that it had; the whole model has none of them."""
        del remove_duplicate
        for name, module in self.named_modules(prefix=prefix) if recurse else [(prefix, self)]:
            for own, stand_in in vars(module).get(_STAND_INS, {}).items():
                yield f"{name}.{own}" if name else own, stand_in

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """As above."""
        return (stand_in for _, stand_in in self.named_parameters(recurse=recurse))

    buffers, named_buffers = nn.Module.buffers, nn.Module.named_buffers
    requires_grad_, zero_grad = nn.Module.requires_grad_, nn.Module.zero_grad

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


def stand_ins(model: nn.Module) -> Dict[str, nn.Parameter]:
    """Of all that the model has lost, by name. Whoever freezes or trains them means parameters of the cloud."""
    return {
        name: stand_in
        for place, module in model.named_modules()
        if isinstance(module, (OnCloud, Gone))
        for name, stand_in in module.named_parameters(place, recurse=False)
    }


def leave_modes(model: nn.Module, doomed: Set[int]) -> None:
    """Takes from a model, in place, the parameters, buffers and modules of these ids; of modules their modes stay."""
    for module in list(model.modules()):
        had = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
        for registered in (module._parameters, module._buffers):
            for name, value in list(registered.items()):
                if id(value) in doomed:
                    delattr(module, name)
        if id(module) in doomed:
            _empty(module, had)


def _empty(module: Any, had: Dict[str, nn.Parameter]) -> None:
    kept = {name: value for name, value in vars(module).items() if name in _KEPT}
    without_memory = {name: StandIn.of(parameter) for name, parameter in had.items()}
    module.__class__ = _emptied(type(module))
    vars(module).clear()
    vars(module).update({**vars(nn.Module()), **kept, _STAND_INS: without_memory})


def _emptied(kind: Any) -> Any:
    """A class that is, for `isinstance` and for `==`, `kind`. The script's own metaclass is not asked."""
    likeness = {"__eq__": lambda own, other: own is other or other is kind, "__hash__": lambda own: hash(kind)}
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type.__new__(type("_Likeness", (type(kind),), likeness), kind.__name__, (OnCloud, kind), names)
