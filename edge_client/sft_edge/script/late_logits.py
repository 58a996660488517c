"""A language model's logits in evaluation, which are fetched only where somebody looks at more than the best tokens.

They are all but everything that would ever cross: a row of the vocabulary for every token. What reads them is mostly
`argmax(dim=-1)`, as the metrics of transformers' scripts do, or nobody: then the loss was what was wanted.

Shape suffixes: B batch, S padded sequence, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

_METHODS = (
    *("size", "dim", "numel", "stride", "element_size", "get_device", "__len__"),
    *("is_floating_point", "is_complex", "is_signed", "is_inference", "is_contiguous"),
)
_PROPERTIES = (
    *("shape", "ndim", "device", "dtype", "layout", "nbytes", "itemsize", "grad", "grad_fn", "requires_grad"),
    *("is_leaf", "is_nested", "is_sparse", "is_quantized", "is_meta", "is_cpu", "is_cuda", "is_mps", "is_xpu"),
)
_LOOKS_AT_NO_VALUE = {
    *(getattr(Tensor, name) for name in _METHODS),
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES if hasattr(Tensor, name)),  # older releases lack some
}
_STAYS = {Tensor.detach, Tensor.contiguous}
_ARGMAX = {Tensor.argmax, torch.argmax}


class LateLogits(Tensor):
    """(B, S, V), float32: knows its shape and the best token of each place, and fetches the rest when it is looked
    at."""

    _best_BS: Tensor
    _fetch: Callable[[], Tensor]
    _fetched: Optional[Tensor]

    @staticmethod
    def __new__(cls, best_BS: Tensor, V: int, fetch: Callable[[], Tensor]) -> LateLogits:
        """`best_BS`: int64; `fetch` gives the logits, and may raise."""
        late: LateLogits = Tensor._make_wrapper_subclass(
            cls, (*best_BS.shape, V), dtype=torch.float32, device=best_BS.device
        )
        late._best_BS, late._fetch, late._fetched = best_BS, fetch, None
        return late

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LateLogits(shape={tuple(self.shape)})"

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Sequence[type], args: Tuple[Any, ...] = (), kwargs: Optional[Dict[str, Any]] = None
    ) -> Any:
        kwargs = kwargs or {}
        late = args[0] if args and isinstance(args[0], LateLogits) else None
        if function in _LOOKS_AT_NO_VALUE:
            return super().__torch_function__(function, types, args, kwargs)  # type: ignore[no-untyped-call]
        if late is not None and function in _STAYS and len(args) == 1 and not kwargs:
            return late
        if late is not None and late._fetched is None and function in _ARGMAX and _of_last(late, *args[1:], **kwargs):
            return late._best_BS.clone()
        return function(*tree_map(_all_of, args), **tree_map(_all_of, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Sequence[type], args: Tuple[Any, ...] = (), kwargs: Optional[Dict[str, Any]] = None
    ) -> Any:
        return function(*tree_map(_all_of, args), **tree_map(_all_of, kwargs or {}))


def _of_last(late: LateLogits, dim: Optional[int] = None, keepdim: bool = False, **others: Any) -> bool:
    """Whether the arguments of an argmax ask for the best tokens."""
    dim = others.pop("axis", dim)
    return dim in (-1, late.dim() - 1) and not keepdim and not others


def _all_of(value: Any) -> Any:
    if not isinstance(value, LateLogits):
        return value
    if value._fetched is None:
        value._fetched = value._fetch()
    return value._fetched
