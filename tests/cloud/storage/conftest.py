"""What several of the files here run on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sft_cloud.storage import CheckpointStore, kept_rows


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Says how many bytes more than has to be left the disk has."""

    def has(size: int) -> None:
        monkeypatch.setattr(kept_rows, "free_bytes", lambda path: kept_rows._LEFT_BYTES + size)

    return has


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints")
