"""Scores of sequence tasks, in percent; the functions are scikit-learn's and scipy's, under transformers' names.

A model that always answers the same has no correlation with anything: 0, not NaN.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Callable, Dict, Sequence

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Values = NDArray[np.float64]


def compute(names: Sequence[str], predictions: Values, references: Values) -> Dict[str, float]:
    """The named scores. Both arrays are (rows,): class ids or numbers; or (rows, labels) of 0 and 1."""
    if len(references) == 0 or predictions.shape != references.shape:
        raise ValueError(f"cannot compare {predictions.shape} predictions with {references.shape} references")
    return {name: METRICS[name](predictions, references) for name in names}


def _accuracy(predictions: Values, references: Values) -> float:
    # Of a row of labels every one has to be right.
    right = (predictions == references).reshape(len(references), -1).all(axis=1)
    return 100.0 * float(right.mean())


def _f1(predictions: Values, references: Values) -> float:
    from sklearn.metrics import f1_score

    # Several labels are counted together: the micro average.
    return 100.0 * float(f1_score(references.ravel(), predictions.ravel(), zero_division=0))


def _f1_macro(predictions: Values, references: Values) -> float:
    from sklearn.metrics import f1_score

    return 100.0 * float(f1_score(references, predictions, average="macro", zero_division=0))


def _matthews(predictions: Values, references: Values) -> float:
    from sklearn.metrics import matthews_corrcoef

    if _constant(predictions) or _constant(references):
        return 0.0
    return 100.0 * float(matthews_corrcoef(references, predictions))


def _pearson(predictions: Values, references: Values) -> float:
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predictions, references)


def _spearman(predictions: Values, references: Values) -> float:
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predictions, references)


def _mse(predictions: Values, references: Values) -> float:
    return float(np.square(predictions - references).mean())


def _correlation(function: Callable[..., Sequence[float]], predictions: Values, references: Values) -> float:
    if _constant(predictions) or _constant(references):
        return 0.0
    value = float(function(predictions, references)[0])
    return 100.0 * value if math.isfinite(value) else 0.0


def _constant(values: Values) -> bool:
    return bool(np.ptp(values) == 0)


METRICS: Dict[str, Callable[[Values, Values], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "f1_macro": _f1_macro,
    "matthews_correlation": _matthews,
    "pearson": _pearson,
    "spearmanr": _spearman,
    "mse": _mse,  # the only one that is not a percentage: squared units of the label
}
