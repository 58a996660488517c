"""Tables of the codec `fitted`, made up: words that are far apart, so that which is the nearest is never in doubt."""

from __future__ import annotations

from typing import Dict

import torch
from torch import Tensor

from sft.wire.codec.fitted import WORDS


def made_up_tables(width: int, groups: int = 3) -> Dict[str, Tensor]:
    """For rows of `width` elements, in so many groups of components."""
    generator = torch.Generator().manual_seed(width)
    sizes = torch.full((groups,), width // groups, dtype=torch.int32)
    sizes[0] += width - int(sizes.sum())
    basis, _ = torch.linalg.qr(torch.randn(width, width, generator=generator))
    numbers = torch.arange(WORDS)
    steps = torch.tensor([[1 / 64], [16.0], [1 / 16]])
    tables = {
        "basis": basis / basis.abs().amax(dim=0) * torch.linspace(32, 127, width),
        "whole": (numbers[:, None] - 128.0).expand(WORDS, width),
        "words": torch.cat([_apart(numbers, int(size)) for size in sizes], dim=1),
    }
    halves = {
        "mean": torch.randn(width, generator=generator),
        "scale": torch.linspace(0.25, 0.5, WORDS),
        "steps": steps.expand(3, width),
    }
    return {
        **{name: x.round().to(torch.int8).contiguous() for name, x in tables.items()},
        **{name: x.to(torch.float16).contiguous() for name, x in halves.items()},
        "sizes": sizes,
    }


def _apart(numbers_N: Tensor, size: int) -> Tensor:
    """Words of so many components, the nearest of them a step apart."""
    return ((numbers_N[:, None] * 37) % WORDS - 128.0).expand(WORDS, size)
