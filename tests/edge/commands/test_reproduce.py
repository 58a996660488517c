"""`sft-edge reproduce` without its runs: which there are, and what is said of them."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Optional

import pytest
from support.jobs import error_line, flags
from support.tiny import make_tiny_model

from sft_edge.cli import main
from sft_edge.commands.reproduce.carry_out import estimate
from sft_edge.commands.reproduce.comparison import Comparison
from sft_edge.commands.reproduce.equations import corrected, from_its_inputs, printed
from sft_edge.commands.reproduce.grid import Run, System, link_arguments, runs_of, runs_with
from sft_edge.commands.reproduce.made_with import code_digest, joined, made_with
from sft_edge.commands.reproduce.plots import plot_of
from sft_edge.commands.reproduce.records import Finished
from sft_edge.options import LinkOptions, ReproduceOptions

DATA = Path("data")


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four blocks."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def grid(figure: str, blocks: int = 6, **values: Any) -> List[Run]:
    return runs_of(ReproduceOptions(figure, data_dir=DATA, **values), LinkOptions(), blocks)  # type: ignore[arg-type]


def finished(run: Run, score: float, seconds: float = 60.0) -> Finished:
    results = {"wire_bytes_sent": 600, "wire_bytes_received": 400, "train_steps": 10, "train_samples": 320}
    return Finished(run, "accuracy", score, results, seconds, {"versions": {}, "devices": []})


@pytest.mark.parametrize(
    ("figure", "values", "count"),
    [
        ("table1", {}, 9 * (1 + 3)),
        ("table1", {"seeds": [0, 1, 2]}, 3 * 9 * (1 + 3)),
        ("table1", {"tasks": ["rte", "rte"], "split_ranks": [8, 8, 4], "split_layers": [2, 3]}, 1 + 2 * 2),
        ("fig2", {}, 2 * (1 + 6)),
        ("fig3", {}, 2 * (1 + 3 * 6)),
        ("fig3", {"tasks": ["sst2"], "split_layers": [1, 2], "split_ranks": [8, 16]}, 1 + 4 + 2 + 2),
    ],
)
def test_the_runs_of_a_figure(figure: str, values: Dict[str, Any], count: int) -> None:
    runs = grid(figure, **values)
    assert len(runs) == count
    assert len({run.name for run in runs}) == count
    assert runs[0].system.title == "local"


def test_what_the_runs_are_told() -> None:
    def said(run: Run) -> Dict[str, Optional[str]]:
        names = ("mode", "split-layer", "split-rank", "residual", "codec", "seed")
        return {name: run.flags[f"--{name}"] for name in names if f"--{name}" in run.flags}

    assert said(grid("table1", tasks=["sst2"], seeds=[7])[1]) == {
        "mode": "sft",
        "split-layer": "5",
        "split-rank": "8",
        "codec": "float32",
        "seed": "7",
    }
    with_residual = grid("fig2")[2]
    assert said(with_residual) == {
        "mode": "local",
        "split-layer": "2",
        "split-rank": "1",
        "residual": "full",
        "seed": "0",
    }
    assert with_residual.name == "sst2-local-l2-r1-full-residual-seed0"
    by_mode = {run.flags["--mode"]: said(run) for run in grid("fig3")}
    assert by_mode["frozen"] == {"mode": "frozen", "split-layer": "6", "codec": "int8", "seed": "0"}
    assert by_mode["sl"] == {"mode": "sl", "split-layer": "6", "codec": "int8", "seed": "0"}


def test_sizes_are_the_tasks_own_unless_they_are_given() -> None:
    def of(task: str, *names: str, **given: int) -> List[Optional[str]]:
        return [grid("table1", tasks=[task], **given)[0].flags.get(f"--{name}") for name in names]

    names = ("max-train-samples", "max-seq-length", "per-device-train-batch-size", "learning-rate")
    assert of("sst2", *names) == ["2000", "128", "32", "0.0002"]
    assert of("rte", *names) == ["960", "96", "8", "0.0001"]
    for task, length in (("sst2", "128"), ("rte", "128"), ("squad", "384")):
        assert of(task, *names, max_train_samples=0) == [None, length, "32", "0.0002"], "what few rows need is for them"
    for task, rows in (("sst2", "1000"), ("squad", "300")):
        assert of(task, "max-eval-samples") == of(task, "max-eval-samples", max_train_samples=0) == [rows]
    given = grid(
        "table1",
        max_train_samples=64,
        max_eval_samples=0,
        max_seq_length=48,
        num_train_epochs=3.0,
        learning_rate=2e-5,
        per_device_train_batch_size=8,
        model="bert-base-uncased",
        device="cuda:1",
    )[-1].flags
    assert given["--max-train-samples"] == "64"
    assert "--max-eval-samples" not in given, "all rows"
    assert [given[f"--{name}"] for name in ("max-seq-length", "num-train-epochs", "learning-rate", "model")] == [
        "48",
        "3.0",
        "2e-05",
        "bert-base-uncased",
    ]
    assert (given["--per-device-train-batch-size"], given["--device"]) == ("8", "cuda:1")


def test_the_way_to_the_cloud_is_handed_on_and_is_none_of_the_flags(tmp_path: Path) -> None:
    """A run that has gone by another way is the same run, but not one whose labels stay."""
    (tmp_path / "token").write_text("sft_a_b")
    link = LinkOptions("localhost:5", token_file=tmp_path / "token", tls=False, labels="local")
    token = ["--token-file", str(tmp_path / "token")]
    assert sorted(link_arguments(link)) == sorted(["--server", "localhost:5", "--tls", "false", *token])
    local, split = runs_of(ReproduceOptions("table1", data_dir=DATA, split_ranks=[8], tasks=["rte"]), link, 6)
    assert split.flags["--labels"] == "local"
    assert "--labels" not in local.flags
    assert "--server" not in split.flags


def test_the_table_has_a_row_of_the_papers_below_ours() -> None:
    runs = grid("table1", tasks=["sst2", "rte"], split_ranks=[8, 4], seeds=[0, 1])
    scores = {"local": [90.0, 91.0], "SFT(l=5,R=8)": [88.0, 90.0]}
    done = [finished(run, scores[run.system.title][run.seed]) for run in runs if run.system.title in scores]
    comparison = Comparison("table1", runs, done)
    assert comparison.table().rows == [
        ["local", "90.50 ± 0.71", "90.50 ± 0.71", "90.50", "-"],
        ["  paper: baseline", "92.54", "66.06", "79.30", "-"],
        ["SFT(l=5,R=8)", "89.00 ± 1.41", "89.00 ± 1.41", "89.00", "+1.50"],
        ["  paper: SFT(l=11,R=8)", "92.43", "64.25", "78.34", "+0.96"],
        ["SFT(l=5,R=4)", "-", "-", "-", "-"],
    ]
    losses = [row[3] for row in comparison.run_table().rows]
    assert losses == ["-", "+2.00", "-", "+2.00", "-", "+1.00", "-", "+1.00"]


def test_a_loss_is_of_seeds_that_both_have() -> None:
    runs = grid("table1", tasks=["sst2"], split_ranks=[8], seeds=[0, 1])
    done = [finished(run, 80.0 + 10 * run.seed) for run in runs if run.system.mode == "sft" or run.seed == 0]
    assert Comparison("table1", runs, done).mean_loss(runs[1].system) == 0.0
    assert Comparison("table1", runs, done[1:2]).mean_loss(runs[1].system) is None


def test_versions_that_differ_are_told_below_the_table() -> None:
    runs = grid("table1", tasks=["sst2"], split_ranks=[8], seeds=[0, 1])
    versions = [{"split-fine-tuning": "0.1.0 (code 1a)", "torch": "2.1.0"} for _ in runs]
    done = [replace(finished(run, 80.0), made_with={"versions": of}) for run, of in zip(runs, versions)]
    assert not [note for note in Comparison("table1", runs, done).notes() if "versions" in note]
    versions[1]["split-fine-tuning"] = "0.1.0 (code 2b)"
    (note,) = [note for note in Comparison("table1", runs, done).notes() if "versions" in note]
    assert note.endswith(": split-fine-tuning 0.1.0 (code 1a) (3 runs), 0.1.0 (code 2b) (1 run)")


def test_a_run_that_goes_on_was_made_with_all_that_its_processes_were() -> None:
    def made(torch: str, device: str, jobs: int) -> Dict[str, Any]:
        return {"versions": {"torch": torch}, "devices": [device], "side_by_side": jobs}

    once = joined({}, made("2.1.0", "a", 2))
    assert once == joined(once, once) == made("2.1.0", "a", 2)
    other = joined(once, made("2.2.0", "b", 1))
    assert other == {"versions": {"torch": "2.1.0, then 2.2.0"}, "devices": ["a", "b"], "side_by_side": 2}
    assert joined(other, made("2.2.0", "b", 1)) == other


def test_two_states_of_the_code_are_two_versions(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("one = 1\n")
    before = code_digest([tmp_path])
    assert code_digest([tmp_path]) == before
    (tmp_path / "one.py").write_text("one = 2\n")
    after = code_digest([tmp_path])
    (tmp_path / "one.py").rename(tmp_path / "two.py")
    assert len({before, after, code_digest([tmp_path]), code_digest()}) == 4
    assert f"(code {code_digest()})" in made_with()["versions"]["split-fine-tuning"]


@pytest.mark.parametrize(
    ("figure", "says"),
    [("table1", "the same in the paper"), ("fig2", "residual kept(R=1)"), ("fig3", "trained int8")],
)
def test_the_plot_is_svg(figure: str, says: str) -> None:
    runs = grid(figure, tasks=["sst2"])
    done = [finished(run, 80.0 + index) for index, run in enumerate(runs)]
    plot = plot_of(Comparison(figure, runs, done))
    assert plot is not None
    assert says in "".join(ElementTree.fromstring(plot).itertext())
    assert plot_of(Comparison(figure, runs, [])) is None


def test_a_curve_goes_from_block_to_block_in_whatever_order_they_are_named() -> None:
    plots = []
    for layers in ([6, 2, 4], [2, 4, 6]):
        runs = grid("fig2", tasks=["sst2"], split_layers=layers)
        done = [finished(run, 80.0 + run.system.split_layer) for run in runs]
        plots.append(plot_of(Comparison("fig2", runs, done)))
    assert plots[0] == plots[1]


def test_what_is_not_as_usual_is_in_the_name_and_wins() -> None:
    more = (("--gradient-codec", "int4"), ("--learning-rate", "0.001"))
    systems = [System("SFT", "sft", 2, 8, codec="float32"), System("SFT", "sft", 2, 8, "low-rank", "int8", more)]
    options = ReproduceOptions("fig3", data_dir=DATA, seeds=[1])
    usual, other = runs_with([*systems, *systems], ["sst2"], options, LinkOptions())
    assert usual.name == "sst2-sft-l2-r8-seed1"
    assert other.name == "sst2-sft-l2-r8-low-rank-residual-int8-gradient-codec-int4-learning-rate-0.001-seed1"
    assert usual.flags["--learning-rate"] == "0.0002"
    assert (other.flags["--learning-rate"], other.flags["--gradient-codec"]) == ("0.001", "int4")


def test_how_long_it_will_take_is_told_by_what_is_done() -> None:
    runs = grid("table1", tasks=["sst2", "rte", "cola"], split_ranks=[8])
    assert estimate(runs, []) is None
    done = [finished(runs[0], 80.0, seconds=10.0), finished(runs[2], 80.0, seconds=30.0)]
    assert estimate([runs[1], runs[3], runs[4]], done) == 10.0 + 30.0 + 20.0
    assert estimate([], []) == 0.0
    assert estimate(runs[:3], [], usual_seconds=7.0) == 21.0


def test_the_equations_as_printed_from_their_inputs_and_corrected() -> None:
    said, exact, right = printed(), from_its_inputs(), corrected()

    def rounded(values: Dict[str, Optional[float]], *names: str) -> List[float]:
        return [round(values[name] or 0.0, 1) for name in names]

    results = ("t_naive", "t_sl", "t_sft")
    assert rounded(said, *results) == [744.0, 2923.6, 647.6]
    assert rounded(said, "t(V100, 12)", "t(V100, 1)", "t(XAVIER, 12)", "t(XAVIER, 1)") == [124.0, 10.3, 744.0, 60.3]
    assert rounded(exact, "t(XAVIER, 1)", "SL traffic", "SFT traffic", *results) == [
        62.0,
        302.4,
        3.1,
        744,
        3059.7,
        665.9,
    ]
    assert rounded(right, "SL traffic", "SL t_comm", "SFT t_comm", *results) == [13.0, 103.8, 1.1, 744.0, 744.5, 641.7]
    assert right["SL traffic"] == 2 * 32 * 66 * 768 * 4 / 1e6
    assert (right["SL traffic"] or 0) / (right["SFT traffic"] or 1) == pytest.approx(96)


def test_timing_without_a_server(tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = flags(model=tiny_model, device="cpu", output_dir=tmp_path / "out")
    assert main(["reproduce", "timing", *argv]) == 0
    told = capsys.readouterr().out
    for number in ("744.0", "2923.6", "647.6", "60.3"):
        assert number in told
    assert "6 x 10.3 is 61.8, and 6 x 124/12 is 62.0" in told
    columns = json.loads((tmp_path / "out" / "timing.json").read_text())["columns"]
    measured = columns["measured"]
    assert measured["t_naive"] == pytest.approx(4 * measured["t(XAVIER, 1)"]) != 0
    assert measured["t_sl"] is None, "no way to a server is known"
    assert "| (10) t_sl, ms | 2923.6 |" in (tmp_path / "out" / "timing.md").read_text()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["table1"], "--data-dir must be given"),
        ([], "--figure must be given"),
        (["table2", "--data-dir", "data"], "'table2' is none of table1, fig2, fig3, timing"),
        (["timing", "--tasks", "sst2"], "--tasks is for table1, fig2 and fig3"),
        (["timing", "--jobs", "2"], "--jobs is for table1, fig2 and fig3"),
        (["fig2", "--data-dir", "data", "--jobs", "0"], "--jobs must be 1 or more"),
        (["timing", "--dry-run"], "--dry-run is for table1, fig2 and fig3"),
        (["fig2", "--data-dir", "data", "--tasks", "imdb"], "the paper has no 'imdb'"),
        (["fig2", "--data-dir", "data", "--split-ranks", "0"], "--split-ranks must be 1 or more, not 0"),
        (["fig2", "--data-dir", "data", "--split-layers", "0"], "--split-layers counts blocks from 1"),
        (["fig2", "--data-dir", "data", "--seeds", "-1"], "--seeds must be 0 or more"),
        (["fig2", "--data-dir", "data", "--num-train-epochs", "0"], "--num-train-epochs must be above 0"),
        (["fig2", "--data-dir", "data", "--max-train-samples", "-1"], "--max-train-samples"),
        (["fig2", "--data-dir", "data", "--device", "tpu"], "--device must be"),
        (["fig2", "--data-dir", "data", "--wait", "5s"], "--wait needs --server"),
    ],
)
def test_bad_flags(argv: List[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", *argv]) == 2
    assert says in error_line(capsys.readouterr().err)


def test_a_block_that_the_model_lacks(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = flags(data_dir=DATA, model=tiny_model, split_layers=5)
    assert main(["reproduce", "fig2", *argv]) == 2
    assert error_line(capsys.readouterr().err).startswith("--split-layers 5: this model has blocks 1 to 4")


def test_a_dry_run_prints_commands_and_leaves_nothing(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = flags(data_dir=DATA, model=tiny_model, tasks="rte", split_ranks=4, dry_run=True, server="localhost:1")
    assert main(["reproduce", "table1", *argv, "--output-dir", str(tmp_path / "out")]) == 0
    local, split, last = capsys.readouterr().out.splitlines()
    assert "sft-edge train --model" in local
    assert "--server" not in local
    assert "--split-rank 4" in split
    assert "--server localhost:1" in split
    assert last.startswith("2 runs, 0 of them done; 2 are left")
    assert not (tmp_path / "out").exists()
