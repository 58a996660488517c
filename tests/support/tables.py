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
    words = torch.cat([_apart(numbers, int(size)) for size in sizes], dim=1)
    tables = {
        "mean": torch.randn(width, generator=generator),
        "basis": basis * torch.linspace(0.5, 2.0, width),
        "whole": 4096.0 * (numbers[:, None] / WORDS - 0.5).expand(WORDS, width),
        "scale": torch.linspace(0.25, 0.5, WORDS),
        "words": words,
    }
    return {**{name: x.to(torch.float16).contiguous() for name, x in tables.items()}, "sizes": sizes}


def _apart(numbers_N: Tensor, size: int) -> Tensor:
    """Words of so many components, the nearest of them a sixteenth apart."""
    return (((numbers_N[:, None] * 37) % WORDS) / 16.0 - 8.0).expand(WORDS, size)
