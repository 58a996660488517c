"""`sft-edge reproduce` with true runs, and against a true server."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.jobs import Job, flags, read_json

from sft_edge.cli import main


@pytest.mark.slow
def test_a_figure_from_true_runs(
    tmp_path: Path, model: Path, job: Job, cloud: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every way to train of Fig. 3, by the server that is named; a second call finds all of it there."""
    given = {"model": model, "data_dir": job.data_dir, "tasks": "sst2", "split_layers": 2, "split_ranks": 4}
    given |= {"num_train_epochs": 1, "per_device_train_batch_size": 8, "max_seq_length": 64, "device": "cpu"}
    argv = ["reproduce", "fig3", *flags(output_dir=tmp_path / "out", server=cloud, **given)]
    assert main(argv) == 0, capsys.readouterr().out
    report = read_json(tmp_path / "out" / "fig3.json")
    bytes_of = {run["system"]: run["wire_bytes"] for run in report["runs"]}
    assert list(bytes_of) == ["local", "SFT(l=2,R=4)", "frozen int8(l=2)", "trained int8(l=2)"]
    assert bytes_of["local"] == 0
    assert bytes_of["trained int8(l=2)"] > bytes_of["frozen int8(l=2)"] > 0, "no gradient comes down"
    assert all(run["results"]["train_samples"] == job.train_rows for run in report["runs"])
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    assert "<svg" in (tmp_path / "out" / "fig3.svg").read_text()
    capsys.readouterr()
    assert main(argv) == 0
    assert "4 of 4 runs are there already" in capsys.readouterr().out
    runs = [str(path.parent) for path in sorted((tmp_path / "out").rglob("all_results.json"))]
    assert main(["compare", *runs]) == 0, "what is left of a run is what it reads"


def test_timing_measures_the_way(tmp_path: Path, model: Path, cloud: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = flags(model=model, device="cpu", output_dir=tmp_path / "out", server=cloud)
    assert main(["reproduce", "timing", *argv]) == 0
    assert f"the way to {cloud}: " in capsys.readouterr().out
    content = read_json(tmp_path / "out" / "timing.json")
    way, measured = content["way"], content["columns"]["measured"]
    moved = 32 * 66 * 32 * 4  # the model is 32 wide
    seconds = way["delay_seconds"] + moved / way["up_bytes_per_second"] + moved / way["down_bytes_per_second"]
    assert measured["SL t_comm"] == pytest.approx(1000 * seconds)
    computing = measured["t(XAVIER, 1)"] + 2 * measured["t(V100, 1)"]
    assert measured["t_sl"] == pytest.approx(computing + measured["SL t_comm"])
    assert measured["t_sft"] == pytest.approx(computing + measured["SFT t_comm"])


def test_timing_without_an_answer(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = flags(model=model, device="cpu", output_dir=tmp_path / "out", server="127.0.0.1:1", connect_timeout="1s")
    assert main(["reproduce", "timing", *argv]) == 5
    told = capsys.readouterr()
    assert told.err.startswith("sft-edge reproduce: error: nobody answers at 127.0.0.1:1")
    assert "sft-edge doctor --server 127.0.0.1:1" in told.err
