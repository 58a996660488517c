"""A micro-batch as it leaves the collator, before anything is packed."""

from __future__ import annotations

from typing import Dict, List, NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """B sequences padded on the right to S tokens.

    The attention mask is not stored: it is `lengths`, see `attention_mask`.
    """

    inputs: Dict[str, Tensor]
    """What the embeddings take, each (B, S): `input_ids`, and `token_type_ids` where the tokenizer makes them."""

    lengths: List[int]
    """Number of tokens of each sequence; padding follows them."""

    labels: Dict[str, Tensor]
    """As the library's heads take them: `labels` (B,) int64 or float32, or (B, C) float32; `labels` (B, S) int64, not
    shifted, for a language model; or `start_positions` and `end_positions` (B,) int64. Empty where nothing is known, as
    in prediction."""


def attention_mask(lengths: List[int], padded_length: int) -> Tensor:
    """The mask that the lengths stand for: (B, S) int64, 1 for tokens, 0 for the padding on the right."""
    positions_S = torch.arange(padded_length)
    return (positions_S[None, :] < torch.tensor(lengths)[:, None]).long()


IGNORED = -100
"""A label of this value is no label: the library's mark, for tokens that a language model is not trained on."""
