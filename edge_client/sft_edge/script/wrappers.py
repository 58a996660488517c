"""What may stand around a script's model, or around parts of it, that a cut cannot see through."""

from __future__ import annotations

import sys
from typing import Any, Dict, Optional

import torch
from torch import nn

from sft.errors import UsageError

NOT_COMPILED = (
    "a model that is cut cannot be compiled: give SFTOptimizer the model as it was before torch.compile, and leave out "
    "torch_compile"
)

_WRAPPERS: Dict[str, str] = {
    # By the names of their classes: most are of packages that are not here.
    "OptimizedModule": NOT_COMPILED,
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
            why = NOT_COMPILED
        elif kind.__module__.partition(".")[0] in _QUANTIZED:
            why = "quantized layers cannot be trained: load the model in float32"
        if why is not None:
            where = f"'{name}' is" if name else "this model is"
            inside = "" if why == NOT_COMPILED else "; give the model itself"
            raise UsageError(f"{where} of class {kind.__name__}: {why}{inside}")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UsageError(
                f"parameter '{name}' has no memory: it was offloaded, or never loaded; load the model whole, "
                "without device_map"
            )


def check_eager() -> None:
    """Raises UsageError where a cut model's forward is being compiled, by whatever has wrapped it since."""
    compiler: Any = torch.compiler
    # Older releases say it elsewhere, which takes seconds to import, and is there when something is being compiled.
    is_compiling = getattr(compiler, "is_compiling", None) or getattr(
        sys.modules.get("torch._dynamo"), "is_compiling", None
    )
    if is_compiling is not None and is_compiling():
        compiler.disable(_refuse)()  # a compiler would take the error of a traced call for a reason to go on uncompiled


def _refuse() -> None:
    raise UsageError(NOT_COMPILED)
