"""Answer spans: the best of them by their logits, and SQuAD v1.1's scores of their text."""

from __future__ import annotations

import re
import string
from collections import Counter
from typing import Dict, Iterable, List, NamedTuple, Sequence

import torch
from torch import Tensor

from sft_edge.tasks.base import Feature

MAX_ANSWER_LENGTH = 30
"""Tokens of an answer."""

N_BEST = 20
"""Candidates that a probability is shared among."""

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


class Span(NamedTuple):
    """A piece of a context."""

    start: int
    """Position of its first character."""

    end: int
    """Position behind its last character."""

    logit: float
    """Start logit and end logit added."""


def best_spans(feature: Feature, logits_S2: Tensor) -> List[Span]:
    """The `N_BEST` spans of this window's context by start plus end logit, best first.

    `logits_S2` has a row for every token, padding included or not. A span does not leave the context and has at most
    `MAX_ANSWER_LENGTH` tokens. Every such span is looked at, so none is missed as by taking the best starts and ends.
    """
    if feature.offsets is None or len(feature.offsets) == 0:
        return []
    logits_T2 = logits_S2[feature.context_start : feature.context_start + len(feature.offsets)].double()
    ends = torch.nn.functional.pad(logits_T2[:, 1], (0, MAX_ANSWER_LENGTH - 1), value=-torch.inf)
    scores = logits_T2[:, :1] + ends.unfold(0, MAX_ANSWER_LENGTH, 1)  # (start, tokens after the start)
    best = scores.flatten().topk(min(N_BEST, scores.numel()))
    spans = []
    for logit, index in zip(best.values.tolist(), best.indices.tolist()):
        first, more = divmod(index, MAX_ANSWER_LENGTH)
        if first + more < len(feature.offsets):
            start, end = int(feature.offsets[first][0]), int(feature.offsets[first + more][1])
            spans.append(Span(start, end, logit))
    return spans


def merge(windows: Iterable[Sequence[Span]]) -> List[Span]:
    """The `N_BEST` spans of all windows of one context, best first, each once."""
    spans = sorted((span for window in windows for span in window), key=lambda span: -span.logit)
    unique = {(span.start, span.end): span for span in reversed(spans)}  # the last to come, the best, stays
    return sorted(unique.values(), key=lambda span: -span.logit)[:N_BEST]


def probability(spans: Sequence[Span]) -> float:
    """Probability of the first among these spans, best first."""
    return float(torch.tensor([span.logit for span in spans], dtype=torch.float64).softmax(dim=0)[0])


def normalized(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous spaces: what SQuAD v1.1 compares."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def scores(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> Dict[str, float]:
    """Of all questions, in percent: `exact_match` and `f1`. `answers` are those that are accepted, a list a question.

    SQuAD's script prints every digit there is, so the last one counts: added up one by one, as there. `sum` is more
    exact than that from Python 3.12 on.
    """
    exact = overlap = 0.0
    for prediction, accepted in zip(predictions, answers):
        exact += exact_match(prediction, accepted)
        overlap += f1(prediction, accepted)
    return {"exact_match": 100.0 * exact / len(answers), "f1": 100.0 * overlap / len(answers)}


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction is one of the answers, else 0."""
    return float(any(normalized(prediction) == normalized(answer) for answer in answers))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Overlap in words with the closest answer, 0 to 1."""
    return max(_f1(normalized(prediction).split(), normalized(answer).split()) for answer in answers)


def _f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    common = sum((Counter(prediction) & Counter(answer)).values())
    if not common:
        return 0.0
    # Not as 2 * common / (all words): the last digit would be another than the official one.
    precision, recall = common / len(prediction), common / len(answer)
    return 2 * precision * recall / (precision + recall)
