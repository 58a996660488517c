"""Optimizers of other packages than torch that both sides can make: a fixed table.

What comes over the wire is looked up in it and never imported: a name that is not in it is no optimizer. The packages
are needed on both sides, and nothing here needs them.
"""

from __future__ import annotations

import importlib
import sys
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Tuple, Type

import torch

from sft.errors import UsageError


class Listed(NamedTuple):
    """Where an optimizer is."""

    package: str
    """What pip installs."""
    module: str
    class_name: str
    own: Tuple[str, ...] = ()
    """Attributes with settings that are in no parameter group, and do not travel: they have to be as the class has
    them by itself."""


LISTED: Dict[str, Listed] = {
    "transformers.Adafactor": Listed("transformers", "transformers.optimization", "Adafactor"),
    "lion_pytorch.Lion": Listed("lion-pytorch", "lion_pytorch", "Lion", own=("decoupled_wd",)),
    **{
        f"schedulefree.{name}": Listed("schedulefree", "schedulefree", name)
        for name in ("AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree")
    },
    **{
        f"bitsandbytes.{kind}{bits}": Listed("bitsandbytes", "bitsandbytes.optim", f"{kind}{bits}", own=("args",))
        for kind in ("Adam", "AdamW", "Lion")
        for bits in ("", "8bit")
    },
}
"""By the names that travel."""

ALLOWED = (
    "torch.optim's, transformers' Adafactor, lion_pytorch's Lion, schedulefree's AdamWScheduleFree, RAdamScheduleFree "
    "and SGDScheduleFree, and bitsandbytes' Adam, AdamW and Lion"
)
"""For people."""

_COUNTED = ("k", "lr_max", "train_mode", "weight_sum")
"""What a schedule-free optimizer keeps in its groups, and not for each parameter; `scheduled_lr` is for logs alone."""


def listed_class(name: str) -> Optional[Type[torch.optim.Optimizer]]:
    """The class that the table has under a name; None where it has none. Raises UsageError where it is not here."""
    entry = LISTED.get(name)
    if entry is None:
        return None
    try:
        found: Type[torch.optim.Optimizer] = getattr(importlib.import_module(entry.module), entry.class_name)
    except (ImportError, AttributeError, OSError, RuntimeError, SystemExit) as error:  # or what it needs
        raise UsageError(
            f"there is no {name} here: whoever runs this has to `pip install {entry.package}`; or use AdamW"
        ) from error
    return found


def check_arguments(kind: Type[torch.optim.Optimizer], arguments: Mapping[str, Any]) -> None:
    """Raises UsageError for arguments that are no settings of a parameter group, or of another type than these.

    The rest of what these constructors take may do anything: `kind` is made without arguments to look.
    """
    defaults = kind([torch.zeros(1, requires_grad=True)]).defaults  # type: ignore[call-arg]
    for name, value in arguments.items():
        if name not in defaults:
            raise UsageError(f"optimizer {kind.__name__}: it has no setting '{name[:80]}' that travels")
        if not _is_like(value, defaults[name]):
            raise UsageError(f"optimizer {kind.__name__}: {name} is by default {defaults[name]}, unlike {value!r:.80}")


def _is_like(value: Any, default: Any) -> bool:
    if isinstance(default, (tuple, list)):
        return isinstance(value, tuple) and len(value) == len(default) and all(map(_is_like, value, default))
    if isinstance(default, (bool, str)):
        return type(value) is type(default)
    return isinstance(value, (int, float)) and not isinstance(value, bool)  # which may be None by default


def name_of(optimizer: torch.optim.Optimizer) -> str:
    """What an optimizer is called on the wire: a class of torch.optim, or a name of the table.

    Raises UsageError for any other.
    """
    kind = type(optimizer)
    if getattr(torch.optim, kind.__name__, None) is kind:
        return str(kind.__name__)
    if getattr(sys.modules.get("bitsandbytes.optim"), kind.__name__, None) is kind:
        # As a Trainer makes them, with arguments; and what the package calls 32bit: the same as other classes of its.
        # Paged ones have the same numbers, and a process never gets the pages back: they are the edge's alone.
        bits = getattr(getattr(optimizer, "args", None), "optim_bits", None)
        base = kind.__name__.replace("Paged", "").replace("32bit", "").replace("8bit", "")
        name = f"bitsandbytes.{base}{'8bit' * (bits == 8)}"
        if name in LISTED:
            return name
    for name, entry in LISTED.items():
        if getattr(sys.modules.get(entry.module), entry.class_name, None) is kind:
            return name
    raise UsageError(
        f"the cloud makes an optimizer of the same class, and {kind.__module__}.{kind.__qualname__} is none that it "
        f"knows: use one of {ALLOWED}"
    )


@contextmanager
def without_overrides() -> Iterator[None]:
    """What this process has told bitsandbytes of single parameters is not for those that are stepped meanwhile: it
    goes by their place in the groups, and by `id`."""
    module = sys.modules.get("bitsandbytes.optim")
    if module is None:
        yield
        return
    manager: Any = module.GlobalOptimManager.get_instance()
    kept = manager.index2config, manager.pid2config
    manager.index2config, manager.pid2config = {}, {}
    try:
        yield
    finally:
        manager.index2config, manager.pid2config = kept


def check_own(optimizer: torch.optim.Optimizer, twin: torch.optim.Optimizer, name: str) -> None:
    """Raises UsageError where an optimizer has settings that a `twin`, made of what travels, has not."""
    for attribute in LISTED[name].own if name in LISTED else ():
        mine, others = (getattr(one, attribute, None) for one in (optimizer, twin))
        if getattr(mine, "__dict__", mine) != getattr(others, "__dict__", others):
            raise UsageError(
                f"{name} keeps settings outside of its parameter groups ('{attribute}'), which the cloud's would not "
                "have: make it with nothing but lr, betas, eps and weight_decay"
            )


def has_modes(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is schedule-free: weights are at another point for evaluation than for training."""
    return "train_mode" in optimizer.defaults


def name_has_modes(name: str) -> bool:
    """As `has_modes`, of one that goes by this name on the wire."""
    return name in LISTED and LISTED[name].package == "schedulefree"


def is_training(optimizer: torch.optim.Optimizer) -> bool:
    """Whether weights are where it can take a step."""
    return not has_modes(optimizer) or bool(optimizer.param_groups[0].get("train_mode"))


def set_training(optimizer: Any, training: bool) -> None:
    """Moves the weights of a schedule-free optimizer to where it trains, or to its average. Else does nothing."""
    if has_modes(optimizer):
        (optimizer.train if training else optimizer.eval)()


def counted(optimizer: torch.optim.Optimizer) -> List[Dict[str, Any]]:
    """What each group counts, which belongs to the optimizer's state; nothing where none does."""
    if not has_modes(optimizer):
        return []
    return [{name: group[name] for name in _COUNTED if name in group} for group in optimizer.param_groups]


def check_counted(optimizer: torch.optim.Optimizer, counts: List[Mapping[str, Any]]) -> None:
    """Raises UsageError when `counts` holds something else than `counted` gives."""
    own = counted(optimizer)
    if [sorted(group) for group in own] != [sorted(group) for group in counts]:
        raise UsageError("what the optimizer's groups count is not of an optimizer like this one")
