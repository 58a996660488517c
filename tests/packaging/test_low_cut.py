"""`bench/low_cut.py`: what it publishes says what was run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
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


def test_weighted_is_nearer_where_gradients_are_and_a_branch_knows_more_than_the_components(
    low_cut: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import low_cut_codes

    monkeypatch.setattr(low_cut_codes, "ROUNDS", 100)
    draws = torch.Generator().manual_seed(0)
    z_TR = torch.randn(2048, 8, generator=draws)
    x_TW = torch.cat([3 * z_TR, z_TR.square(), 0.1 * torch.randn(2048, 16, generator=draws)], dim=1)
    gradient_TW = torch.randn(2048, 3, generator=draws) @ torch.randn(3, 32, generator=draws)
    errors = {}
    for name in ("fitted:10", "weighted:10", "rank:8", "branch:8"):
        arrived_TW, size = low_cut_codes.code_named(name, x_TW, gradient_TW, 0)(x_TW, 0)
        assert size == pytest.approx(2048 * (10 if name.endswith("10") else 32), rel=0.1)
        errors[name] = x_TW - arrived_TW
    loss = {name: float((error_TW @ gradient_TW.T).square().mean()) for name, error_TW in errors.items()}
    assert loss["weighted:10"] < 0.7 * loss["fitted:10"]
    assert float(errors["branch:8"].square().mean()) < 0.8 * float(errors["rank:8"].square().mean())
