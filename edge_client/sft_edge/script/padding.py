"""Padding on the left: tokens are moved to the start of their rows, as they cross, and what comes of them back.

Shape suffixes: B batch, S padded sequence.
"""

from __future__ import annotations

from typing import List, Optional, Tuple

import torch
from torch import Tensor

from sft.batch import attention_mask
from sft.errors import UsageError


class Moved:
    """Where the tokens of a batch were, and where they are now."""

    def __init__(self, starts: List[int], padded_length: int) -> None:
        """`starts`: the place of each sequence's first token."""
        self.starts = starts
        start_B = torch.tensor(starts)
        # Turned, so that padding comes behind the tokens, whatever it holds.
        self._from_BS = (torch.arange(padded_length)[None] + start_B[:, None]) % padded_length
        self._back_BS = (torch.arange(padded_length)[None] - start_B[:, None]) % padded_length

    def to_the_start(self, x: Tensor) -> Tensor:
        """Of (B, S) or (B, S, D)."""
        return _gathered(x, self._from_BS)

    def back(self, x: Tensor) -> Tensor:
        """The inverse."""
        return _gathered(x, self._back_BS)

    @property
    def places_BS(self) -> Tensor:
        """Of the tokens that are at each place now, int64."""
        return self._from_BS


def lengths_of(mask_BS: Optional[Tensor], rows: int, padded_length: int) -> Tuple[List[int], Optional[Moved]]:
    """The number of tokens of each sequence, and how they are to be moved; None where all padding is on the right.

    Raises UsageError for a mask of another kind.
    """
    if mask_BS is None:
        return [padded_length] * rows, None
    if tuple(mask_BS.shape) != (rows, padded_length):
        raise UsageError(
            f"attention_mask has shape {list(mask_BS.shape)}, the inputs {[rows, padded_length]}; only such masks cross"
        )
    mask_BS = mask_BS.detach().cpu()
    lengths = [int(length) for length in mask_BS.sum(1)]
    starts = [int(row_S.ne(0).long().argmax()) for row_S in mask_BS]
    moved = Moved(starts, padded_length) if any(starts) else None
    at_start_BS = mask_BS if moved is None else moved.to_the_start(mask_BS)
    if min(lengths) < 1 or not at_start_BS.eq(attention_mask(lengths, padded_length)).all():
        raise UsageError(
            "attention_mask must be ones, with zeros on the right or on the left of a sequence, and a one at least"
        )
    return lengths, moved


def _gathered(x: Tensor, from_BS: Tensor) -> Tensor:
    index = from_BS.to(x.device).reshape(*from_BS.shape, *[1] * (x.dim() - 2)).expand(x.shape)
    return x.gather(1, index)
