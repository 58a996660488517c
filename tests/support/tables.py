"""Tables of the codec `fitted`, made up: words that are far apart, so that which is the nearest is never in doubt."""

from __future__ import annotations

from typing import Dict

import torch
from torch import Tensor

from sft.wire.codec.rans import SLOTS

WORDS, CLASSES, KINDS, REACH = 40, 2, 3, 4


def made_up_tables(width: int, words: int = WORDS, reach: int = REACH) -> Dict[str, Tensor]:
    """For rows of `width` elements; numbers q from -`reach` to it come, in one of the kinds but not so far."""
    generator = torch.Generator().manual_seed(width)
    basis, _ = torch.linalg.qr(torch.randn(width, width, generator=generator))
    q = torch.arange(-reach, reach + 1)
    falls = 0.5 ** (q.abs() * torch.tensor([[0.1], [1.0], [2.0]]))
    falls[2, [0, -1]] = 0.0
    numbers = torch.arange(words)
    tables = {
        "basis": basis / basis.abs().amax(dim=0) * torch.linspace(32, 127, width),
        "whole": ((numbers[:, None] * 7 + torch.arange(width) * 3) % words - words // 2) * (100 // words),
    }
    halves = {
        "basis_steps": torch.full((width,), 1 / 64),
        "whole_steps": torch.full((width,), 4.0),
        "mean": torch.randn(width, generator=generator),
        "step": torch.linspace(0.25, 0.5, words),
        "points": (q + 0.125 * q.sign()).expand(KINDS, -1),
    }
    return {
        **{name: x.round().to(torch.int8).contiguous() for name, x in tables.items()},
        **{name: x.to(torch.float16).contiguous() for name, x in halves.items()},
        "class": (numbers % CLASSES).to(torch.uint8),
        "kind": torch.arange(CLASSES * width).reshape(CLASSES, width).remainder(KINDS).to(torch.uint8),
        "word_frequencies": of_slots(torch.linspace(1, 3, words)),
        "frequencies": torch.stack([of_slots(row) for row in falls]),
    }


def of_slots(likely_S: Tensor) -> Tensor:
    """Whole numbers in these proportions, as tables have them."""
    of_S = (likely_S / likely_S.sum() * SLOTS).floor().to(torch.int32)
    of_S[len(of_S) // 2] += SLOTS - int(of_S.sum())
    return of_S
