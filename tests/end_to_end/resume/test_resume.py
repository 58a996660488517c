"""Runs that are broken off and go on: the bits of one that was not, of both halves and of all that was noted."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.jobs import error_line, read_json, same_bits, weights_of
from support.resuming import Clouds, Outcome, PowerCut, steps_in

KINDS: list[dict[str, object]] = [
    {"mode": "local"},
    {"mode": "local", "split_layer": None, "lora_r": 2, "lora_dropout": 0.1},
    {"mode": "sl"},
    {},
    {"labels": "local"},
    {"codec": "int8", "gradient_codec": "int4", "gradient_accumulation_steps": 2},
    {"lora_r": 2, "lora_dropout": 0.1, "lora_half": "both"},
    {"freeze_edge": True},
    {"freeze_edge": True, "activations": "keep-on-edge", "mode": "sl", "codec": "int8"},
    {"freeze_edge": True, "activations": "keep-on-cloud", "labels": "local", "eval_strategy": "epoch"},
    {"freeze_edge": True, "activations": "keep-on-edge", "mode": "sl", "codec": "fitted"},
    {"freeze_edge": True, "activations": "keep-on-cloud", "mode": "sl", "codec": "fitted"},
    {"residual": "low-rank", "optim": "SGD", "optim_args": "momentum=0.9"},
    {"eval_strategy": "steps", "eval_steps": 2, "logging_steps": 3},
    {"eval_strategy": "epoch", "dataloader_num_workers": 1, "lr_scheduler_type": "cosine", "save_total_limit": 1},
]


QUICK = (2, 3, 4, 6, 10)
"""Of the kinds; the others are tried with the slow tests."""


@pytest.mark.first_only
@pytest.mark.parametrize(
    "options",
    [pytest.param(one, id=str(one), marks=[] if i in QUICK else [pytest.mark.slow]) for i, one in enumerate(KINDS)],
)
def test_an_edge_that_is_cut_off_and_started_again(
    run: Callable[..., int],
    whole: Callable[..., Outcome],
    clouds: Clouds,
    out: Path,
    at_step: Callable[[int, Callable[[], object]], None],
    options: dict[str, object],
) -> None:
    expected = whole(**options)

    def cut() -> None:
        raise PowerCut

    at_step(5, cut)
    with pytest.raises(PowerCut):
        run(**options)
    assert steps_in(out) == ([4] if "save_total_limit" in options else [2, 4])
    if options.get("mode") != "local":
        clouds.replace()
    assert run(**options, resume_from_checkpoint=True) == 0
    Outcome(out, clouds.store).check_same(expected)


def test_from_any_step_again(
    run: Callable[..., int], whole: Callable[..., Outcome], clouds: Clouds, out: Path, tmp_path: Path
) -> None:
    """Named on the command line, into the same directory and into another one."""
    expected = whole()
    assert run() == 0
    for step in (2, 6):
        assert run(resume_from_checkpoint=out / f"checkpoint-{step}", output_dir=None) == 0
        Outcome(out, clouds.store).check_same(expected)
    assert run(resume_from_checkpoint=out / "checkpoint-4", output_dir=tmp_path / "other") == 0
    assert same_bits(weights_of(tmp_path / "other"), expected.weights)
    assert steps_in(tmp_path / "other") == [6]
    run_id = read_json(out / "checkpoint-4" / "manifest.json")["run_id"]
    assert {path.name.partition("-")[0] for path in clouds.store.glob(f"*/{run_id}/*")} == {"4", "6"}


def test_one_command_for_ever(
    run: Callable[..., int], whole: Callable[..., Outcome], clouds: Clouds, out: Path, capsys
) -> None:
    expected = whole()
    assert run(resume_from_checkpoint=True) == 0
    assert f"no checkpoint in {out} yet: beginning at step 0" in capsys.readouterr().err
    Outcome(out, clouds.store).check_same(expected)
    assert run(resume_from_checkpoint=True) == 0
    assert f"going on from step 6, as it is in {out / 'checkpoint-6'}" in capsys.readouterr().err
    Outcome(out, clouds.store).check_same(expected)


# What is refused.


def test_another_run_is_refused_by_name(
    run: Callable[..., int], clouds: Clouds, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(max_steps=3) == 0
    for changes, said in (
        ({"split_rank": 2}, "--split-rank 4, now it is 2"),
        ({"mode": "sl"}, "--mode sft, now it is sl"),
        ({"seed": 8}, "--seed 7, now it is 8"),
        ({"optim": "SGD"}, "--optim AdamW, now it is SGD"),
    ):
        capsys.readouterr()
        assert run(**{"max_steps": 3, "resume_from_checkpoint": True, **changes}) == 2
        line = error_line(capsys.readouterr().err)
        assert line.startswith(f"{out / 'checkpoint-2'} was trained with {said}"), line
    assert run(max_steps=3, resume_from_checkpoint=True, max_train_samples=9) == 2
    assert steps_in(out) == [2]


@pytest.mark.parametrize("schedule", [pytest.param("constant", marks=pytest.mark.slow), "linear"])
def test_a_run_that_is_over_gets_more_steps(
    run: Callable[..., int],
    whole: Callable[..., Outcome],
    clouds: Clouds,
    out: Path,
    capsys: pytest.CaptureFixture[str],
    schedule: str,
) -> None:
    """With a schedule that does not know how long the run is, it ends with the bits of one that was so long at once."""
    options = {"lr_scheduler_type": schedule, "mode": "local" if schedule == "linear" else "sft"}
    assert run(max_steps=2, **options) == 0
    capsys.readouterr()
    assert run(resume_from_checkpoint=True, **options) == 0
    told = capsys.readouterr().err
    assert "it was to have 2 steps: learning rates are those of 7 from here on" in told
    rates = [e["learning_rate"] for e in read_json(out / "trainer_state.json")["log_history"] if "learning_rate" in e]
    if schedule == "constant":
        Outcome(out, clouds.store).check_same(whole())
    else:
        assert rates == pytest.approx([1e-3, 5e-4, *(1e-3 * left / 7 for left in (5, 4, 3, 2, 1))])
    assert run(max_steps=3, resume_from_checkpoint=True, **options) == 2
    assert error_line(capsys.readouterr().err).startswith(f"{out / 'checkpoint-6'}: 6 steps are taken, and --max-steps")


def test_a_checkpoint_that_is_not_there(run: Callable[..., int], out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(resume_from_checkpoint=out / "checkpoint-2") == 4
    assert error_line(capsys.readouterr().err).startswith(f"{out / 'checkpoint-2'}: no whole checkpoint")


def test_a_cloud_that_lost_its_half(
    run: Callable[..., int], clouds: Clouds, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(max_steps=5) == 0
    shutil.rmtree(clouds.store)
    capsys.readouterr()
    assert run(max_steps=5, resume_from_checkpoint=True) == 5
    assert "has no whole checkpoint of the run at a step that the edge has (the newest: 2, 4)" in error_line(
        capsys.readouterr().err
    )


@pytest.mark.first_only
@pytest.mark.parametrize("side", ["edge", "cloud"])
def test_a_newest_half_that_is_torn(
    run: Callable[..., int], whole: Callable[..., Outcome], clouds: Clouds, out: Path, side: str
) -> None:
    """The step before is taken."""
    expected = whole()
    assert run() == 0
    run_id = read_json(out / "checkpoint-6" / "manifest.json")["run_id"]
    (half,) = [out / "checkpoint-6"] if side == "edge" else clouds.store.glob(f"*/{run_id}/6-*")
    path = half / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    (out / "all_results.json").unlink()
    assert run(resume_from_checkpoint=True) == 0
    Outcome(out, clouds.store).check_same(expected)


def test_halves_of_two_time_lines(
    run: Callable[..., int], clouds: Clouds, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The edge's half of one run beside the cloud's of another, which has the same steps."""
    assert run(max_steps=2) == 0
    assert run(max_steps=2, output_dir=tmp_path / "other") == 0
    mine, other = (read_json(place / "checkpoint-2" / "manifest.json") for place in (out, tmp_path / "other"))
    assert mine["run_id"] != other["run_id"]
    path = out / "checkpoint-2" / "manifest.json"
    path.write_text(path.read_text().replace(mine["run_id"], other["run_id"]))
    capsys.readouterr()
    assert run(max_steps=2, resume_from_checkpoint=True) == 5
    assert "has no whole checkpoint" in error_line(capsys.readouterr().err)
