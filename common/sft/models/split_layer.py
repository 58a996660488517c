"""What stands where W was: FFN-1 to FFN-3, the end of net_1, and the residual addition that the library's block does.

The library's own forward goes on after W, to `x + residual` or `residual + x`, perhaps through dropout first. What it
gets to add is not a tensor but `AwaitingResidual`, which decides what the sum is; and where net_1 ends, `Reached` takes
the activation out of the library's forward, whatever it would have done with a tensor of width R.

Shape suffixes: B batch, S sequence, D model width, F the FFN's inner width, R split rank.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, Optional, Sequence

import torch
from torch import Tensor, nn

from sft.errors import UsageError

RESIDUALS = ("none", "low-rank", "full")


_ENDS_HERE = "this part of the model ends at the layer that is cut, and the rest is on the cloud: call the model itself"


class Reached(UsageError):
    """The place in the library's forward where one of ours ends; caught by `Net1.forward`.

    Who runs that forward otherwise, such as `model.bert(...)` of a script's cut model, gets it as the error it then is.
    """

    x: Tensor
    """(B, S, width), or (B * S, width) where the library's block has flattened it."""

    def __init__(self, text: str = _ENDS_HERE, x: Optional[Tensor] = None) -> None:
        super().__init__(text)
        if x is not None:
            self.x = x


class AwaitingResidual:
    """The output of the split layer on its way to the residual addition; dropout on that way leaves it alone."""

    def __init__(self, add: Callable[[Tensor], Tensor]) -> None:
        """`add` gives the block's sum from the residual."""
        self._add = add

    def __add__(self, residual: Tensor) -> Tensor:
        return self._add(residual)

    __radd__ = __add__

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Optional[Dict[str, Any]] = None
    ) -> Any:
        # Of torch's functions only dropout is for us; a tensor on the left of a + then asks `__radd__`.
        return args[0] if function is nn.functional.dropout else NotImplemented


class SplitLayer(nn.Sequential):
    """Stands where W was; its children are FFN-1, and in one process FFN-2, FFN-3 and the dropout, too.

    `residual` says what becomes of the block's addition:

    - "none": the sum is this layer's output. The residual would need the layer's full-width input on the cloud, which
      is what the decomposition avoids sending.
    - "low-rank": FFN-1 takes the FFN's inner state and the residual stream side by side, (B, S, F + D).
    - "full": it is added as ever.
    """

    def __init__(self, children: Dict[str, nn.Module], residual: str, last: bool = False) -> None:
        """`last`: the model ends here."""
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)
        self.residual = residual
        self.last = last

    def forward(self, x_BSF: Tensor) -> Any:
        if self.residual == "low-rank":
            return AwaitingResidual(lambda r_BSD: self._finish(torch.cat([x_BSF, r_BSD], dim=-1)))
        out = self._finish(x_BSF)
        return out if self.residual == "full" else AwaitingResidual(lambda _: out)

    def _finish(self, x: Tensor) -> Tensor:
        for child in self:
            x = child(x)
        if self.last:
            raise Reached(x=x)
        return x


class Probe(nn.Module):
    """Stands where W was, to see the sum that the block computes: the model ends there."""

    def __init__(self, w: nn.Module) -> None:
        super().__init__()
        self.w = w

    def forward(self, x_BSF: Tensor) -> Any:
        def reach(r_BSD: Tensor) -> Tensor:
            raise Reached(x=self.w(x_BSF) + r_BSD)

        return AwaitingResidual(reach)
