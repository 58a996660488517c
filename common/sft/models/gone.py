"""What stands in a library model that is cut where something was that is on the cloud: it says so."""

from __future__ import annotations

from typing import Any, Iterable, Iterator, NoReturn, Tuple

import torch
from torch import nn

from sft.errors import UsageError

_COUNTING = frozenset(
    {
        torch.Tensor.numel, torch.Tensor.nelement, torch.Tensor.element_size, torch.Tensor.size, torch.Tensor.dim,
        torch.Tensor.is_floating_point, torch.Tensor.is_complex, torch.Tensor.requires_grad_, torch.Tensor.__hash__,
        torch.Tensor.requires_grad.__set__,  # type: ignore[attr-defined]
        *(
            getattr(torch.Tensor, name).__get__
            for name in ("shape", "ndim", "dtype", "device", "is_meta", "grad", "requires_grad")
        ),
    }
)  # fmt: skip
"""What may be asked of a stand-in: its size, and whether it is trained, which the optimizer looks at in `step()`."""


class OnCloudError(UsageError, AttributeError):
    """The latter, so that `hasattr` says no."""


class StandIn(nn.Parameter):
    """For a parameter on the cloud: of its shape, without memory."""

    @classmethod
    def of(cls, parameter: nn.Parameter) -> StandIn:
        """For this one."""
        return cls(torch.empty_like(parameter, device="meta"), parameter.requires_grad)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"parameter on the cloud, of shape {list(self.shape)}"

    @classmethod
    def __torch_function__(cls, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Raises OnCloudError for what would change it, or compute with it."""
        if func not in _COUNTING:
            raise OnCloudError("this parameter is on the cloud: what is done to it here does not reach it")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class BlockGoneError(UsageError, IndexError):
    """The latter, so that who counts up finds the end."""


class Gone(nn.Module):
    """In the place of a head or a part of one: it follows `train()` and `eval()` alone. Who counts its parameters finds
    stand-ins, of which the whole model has none."""

    def __init__(self, was: nn.Module) -> None:
        """`was`: what was there."""
        super().__init__()
        self._kind, self.training = type(was).__name__, was.training
        self._stand_ins = {name: StandIn.of(parameter) for name, parameter in was.named_parameters()}

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"a {self._kind}, on the cloud"

    def forward(self, *_: Any, **__: Any) -> NoReturn:
        """Raises OnCloudError."""
        self._refuse("does not run here: call the model")

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[Tuple[str, nn.Parameter]]:
        """Stand-ins for those that there were."""
        del recurse, remove_duplicate
        return ((f"{prefix}.{name}" if prefix else name, one) for name, one in self._stand_ins.items())

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """As above."""
        return iter(self._stand_ins.values())

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Nothing, for that of the whole model; raises OnCloudError where it is asked alone."""
        if not args and kwargs.get("destination") is None:
            self._refuse("its weights with it: they are in model.state_dict()")
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, *_: Any, **__: Any) -> NoReturn:
        """Raises OnCloudError."""
        self._refuse("its weights with it: load them with model.load_state_dict()")

    def requires_grad_(self, requires_grad: bool = True) -> NoReturn:
        """Raises OnCloudError."""
        self._refuse("is trained as it was when the model was cut: freeze or thaw it before")

    def __getattr__(self, name: str) -> Any:
        self._refuse(f"'{name}' with it: read that before the model is cut, or weights of model.state_dict()")

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "training" and not name.startswith("_"):
            self._refuse(f"hears of nothing but train() and eval(): set '{name}' before the model is cut")
        super().__setattr__(name, value)

    def _refuse(self, text: str) -> NoReturn:
        raise OnCloudError(f"this {self._kind} is on the cloud, and {text}")


class LowerBlocks(nn.ModuleList):
    """The blocks that are left of `count`."""

    def __init__(self, blocks: Iterable[nn.Module], count: int = 0) -> None:
        super().__init__(blocks)
        self._count = count

    def __getitem__(self, index: Any) -> Any:
        """Counts as before the cut, from the end, too. Raises BlockGoneError for a block of the cloud, and for a slice
        that begins with one or has a bound that is counted from the end beyond; the library asks for `[:count]`."""
        if isinstance(index, slice):
            bounds = [bound for bound in (index.start, index.stop) if bound is not None]
            whole = range(self._count)[index]
            from_end = min(bounds, default=0) < 0
            if whole and max(whole) >= len(self) and (from_end or whole[0] >= len(self)):
                self._refuse(max(whole))
            index = slice(*index.indices(self._count)) if self._count and (index.step or 1) > 0 else index
        elif -self._count <= index < self._count:
            index = range(self._count)[index]
            if index >= len(self):
                self._refuse(index)
        return super().__getitem__(index)

    def _refuse(self, index: int) -> NoReturn:
        raise BlockGoneError(
            f"block {index + 1} of {self._count} is on the cloud: what it has is in model.state_dict(), and to freeze "
            "it, set requires_grad before the model is cut"
        )
