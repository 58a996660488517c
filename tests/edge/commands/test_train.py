"""`sft-edge train --mode local`: the whole way from files to a directory that answers, in one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import List

import pytest
from support.jobs import JOBS, error_line, flags, read_json, same_bits, weights_of
from support.tiny import FAMILIES, make_tiny_model
from transformers import AutoModelForSequenceClassification

from sft_edge.cli import main
from sft_edge.model_files.saved import load_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", layers=2)


def lines_of(out: str) -> List[str]:
    return out.splitlines()


@pytest.mark.one_in(3)
@pytest.mark.parametrize("task", JOBS)
def test_every_kind_of_task(tmp_path: Path, model: Path, task: str, capsys: pytest.CaptureFixture[str]) -> None:
    job, output_dir = JOBS[task](tmp_path / "data"), tmp_path / "out"
    options = {"mode": "local", "model": model, "split_layer": None, "output_dir": output_dir}
    assert main(["train", *job.flags(**options, max_steps=3)]) == 0
    told = capsys.readouterr()
    assert told.out.endswith(f"saved in {output_dir}\n")
    assert "step 3/3" in told.err
    results = read_json(output_dir / "all_results.json")
    assert results["wire_bytes_sent"] == results["wire_payload_bytes_received"] == 0
    assert results["wire_reduction"] is None

    data = {"data_dir": job.data_dir, "task": task}
    if task == "stsb":
        # In the batches of training: how far rows are padded shows in the last bits, and a correlation of predictions
        # that are nearly alike shows them in the fifth digit.
        data["per_device_eval_batch_size"] = 8
    assert main(["evaluate", *flags(model=output_dir, **data)]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    for name in set(evaluated) - {"eval_runtime", "eval_samples_per_second"}:
        assert evaluated[name] == pytest.approx(results[name], rel=1e-5), name
    questions = {"stsb": ["--text-pair", "a good film"], "squad": ["--text-pair", "it was a good film"]}
    asking = ["predict", "--model", str(output_dir), "--text", "what is it", *questions.get(task, []), "--json-lines"]
    assert main(asking) == 0
    (prediction,) = [json.loads(line) for line in lines_of(capsys.readouterr().out)]
    answers = {"sst2": "label", "stsb": "score", "text": "labels", "squad": "answer"}
    assert answers[task] in prediction
    if task == "squad":
        assert prediction["answer"] == "it was a good film"[prediction["start"] : prediction["end"]]


@pytest.mark.first_only
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_a_plain_checkpoint(tmp_path: Path, family: str) -> None:
    job = JOBS["sst2"](tmp_path / "data")
    source = make_tiny_model(tmp_path / "model", family, layers=2)
    options = {"mode": "local", "model": source, "split_layer": None, "output_dir": tmp_path / "out"}
    assert main(["train", *job.flags(**options, max_steps=2)]) == 0
    plain, info = AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "out"), output_loading_info=True)
    assert not list(info["missing_keys"]) + list(info["unexpected_keys"])
    ours = dict(load_model(tmp_path / "out").net.whole_parameters())
    theirs = dict(plain.named_parameters())
    assert same_bits(ours, theirs)
    assert not same_bits(ours, dict(AutoModelForSequenceClassification.from_pretrained(str(source)).named_parameters()))


def test_one_row_more_than_asked_for_is_not_read(tmp_path: Path, model: Path) -> None:
    """Limits count from the top of the file; what follows may be anything."""
    job = JOBS["sst2"](tmp_path / "data")
    for name in ("train", "dev"):
        path = job.data_dir / "SST-2" / f"{name}.tsv"
        path.write_text("\n".join(path.read_text().splitlines()[:6] + ["not a row"]) + "\n")
    options = {"mode": "local", "model": model, "split_layer": None, "output_dir": tmp_path / "out"}
    limits = {"max_train_samples": 5, "max_eval_samples": 4, "num_train_epochs": 2, "per_device_train_batch_size": 2}
    assert main(["train", *job.flags(**options, **limits)]) == 0
    results = read_json(tmp_path / "out" / "all_results.json")
    assert (results["train_steps"], results["train_samples"], results["eval_samples"]) == (6, 10, 4)


def test_without_an_output_directory_there_is_a_new_one(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job = JOBS["sst2"](tmp_path / "data")
    assert main(["train", *job.flags(mode="local", model=model, split_layer=None, max_steps=1)]) == 0
    (output_dir,) = (tmp_path / "runs").iterdir()
    assert output_dir.name.startswith("sst2-local-")
    assert weights_of(output_dir)


def test_the_loss_is_the_mean_over_the_steps(tmp_path: Path, model: Path) -> None:
    job, output_dir = JOBS["sst2"](tmp_path / "data"), tmp_path / "out"
    options = {"mode": "local", "model": model, "split_layer": None, "output_dir": output_dir, "logging_steps": 2}
    assert main(["train", *job.flags(**options, max_steps=3, lr_scheduler_type="constant")]) == 0
    history = read_json(output_dir / "trainer_state.json")["log_history"]
    (first, second), (evaluation,) = [e for e in history if "loss" in e], [e for e in history if "eval_loss" in e]
    assert [first["step"], second["step"], evaluation["step"]] == [2, 3, 3]
    assert first["learning_rate"] == second["learning_rate"] == 1e-3
    train_loss = read_json(output_dir / "all_results.json")["train_loss"]
    assert train_loss == pytest.approx((2 * first["loss"] + second["loss"]) / 3)


@pytest.mark.parametrize("step", [2, 500])
def test_a_checkpoint_of_another_trainer_stays(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], step: int
) -> None:
    """Whether this run would save such a step or not; that it would is told before the first one."""
    job, theirs = JOBS["sst2"](tmp_path / "data"), tmp_path / "out" / f"checkpoint-{step}"
    theirs.mkdir(parents=True)
    (theirs / "trainer_state.json").write_text("{}")
    options = {"mode": "local", "model": model, "split_layer": None, "output_dir": tmp_path / "out", "max_steps": 3}
    saving = {"save_steps": 1, "save_total_limit": 1, "resume_from_checkpoint": True}
    assert main(["train", *job.flags(**options, **saving)]) == (0 if step == 500 else 2)
    told = capsys.readouterr().err
    assert f"no checkpoint in {tmp_path / 'out'} yet (checkpoint-{step}: none of ours): beginning at step 0" in told
    assert [path.name for path in theirs.iterdir()] == ["trainer_state.json"]
    if step == 2:
        assert error_line(told).startswith(f"{theirs} is in the way: it is no checkpoint of a run of ours")
        assert "step 1/3" not in told
