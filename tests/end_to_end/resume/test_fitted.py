"""A codec that is fitted to a run's activations: once, whatever becomes of its sessions."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.jobs import error_line, read_json
from support.resuming import Clouds, Outcome
from support.tiny import make_tiny_model

from sft_edge.systems import halves

FITTED = {"mode": "sl", "freeze_edge": True, "codec": "fitted"}


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """The tables of each time that a codec was fitted."""
    made: list[dict[str, torch.Tensor]] = []
    right = halves.fit_tables

    def fit(*arguments):
        made.append(right(*arguments))
        return made[-1]

    monkeypatch.setattr(halves, "fit_tables", fit)
    return made


@pytest.mark.slow
@pytest.mark.parametrize(("step", "activations"), [(5, "keep-on-cloud"), (1, "resend"), (5, "resend")])
def test_a_session_that_is_lost(
    run: Callable[..., int],
    whole: Callable[..., Outcome],
    clouds: Clouds,
    out: Path,
    at_step: Callable[[int, Callable[[], object]], None],
    fits: list[dict[str, torch.Tensor]],
    capsys: pytest.CaptureFixture[str],
    step: int,
    activations: str,
) -> None:
    """Before the first checkpoint, which is of step 2, and after it: the next session has the same tables."""
    expected = whole(**FITTED, activations=activations)
    capsys.readouterr()
    fits.clear()
    at_step(step, clouds.replace)
    assert run(**FITTED, activations=activations) == 0
    assert "fitting the codec" in capsys.readouterr().err
    assert read_json(out / "all_results.json")["recoveries"] == 1
    assert len(fits) == 1
    Outcome(out, clouds.store).check_same(expected)
    saved = load_file(out / "checkpoint-6" / "codec.safetensors")
    assert all(torch.equal(saved[name], table) for name, table in fits[0].items())


def test_other_tables_are_refused(
    run: Callable[..., int], clouds: Clouds, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(**{**FITTED, "max_steps": 3}) == 0
    right = halves.in_memory
    monkeypatch.setattr(halves, "in_memory", lambda tables: right({**tables, "mean": 2 * tables["mean"]}))
    assert run(**{**FITTED, "max_steps": 3}, resume_from_checkpoint=True) == 5
    assert "was opened with another codec_tables_sha256" in error_line(capsys.readouterr().err)


def test_an_edge_whose_activations_are_no_numbers(
    run: Callable[..., int], clouds: Clouds, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sick = make_tiny_model(tmp_path / "sick", layers=3)
    tensors = load_file(sick / "model.safetensors")
    tensors["encoder.layer.0.output.dense.bias"][0] = math.inf
    save_file(tensors, sick / "model.safetensors", {"format": "pt"})
    assert run(**FITTED, model=sick) == 2
    assert "no numbers, or too large, for --codec fitted: choose another" in error_line(capsys.readouterr().err)
