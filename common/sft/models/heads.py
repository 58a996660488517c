"""What a model can predict: what a cut has to know of each head.

Shape suffixes: B batch, S sequence, C outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, Tuple

from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)


@dataclass(frozen=True)
class Head:
    """Of the library's."""

    auto_class: Any
    """Which opens such models."""

    learns: str
    """What its labels are, as the wire calls them (`Labels` in the protocol): "classes", which are "values" for some
    problem types of sequence classification; "spans"; or "tokens", a number for each."""

    per_token: bool = False
    """Whether its logits are (B, S, C), not (B, C)."""

    of_vocabulary: bool = False
    """Whether C is the size of the vocabulary: far more than all else that crosses."""

    trained_whole: Tuple[str, ...] = ()
    """What peft trains whole for its task; it takes all modules whose names end so."""


_CLASSIFIERS = ("classifier", "score")

HEADS: Dict[str, Head] = {
    "sequence-classification": Head(AutoModelForSequenceClassification, "classes", trained_whole=_CLASSIFIERS),
    "question-answering": Head(AutoModelForQuestionAnswering, "spans", per_token=True, trained_whole=("qa_outputs",)),
    "causal-lm": Head(AutoModelForCausalLM, "tokens", per_token=True, of_vocabulary=True),
    "token-classification": Head(AutoModelForTokenClassification, "tokens", per_token=True, trained_whole=_CLASSIFIERS),
    "multiple-choice": Head(AutoModelForMultipleChoice, "classes", trained_whole=_CLASSIFIERS),
    "masked-lm": Head(AutoModelForMaskedLM, "tokens", per_token=True, of_vocabulary=True),
}
