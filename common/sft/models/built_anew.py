"""What the cloud's half of a model object would not have: it is built from the configuration, and gets weights alone.

What else a script has done to modules of the upper half is looked for here, so that it is refused and not lost. What it
has done to their classes is not seen: those that describe the model have it, too.
"""

from __future__ import annotations

import re
from typing import Any, Dict, Iterator, List, Optional, Tuple, Type

from torch import nn

from sft.errors import UsageError
from sft.models.cut import Cut, build_whole
from sft.models.families.catalogue import family_of
from sft.models.families.family import Family

BY_PEFT = re.compile(r"\.(lora_[^.]*|original_module)\.")
"""In the names of parameters that peft has added to a model."""

_LIBRARY = "transformers."
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOKS_OF_PARAMETERS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def whole_name(name: str) -> str:
    """A parameter's name in the whole model, from that in a library model, which peft may have changed."""
    name = re.sub(r"^base_model\.model\.", "", name)
    return re.sub(r"\.(base_layer|modules_to_save\.default)\.", ".", name)


def check_built_anew(model: Any, head: str, cut: Cut, decomposed: Optional[Cut] = None) -> None:
    """Raises UsageError for what modules have beside weights that are the cloud's, or that end in its half.

    `model`: the library's, with or without peft's adapters, its parameters as its configuration describes them;
    `decomposed`: for which cut that was done to it before, if it was.
    """
    family = family_of(model.config)
    described = dict(build_whole(model.config, head, decomposed).model.named_modules())
    for name, module in _of_cloud(model, family, cut):
        where = f"'{name}' of the {type(model).__name__}" if name else f"this {type(model).__name__}"
        own = list(module.parameters(recurse=False))
        if any(map(_is_the_scripts, _hooks(module, _HOOKS))) or any(_hooks(p, _HOOKS_OF_PARAMETERS) for p in own):
            raise UsageError(
                f"{where} has hooks, which the cloud's would not have: remove them, or hook what is below the cut"
            )
        if not name or type(module).__module__.startswith("peft."):
            continue
        if "forward" in vars(module):
            raise UsageError(
                f"{where} has a forward of its own, which the cloud's would not have: give the library's, uncompiled"
            )
        built = described.get(whole_name(f"{name}.")[:-1], module)
        if not _are_alike(type(built), type(module)):
            raise UsageError(
                f"{where} is a {type(module).__name__}, and model.config describes a {type(built).__name__}: the cloud "
                "builds it from that"
            )
        _check_dropout(model, where, module, built)
    _check_ties(model, described, family, cut)


def _are_alike(built: Type[Any], own: Type[Any]) -> bool:
    """Also where the library has a class for each way to compute attention, and the script has chosen another since."""
    related = issubclass(built, own) or issubclass(own, built)
    return built is own or (
        related and built.__module__ == own.__module__ and own.__module__.startswith("transformers.")
    )


def _check_dropout(model: Any, where: str, module: nn.Module, built: nn.Module) -> None:
    """Of a module, and of one that keeps its own as a number."""
    own = {"p": module.p} if isinstance(module, nn.Dropout) else {n: x for n, x in vars(module).items() if "drop" in n}
    for name, value in own.items():
        described = getattr(built, name, value)
        if isinstance(value, (int, float)) and value != described:
            raise UsageError(
                f"{where} has {name}={value}, and by model.config the cloud's has {described}: give both the same, or "
                "make the model of a config that says it"
            )
    if isinstance(module, nn.Dropout) and module.p and model.training and not module.training:
        raise UsageError(
            f"{where} is in eval() mode, and the cloud's follows the model: call train() or eval() of the model, or "
            "make it of a config with a dropout of 0"
        )


def _of_cloud(model: Any, family: Family, cut: Cut) -> Iterator[Tuple[str, Any]]:
    """All of the cloud's modules, and those that contain the layer that is cut, but for the model itself."""
    base = next(name for name, module in model.named_modules() if module is model.base_model)
    inside = f"{base}." if base else ""
    containers = {f"{inside}{family.blocks}".rpartition(".")[0], f"{inside}{family.blocks}", base}
    first = cut.split_layer - (1 if cut.mode == "sft" else 0)  # counted from 0: the first that is not the edge's alone
    for name, module in model.named_modules(remove_duplicate=False):
        own = name[len(inside) :]
        if not name.startswith(inside) and name not in containers:
            is_clouds = name != ""  # a head; hooks of the model itself are called around both halves
        elif own.startswith(f"{family.blocks}."):
            index, _, within = own[len(family.blocks) + 1 :].partition(".")
            is_clouds = int(index) > first or (int(index) == first and _is_after_cut(within, family, cut))
        else:
            is_clouds = name in containers or own.partition(".")[0] == "pooler" or own == family.final_norm
        if is_clouds and not BY_PEFT.search(f".{name}."):
            yield name, module


def _is_after_cut(name: str, family: Family, cut: Cut) -> bool:
    """In the block that is cut: of what comes before W, all is the edge's."""
    after = (family.ffn_out, family.ffn_dropout, family.ffn_norm)
    return cut.mode == "sl" or name in after or f"{family.ffn_out}.".startswith(f"{name}." if name else "")


def _hooks(of: Any, kinds: Tuple[str, ...]) -> List[Any]:
    return [hook for kind in kinds for hook in (getattr(of, kind, None) or {}).values()]


def _is_the_scripts(hook: Any) -> bool:
    """Not the library's own, which wait for somebody who wants hidden states."""
    return not str(getattr(hook, "__module__", "")).startswith(_LIBRARY)


def _check_ties(model: Any, described: Dict[str, nn.Module], family: Family, cut: Cut) -> None:
    """Raises UsageError where parameters are one that the library has apart: the halves would train them apart."""
    of_cloud = {whole_name(f"{name}.")[:-1] for name, _ in _of_cloud(model, family, cut)}
    names: Dict[int, List[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not BY_PEFT.search(f".{name}"):
            names.setdefault(id(parameter), []).append(whole_name(name))
    for group in names.values():
        modules = [(described[one.rpartition(".")[0]], one.rpartition(".")[2]) for one in group]
        apart = {id(module.get_parameter(own)) for module, own in modules}
        if len(apart) > 1 and any(one.rpartition(".")[0] in of_cloud for one in group):
            raise UsageError(
                f"'{group[0]}' and '{group[1]}' are one parameter, which model.config does not say: the cloud builds "
                "each by itself, so give each its own"
            )
