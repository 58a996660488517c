from __future__ import annotations

import pytest

from sft.cli.durations import Duration


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30), ("1m30s", 90), ("500ms", 0.5), ("2h", 7200), ("7d", 604800), ("1.5s", 1.5)]
)
def test_a_duration_is_read_with_its_units(text, seconds):
    assert Duration(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "s", "30 s", "-3s", "3x", "1m 30s", "infs", "nan", "1e3s"])
def test_other_text_is_refused(text):
    with pytest.raises(ValueError, match="is not a duration"):
        Duration(text)


@pytest.mark.parametrize("text", ["0s", "250ms", "30s", "1m30s", "2h", "7d", "1d1h1m1s1ms"])
def test_it_is_shown_as_it_is_written(text):
    assert str(Duration(text)) == text
