"""What a cut has to know about a family of architectures: the names of a few modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Tuple


@dataclass(frozen=True)
class Family:
    """Names of modules in the library's own implementation, dotted as in `get_submodule`.

    The families here are post-norm encoders: a block ends in `norm(dropout(W(x)) + residual)`.
    """

    model_types: Tuple[str, ...]
    """Values of `config.model_type` that belong to the family."""

    blocks: str
    """In the base model: the list of its L blocks."""

    embeddings: str
    """In the base model: what turns token ids into the first hidden states."""

    after_embeddings: Tuple[str, ...]
    """In the base model: modules between embeddings and blocks, which some members have."""

    ffn_out: str
    """In a block: W, the second matrix of the feed-forward layer. This is the layer that is decomposed."""

    ffn_dropout: str
    """In a block: the dropout between W and the residual addition."""

    ffn_norm: str
    """In a block: the norm after the residual addition, the block's last module."""

    reserved_positions: int = 0
    """How many of `config.max_position_embeddings` no token can have."""
