"""A script with role="cloud", hosted in a thread of this process behind real gRPC."""

from __future__ import annotations

import queue
import threading
from typing import Any

import torch
from torch import nn

from sft import SFTOptimizer

_SECONDS = 60.0


class ScriptCloud:
    """Serves one edge; a context manager that ends when the edge has ended."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> None:
        self.model = model
        self.optimizer = SFTOptimizer(optimizer, role="cloud", model=model, **options)
        self.error: BaseException | None = None
        self._ready: queue.Queue[str | BaseException] = queue.Queue()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> ScriptCloud:
        self._thread.start()
        first = self._ready.get(timeout=_SECONDS)
        if isinstance(first, BaseException):
            raise first
        self.address = first
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self.join()

    def join(self) -> None:
        """Until `serve` has returned, or raised `error`."""
        self._thread.join(_SECONDS)
        assert not self._thread.is_alive(), "the cloud still waits"

    def _serve(self) -> None:
        try:
            self.optimizer.serve("127.0.0.1:0", self._ready.put)
        except BaseException as error:
            self.error = error
            self._ready.put(error)
