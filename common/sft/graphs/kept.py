"""What of a module stays when it is cut in place."""

from __future__ import annotations

from typing import Dict, Iterable, List, Set

from torch import Tensor, nn

from sft.graphs.half import Half


def stored_names(model: nn.Module, halves: List[Half]) -> Set[str]:
    """Of the parameters that halves need, and of the buffers, if `state_dict` has them."""
    needed = owned(model, halves)
    stored = set(model.state_dict(keep_vars=True))
    tensors: Dict[str, Tensor] = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    return {name for name, tensor in tensors.items() if id(tensor) in needed and name in stored}


def other_names(model: nn.Module, names: Iterable[str]) -> Dict[str, str]:
    """What `state_dict` has these tensors by, too: further name -> the one that is given here."""
    stored = model.state_dict(keep_vars=True)
    given = {id(stored[name]): name for name in sorted(names)}
    return {other: given[id(x)] for other, x in stored.items() if given.get(id(x), other) != other}


def tensors_named(model: nn.Module, names: Iterable[str]) -> Dict[str, Tensor]:
    """Parameters and buffers, which are the model's own."""
    tensors: Dict[str, Tensor] = dict(model.named_buffers())
    tensors.update(model.named_parameters(remove_duplicate=False))
    return {name: tensors[name] for name in sorted(names)}


def owned(model: nn.Module, halves: List[Half]) -> Set[int]:
    """Ids of the parameters and buffers that halves need, and of the modules that hold them."""
    return set().union(*(half.owned(model) for half in halves))


def remove(module: nn.Module, doomed: Set[int]) -> None:
    """Removes modules, parameters and buffers from wherever they are registered."""
    for registered in (module._modules, module._parameters, module._buffers):
        for name, value in list(registered.items()):
            if id(value) in doomed:
                delattr(module, name)
    for child in module.children():
        remove(child, doomed)


def keep(module: nn.Module, kept: Set[int]) -> bool:
    """Removes all but these; returns whether anything is left."""
    for registered in (module._parameters, module._buffers):
        for name, value in list(registered.items()):
            if id(value) not in kept:
                delattr(module, name)
    for name, child in list(module._modules.items()):
        if child is None or not (id(child) in kept or keep(child, kept)):
            delattr(module, name)
    return any((module._modules, module._parameters, module._buffers))


def add_constants(model: nn.Module, halves: Iterable[Half]) -> None:
    """Gives a model the tensors that its halves read and that no module has."""
    for name, tensor in {name: tensor for half in halves for name, tensor in half.constants.items()}.items():
        model.register_buffer(name, tensor, persistent=False)  # so that they follow the model to its device
