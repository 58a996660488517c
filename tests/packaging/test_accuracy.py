"""`bench/accuracy.py`: which runs there are, and what is made of those that are done; none trains anything here."""

from __future__ import annotations

import json
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from support.tiny import make_tiny_model

from sft.cli.options import parse
from sft_edge.commands.reproduce.comparison import Comparison
from sft_edge.commands.reproduce.grid import BASELINE, Run, System
from sft_edge.commands.reproduce.records import Finished
from sft_edge.options import TRAIN_OPTIONS

ROOT = Path(__file__).parents[2]
RUN = """\
import json, pathlib, sys
said = dict(zip(sys.argv[2::2], sys.argv[3::2]))
results = {"wire_bytes_sent": 6, "wire_bytes_received": 4, "train_steps": 1, "train_samples": 4, "eval_accuracy": 75.0}
results |= {"edge_forward_seconds": 0.5, "edge_backward_seconds": 0.5, "edge_peak_memory_bytes": 7000000}
pathlib.Path(said["--output-dir"]).mkdir()
(pathlib.Path(said["--output-dir"]) / "all_results.json").write_text(json.dumps(results))
"""


@pytest.fixture(scope="module")
def accuracy() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "bench")
        import accuracy

        yield accuracy


@pytest.fixture(scope="module")
def tables(accuracy: Any) -> Any:
    return sys.modules["accuracy_tables"]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four blocks of width 32."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def runs_of(accuracy: Any, part: str, *arguments: str) -> list[Run]:
    given = accuracy._parser().parse_args(["--data-dir", "data", "--part", part, *arguments])
    runs: list[Run] = accuracy.runs_of(part, given, accuracy.Shape(6, 384))
    return runs


def test_both_parts_have_the_runs_they_say_and_share_those_that_are_the_same(accuracy: Any) -> None:
    grid, low_cut = runs_of(accuracy, "grid"), runs_of(accuracy, "low-cut")
    assert len(grid) == len({run.name for run in grid}) == 3 * 3 * (1 + 3 * 11)
    assert len(low_cut) == len({run.name for run in low_cut})
    assert [run.system for run in grid[:2]] == [BASELINE, System("SFT float32", "sft", 2, 8, codec="float32")]
    flags = {run.name: run.flags for run in grid}
    shared = [run for run in low_cut if run.name in flags]
    assert {run.system.name for run in shared} >= {"local", "SFT float32", "SFT int8", "frozen fitted"}
    assert all(run.flags == flags[run.name] for run in shared)


@pytest.mark.parametrize("part", ["grid", "low-cut"])
def test_train_takes_every_run(accuracy: Any, part: str) -> None:
    for run in runs_of(accuracy, part, "--tasks", "sst2", "--seeds", "0"):
        parse(TRAIN_OPTIONS, [word for flag in run.flags.items() for word in flag], "sft-edge train")


def test_what_is_held_against_the_papers_rank_8_takes_its_bytes(accuracy: Any, tables: Any) -> None:
    systems = {run.system for run in runs_of(accuracy, "low-cut") if run.system.mode == "sft"}
    crossing = {system.title: sum(tables.bytes_a_token(system, 384)) for system in systems}
    assert len(crossing) == 18
    assert crossing["SFT float32(l=2,R=8)"] == 64
    assert {title: size for title, size in crossing.items() if not 62 <= size <= 66} == {}
    frozen = System("frozen int8", "frozen", 2, codec="int8")
    assert tables.bytes_a_token(frozen, 384) == (390, 0)


def finished(run: Run, score: float, jobs: int = 1) -> Finished:
    results = {"train_samples": 10, "edge_forward_seconds": 0.1, "edge_backward_seconds": 0.2}
    made_with = {"versions": {}, "side_by_side": jobs}
    return Finished(run, "accuracy", score, {**results, "edge_peak_memory_bytes": 2e6}, 60.0, made_with)


def test_a_table_has_each_seed_and_what_the_edge_pays(accuracy: Any) -> None:
    runs = runs_of(accuracy, "grid", "--tasks", "sst2", "--seeds", "0", "1", "--split-layers", "2")
    scores = {"local": (90.0, 91.0), "SFT(l=2,R=8)": (80.0, 83.0), "frozen int8(l=2)": (89.0,)}
    done = [
        finished(run, scores[name][run.seed])
        for run in runs
        for name in [run.system.title.replace("SFT float32", "SFT")]
        if run.seed < len(scores.get(name, ()))
    ]
    (table,) = accuracy.tables_of(Comparison("grid", runs, done), accuracy.Shape(6, 384))
    assert table.title == "Cut at block 2 of 6"
    assert table.rows == [
        ["local", "90.5 (90.0, 91.0)", "-", "-", "2 MB", "30.0"],
        ["SFT float32(R=8)", "81.5 (80.0, 83.0)", "9.0", "32 + 32", "2 MB", "30.0"],
        ["frozen int8", "89.0", "1.0", "390 once", "2 MB", "30.0"],
    ]


def test_times_of_runs_that_were_side_by_side_are_in_no_table(accuracy: Any) -> None:
    runs = runs_of(accuracy, "grid", "--tasks", "sst2", "stsb", "--seeds", "0", "--split-layers", "2")
    shape = accuracy.Shape(6, 384)
    for jobs, ends in (({"sst2": 1, "stsb": 2}, ["edge memory", "edge ms a row"]), ({"sst2": 2}, ["edge memory"])):
        done = [finished(run, 80.0, jobs.get(run.task, 1)) for run in runs]
        (table,) = accuracy.tables_of(Comparison("grid", runs, done), shape)
        assert list(table.columns[-len(ends) :]) == ends
        assert {len(row) for row in table.rows} == {len(table.columns)}
    assert "2 runs side by side" in "".join(accuracy.notes(Comparison("grid", runs, done)))


