"""Replacing the forward of one module object."""

from __future__ import annotations

import functools
import types
from typing import Any, Callable

from torch import nn

from sft.graphs.wrappers import never_compiled


def replace_forward(model: nn.Module, forward: Callable[..., Any]) -> None:
    """From now on `model(...)` calls `forward(model, ...)`, which keeps the name, signature and docstring of the old.

    Hooks of the module run as before: only this object's `forward` is another. Compiled, it runs as it is.
    """
    runs = never_compiled(forward)

    @functools.wraps(type(model).forward)
    def replaced(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return runs(self, *args, **kwargs)

    model.forward = types.MethodType(replaced, model)
