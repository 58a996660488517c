"""A script with role="cloud", hosted in a thread of this process behind real gRPC."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import torch
from support.script import adamw
from torch import nn

from sft import SFTOptimizer

RANK, AT = 4, "3"

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


def make_model(seed: int = 0, width: int = 16) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU(),
        nn.Linear(width, 3),
    )  # fmt: skip


def host(model: nn.Module | None = None, make: Callable[[Any], Any] = adamw, **options: Any) -> ScriptCloud:
    model = make_model() if model is None else model
    return ScriptCloud(model, make(model), **{"split_at": AT, "split_rank": RANK, **options})


def wrap(model: nn.Module, cloud: ScriptCloud, make: Callable[[Any], Any] = adamw, **options: Any) -> SFTOptimizer:
    values = {"split_at": AT, "split_rank": RANK, "server": cloud.address, **options}
    return SFTOptimizer(make(model), role="edge", model=model, **values)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    draw = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        x, y = torch.randn(7, 6, generator=draw), torch.randint(0, 3, (7,), generator=draw)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
