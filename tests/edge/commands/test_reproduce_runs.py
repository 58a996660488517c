"""`sft-edge reproduce`, which has its runs done by other processes: here by a program that only leaves what they do."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import pytest
from support.jobs import error_line, flags, read_json
from support.tiny import make_tiny_model

from sft.errors import StorageError
from sft_edge.cli import main
from sft_edge.commands.reproduce.records import Directory

RUN = """\
import json, os, pathlib, signal, sys
said = dict(zip(sys.argv[2::2], sys.argv[3::2]))
output_dir = pathlib.Path(said["--output-dir"])
output_dir.mkdir(parents=True, exist_ok=True)
with open(os.environ["CALLS"], "a") as calls:
    calls.write(f"{output_dir.parent.name}{' goes on' if sys.argv[-1] == '--resume-from-checkpoint' else ''}\\n")
if output_dir.parent.name in os.environ.get("FAILING", ""):
    print("a warning\\nsft-edge train: error: no rows")
    sys.exit(3)
results = {"wire_bytes_sent": 6, "wire_bytes_received": 4, "train_steps": 1, "eval_accuracy": 75.0}
def leave():
    (output_dir / "all_results.json").write_text(json.dumps(results))
def meet():  # the other run, which is on, too, or this one dies
    if "MEETING" in os.environ:
        signal.alarm(60)
        open(os.environ["MEETING"], "r" if output_dir.parent.name == os.environ["READING"] else "w")
        signal.alarm(0)
if output_dir.parent.name in os.environ.get("INTERRUPTING", ""):
    (output_dir / "checkpoint-1").mkdir()
    ignores = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    def on_sigterm(*_):
        print("saved, without Ctrl-C" if ignores else "?", flush=True)
        if "LEAVING" in os.environ:
            leave()
        if os.environ.get("LEAVING") == "killed":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    signal.signal(signal.SIGTERM, on_sigterm)
    meet()
    if os.environ["INTERRUPTING"].startswith(output_dir.parent.name):
        os.kill(os.getppid(), int(os.environ["SIGNAL"]))
    signal.alarm(60)  # who is not asked to end dies, and has saved nothing
    while True:
        signal.pause()
meet()
if output_dir.parent.name not in os.environ.get("TORN", ""):
    leave()
(output_dir / "model.safetensors").write_text("weights")
"""

GRID = """\
import sys
from pathlib import Path
from sft.cli.child import python_command
from sft_edge.commands.reproduce import runner
from sft_edge.commands.reproduce.grid import BASELINE, Run
from sft_edge.signals import Termination
runner.python_command = lambda module, **how: python_command("left_alone", **how)
runner.Runner(Path(sys.argv[1]), [], {}, False, Termination()).do([Run("rte", BASELINE, 0, {})])
"""
LEFT_ALONE = """\
import os, signal
def main():
    told = os.open(os.environ["TOLD"], os.O_WRONLY)
    signal.signal(signal.SIGTERM, lambda *_: (os.write(told, b"asked to end"), os._exit(0)))
    signal.alarm(300)
    os.write(told, b"on")
    while True:
        signal.pause()
