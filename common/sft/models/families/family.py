"""What a cut has to know about a family of architectures: the names of a few modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Optional, Tuple

from transformers import PretrainedConfig


def _anything_goes(_: PretrainedConfig) -> str:
    return ""


@dataclass(frozen=True)
class Family:
    """Names of modules in the library's own implementation, dotted as in `get_submodule`.

    A post-norm block ends in `norm(dropout(W(x)) + residual)`, a pre-norm block in `residual + dropout(W(x))`.
    """

    model_types: Tuple[str, ...]
    """Values of `config.model_type` that belong to the family."""

    blocks: str
    """In the base model: the list of its L blocks."""

    embeddings: str
    """In the base model: what turns token ids into the first hidden states; for decoders the table alone."""

    ffn_out: str
    """In a block: W, the second matrix of the feed-forward layer. This is the layer that is decomposed."""

    ffn_dropout: Optional[str] = None
    """In a block: the dropout between W and the residual addition, a module or a probability; None without one."""

    ffn_norm: Optional[str] = None
    """In a block: the norm after the residual addition, a post-norm block's last module; None for pre-norm blocks."""

    final_norm: Optional[str] = None
    """In the base model: the norm after the last block, which pre-norm models have."""

    added_to_embeddings: Tuple[str, ...] = ()
    """In the base model: embeddings of positions that its forward adds itself."""

    after_embeddings: Tuple[str, ...] = ()
    """In the base model: modules between embeddings and blocks, which some members have."""

    after_block_1: Optional[str] = None
    """In the base model: what some members compute from the first block's input and output."""

    for_every_block: Tuple[str, ...] = ()
    """In the base model: what blocks of both halves read. Both halves hold it, so neither trains it."""

    runs_blocks: Optional[str] = None
    """In the base model: the module around the blocks, if its forward cannot do without any."""

    scales_embeddings: bool = False
    """Whether releases exist whose base model multiplies embeddings by the root of `config.hidden_size`."""

    ffn_width: str = "intermediate_size"
    """How the configuration calls F."""

    positions_after_padding: bool = False
    """Whether positions are counted from the padding token's number on: those up to it no token can have."""

    counts_padding: bool = False
    """Whether a token's place in its row is embedded, with padding on its left counted."""

    decoder: bool = False
    """Whether tokens see only what precedes them: the last one then stands for the sequence."""

    refuses: Callable[[PretrainedConfig], str] = _anything_goes
    """Why a member cannot be cut, or nothing."""

    @property
    def heads(self) -> Tuple[str, ...]:
        """The heads that its members are trained with, where the library has them."""
        if self.decoder:
            return ("sequence-classification", "causal-lm", "token-classification")
        return (
            *("sequence-classification", "question-answering", "token-classification"),
            *("multiple-choice", "masked-lm"),
        )
