"""An engine that is reached through bytes alone, as one in another process or an actor would be."""

from __future__ import annotations

import io
import pickle
from collections import Counter
from collections.abc import Callable
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from sft_cloud.engine import Engine


class EngineElsewhere:
    """Pickles all that goes to an engine, and all that comes back; refuses tensors, modules and functions."""

    def __init__(self, engine: Engine) -> None:
        self.device = crossed(engine.device)
        self.asked: Counter[str] = Counter()
        """How often each method was called."""
        self._engine = engine

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def ask(*arguments: object) -> Any:
            self.asked[name] += 1
            arguments = crossed(arguments)
            try:
                result = getattr(self._engine, name)(*arguments)
            except Exception as error:
                raised = crossed(error)
            else:
                return crossed(result)
            raise raised

        return ask


def crossed(value: Any) -> Any:
    """What arrives of it on the other side. Raises TypeError for what cannot cross."""
    buffer = io.BytesIO()
    _Pickler(buffer).dump(value)
    return pickle.loads(buffer.getvalue())


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: object) -> Any:
        if isinstance(value, (Tensor, nn.Module, FunctionType)):
            raise TypeError(f"a {type(value).__name__} does not cross the seam of an engine")
        return NotImplemented