"""
"""A run whose grid is killed, and what has it done."""

WHOLE = '{"wire_bytes_sent": 6, "wire_bytes_received": 4, "train_steps": 1, "eval_accuracy": 75.0}'
"""What a run that has ended leaves."""

LOCAL, SPLIT = "rte-local-seed0", "rte-sft-l3-r4-seed0"

Reproduce = Callable[..., Tuple[int, List[str]]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four blocks."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def reproduce(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Reproduce:
    """Runs table1 of two runs into `tmp_path / "out"`; gives the exit code and the runs that were begun."""
    monkeypatch.setattr(
        "sft_edge.commands.reproduce.runner.python_command", lambda *_, **__: [sys.executable, "-c", RUN]
    )
    calls = tmp_path / "calls"
    monkeypatch.setenv("CALLS", str(calls))

    def run(**options: Any) -> Tuple[int, List[str]]:
        calls.write_text("")
        values: Dict[str, Any] = {"model": model, "data_dir": "data", "tasks": "rte", "split_ranks": 4, **options}
        code = main(["reproduce", "table1", *flags(output_dir=tmp_path / "out", **values)])
        return code, calls.read_text().splitlines()

    return run


def test_what_is_finished_is_not_run_again(
    reproduce: Reproduce, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reproduce() == (0, [LOCAL, SPLIT])
    told = capsys.readouterr().out
    assert "2/2  rte    SFT(l=3,R=4)  seed 0: accuracy 75.00, " in told
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [LOCAL, SPLIT, "table1.json", "table1.md", "table1.svg"]
    assert sorted(path.name for path in (out / LOCAL).iterdir()) == ["all_results.json", "log.txt", "run.json"]
    report = read_json(out / "table1.json")
    assert [run["score"] for run in report["runs"]] == [75.0, 75.0]
    assert report["runs"][1]["flags"]["--split-rank"] == "4"
    assert report["runs"][1]["made_with"]["versions"]["torch"]
    assert report["mean_loss_against_local"] == {"local": 0.0, "SFT(l=3,R=4)": 0.0}
    assert "| SFT(l=3,R=4) | 75.00 | 75.00 | +0.00 |" in (out / "table1.md").read_text()
    assert reproduce() == (0, [])
    assert "2 of 2 runs are there already" in capsys.readouterr().out
    assert reproduce(seeds=1) == (0, [LOCAL[:-1] + "1", SPLIT[:-1] + "1"]), "another seed is another run"


def test_a_run_with_other_flags_is_run_anew(reproduce: Reproduce, tmp_path: Path) -> None:
    reproduce()
    (tmp_path / "out" / LOCAL / "model").mkdir()
    (tmp_path / "out" / LOCAL / "model" / "checkpoint-7").mkdir()  # which a run of these flags could not go on from
    assert reproduce(learning_rate=1e-3) == (0, [LOCAL, SPLIT])
    assert not (tmp_path / "out" / LOCAL / "model").exists()
    assert read_json(tmp_path / "out" / LOCAL / "run.json")["flags"]["--learning-rate"] == "0.001"


@pytest.mark.parametrize(
    "left", ["", "{", "[]", "{}", "[" * 100_000, WHOLE.replace("75.0", "null"), WHOLE.replace("75.0", "1" + "0" * 400)]
)
def test_results_that_are_not_whole_are_made_again(reproduce: Reproduce, tmp_path: Path, left: str) -> None:
    reproduce()
    (tmp_path / "out" / SPLIT / "all_results.json").write_text(left)
    assert reproduce() == (0, [SPLIT])


def test_what_others_wrote_beside_the_results_is_shown_as_text(reproduce: Reproduce, tmp_path: Path) -> None:
    reproduce()
    directory = tmp_path / "out" / LOCAL
    (directory / "all_results.json").write_text(WHOLE[:-1] + ', "train_samples": ' + "[" * 500 + "]" * 500 + "}")
    record = {**read_json(directory / "run.json"), "made_with": {"versions": [1], "devices": [{"\x1b[2J": "\ud800"}]}}
    (directory / "run.json").write_text(json.dumps(record))
    assert reproduce() == (0, [])
    assert read_json(tmp_path / "out" / "table1.json")["runs"][0]["made_with"]["versions"] == {}
    assert "\x1b" not in (tmp_path / "out" / "table1.md").read_text()


def test_a_plot_of_other_runs_goes(reproduce: Reproduce, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reproduce()
    monkeypatch.setenv("FAILING", f"{LOCAL} {SPLIT}")
    reproduce(learning_rate=1e-3)
    assert not (tmp_path / "out" / "table1.svg").exists()


def test_models_are_kept_where_that_is_wanted(reproduce: Reproduce, tmp_path: Path) -> None:
    reproduce(keep_models=True)
    assert (tmp_path / "out" / LOCAL / "model" / "model.safetensors").exists()


def test_a_run_that_fails_is_told_and_the_others_go_on(
    reproduce: Reproduce, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAILING", LOCAL)
    assert reproduce() == (3, [LOCAL, SPLIT])
    log = tmp_path / "out" / LOCAL / "log.txt"
    told = capsys.readouterr().out
    assert f"local  seed 0: failed: sft-edge train: error: no rows ({log})\n" in told
    assert "1 run failed" in told
    assert read_json(tmp_path / "out" / "table1.json")["failed"][0]["run"] == LOCAL
    monkeypatch.setenv("FAILING", "")
    monkeypatch.setenv("TORN", LOCAL)
    assert reproduce()[0] == 1
    assert "no whole results: it said nothing" in capsys.readouterr().out, "and not what the first attempt said"
    monkeypatch.delenv("TORN")
    assert reproduce() == (0, [f"{LOCAL} goes on"])
    assert log.read_text().startswith("a warning"), "of all attempts"


def test_a_run_that_leaves_no_results_has_failed(
    reproduce: Reproduce, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORN", SPLIT)
    assert reproduce() == (1, [LOCAL, SPLIT])
    assert "failed: it left no whole results: it said nothing" in capsys.readouterr().out
    monkeypatch.delenv("TORN")
    assert reproduce() == (0, [f"{SPLIT} goes on"])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_who_is_stopped_goes_on_with_the_run_that_was_on(
    reproduce: Reproduce,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    code: int,
) -> None:
    """The run is asked by SIGTERM, by which it saves a checkpoint, and gets no Ctrl-C of the terminal's."""
    monkeypatch.setenv("FAILING", LOCAL)
    monkeypatch.setenv("INTERRUPTING", SPLIT)
    monkeypatch.setenv("SIGNAL", str(int(number)))
    assert reproduce() == (code, [LOCAL, SPLIT])
    assert "table1, 0 of 2 runs" in capsys.readouterr().out, "what is there is reported"
    assert [one["run"] for one in read_json(tmp_path / "out" / "table1.json")["failed"]] == [LOCAL]
    directory = tmp_path / "out" / SPLIT
    assert (directory / "log.txt").read_text() == "saved, without Ctrl-C\n"
    assert (directory / "model" / "checkpoint-1").exists()
    assert 0 < read_json(directory / "run.json")["seconds"] < 60
    monkeypatch.delenv("INTERRUPTING")
    monkeypatch.delenv("FAILING")
    assert reproduce() == (0, [f"{LOCAL} goes on", f"{SPLIT} goes on"])


