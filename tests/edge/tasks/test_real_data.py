"""The real files load whole; none of their rows is in this project."""

from __future__ import annotations

from pathlib import Path

import pytest

from sft_edge.tasks import make_task


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    ("name", "train_rows", "validation_rows"),
    [
        ("sst2", 67_349, 872),
        ("cola", 8_551, 1_043),
        ("mrpc", 3_668, 408),
        ("rte", 2_490, 277),
        ("stsb", 5_749, 1_500),
        ("qnli", 22_980, 2_732),
        ("qqp", 20_496, 3_000),
        ("mnli", 9_880, 4_908),
        ("squad", 11_877, 4_961),
    ],
)
def test_row_counts(data_dir: Path, name: str, train_rows: int, validation_rows: int) -> None:
    task = make_task(name, data_dir)
    assert (len(task.read("train")), len(task.read("validation"))) == (train_rows, validation_rows)
