"""What a run has moved, as it is read by who goes on with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sft_edge.commands.train.moved import FILE, Moved, read_moved, write_moved


def test_the_file_of_the_same_run_counts(tmp_path: Path) -> None:
    write_moved(tmp_path, "mine", Moved(1, 2, 3))
    assert read_moved([tmp_path / "absent", tmp_path], "mine") == Moved(1, 2, 3)
    assert read_moved([tmp_path], "another's") == Moved()


@pytest.mark.parametrize(
    "count", ["Infinity", "-Infinity", "NaN", "1e400", "-5", "9" * 30, "[" * 100_000, "null", '"x"']
)
def test_what_is_no_count_is_none(tmp_path: Path, count: str) -> None:
    (tmp_path / FILE).write_text(f'{{"run_id": "mine", "bytes_sent": 1, "bytes_received": 2, "link_bytes": {count}}}')
    assert read_moved([tmp_path], "mine") == Moved()
