"""Removing the residual around the split layer (§III-A of the paper), without copying the library's forward."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class _Absorbing:
    """A tensor to which nothing can be added: the block's `ffn(x) + residual` gives `ffn(x)`."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __add__(self, residual: Any) -> Tensor:
        return self.x

    __radd__ = __add__


class WithoutResidual(nn.Module):
    """Stands where the dropout before the residual addition was, and makes that addition a no-op.

    The residual would need the layer's full-width input on the cloud, which is what the decomposition avoids sending.
    """

    def __init__(self, dropout: nn.Module) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, x: Tensor) -> Any:
        return _Absorbing(self.dropout(x))
