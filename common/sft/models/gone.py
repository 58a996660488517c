"""What stands in a library model that is cut where something was that is on the cloud: it says so."""

from __future__ import annotations

from typing import Any, Iterable, NoReturn

from torch import nn

from sft.errors import UsageError


class GoneError(UsageError, AttributeError):
    """The latter, so that `hasattr` says no."""


class BlockGoneError(UsageError, IndexError):
    """The latter, so that who counts up finds the end."""


class Gone(nn.Module):
    """In the place of a head or a part of one. It has no parameters, and follows `train()` and `eval()` alone."""

    def __init__(self, was: nn.Module) -> None:
        """`was`: what was there."""
        super().__init__()
        self._kind, self.training = type(was).__name__, was.training

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"a {self._kind}, on the cloud"

    def forward(self, *_: Any, **__: Any) -> NoReturn:
        """Raises GoneError."""
        self._refuse("does not run here: call the model")

    def requires_grad_(self, requires_grad: bool = True) -> NoReturn:
        """Raises GoneError."""
        self._refuse("is trained as it was when the model was cut: freeze or thaw it before")

    def __getattr__(self, name: str) -> Any:
        self._refuse(f"'{name}' with it: read that before the model is cut, or weights of model.state_dict()")

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "training" and not name.startswith("_"):
            self._refuse(f"hears of nothing but train() and eval(): set '{name}' before the model is cut")
        super().__setattr__(name, value)

    def _refuse(self, text: str) -> NoReturn:
        raise GoneError(f"this {self._kind} is on the cloud, and {text}")


class LowerBlocks(nn.ModuleList):
    """The blocks that are left of `count`."""

    def __init__(self, blocks: Iterable[nn.Module], count: int = 0) -> None:
        super().__init__(blocks)
        self._count = count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int) and len(self) <= index < self._count:
            raise BlockGoneError(
                f"block {index + 1} of {self._count} is on the cloud: what it has is in model.state_dict(), and to "
                "freeze it, set requires_grad before the model is cut"
            )
        return super().__getitem__(index)
