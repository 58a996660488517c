from __future__ import annotations

import numpy as np
import pytest

from sft_edge.tasks.metrics import METRICS, compute


def values(*numbers: float) -> np.ndarray:
    return np.asarray(numbers, dtype=np.float64)


def test_correlations_of_a_model_that_always_says_the_same_are_zero() -> None:
    names = ("matthews_correlation", "pearson", "spearmanr")
    zeros = dict.fromkeys(names, 0.0)
    assert compute(names, values(1, 1, 1), values(0, 1, 1)) == zeros
    assert compute(names, values(0, 1, 1), values(1, 1, 1)) == zeros
    assert compute(names, values(1), values(0)) == zeros


def test_f1_without_a_positive_is_zero() -> None:
    assert compute(("f1", "f1_macro"), values(0, 0), values(0, 0)) == {"f1": 0.0, "f1_macro": 100.0}


def test_perfect_and_opposite_answers() -> None:
    right = values(0, 1, 1, 0)
    perfect = compute([name for name in METRICS if name != "mse"], right, right)
    assert perfect == pytest.approx(dict.fromkeys(perfect, 100.0))
    opposite = compute(("accuracy", "matthews_correlation", "pearson"), 1 - right, right)
    assert opposite == pytest.approx({"accuracy": 0.0, "matthews_correlation": -100.0, "pearson": -100.0})


def test_nothing_cannot_be_scored() -> None:
    with pytest.raises(ValueError, match="cannot compare"):
        compute(("accuracy",), values(), values())
    with pytest.raises(ValueError, match="cannot compare"):
        compute(("accuracy",), values(1), values(1, 0))
