"""A cut module's parts, for every set of optional arguments that a call may give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Dict, FrozenSet, List, Mapping, Optional, Tuple

from torch import Tensor, nn

from sft.errors import CutError, UsageError
from sft.graphs.split import Parts
from sft.graphs.trace import Inputs


@dataclass(frozen=True)
class Variants:
    """What each half of a module runs. Made without touching the module."""

    model: nn.Module
    cut_at: str
    """The module inside that is not traced: where the halves part."""
    inputs: Inputs
    variants: Mapping[FrozenSet[str], Parts]
    """By the optional inputs that a call gives; those that cannot be given are missing."""
    numbers: Mapping[FrozenSet[str], int]
    """What `pb.Activation` has for each of `variants`: the number of the first of them with the same net_2."""
    numbered: Mapping[int, Parts]
    """`variants` by their own numbers, which are the same on both sides, whatever is missing there."""
    refused: Mapping[FrozenSet[str], CutError]
    """Why they are."""

    @property
    def dropped(self) -> Tuple[str, ...]:
        """The residual connection around the layer, in words, if there is one."""
        return tuple(dict.fromkeys(what for parts in self.variants.values() for what in parts.dropped))

    def upper_modules(self) -> Dict[str, nn.Module]:
        """Those that net_2 calls, with all in them, by their names in the model, which is whole or cut to net_2."""
        called = sorted({name for parts in self.variants.values() for name in parts.net_2.modules})
        return {name: one for top in called for name, one in self.model.get_submodule(top).named_modules(prefix=top)}

    def run(self, cross: Callable[[Any, int], Tensor], args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> Any:
        """What the model returns for these arguments, with the model cut to net_1.

        `cross` gives what `run_net_2` does for what net_1 gives and the number of a variant. Raises CutError for
        arguments that the model was not cut for, UsageError for modes that it was not traced in.
        """
        given = self.inputs.bind(self.model, args, kwargs)
        optional = frozenset(given).difference(self.inputs.required)
        parts = self.variants.get(optional)
        if parts is None:
            which = f"with {' and '.join(sorted(optional))}" if optional else "without its optional arguments"
            reason = self.refused.get(optional, "that set of arguments was not tried: leave some out")
            raise CutError(f"this {type(self.model).__name__} was not cut for calls {which}: {reason}")
        self._check_modes(parts)
        a, stays = parts.net_1.run(self.model, **given)
        output = parts.tail.run(self.model, cross(a, self.numbers[optional]), *stays)
        return self.inputs.returned(args, kwargs, output)

    def _check_modes(self, parts: Parts) -> None:
        """Of what was traced, which is in the mode of the model."""
        if all(half.code[True] == half.code[False] for half in (parts.net_1, parts.net_2, parts.tail)):
            return
        names = self.cut_at.split(".")
        for name in (".".join(names[:count]) for count in range(1, len(names))):
            if self.model.get_submodule(name).training is not self.model.training:
                raise UsageError(
                    f"'{name}', in which the model is cut, is not in its mode, and decides something by that: call "
                    "train() or eval() of the whole model, or of modules that do not contain what is cut"
                )

    def run_net_2(self, a: Any, variant: Optional[int] = None) -> Any:
        """One tensor as a rule, of what crosses, with the model cut to net_2; of the first variant that there is,
        unless one is named."""
        parts = next(iter(self.variants.values())) if variant is None else self.numbered[variant]
        return parts.net_2.run(self.model, a)

    def has_variant(self, variant: int) -> bool:
        """Whether the model can be cut for calls of it."""
        return variant in self.numbered


def find_variants(
    model: nn.Module, cut_at: str, inputs: Inputs, split: Callable[[FrozenSet[str], List[Parts]], Parts]
) -> Variants:
    """Splits for every set of optional inputs; `split` is told the parts that there are so far.

    Raises CutError where none can be split.
    """
    parts: Dict[FrozenSet[str], Parts] = {}
    numbers: Dict[FrozenSet[str], int] = {}
    numbered: Dict[int, Parts] = {}
    refused: Dict[FrozenSet[str], CutError] = {}
    for number, given in enumerate(inputs.variants()):
        try:
            one = split(given, list(parts.values()))
        except CutError as error:
            refused[given] = error
        else:
            parts[given] = numbered[number] = one
            numbers[given] = next(own for own, other in numbered.items() if one.net_2.same_as(other.net_2))
    if not parts:
        raise next(iter(refused.values()))
    return Variants(model, cut_at, inputs, parts, numbers, numbered, refused)
