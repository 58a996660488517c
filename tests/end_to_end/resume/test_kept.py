"""A frozen edge that keeps its activations: computed in the first epoch, the same bits whatever happens to the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.jobs import read_json
from support.resuming import Clouds, Outcome, PowerCut

from sft.models import Net1
from sft_edge.systems.kept import KeptActivations

FROZEN = {"freeze_edge": True, "activations": "keep-on-edge", "max_train_samples": 7, "per_device_train_batch_size": 3}
"""Three batches an epoch: seven steps are two epochs and a batch."""


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sequences in each batch that a frozen net_1 has computed."""
    seen: list[int] = []
    right = KeptActivations._computed

    def computed(self, net_1: Net1, batch):
        seen.append(len(batch.lengths))
        return right(self, net_1, batch)

    monkeypatch.setattr(KeptActivations, "_computed", computed)
    return seen


def test_every_row_is_computed_once(
    run: Callable[..., int], clouds: Clouds, out: Path, batches: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(**FROZEN) == 0
    assert sorted(batches) == [1, 3, 3]
    path = out / "activations.bin"
    assert not path.exists()
    kept = Outcome(out, clouds.store)
    path.write_bytes(b"somebody's")
    assert run(**{**FROZEN, "activations": "resend", "overwrite_output_dir": True}) == 0
    computed = Outcome(out, clouds.store)
    assert kept.payload == computed.payload
    assert kept.results["train_loss"] == pytest.approx(computed.results["train_loss"], abs=1e-6)
    assert len(batches) == 3
    capsys.readouterr()
    assert run(**FROZEN, overwrite_output_dir=True) == 2
    assert f"{path} holds no activations of a run: move it away" in capsys.readouterr().err
    assert path.read_bytes() == b"somebody's"


@pytest.mark.first_only
@pytest.mark.parametrize("becomes", ["kept", "lost", "cut short", "another run's"])
def test_the_file_after_a_cut(
    run: Callable[..., int],
    whole: Callable[..., Outcome],
    clouds: Clouds,
    out: Path,
    at_step: Callable[[int, Callable[[], object]], None],
    batches: list[int],
    capsys: pytest.CaptureFixture[str],
    becomes: str,
) -> None:
    expected = whole(**FROZEN)
    path = out / "activations.bin"

    def cut() -> None:
        raise PowerCut

    at_step(5, cut)
    with pytest.raises(PowerCut):
        run(**FROZEN)
    data = path.read_bytes()
    if becomes == "lost":
        path.unlink()
    elif becomes == "cut short":
        path.write_bytes(data[:-1])
    elif becomes == "another run's":
        run_id = read_json(out / "checkpoint-4" / "manifest.json")["run_id"]
        path.write_bytes(data.replace(run_id.encode(), run_id[::-1].encode(), 1))
    batches.clear()
    clouds.replace()
    assert run(**FROZEN, resume_from_checkpoint=True) == 0
    assert len(batches) == {"kept": 0, "lost": 3, "cut short": 1, "another run's": 3}[becomes]
    assert ("activations of another run" in capsys.readouterr().err) is (becomes == "another run's")
    Outcome(out, clouds.store).check_same(expected)


@pytest.mark.first_only
@pytest.mark.parametrize(("step", "workers"), [(1, 0), (3, 1), (5, 0)])
def test_a_session_that_is_lost(
    run: Callable[..., int],
    whole: Callable[..., Outcome],
    clouds: Clouds,
    out: Path,
    at_step: Callable[[int, Callable[[], object]], None],
    batches: list[int],
    step: int,
    workers: int,
) -> None:
    """Before the first checkpoint, which is of step 2, and after it: what is kept is of this run, and stays."""
    options = {**FROZEN, "gradient_accumulation_steps": 2, "dataloader_num_workers": workers}
    expected = whole(**options)
    batches.clear()
    at_step(step, clouds.replace)
    assert run(**options) == 0
    assert sorted(batches) == [1, 3, 3]
    assert read_json(out / "all_results.json")["recoveries"] == 1
    Outcome(out, clouds.store).check_same(expected)


def test_a_disk_that_takes_no_more(
    run: Callable[..., int],
    out: Path,
    clouds: Clouds,
    batches: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As soon as the model, and what is saved of it, would be the next that it does not take."""
    monkeypatch.setattr("sft_edge.systems.cache.free_bytes", lambda path: 100_000)
    assert run(**FROZEN) == 0
    assert "takes no more activations (what the disk has left is for the model" in capsys.readouterr().err
    assert sum(batches) == read_json(out / "all_results.json")["train_samples"]
