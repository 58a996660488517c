"""Replacing the forward of one module object."""

from __future__ import annotations

import functools
import types
from typing import Any, Callable

from torch import nn

from sft_edge.script.wrappers import check_eager


def replace_forward(model: nn.Module, forward: Callable[..., Any]) -> None:
    """From now on `model(...)` calls `forward(model, ...)`, which keeps the name, signature and docstring of the old.

    Hooks of the module run as before: only this object's `forward` is another. Compiled, it raises UsageError.
    """
    original = type(model).forward

    @functools.wraps(original)
    def replaced(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        check_eager()
        return forward(self, *args, **kwargs)

    model.forward = types.MethodType(replaced, model)
