from __future__ import annotations

import pytest

from sft_edge.tasks.spans import Span, exact_match, f1, merge, normalized, probability


def test_normalized_text() -> None:
    assert normalized("The  Quick, (brown) fox's an A-team") == "quick brown foxs ateam"
    assert normalized("theatre another") == "theatre another"


def test_scores_take_the_closest_answer() -> None:
    assert exact_match("The cat!", ["a dog", "cat"]) == 1.0
    assert exact_match("cats", ["cat"]) == 0.0
    assert f1("the big red cat", ["dog", "red cat"]) == pytest.approx(2 * 2 / (3 + 2))
    assert f1("cat cat", ["cat"]) == pytest.approx(2 / 3)
    assert f1("", ["cat"]) == 0.0


def test_spans_of_several_windows_are_merged() -> None:
    low, high, other = Span(0, 4, 1.0), Span(0, 4, 3.0), Span(5, 9, 2.0)
    assert merge([[other, low], [high]]) == [high, other]
    assert merge([]) == []
    assert len(merge([[Span(index, index + 1, 0.0) for index in range(50)]])) == 20
    assert probability([high, high]) == 0.5
