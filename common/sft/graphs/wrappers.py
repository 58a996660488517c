"""What may stand around a script's model, or around parts of it, that a cut cannot see through."""

from __future__ import annotations

import logging
import sys
from typing import Any, Callable, Dict, Optional

import torch
from torch import nn

from sft.errors import UsageError

_PART_COMPILED = "give SFTOptimizer the model as it was before a part of it was compiled"

_WRAPPERS: Dict[str, str] = {
    # By the names of their classes: most are of packages that are not here.
    "OptimizedModule": _PART_COMPILED,
    "DataParallel": "copies of a model cannot share a session",
    "DistributedDataParallel": "copies of a model cannot share a session",
    "FullyShardedDataParallel": "a model in shards cannot be cut",
    "DeepSpeedEngine": "a model in shards cannot be cut",
    "RecursiveScriptModule": "a scripted model cannot be cut",
    "TopLevelTracedModule": "a traced model cannot be cut",
}

_QUANTIZED = ("bitsandbytes", "gptqmodel", "auto_gptq", "awq", "torchao", "quanto", "optimum", "hqq", "aqlm", "eetq")
"""Packages whose layers hold numbers that are not trained."""


def check_wrappers(model: nn.Module) -> None:
    """Raises UsageError for a model that is wrapped, or that has a part that is."""
    for name, module in model.named_modules():
        kind = type(module)
        why: Optional[str] = _WRAPPERS.get(kind.__name__)
        if getattr(module, "_compiled_call_impl", None) is not None:  # module.compile()
            why = _PART_COMPILED
        elif kind.__module__.partition(".")[0] in _QUANTIZED:
            why = "quantized layers cannot be trained: load the model in float32"
        if why is not None:
            where = f"'{name}' is" if name else "this model is"
            inside = "" if why == _PART_COMPILED else "; give the model itself"
            raise UsageError(f"{where} of class {kind.__name__}: {why}{inside}")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UsageError(
                f"parameter '{name}' has no memory: it was offloaded, or never loaded; load the model whole, "
                "without device_map"
            )


def uncompiled(model: nn.Module, log: logging.Logger) -> nn.Module:
    """The model inside of one that `torch.compile` has made; any other as it is. What was compiled of it is forgotten.

    A cut model has nothing that compiling would make faster: between its halves is a network.
    """
    inside: Any = model._orig_mod if type(model).__name__ == "OptimizedModule" else model
    if inside is not model or getattr(model, "_compiled_call_impl", None) is not None:
        log.warning("the model is compiled, and runs uncompiled: a cut model's forward crosses the network")
        inside._compiled_call_impl = None
        compiler: Any = sys.modules["torch._dynamo"]  # it is here if something is compiled
        compiler.reset()
    whole: nn.Module = inside
    return whole


def never_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, whatever compiles what calls it."""
    compiler: Any = torch.compiler
    disabled: Callable[..., Any]
    if not hasattr(compiler, "is_compiling"):  # older releases, in which disabling is quick
        disabled = compiler.disable(function)
        return disabled

    def run(*args: Any, **kwargs: Any) -> Any:
        if compiler.is_compiling():  # only then: it imports the compiler, which takes seconds
            return compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return run
