"""`sft-edge demo`, with a tiny model in MiniLM's place."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from support.jobs import error_line, read_json
from support.tiny import make_tiny_model

from sft_edge.cli import main
from sft_edge.commands.demo import comparison


def figures(**changes: object) -> dict[str, object]:
    wire = {"wire_bytes_sent": 61_000, "wire_bytes_received": 60_000, "wire_reduction": 48.04}
    return {
        "eval_accuracy": 81.25,
        "train_steps": 10,
        "train_samples": 320,
        "edge_forward_seconds": 1.6,
        "edge_backward_seconds": 3.2,
        "train_runtime": 83.0,
        "edge_peak_memory_bytes": 3e8,
        **wire,
        **changes,
    }


def test_the_table_has_a_row_for_every_system() -> None:
    nothing = {"wire_bytes_sent": 0, "wire_bytes_received": 0, "wire_reduction": None}
    table = comparison({"local": figures(**nothing), "sft": figures(eval_accuracy=80.0)})
    screen = io.StringIO()
    Console(file=screen, width=120).print(table)
    rows = [line.split("  ") for line in screen.getvalue().splitlines()]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert ["local", "81.2", "-", "-", "1m23s", "15.0", "300 MB"] in cells
    assert ["sft", "80.0", "12.1 kB", "48.0x", "1m23s", "15.0", "300 MB"] in cells


@pytest.mark.parametrize("theirs", ["notes.txt", "data/SST-2/test.tsv", "data/MRPC/train.tsv"])
def test_what_no_demo_wrote_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str], theirs: str) -> None:
    """Real data where the synthetic set would go, for one."""
    (tmp_path / theirs).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / theirs).write_text("theirs")
    before = sorted(tmp_path.rglob("*"))
    assert main(["demo", "--output-dir", str(tmp_path)]) == 2
    assert "which no demo wrote; name another" in error_line(capsys.readouterr().err)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_it_trains_the_three_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with a cloud of its own, and once more over what the first demo left: there as far as the first run."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = make_tiny_model(tmp_path / "tiny", layers=3)
    demo = ["demo", "--output-dir", str(tmp_path / "demo"), "--split-layer", "2", "--split-rank", "4"]
    demo += ["--max-train-samples", "64", "--num-train-epochs", "1"]
    assert main([*demo, "--model", str(model)]) == 0
    told = capsys.readouterr().out
    for mode in ("local", "sl", "sft", "frozen"):
        results = read_json(tmp_path / "demo" / mode / "all_results.json")
        assert (results["mode"], results["train_samples"], results["eval_samples"]) == (mode, 64, 400)
    assert "the systems on the synthetic set" in told
    assert main([*demo, "--model", str(tmp_path / "nowhere")]) == 4, "the first run's own code"
    told = capsys.readouterr()
    assert "wrote a synthetic text set" in told.out
    assert "the systems on the synthetic set" not in told.out
    assert main(["predict", "--model", str(tmp_path / "demo" / "sft"), "--text", "the plot is not bad at all"]) == 0
    assert capsys.readouterr().out.split("\t")[0] in ("negative", "positive")
