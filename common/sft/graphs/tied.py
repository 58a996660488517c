"""Parameters that both halves of a cut need under different names, such as an embedding's and a head's: tied weights.

The cut unties them: net_2's becomes a parameter of its own, which begins as a copy.
"""

from __future__ import annotations

from typing import Dict, Iterable, List, NamedTuple, Tuple

from torch import Tensor, nn

from sft.errors import CutError
from sft.graphs.split import Parts


class Tied(NamedTuple):
    """One parameter of the whole model."""

    names: Tuple[str, ...]
    """All that it has, in the order of `named_parameters`."""

    upper: Tuple[str, ...]
    """Those of them that net_2 takes it by."""

    def __str__(self) -> str:
        """What becomes of it."""
        lower = [name for name in self.names if name not in self.upper]
        return f"{in_words(self.upper)} is trained apart from {in_words(lower)}, of which it begins as a copy"


def find_tied(model: nn.Module, variants: List[Parts]) -> List[Tied]:
    """What net_1 and net_2 share. Raises CutError for a buffer, and for what both take by the same name."""
    lower = {name for parts in variants for half in (parts.net_1, parts.tail) for name in half.names(model)}
    upper = {name for parts in variants for name in parts.net_2.names(model)}
    tied = []
    for names in names_of_each(model.named_parameters(remove_duplicate=False)):
        below, above = [[name for name in names if name in half] for half in (lower, upper)]
        if below and above:
            _check(not set(below) & set(above), "parameter", [*dict.fromkeys([*below, *above])])
            tied.append(Tied(tuple(names), tuple(above)))
    for names in names_of_each(model.named_buffers(remove_duplicate=False)):
        below, above = [[name for name in names if name in half] for half in (lower, upper)]
        _check(not (below and above), "buffer", [*dict.fromkeys([*below, *above])])
    return tied


def untie(model: nn.Module, tied: Iterable[Tied]) -> None:
    """Gives net_2 parameters of its own, in place."""
    for one in tied:
        shared = model.get_parameter(one.upper[0])
        own = nn.Parameter(shared.detach().clone(), shared.requires_grad)
        for name in one.upper:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, own)


def in_words(names: Iterable[str]) -> str:
    """Quoted, and as a list if there are several; of at least one."""
    *others, last = [f"'{name}'" for name in names]
    return f"{', '.join(others)} and {last}" if others else last


def names_of_each(named: Iterable[Tuple[str, Tensor]]) -> List[List[str]]:
    """All names of each tensor."""
    names: Dict[int, List[str]] = {}
    for name, tensor in named:
        names.setdefault(id(tensor), []).append(name)
    return list(names.values())


def _check(is_apart: bool, kind: str, names: List[str]) -> None:
    if not is_apart:
        raise CutError(
            f"both halves need the {kind} {in_words(names)}: give each its own copy, or cut where only one needs it"
        )
