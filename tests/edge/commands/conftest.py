"""Exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import pytest
from support.saved import save_tiny

from sft_edge.commands.export.content import Export
from sft_edge.model_files import DENSE
from sft_edge.model_files.saved import load_model


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Exports without the check, which has a file of its own."""

    def run(form: str = DENSE, **values: Any) -> Path:
        saved = load_model(save_tiny(tmp_path / "model", **values))
        to = tmp_path / f"export-{form}"
        to.mkdir()
        Export(saved, form).write(to)
        return to

    return run
