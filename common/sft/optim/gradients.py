"""Sums over gradients that span both halves: norms, products, and the scale that a norm calls for."""

from __future__ import annotations

from typing import Iterable, Optional, Tuple

import torch
from torch import Tensor, nn

_PIECE = 1 << 20
"""Elements that are multiplied at once: eight megabytes in double precision."""


def squared_gradient_norm(parameters: Iterable[nn.Parameter]) -> float:
    """The sum of squares of every gradient, added in double precision."""
    return squared_norm(p.grad for p in parameters)


def squared_norm(tensors: Iterable[Optional[Tensor]]) -> float:
    """The sum of squares of all elements, added in double precision."""
    return _add_products((x, x) for x in tensors)


def scalar_product(tensors: Iterable[Optional[Tensor]], others: Iterable[Optional[Tensor]]) -> float:
    """The sum of products of all elements, added in double precision; None stands for zeros."""
    return _add_products(zip(tensors, others))


def _add_products(pairs: Iterable[Tuple[Optional[Tensor], Optional[Tensor]]]) -> float:
    # Multiplied in double precision, too: the square of what a gradient scaler makes may be more than float32 holds.
    # Piece by piece, as the whole of an embedding's gradient would take three times its memory.
    sums = [
        (one.double() * other.double()).sum()
        for x, y in pairs
        if not (x is None or y is None)
        for one, other in zip(torch.split(x.detach().reshape(-1), _PIECE), torch.split(y.detach().reshape(-1), _PIECE))
    ]
    return float(torch.stack(sums).sum()) if sums else 0.0


def clip_scale(norm: float, max_norm: float) -> float:
    """What gradients of this norm are multiplied by, as by torch's clip_grad_norm_; 1 where `max_norm` is 0."""
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0


def scale_gradients(parameters: Iterable[nn.Parameter], scale: float) -> None:
    """Multiplies every gradient in place, as torch's clip_grad_norm_ does; 1 leaves the bits."""
    for parameter in parameters:
        if parameter.grad is not None and scale != 1.0:
            parameter.grad.mul_(scale)
