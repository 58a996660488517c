"""What a model can predict: what a cut has to know of each head.

Shape suffixes: B batch, S sequence, C outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, Tuple

from transformers import (
    AutoModel,
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

    options: Dict[str, Any] = field(default_factory=dict)
    """Which the library's class is built with."""


_CLASSIFIERS = ("classifier", "score")

HEADS: Dict[str, Head] = {
    "sequence-classification": Head(AutoModelForSequenceClassification, "classes", trained_whole=_CLASSIFIERS),
    "question-answering": Head(AutoModelForQuestionAnswering, "spans", per_token=True, trained_whole=("qa_outputs",)),
    "causal-lm": Head(AutoModelForCausalLM, "tokens", per_token=True, of_vocabulary=True),
    "token-classification": Head(AutoModelForTokenClassification, "tokens", per_token=True, trained_whole=_CLASSIFIERS),
    "multiple-choice": Head(AutoModelForMultipleChoice, "classes", trained_whole=_CLASSIFIERS),
    "masked-lm": Head(AutoModelForMaskedLM, "tokens", per_token=True, of_vocabulary=True),
}

_BODIES = {
    "body": Head(AutoModel, "nothing", per_token=True),
    "body-without-pooler": Head(AutoModel, "nothing", per_token=True, options={"add_pooling_layer": False}),
}
"""Of modules whose head is their own: what the library's base model returns. No server builds such modules."""


def head_named(name: str) -> Head:
    """One of `HEADS`, or a body."""
    return _BODIES[name] if name in _BODIES else HEADS[name]


def is_body(name: str) -> bool:
    """Whether it is none of `HEADS`: a base model."""
    return name in _BODIES