def test_the_record_has_what_a_plan_can_propose(accuracy: Any) -> None:
    runs = runs_of(accuracy, "low-cut", "--tasks", "sst2", "stsb", "--seeds", "0")
    done = [finished(run, 80.0) for run in runs if run.task == "sst2" or run.system != BASELINE]
    told = json.loads(accuracy.record(done, accuracy.Shape(6, 384)))["runs"]
    assert {run["task"] for run in told} == {"sst2"}, "of the other the whole model's score is not known"
    assert not [run for run in told if "--residual" in run["flags"] or "--gradient-codec" in run["flags"]]
    assert next(run for run in told if run["mode"] == "frozen") == {
        "model": "minilm",
        "blocks": 6,
        "task": "sst2",
        "metric": "accuracy",
        "seed": 0,
        "mode": "frozen",
        "split_layer": 2,
        "split_rank": 0,
        "codec": "int8",
        "score": 80.0,
        "local": 80.0,
        "flags": {
            "--max-seq-length": "128",
            "--num-train-epochs": "2.0",
            "--learning-rate": "0.0002",
            "--per-device-train-batch-size": "32",
            "--max-train-samples": "2000",
            "--max-eval-samples": "1000",
        },
    }


def test_the_page_has_a_place_for_each_part(accuracy: Any) -> None:
    page = accuracy.PAGE.read_text(encoding="utf-8")
    for part in (*accuracy.PARTS, "codes"):
        once = accuracy.between_markers(page, part, "| a table |")
        assert once.count("| a table |") == 1
        assert accuracy.between_markers(once, part, "| a table |") == once
    with pytest.raises(ValueError, match="no place for another"):
        accuracy.between_markers(page, "another", "")


def test_what_is_done_is_published(
    accuracy: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sft_edge.commands.reproduce.runner.python_command", lambda *_, **__: [sys.executable, "-c", RUN]
    )
    monkeypatch.setattr(accuracy, "RECORD", tmp_path / "plan" / "accuracy.json")
    monkeypatch.setattr(accuracy, "PAGE", tmp_path / "page.md")
    shutil.copy(ROOT / "docs" / "decompositions.md", tmp_path / "page.md")
    monkeypatch.setattr(accuracy, "TASKS", ["rte"])
    monkeypatch.setattr(accuracy, "SEEDS", [0])
    monkeypatch.setitem(accuracy.PARTS, "grid", (accuracy.ways, (3,)))
    given = ["--data-dir", "data", "--model", str(tiny_model), "--only", "local", "frozen", "--jobs", "2", "--publish"]
    given += ["--output-dir", str(tmp_path / "out")]
    assert accuracy.main(given) == 0
    record = json.loads((tmp_path / "plan" / "accuracy.json").read_text())
    assert [(run["codec"], run["blocks"]) for run in record["runs"]] == [("int8", 4), ("int4", 4), ("fitted", 4)]
    assert record["made_with"]["versions"]["torch"]
    page = (tmp_path / "page.md").read_text()
    assert "### Cut at block 3 of 4\n" in page
    assert "| frozen int8 | 75.0 | 0.0 | 33 once | 7 MB |\n" in page, "of runs side by side no times"
    assert "4 of 12 runs." in page
    for name in ("grid", "grid-by-bytes"):
        assert "frozen" in "".join(ElementTree.fromstring((tmp_path / "out" / f"{name}.svg").read_text()).itertext())
    assert len(json.loads((tmp_path / "out" / "accuracy.json").read_text())["runs"]) == 4


def test_runs_that_failed_are_told(
    accuracy: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fails = "import sys\nif 'frozen' in sys.argv: sys.exit('no room')\n"
    command = [sys.executable, "-c", fails + RUN]
    monkeypatch.setattr("sft_edge.commands.reproduce.runner.python_command", lambda *_, **__: command)
    monkeypatch.setitem(accuracy.PARTS, "grid", (accuracy.ways, (3,)))
    given = ["--data-dir", "data", "--model", str(tiny_model), "--tasks", "rte", "--seeds", "0", "--only", "local"]
    given += ["frozen-l3-seed", "r8-seed", "--output-dir", str(tmp_path / "out")]
    failed = "rte-frozen-l3-seed0"
    assert accuracy.main(given) == 1
    told = capsys.readouterr().out
    assert f"2 of 12 runs; failed: `{failed}`. " in told
    assert f"1 run failed: {failed}\n" in told
    assert [run["run"] for run in json.loads((tmp_path / "out" / "accuracy.json").read_text())["failed"]] == [failed]


def test_a_dry_run_tells_the_hours(accuracy: Any, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--data-dir", "data", "--model", str(tiny_model), "--dry-run", "--seeds", "0", "--jobs", "2"]
    assert accuracy.main([*given, "--split-layers", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("36 runs, 0 of them done; 36 are left: about 45m")
    assert accuracy.main(given) != 0
    assert "--split-layers 5: this model has blocks 1 to 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--publish", "--seeds", "0"], "--publish does not go with --seeds"),
        (["--publish", "--split-layers", "4"], "--publish does not go with --split-layers"),
        (["--jobs", "0", "--dry-run"], "--jobs"),
        (["--tasks", "imdb", "--dry-run"], "imdb"),
        (["--split-layers", "0", "--dry-run"], "--split-layers"),
    ],
)
def test_bad_input(
    accuracy: Any, arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert accuracy.main(["--data-dir", str(tmp_path), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
