"""Runs that may move no more than so much: they end whole, and go on with the bits of a run that nothing held back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.jobs import error_line, read_json, same_bits, weights_of
from support.proxy import TcpProxy
from support.resuming import Clouds, Outcome

from sft.errors import StorageError
from sft_edge.checkpoints import policy
from sft_edge.cli import main
from sft_edge.commands.train.budget import Budget
from sft_edge.training import TrainingLoop

LONG = {"max_steps": 60, "save_steps": None, "logging_steps": 20, "mode": "sl"}
FROZEN = {**LONG, "mode": "frozen", "activations": "resend", "codec": "float32"}


@pytest.fixture
def proxy(clouds: Clouds) -> Iterator[TcpProxy]:
    with TcpProxy(clouds.address) as proxy:
        yield proxy


def moved(proxy: TcpProxy) -> int:
    return proxy.up.forwarded + proxy.down.forwarded


@pytest.mark.first_only
@pytest.mark.parametrize("options", [LONG, FROZEN, {**LONG, "labels": "local"}])
def test_a_run_that_needs_twice_its_cap(
    run: Callable[..., int],
    whole: Callable[..., Outcome],
    clouds: Clouds,
    proxy: TcpProxy,
    out: Path,
    job,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, object],
) -> None:
    expected = whole(**options)
    needed = expected.link_bytes
    cap = needed // 2
    capsys.readouterr()
    assert run(**options, data_cap=cap, server=proxy.address) == 9
    told = capsys.readouterr()
    results = read_json(out / "all_results.json")
    steps = results["train_steps"]
    assert 0 < steps < options["max_steps"]
    counted = results["run_wire_bytes_sent"] + results["run_wire_bytes_received"]
    assert 0.95 * moved(proxy) < counted < moved(proxy) < results["run_link_bytes"] <= cap
    assert results["run_link_bytes"] > 0.6 * cap, "most of it was used"
    assert results["ended_by"] == "data-cap"
    assert f"training will end near step {steps} of" in told.err or abs(_said_step(told.err) - steps) <= 6
    assert told.out.endswith(
        f"ended the run after step {steps} of {options['max_steps']}, which is saved in {out / f'checkpoint-{steps}'}; "
        "the same command with a higher --data-cap and --resume-from-checkpoint goes on\n"
    )
    assert main(["evaluate", "--model", str(out), "--data-dir", str(job.data_dir), "--task", job.task]) == 0

    capsys.readouterr()
    assert run(**options, data_cap=cap, server=proxy.address, resume_from_checkpoint=True) == 2
    assert "and not one step fits; give more" in (line := error_line(capsys.readouterr().err)) or "too little" in line
    assert run(**options, data_cap=3 * needed, server=proxy.address, resume_from_checkpoint=True) == 0
    assert "the run fits" in capsys.readouterr().err
    assert same_bits(weights_of(out), expected.weights)
    assert Outcome(out, clouds.store).history == expected.history
    results = read_json(out / "all_results.json")
    assert moved(proxy) < results["run_link_bytes"]
    counted = results["run_wire_bytes_sent"] + results["run_wire_bytes_received"]
    assert counted == pytest.approx(moved(proxy), rel=0.05), "what the run had moved before counts"
    assert results["ended_by"] is None


@pytest.fixture
def needed(whole: Callable[..., Outcome]) -> int:
    """Bytes of a run with LONG, without checkpoints."""
    return int(whole(**LONG).link_bytes)


@pytest.mark.first_only
def test_an_older_checkpoint_where_the_last_cannot_be_saved(
    run: Callable[..., int],
    needed: int,
    out: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = policy.write_checkpoint

    def full(directory: Path, run_id: str, step: int, *rest: object) -> object:
        if step > 5:
            raise StorageError("the disk is full")
        return write(directory, run_id, step, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(policy, "write_checkpoint", full)
    assert run(**{**LONG, "save_steps": 5}, data_cap=needed // 2) == 9
    assert capsys.readouterr().out.endswith(
        f"of 60; no checkpoint of it is saved, the same command with a higher --data-cap and --resume-from-checkpoint "
        f"goes on from {out / 'checkpoint-5'}\n"
    )


@pytest.mark.first_only
def test_a_session_that_is_lost_in_the_last_save_leaves_no_older_model_for_a_result(
    run: Callable[..., int],
    needed: int,
    out: Path,
    clouds: Clouds,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save = policy.Checkpointing.save_now

    def lost(checkpointing: policy.Checkpointing, loop: TrainingLoop) -> None:
        clouds.replace()
        save(checkpointing, loop)

    monkeypatch.setattr(policy.Checkpointing, "save_now", lost)
    looked_up = Budget._next
    monkeypatch.setattr(Budget, "_next", lambda budget, loop: 10 * looked_up(budget, loop))  # there is room to go on in
    assert run(**{**LONG, "save_steps": 15}, data_cap=needed // 2) == 2
    assert "and not one step fits; give more" in error_line(capsys.readouterr().err)
    assert not (out / "model.safetensors").exists()


def test_a_cap_that_is_less_than_the_result(
    run: Callable[..., int], proxy: TcpProxy, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(data_cap="10kB", server=proxy.address) == 2
    assert "--data-cap 10 kB is too little: bringing the result home takes " in error_line(capsys.readouterr().err)
    assert moved(proxy) == 0


def _said_step(stderr: str) -> int:
    return int(stderr.partition("training will end near step ")[2].split()[0])
