"""`bench/low_cut.py`: what it publishes says what was run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from support.jobs import sst2

ROOT = Path(__file__).parents[2]


@pytest.fixture
def low_cut(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "bench")
    import low_cut

    return low_cut


@pytest.mark.slow
def test_what_is_published_is_what_was_run(
    low_cut: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    job = sst2(tmp_path / "data", train_rows=40, eval_rows=5)
    monkeypatch.setattr(low_cut, "PAGE", tmp_path / "page.md")
    shutil.copy(ROOT / "docs" / "decompositions.md", tmp_path / "page.md")
    given = ["--data-dir", str(job.data_dir), "--rows", "36", "--eval-rows", "9", "--codes", "rank:8,float32"]
    assert low_cut.main([*given, "--fit-at", "1", "--split-layer", "3", "--seeds", "4", "--publish"]) == 0
    page = (tmp_path / "page.md").read_text()
    ran = "sst2, 36 training rows, epochs: 1, learning rate 0.0001, cut at block 3, seeds 4, fitted at steps 1"
    assert f"\n{ran}; accuracy on 5 rows of dev. Made with split-fine-tuning 0." in page
    assert (
        "\n\n| up | down | bytes a token | score |\n|---|---|---:|---:|\n| `rank:8` | `float32` | 32 + 1536 | " in page
    )
    assert capsys.readouterr().out.strip() in page
