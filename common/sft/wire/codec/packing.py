"""Padding does not travel: sequences one after the other, and back."""

from __future__ import annotations

from typing import Sequence

from torch import Tensor

from sft.batch import attention_mask


def pack(x_BSR: Tensor, lengths: Sequence[int]) -> Tensor:
    """The rows of tokens, padding left out: (T, R), sequence after sequence."""
    return x_BSR[attention_mask(list(lengths), x_BSR.shape[1]).bool().to(x_BSR.device)]


def unpack(x_TR: Tensor, lengths: Sequence[int], padded_length: int) -> Tensor:
    """The inverse of `pack`: (B, S, R), zeros at padding."""
    x_BSR = x_TR.new_zeros(len(lengths), padded_length, x_TR.shape[-1])
    x_BSR[attention_mask(list(lengths), padded_length).bool().to(x_TR.device)] = x_TR
    return x_BSR
