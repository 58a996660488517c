"""`sft-edge compare`: runs of all kinds and states, held against each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List

import pytest
from support.jobs import read_json
from support.left_by_runs import leave_run

from sft_edge.cli import main
from sft_edge.commands.compare.reading import Point, read_run
from sft_edge.files import write_json

WRITTEN_BEFORE = Path(__file__).parents[2] / "end_to_end" / "written_before" / "run"


@pytest.fixture
def runs(tmp_path: Path) -> List[str]:
    """One of each mode; the second needs a tenth of the bytes of the first."""
    leave_run(tmp_path / "sl", mode="sl", seed=1, sent=10_000)
    leave_run(tmp_path / "sft", mode="sft", seed=1, scores=(50.0, 78.0, 76.5))
    leave_run(tmp_path / "local", mode="local", seed=1, scores=(90.0,))
    return [str(tmp_path / name) for name in ("sl", "sft", "local")]


def asked(capsys: pytest.CaptureFixture[str], *arguments: str) -> Dict[str, Any]:
    assert main(["compare", *arguments, "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def row(out: str, label: str) -> List[str]:
    """The cells of a line, of all tables."""
    lines = [line for line in out.splitlines() if line.startswith(f"  {label}  ")]
    assert lines
    return [cell.strip() for line in lines for cell in line[len(label) + 2 :].split("  ") if cell.strip()]


def test_the_table_has_figures_with_differences_and_the_options_that_differ(
    runs: List[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *runs]) == 0
    out = capsys.readouterr().out
    assert "sl (baseline)" in out
    assert row(out, "accuracy, best") == ["80.00", "78.00 (-2.00)", "90.00 (+10.00)"]
    assert row(out, "accuracy, last") == ["70.00", "76.50 (+6.50)", "90.00 (+20.00)"]
    assert row(out, "training, sent") == ["60 kB", "6 kB (1/10)", "0 B"]
    assert row(out, "training, received") == ["30 kB", "3 kB (1/10)", "0 B"]
    assert row(out, "a step, both ways") == ["15 kB", "1.5 kB (1/10)", "0 B"]
    assert row(out, "evaluation, sent") == ["10 kB", "1 kB (1/10)", "0 B"]
    assert row(out, "training") == ["12s", "12s (+0%)", "12s (+0%)"]
    assert row(out, "edge, forward") == ["3s", "3s (+0%)", "3s (+0%)"]
    assert row(out, "memory, at most") == ["1 GB", "1 GB (+0%)", "1 GB (+0%)"]
    assert row(out, "mode") == ["sl", "sft", "local"]
    assert row(out, "codec") == ["float32", "int8", "-"]
    assert not [same for same in ("seed", "split_layer", "learning_rate") if same in out]
    assert "note" not in out


def test_another_baseline(runs: List[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *runs, "--baseline", os.path.relpath(runs[1])]) == 0
    out = capsys.readouterr().out
    assert "sft (baseline)" in out
    assert row(out, "accuracy, best") == ["80.00 (+2.00)", "78.00", "90.00 (+12.00)"]
    assert row(out, "training, sent") == ["60 kB (10x)", "6 kB", "0 B"]


def test_more_runs_than_fit_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = [str(leave_run(tmp_path / f"run-{index:02}", seed=index)) for index in range(12)]
    assert main(["compare", *named]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 120
    assert [out.count(Path(name).name) for name in named] == [1] * 12
    assert out.count("Bytes on the wire") > 1


def test_json_has_every_number_and_point(runs: List[str], capsys: pytest.CaptureFixture[str]) -> None:
    found = asked(capsys, *runs)
    assert found["baseline"] == "sl"
    assert found["differing_options"]["mode"] == {"sl": "sl", "sft": "sft", "local": "local"}
    assert found["shared_options"]["seed"] == "1"
    of_sft = found["columns"][1]
    assert of_sft["figures"]["wire_bytes_per_step"] == 1500.0
    (run,) = of_sft["runs"]
    assert run["scores"] == [
        {"step": 2, "value": 50.0, "bytes": 3000},
        {"step": 4, "value": 78.0, "bytes": 6000},
        {"step": 6, "value": 76.5, "bytes": 9000},
    ]
    assert run["losses"][0] == {"step": 1, "value": 0.9}


def test_runs_of_one_kind_are_a_mean_and_a_spread(
    tmp_path: Path, runs: List[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, score in ((1, 80.0), (2, 82.0), (3, 84.0)):
        runs.append(str(leave_run(tmp_path / f"int4-seed{seed}", codec="int4", seed=seed, scores=(score,))))
    runs.append(str(leave_run(tmp_path / "int4-other", codec="int4", seed=2, learning_rate=1e-3)))
    runs.append(str(leave_run(tmp_path / "int4-broken", codec="int4", seed=4, steps=3, scores=(1.0,))))
    assert main(["compare", *runs, "--group-seeds", "--baseline", runs[4]]) == 0
    out = capsys.readouterr().out
    assert "int4 (n=3) (baseline)" in " ".join(out.split())
    assert "82.00 ± 2.00" in row(out, "accuracy, best")
    assert "1, 2, 3" in row(out, "seed")
    assert "in no group, as they are unfinished or their options are not known: int4-broken" in out
    columns = asked(capsys, *runs, "--group-seeds")["columns"]
    assert [len(column["runs"]) for column in columns] == [1, 1, 1, 3, 1, 1]
    assert columns[3]["spread"]["best"] == 2.0
    assert "a seed is there twice" not in out
    twin = str(leave_run(tmp_path / "twin", codec="int4", seed=3))
    assert main(["compare", *runs, twin, "--group-seeds"]) == 0
    assert "a seed is there twice" in capsys.readouterr().out


def test_a_run_that_was_broken_off_is_shown_as_far_as_it_came(tmp_path: Path) -> None:
    run = read_run(leave_run(tmp_path / "run", steps=3, planned=100, scores=(30.0,)))
    assert (run.status, run.steps, run.planned_steps, run.is_finished) == ("unfinished", 3, 100, False)
    assert run.scores == [Point(3, 30.0)]
    (tmp_path / "run" / "all_results.json").unlink()
    run = read_run(tmp_path / "run")
    assert (run.status, run.metric, len(run.losses)) == ("unfinished", "accuracy", 3)
    assert "wire_bytes_sent" not in run.figures


def test_figures_of_an_attempt_before_are_not_those_of_the_history(tmp_path: Path) -> None:
    """A run that was interrupted, resumed, and whose link was lost then."""
    run = leave_run(tmp_path / "run", steps=3, planned=100)
    write_json(run / "trainer_state.json", {**read_json(run / "trainer_state.json"), "global_step": 9})
    assert read_run(run).steps == 9
    assert "train_runtime" not in read_run(run).figures


def test_a_run_that_was_killed_has_its_checkpoint(tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / "checkpoint-2").symlink_to(WRITTEN_BEFORE / "checkpoint-2")
    (killed / "checkpoint-3").mkdir()  # torn: no manifest
    (killed / "checkpoint-3" / "state.json").write_text("{")
    run = read_run(killed)
    assert (run.status, run.steps, run.planned_steps) == ("unfinished: checkpoint-2", 2, 4)
    assert [point.step for point in run.losses] == [1, 2]
    assert run.wire_bytes[-1] == run.figures["wire_bytes_sent"] + run.figures["wire_bytes_received"] > 0
    assert run.figures["train_loss"] == pytest.approx(sum(point.value for point in run.losses) / 2)
    assert run.options["learning_rate"] == "0.01"
    assert run.options["seed"] == "7"
    # One that goes on after it was broken off: the checkpoint is further than what was left then.
    leave_run(killed, steps=1, planned=4)
    assert read_run(killed).status == "unfinished: checkpoint-2"


def test_different_tasks_and_metrics_are_said_and_the_rest_is_compared(
    tmp_path: Path, runs: List[str], capsys: pytest.CaptureFixture[str]
) -> None:
    runs.append(str(leave_run(tmp_path / "cola", task="cola", metric="matthews_correlation", sent=20_000)))
    assert main(["compare", *runs]) == 0
    out = capsys.readouterr().out
    assert "note: of different tasks (sst2, cola): their scores and losses say nothing about each other" in out
    assert row(out, "metric, best")[-1] == "80.00"
    assert row(out, "metric")[-1] == "matthews_correlation"
    assert row(out, "training, sent")[-1] == "120 kB (+100%)"


def test_a_run_of_before_is_compared_by_what_it_says(
    tmp_path: Path, runs: List[str], capsys: pytest.CaptureFixture[str]
) -> None:
    old = leave_run(tmp_path / "old", mode="sft")
    for name in ("options.json", "ledger.csv"):
        (old / name).unlink()
    assert main(["compare", *runs, str(old), "--svg", str(tmp_path / "c.svg")]) == 0
    out = capsys.readouterr().out
    assert "note: without options.json, so that most options are not known: old" in out
    assert row(out, "mode") == ["sl", "sft", "local", "sft"]


def test_it_does_without_torch(tmp_path: Path, runs: List[str]) -> None:
    for name in ("torch", "transformers", "grpc"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} was imported')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]), "PYTHONIOENCODING": "ascii"}
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "checkpoint-2").symlink_to(WRITTEN_BEFORE / "checkpoint-2")
    command = [sys.executable, "-m", "sft_edge", "compare", *runs, str(tmp_path / "killed")]
    command += ["--html", str(tmp_path / "new" / "c.html")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(f"wrote {tmp_path / 'new' / 'c.html'}\n")
