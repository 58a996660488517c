"""`sft-edge plan`, by true sessions with a true server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.callers import named
from support.jobs import Job, error_line, flags, read_json
from support.script import adamw, tiny_model, wrap
from support.servers import start_server

from sft_cloud.access.protection import Access
from sft_cloud.server import CloudServer
from sft_edge.cli import main

pytestmark = pytest.mark.usefixtures("quick_trials")

OPEN = {"split_layer": None, "split_rank": None, "max_seq_length": 32}


@pytest.fixture
def plan(job: Job, model: Path, cloud: str) -> Callable[..., int]:
    def run(**options: object) -> int:
        return main(["plan", *job.flags(**{"model": model, "server": cloud, **OPEN, **options})])

    return run


def told(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_every_way_to_train(plan: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(json=True, svg=tmp_path / "plan.svg", price_per_gb=2.5) == 0
    content = told(capsys)
    plans = content["plans"]
    assert len(plans) == 3 * (3 * 3 + 3 + 4) + 1
    assert {one["split_layer"] for one in plans} == {0, 1, 2, 3}
    assert content["best"]["run_seconds"] == min(one["run_seconds"] for one in plans)
    assert content["steps"] == 3 * content["steps_in_epoch"] == 12
    by_name = {(one["mode"], one["split_layer"], one["split_rank"], one["codec"]): one for one in plans}
    local, frozen = by_name["local", 0, 0, ""], by_name["frozen", 2, 0, "int8"]
    sl, sft = by_name["sl", 2, 0, "float32"], by_name["sft", 2, 8, "int8"]
    assert local["step_bytes"] == local["run_bytes"] == local["price"] == 0.0
    assert local["points"] == sl["points"] == 0.0
    assert 0 < sft["step_bytes"] < frozen["step_bytes"] < sl["step_bytes"]
    assert sl["price"] == pytest.approx(2.5 * sl["run_bytes"] / 1e9)
    assert frozen["run_bytes"] < sl["run_bytes"] - 12 * (sl["step_bytes"] - frozen["step_bytes"]), "sent once"
    assert all(50e6 < one["edge_memory_bytes"] < 8e9 for one in plans)
    assert all(one["step_seconds"] > 0 and one["edge_processor_seconds"] > 0 for one in plans)
    picture = (tmp_path / "plan.svg").read_text()
    assert picture.startswith("<svg")
    assert "sft R=16 int8" in picture


def test_the_table_and_its_limits(plan: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    given = {"mode": "sl", "split_layer": 2, "max_run_time": "1h", "data_cap": "1GB", "max_mbit": 50}
    assert plan(**given, codec="float32") == 0
    out, err = capsys.readouterr()
    assert "measuring the way to the cloud\nhashing the weights of every cut, " in err, "which takes its time, too"
    assert "12 steps, 4 an epoch" in out
    (row,) = [line for line in out.splitlines() if line.strip().startswith("sl l=2 float32")]
    assert row.rstrip().endswith("best")
    assert "+0.0" in row
    capsys.readouterr()
    assert plan(**given, codec="float32", max_bytes_per_step="1kB") == 2
    told = capsys.readouterr()
    assert "not within --max-bytes-per-step" in told.out
    line = error_line(told.err)
    assert line.startswith("none of 1 ways to train keeps to all limits: --max-bytes-per-step 1 kB rules out 1 of them")
    assert "the nearest is sl l=2 float32, which breaks --max-bytes-per-step 1 kB (it takes " in line


def test_a_rate_holds_a_step_back(plan: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(mode="sl", split_layer=2, codec="float32", max_mbit=0.5, json=True) == 0
    (held,) = told(capsys)["plans"]
    assert held["step_seconds"] >= 0.9 * held["step_bytes"] / 2 / (0.5e6 / 8)


@pytest.mark.parametrize("mode", ["sl", "frozen"])
def test_bytes_are_those_of_the_run(
    plan: Callable[..., int],
    train: Callable[..., Path],
    job: Job,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    mode: str,
) -> None:
    options = {"mode": mode, "split_layer": 2, "codec": "int8", "num_train_epochs": 2, "max_seq_length": 32}
    assert plan(**options, json=True) == 0
    (planned,) = told(capsys)["plans"]
    run = read_json(train(job, model=model, **options) / "all_results.json")
    # Names of tensors, of which so small a model is half, are not looked up.
    assert 0.95 * run["run_link_bytes"] < planned["run_bytes"] < 1.25 * run["run_link_bytes"]


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "sft", "labels": "local", "gradient_accumulation_steps": 2},
        {"mode": "sl", "codec": "int8", "gradient_accumulation_steps": 100},
        {"mode": "frozen", "codec": "int8", "activations": "keep-on-edge"},
    ],
)
def test_other_ways_to_send(
    plan: Callable[..., int], capsys: pytest.CaptureFixture[str], options: dict[str, object]
) -> None:
    assert plan(**options, split_layer=1, json=True) == 0
    content = told(capsys)
    assert content["best"]["mode"] == options["mode"]
    assert content["steps"] == {2: 6, 100: 3}.get(options.get("gradient_accumulation_steps"), 12)
    assert content["measured"][0]["sent"] < 3 * content["best"]["step_bytes"], "an epoch's end is a step's, too"


def test_a_rate_that_no_training_stands(plan: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is trained: what is tried has weights of no meaning, which may not stand the rate of a run either."""
    given = {"mode": "frozen", "split_layer": 1, "codec": "int8", "optim": "SGD", "learning_rate": 1e30}
    assert plan(**given, json=True) == 0
    assert told(capsys)["best"]["step_seconds"] > 0


