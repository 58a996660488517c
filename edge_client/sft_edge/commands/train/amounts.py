"""What a run will move, told before it does: from the lengths of its rows and the code that they are written in."""

from __future__ import annotations

import math
from typing import Any, Sequence, Tuple

from sft.wire.codec.elements import FITTED, codecs_named
from sft.wire.codec.messages import is_packed, outputs_of
from sft.wire.codec.rows import CODES
from sft.wire.protocol import PART_BYTES
from sft_edge.link import on_link
from sft_edge.options import RunOptions
from sft_edge.systems import mean_row_bytes

_BYTES_A_SEQUENCE = 24
"""Its length, its label or the span of its answer, its number where the cloud keeps it; beside labels by class."""

_BYTES_A_MESSAGE = 96
"""Numbers, learning rates, what a message is framed with."""

_MOST_BYTES_AN_ELEMENT = 2
"""In a code whose rows differ."""


def answers_of(options: RunOptions) -> int:
    """That a micro-batch waits for: where labels stay, the logits and then the gradient."""
    return 2 if options.link.labels == "local" else 1


class Amounts:
    """Bytes on the link, both ways together; a little too many rather than too few."""

    def __init__(self, options: RunOptions, config: Any, head: str) -> None:
        """`config`: the whole model's, in transformers' form."""
        cut, training = options.cut, options.training
        codecs = codecs_named(cut.wire_dtype, cut.codec, cut.gradient_codec)
        width = cut.split_rank if cut.mode == "sft" else int(config.hidden_size)
        if cut.codec == FITTED:
            self._up, self._most_up = mean_row_bytes(width), float(_MOST_BYTES_AN_ELEMENT * width)
        else:
            self._up = self._most_up = float(CODES[codecs.activation].row_bytes(width))
        self._down = 0.0 if cut.freeze_edge else float(CODES[codecs.gradient].row_bytes(width))
        self._outputs = 4 * outputs_of(config, head)
        self._per_token = is_packed(head)
        self._answers = answers_of(options)
        self._rows = training.per_device_train_batch_size
        self._micro_batches = training.gradient_accumulation_steps
        self._eval_rows = training.per_device_eval_batch_size

    def step(self, lengths: Sequence[int], kept: bool = False) -> float:
        """At most of one step, whichever of the sequences of these lengths are in it; `kept`: the cloud has them."""
        longest = sorted(lengths, reverse=True)[: self._rows * self._micro_batches]
        return self._training(longest, self._micro_batches, self._most_up, kept)

    def answers(self, lengths: Sequence[int]) -> float:
        """At most what the cloud's answers to one step take."""
        longest = sorted(lengths, reverse=True)[: self._rows * self._micro_batches]
        bytes_moved = self._beside(longest) + sum(longest) * self._down + (self._answers - 1) * self._logits(longest)
        return self._on_link(bytes_moved, self._answers * self._micro_batches)

    def epoch(self, lengths: Sequence[int], kept: bool = False) -> float:
        """About that of the steps of an epoch over sequences of these lengths."""
        return self._training(lengths, math.ceil(len(lengths) / self._rows), self._up, kept)

    def evaluation(self, lengths: Sequence[int]) -> float:
        """At most that of an evaluation over sequences of these lengths, none of which the cloud has."""
        bytes_moved = self._beside(lengths) + sum(lengths) * self._most_up + self._logits(lengths)
        return self._on_link(bytes_moved, 2 * math.ceil(len(lengths) / self._eval_rows))

    def crossing(self, lengths: Sequence[int], kept: bool = False) -> Tuple[float, float]:
        """About what training on sequences of these lengths sends, and what comes back: without messages' framing."""
        return self._crossing(lengths, self._up, kept)

    def _training(self, lengths: Sequence[int], micro_batches: int, up: float, kept: bool) -> float:
        return self._on_link(sum(self._crossing(lengths, up, kept)), 2 * self._answers * micro_batches)

    def _crossing(self, lengths: Sequence[int], up: float, kept: bool) -> Tuple[float, float]:
        tokens, back = sum(lengths), (self._answers - 1) * self._logits(lengths)  # logits come, and their gradient goes
        return self._beside(lengths) + (0 if kept else tokens * up) + back, tokens * self._down + back

    def _beside(self, lengths: Sequence[int]) -> float:
        return len(lengths) * (_BYTES_A_SEQUENCE + self._outputs)

    def _logits(self, lengths: Sequence[int]) -> float:
        return self._outputs * (sum(lengths) if self._per_token else len(lengths))

    @staticmethod
    def _on_link(bytes_moved: float, messages: float) -> float:
        return on_link(bytes_moved + messages * _BYTES_A_MESSAGE, messages + bytes_moved / PART_BYTES)