@pytest.mark.parametrize("how", ["ended", "killed"])
def test_a_run_that_gets_to_its_end_while_it_is_stopped_counts(
    reproduce: Reproduce, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Asked to end it had nothing left but to leave, or was past that, where a SIGTERM kills it."""
    monkeypatch.setenv("INTERRUPTING", SPLIT)
    monkeypatch.setenv("SIGNAL", str(int(signal.SIGTERM)))
    monkeypatch.setenv("LEAVING", how)
    assert reproduce()[0] == 143
    told = capsys.readouterr().out
    assert "2/2  rte    SFT(l=3,R=4)  seed 0: accuracy 75.00, " in told
    assert "table1, 2 of 2 runs" in told
    directory = tmp_path / "out" / SPLIT
    assert read_json(directory / "run.json")["made_with"]["versions"]["torch"]
    assert not (directory / "model").exists()
    monkeypatch.delenv("INTERRUPTING")
    assert reproduce() == (0, [])


def test_runs_end_with_a_grid_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "left_alone.py").write_text(LEFT_ALONE)
    os.mkfifo(str(tmp_path / "told"))
    told = os.open(str(tmp_path / "told"), os.O_RDONLY | os.O_NONBLOCK)
    places = os.pathsep.join([str(tmp_path), *sys.path])
    environment = {**os.environ, "PYTHONPATH": places, "TOLD": str(tmp_path / "told")}
    grid = subprocess.Popen(
        [sys.executable, "-c", GRID, str(tmp_path / "out")], env=environment, stdout=subprocess.DEVNULL
    )
    try:
        assert select.select([told], [], [], 300)[0]
        assert os.read(told, 100) == b"on"
        grid.kill()
        assert select.select([told], [], [], 300)[0]
        assert os.read(told, 100) == b"asked to end"
    finally:
        grid.kill()
        grid.wait()
        os.close(told)


@pytest.fixture
def meeting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the two runs waits until the other is on."""
    os.mkfifo(str(tmp_path / "meeting"))
    monkeypatch.setenv("MEETING", str(tmp_path / "meeting"))
    monkeypatch.setenv("READING", LOCAL)


@pytest.mark.usefixtures("meeting")
def test_runs_side_by_side(reproduce: Reproduce, capsys: pytest.CaptureFixture[str]) -> None:
    code, begun = reproduce(jobs=2)
    assert (code, sorted(begun)) == (0, [LOCAL, SPLIT])
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"1/2  rte    local  seed 0: accuracy 75.00, .*|2/2  rte    SFT\(l=3,R=4\)  seed 0: ac", lines[0])
    assert "2 of 2 runs" in lines[2]


@pytest.mark.usefixtures("meeting")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_all_that_are_on_are_stopped(
    reproduce: Reproduce, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    monkeypatch.setenv("INTERRUPTING", f"{SPLIT} {LOCAL}")
    monkeypatch.setenv("SIGNAL", str(int(number)))
    assert reproduce(jobs=2)[0] == code
    for name in (LOCAL, SPLIT):
        assert (tmp_path / "out" / name / "log.txt").read_text() == "saved, without Ctrl-C\n"
        assert read_json(tmp_path / "out" / name / "run.json")["ended"] is False
    monkeypatch.delenv("INTERRUPTING")
    monkeypatch.delenv("MEETING")
    assert reproduce() == (0, [f"{LOCAL} goes on", f"{SPLIT} goes on"])
    made_with = [run["made_with"] for run in read_json(tmp_path / "out" / "table1.json")["runs"]]
    assert [made["side_by_side"] for made in made_with] == [2, 2], "as they were at first"


@pytest.mark.usefixtures("meeting")
def test_what_cannot_be_kept_of_one_that_is_stopped_is_told(
    reproduce: Reproduce, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    end = Directory.end

    def end_unless_full(directory: Directory, *given: Any) -> Any:
        if directory.path.name == LOCAL:
            raise StorageError("no space left")
        return end(directory, *given)

    monkeypatch.setattr(Directory, "end", end_unless_full)
    monkeypatch.setenv("INTERRUPTING", f"{LOCAL} {SPLIT}")
    monkeypatch.setenv("SIGNAL", str(int(signal.SIGTERM)))
    assert reproduce(jobs=2)[0] == 143, "it was stopped all the same"
    assert "rte    local  seed 0: failed: no space left\nstopped\n" in capsys.readouterr().out
    assert read_json(tmp_path / "out" / SPLIT / "run.json")["seconds"] > 0


@pytest.mark.parametrize("name", ["notes.txt", "run.json"])
def test_what_no_run_left_stays(
    reproduce: Reproduce, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    theirs = tmp_path / "out" / LOCAL / name
    theirs.parent.mkdir(parents=True)
    theirs.write_text('{"theirs": 1}')
    assert reproduce() == (2, [])
    assert "holds what no run of this command left" in error_line(capsys.readouterr().err)
    assert theirs.read_text() == '{"theirs": 1}'