def test_a_caller_who_has_limits(plan: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ways that the server takes, of a model that it takes: as of a run."""
    access = Access(identify=named(models=("tiny*",), max_split_rank=16))
    server = start_server(tmp_path / "cloud", access=access)
    given = {"server": server.address, "model_name": "tiny-bert", "codec": "int8", "split_layer": 1, "json": True}
    try:
        assert plan(**given, mode="sft") == 0
        assert {one["split_rank"] for one in told(capsys)["plans"]} == {8, 16}
        assert plan(**given, mode="sl") == 2
        line = error_line(capsys.readouterr().err)
    finally:
        server.stop(grace_seconds=0)
    assert line == "the server takes ranks up to 16 of us, and every way to train here is wider"


def test_a_server_that_is_gone(plan: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(server="127.0.0.1:1", connect_timeout="1s") == 5
    assert error_line(capsys.readouterr().err).startswith("nobody answers at 127.0.0.1:1")


def test_a_server_that_is_full(
    plan: Callable[..., int], start_cloud: Callable[..., CloudServer], capsys: pytest.CaptureFixture[str]
) -> None:
    server, small = start_cloud(max_sessions=1), tiny_model()
    with wrap(small, adamw(small), server=server.address):
        assert plan(server=server.address, mode="sl", split_layer=1, codec="int8") == 5
        assert error_line(capsys.readouterr().err)
    assert plan(server=server.address, mode="sl", split_layer=1, codec="int8") == 0, "sessions are closed"


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        ({"data_dir": "/nowhere"}, 3, "/nowhere"),
        ({"split_layer": 9}, 2, "split_layer is 9, but this model has blocks 1 to 3"),
        ({"mode": "local", "server": None, "max_run_time": "1ms"}, 2, "none of 1 ways to train keeps to all limits"),
        ({"mode": "sl", "min_accuracy": 3}, 2, "--min-accuracy must be from -100 to 0"),
    ],
)
def test_what_cannot_be_planned(
    plan: Callable[..., int], capsys: pytest.CaptureFixture[str], options: dict[str, object], code: int, says: str
) -> None:
    assert plan(**options) == code
    assert says in error_line(capsys.readouterr().err)


def test_help_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", *flags(help=True)])
    assert "--min-accuracy" in capsys.readouterr().out
