"""Two attempts at a run: which options may differ, and which are refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Dict

import pytest
from support.jobs import run_options, sst2
from support.tiny import tiny_config, tiny_tokenizer

from sft.cli.options import options_of
from sft.errors import UsageError
from sft_edge.checkpoints.same_run import MODEL, SETTINGS, check_same_run, likeness
from sft_edge.model_files.source import Source
from sft_edge.options.link import LinkOptions
from sft_edge.options.lora import LoraOptions
from sft_edge.options.optimizer import OptimizerOptions
from sft_edge.options.train import CutOptions, DataOptions, TrainingOptions
from sft_edge.tasks import make_task

CLASSES = (CutOptions, DataOptions, TrainingOptions, OptimizerOptions, LoraOptions, LinkOptions)
GIVEN: Dict[str, Any] = {"split_layer": 2, "task": "sst2", "optim": "SGD", "lora_r": 4}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sst2(tmp_path_factory.mktemp("data"), train_rows=6).data_dir


def of(place: Path, model: Any = None, rows: Any = None, **changes: Any) -> Dict[str, str]:
    task = make_task("sst2", place)
    features = task.encode(task.read("train"), tiny_tokenizer(), 64)
    config = model or tiny_config()
    return likeness(
        run_options(**{**GIVEN, **changes}), Source("", config, None, values=config.to_dict()), features[:rows]
    )


FREE: Dict[str, Any] = {
    "data_dir": Path("elsewhere"),
    "max_eval_samples": 3,
    "dataloader_num_workers": 2,
    "output_dir": Path("other"),
    "overwrite_output_dir": True,
    "per_device_eval_batch_size": 3,
    "num_train_epochs": 9.0,
    "max_steps": 9,
    "eval_strategy": "epoch",
    "eval_steps": 3,
    "device": "cuda",
    "save_steps": 5,
    "save_total_limit": 2,
    "resume_from_checkpoint": "newest",
    "detach": True,
    "server": "cloud:1",
}
MATTERS: Dict[str, Any] = {
    "mode": "sl",
    "split_layer": 3,
    "split_rank": 9,
    "residual": "low-rank",
    "freeze_edge": True,
    "activations": "keep-on-edge",
    "wire_dtype": "bfloat16",
    "codec": "int4",
    "gradient_codec": "int8",
    "task": "mrpc",
    "problem_type": "regression",
    "max_train_samples": 3,
    "per_device_train_batch_size": 9,
    "gradient_accumulation_steps": 2,
    "seed": 9,
    "optim": "Rprop",
    "optim_args": "momentum=0.5",
    "learning_rate": 0.5,
    "factor_learning_rate": 0.5,
    "weight_decay": 0.5,
    "adam_beta1": 0.5,
    "adam_beta2": 0.5,
    "adam_epsilon": 0.5,
    "max_grad_norm": 0.5,
    "lr_scheduler_type": "cosine",
    "lr_scheduler_kwargs": {"num_cycles": 2},
    "warmup_steps": 9,
    "warmup_ratio": 0.5,
    "lora_r": 9,
    "lora_alpha": 9,
    "lora_dropout": 0.5,
    "lora_target_modules": ["query"],
    "use_rslora": True,
    "lora_half": "edge",
    "labels": "local",
}


def test_every_option_is_one_or_the_other() -> None:
    known = {option.name for cls in CLASSES[:-1] for option in options_of(cls)}
    assert known <= FREE.keys() | MATTERS.keys()
    assert not FREE.keys() & MATTERS.keys()


@pytest.mark.parametrize("name", FREE)
def test_what_may_differ(data_dir: Path, name: str) -> None:
    beside = {"eval_steps": {"eval_strategy": "steps"}, "resume_from_checkpoint": {"output_dir": Path("other")}}
    check_same_run(of(data_dir, **{name: FREE[name], **beside.get(name, {})}), of(data_dir), Path("out"))


@pytest.mark.parametrize("name", MATTERS)
def test_what_may_not(data_dir: Path, name: str) -> None:
    beside = {"lr_scheduler_kwargs": {"lr_scheduler_type": "cosine"}}.get(name, {})
    needs = {"optim_args": {"optim": "SGD"}, "residual": {"mode": "sft"}, "activations": {"freeze_edge": True}}
    beside = needs.get(name, beside)
    then, now = of(data_dir, **beside), of(data_dir, **{**beside, name: MATTERS[name]})
    flag = "--" + name.replace("_", "-")
    with pytest.raises(UsageError, match=rf"^out/checkpoint-3 was trained with {flag} .*, now it is .*: give the same"):
        check_same_run(now, then, Path("out/checkpoint-3"))


def test_other_rows_and_another_model(data_dir: Path) -> None:
    then = of(data_dir)
    with pytest.raises(UsageError, match="the training rows, or their tokens are others"):
        check_same_run(of(data_dir, rows=5), then, Path("out"))
    with pytest.raises(UsageError, match=r"--model has another hidden_dropout_prob in config.json"):
        check_same_run(of(data_dir, model=tiny_config(hidden_dropout_prob=0.5)), then, Path("out"))
    check_same_run(of(data_dir, model=tiny_config(_name_or_path="elsewhere")), then, Path("out"))


def test_an_option_of_another_release(data_dir: Path) -> None:
    now = of(data_dir, codec="float32")
    added = ("--codec", "--gradient-codec", "--activations", "--factor-learning-rate")
    check_same_run(now, {name: value for name, value in now.items() if name not in added}, Path("out"))
    check_same_run(now, {**now, "--codec": "None"}, Path("out"))
    half = of(data_dir, wire_dtype="bfloat16")
    check_same_run(half, {**half, "--codec": "None"}, Path("out"))
    with pytest.raises(UsageError, match=re.escape("out was trained with --codec float32, now it is int8: give the")):
        check_same_run(of(data_dir), {**now, "--codec": "None"}, Path("out"))
    with pytest.raises(UsageError, match=re.escape("out was trained with --colour red, now it is None")):
        check_same_run(now, {**now, "--colour": "red"}, Path("out"))
    with pytest.raises(UsageError, match=re.escape("out was trained with --seed None, now it is 42")):
        check_same_run(now, {name: value for name, value in now.items() if name != "--seed"}, Path("out"))


def test_a_checkpoint_of_before(data_dir: Path) -> None:
    """It has a hash of all that the library's object printed, of one release."""
    then = {name: value for name, value in of(data_dir).items() if name != SETTINGS}
    check_same_run(of(data_dir), then, Path("out"))
    with pytest.raises(UsageError, match=r"another configuration .*, or transformers another release"):
        check_same_run(of(data_dir, model=tiny_config(hidden_dropout_prob=0.5)), then, Path("out"))


def test_another_release_of_the_library(data_dir: Path) -> None:
    """Its defaults, and its names, are others; config.json is the same, or says the same."""
    now = of(data_dir)
    values = json.loads(now[SETTINGS])
    older = {**values, "transformers_version": "4.46.3", "pruned_heads": {}, "use_bfloat16": False, "is_decoder": False}
    shorter = {name: value for name, value in values.items() if name not in ("layer_norm_eps", "hidden_act")}
    for other in (older, shorter):
        check_same_run(now, {**now, MODEL: "the model with another hash", SETTINGS: json.dumps(other)}, Path("out"))
    for change in ({"num_attention_heads": 4}, {"pruned_heads": {"1": [0]}}):
        with pytest.raises(UsageError, match=next(iter(change))):
            check_same_run(now, {**now, SETTINGS: json.dumps({**values, **change})}, Path("out"))
    with pytest.raises(UsageError, match="cannot be compared"):
        check_same_run(now, {**now, SETTINGS: "{"}, Path("out"))
