"""What an older commit wrote (written_before/README.md): a checkpoint, both halves of it, models, and an export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.jobs import flags, read_json, weights_of
from support.opened import code_copied_to
from support.servers import start_server
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from sft_edge.cli import main
from sft_edge.commands.export.content import Export
from sft_edge.model_files import DENSE, FACTORED
from sft_edge.model_files.saved import load_model

WRITTEN = Path(__file__).parent / "written_before"
OPTIONS: dict[str, object] = {
    "model": WRITTEN / "model",
    "data_dir": WRITTEN / "data",
    "task": "sst2",
    "max_seq_length": 32,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "learning_rate": "1e-2",
    "adam_epsilon": "1e-3",
    "logging_steps": 1,
    "max_steps": 4,
    "seed": 7,
    "device": "cpu",
    "split_layer": 1,
    "split_rank": 4,
    "codec": "float32",  # the default then
}


def test_a_run_goes_on_from_both_halves_of_its_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And ends as the one did that was not disturbed; within what the kernels of another CPU may round otherwise."""
    out, store = tmp_path / "run", tmp_path / "store"
    shutil.copytree(WRITTEN / "run" / "checkpoint-2", out / "checkpoint-2")
    shutil.copytree(WRITTEN / "store", store)
    server = start_server(tmp_path / "state", 1, checkpoint_store=str(store))
    try:
        going_on = {"server": server.address, "save_steps": 2, "output_dir": out, "resume_from_checkpoint": True}
        assert main(["train", *flags(**OPTIONS, **going_on)]) == 0
    finally:
        server.stop(grace_seconds=0)
    assert "going on from step 2" in capsys.readouterr().err
    then, now = (read_json(place / "trainer_state.json")["log_history"] for place in (WRITTEN / "run", out))
    losses = [entry["loss"] for entry in then if "loss" in entry]
    assert len(losses) == 4
    assert [entry["loss"] for entry in now if "loss" in entry] == pytest.approx(losses, rel=1e-6)
    ended, expected = weights_of(out), weights_of(WRITTEN / "run")
    assert ended.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(ended[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("model", ["run", "dense"])
def test_a_trained_model_says_what_it_said(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    trained = WRITTEN / model
    data = {"data_dir": WRITTEN / "data", "per_device_eval_batch_size": 8}
    assert main(["evaluate", *flags(model=trained, **data)]) == 0
    evaluated, then = json.loads(capsys.readouterr().out), read_json(trained / "evaluate.json")
    for name in ("eval_accuracy", "eval_loss", "eval_samples"):
        assert evaluated[name] == pytest.approx(then[name], rel=1e-6)
    assert main(["predict", *flags(model=trained, text="the worst plot of them all", json_lines=True)]) == 0
    predicted, then = json.loads(capsys.readouterr().out), read_json(trained / "predict.jsonl")
    assert predicted["label"] == then["label"]
    assert predicted["scores"] == pytest.approx(then["scores"], rel=1e-6)


def test_a_trained_model_is_exported_as_it_was(tmp_path: Path) -> None:
    for model, form in (("run", FACTORED), ("run", DENSE), ("dense", DENSE)):
        to = tmp_path / f"{model}-{form}"
        to.mkdir()
        Export(load_model(WRITTEN / model), form).write(to)
    tensors, then = (
        load_file(place / "model.safetensors") for place in (tmp_path / "run-factored", WRITTEN / "export")
    )
    in_place_of_w = "bert.encoder.layer.0.output.dense.weight"  # empty, so that the library's own class refuses it
    assert tensors.pop(in_place_of_w).numel() == 0
    assert tensors.keys() == then.keys()
    assert all(tensors[name].equal(then[name]) for name in then)
    assert weights_of(tmp_path / "dense-dense").keys() == weights_of(WRITTEN / "dense").keys()


def test_an_export_opens_with_the_code_that_it_brought_along(tmp_path: Path) -> None:
    to = shutil.copytree(WRITTEN / "export", tmp_path / "written-before")
    with code_copied_to(tmp_path / "modules"), torch.no_grad():
        model = AutoModelForSequenceClassification.from_pretrained(to, trust_remote_code=True).eval()
        encoding = AutoTokenizer.from_pretrained(to)("the worst plot of them all", return_tensors="pt")
        scores = model(**encoding).logits.softmax(-1)[0].tolist()
    then = read_json(WRITTEN / "run" / "predict.jsonl")["scores"]
    assert {model.config.id2label[index]: score for index, score in enumerate(scores)} == pytest.approx(then, rel=1e-4)
