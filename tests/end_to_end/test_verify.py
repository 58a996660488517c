"""`sft-edge verify`: training over the wire is training in one process, and what is not is found out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.jobs import error_line, flags
from support.tiny import FAMILIES, make_tiny_model, tiny_config

from sft.wire.codec.elements import codecs_named
from sft_cloud.session.session import Session
from sft_edge.cli import main
from sft_edge.systems.split import SplitSystem

TAMPERED_STEP = 3  # counted from 1

MOMENTUM = {"optim": "SGD", "optim_args": "momentum=0.9,nesterov=true", "learning_rate": 0.05}
ALL_AT_ONCE = {
    "gradient_accumulation_steps": 3,
    "weight_decay": 0.1,
    "max_grad_norm": 0.05,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
}


@pytest.fixture
def verify(cloud: str, model: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict, str]]:
    """Exit code, report and standard error of the command against the shared cloud."""

    def run(**options: object) -> tuple[int, dict, str]:
        small = {"split_layer": 2, "split_rank": 4, "steps": 5, "learning_rate": 1e-3, "max_seq_length": 12}
        where = {"model": model, "server": cloud, "json": True}
        code = main(["verify", *flags(**{**small, **where, **options})])
        written = capsys.readouterr()
        return code, json.loads(written.out), written.err

    return run


@pytest.mark.one_in(11)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "sl"},
        {"problem_type": "regression"},
        {"problem_type": "multi_label_classification"},
        {"head": "question-answering"},
        {"head": "token-classification"},
        {"head": "token-classification", "labels": "local"},
        {"head": "multiple-choice"},
        {"head": "masked-lm", "mode": "sl"},
        {"head": "question-answering", "mode": "sl"},
        {"codec": "int4", "gradient_codec": "int8", "mode": "sl", "gradient_accumulation_steps": 2},
        {"split_layer": 1, "split_rank": 32},
        {"split_layer": 3, "split_rank": 1},
        {"split_layer": 3, "mode": "sl"},
        {"gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 1, "max_seq_length": 1},
        {"codec": "int8"},
        {"max_grad_norm": 0.01},
        {"max_grad_norm": 0},
        {"weight_decay": 0.5, "factor_learning_rate": 1e-2},
        {"adam_beta1": 0.5, "adam_beta2": 0.7, "adam_epsilon": 1e-4},
        {"warmup_ratio": 0.5, "lr_scheduler_type": "constant_with_warmup"},
        MOMENTUM,
        {**MOMENTUM, **ALL_AT_ONCE},
        {**ALL_AT_ONCE, "mode": "sl", "head": "question-answering"},
        *[
            {"optim": name}
            for name in ("Adam", "Adamax", "Adadelta", "Adagrad", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop")
        ],
        {"labels": "local"},
        {"labels": "local", "mode": "sl"},
        {"labels": "local", "problem_type": "regression"},
        {"labels": "local", "problem_type": "multi_label_classification"},
        {"labels": "local", "head": "question-answering"},
        {**MOMENTUM, **ALL_AT_ONCE, "labels": "local"},
        {"residual": "low-rank"},
        {**ALL_AT_ONCE, "residual": "low-rank", "labels": "local"},
        {"freeze_edge": True},
        {"freeze_edge": True, "mode": "sl", "labels": "local"},
        {**MOMENTUM, **ALL_AT_ONCE, "freeze_edge": True},
        {"optim": "AdamW", "optim_args": "amsgrad=true"},
        {"optim": "RMSprop", "optim_args": "momentum=0.5,centered=true"},
    ],
    ids=lambda options: ",".join(f"{name}={value}" for name, value in options.items()) or "as it is",
)
def test_split_training_is_one_process_training(
    verify: Callable[..., tuple[int, dict, str]], options: dict[str, object]
) -> None:
    """At most 1e-6 is promised; over one machine's own loopback not even a bit differs."""
    code, report, _ = verify(**options)
    assert code == 0
    assert report["passed"] is True
    assert report["max_parameter_difference"] == 0.0
    # Of several micro-batches the losses are divided before or after they are added.
    assert report["max_loss_difference"] == pytest.approx(0.0, abs=1e-7)
    assert report["first_step_over_tolerance"] is None
    assert report["steps"] == 5
    assert report["parameters_compared"] > 30_000
    assert report["last_loss"] != report["first_loss"]


@pytest.mark.first_only
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(verify: Callable[..., tuple[int, dict, str]], tmp_path: Path, family: str) -> None:
    code, report, _ = verify(model=make_tiny_model(tmp_path / family, family, layers=3), split_layer=3)
    assert (code, report["max_loss_difference"], report["max_parameter_difference"]) == (0, 0.0, 0.0)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("labels", ["cloud", "local"])
@pytest.mark.parametrize("head", ["causal-lm", "sequence-classification"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_decoders(
    verify: Callable[..., tuple[int, dict, str]], tmp_path: Path, family: str, head: str, labels: str
) -> None:
    tiny_config(family, layers=3).save_pretrained(tmp_path)
    residual = "none" if labels == "local" else "low-rank"
    options = {"model": None, "from_config": tmp_path / "config.json", "head": head, "residual": residual}
    code, report, _ = verify(**options, labels=labels, steps=3, gradient_accumulation_steps=2)
    assert (code, report["max_parameter_difference"]) == (0, 0.0)
    assert report["max_loss_difference"] == pytest.approx(0.0, abs=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("mode", ["sft", "sl"])
@pytest.mark.parametrize("codec", ["bfloat16", "float16", "int8", "int4"])
def test_codecs(
    verify: Callable[..., tuple[int, dict, str]], tmp_path: Path, family: str, mode: str, codec: str
) -> None:
    """One process that writes and reads likewise what is cut there."""
    tiny_config(family, layers=3).save_pretrained(tmp_path)
    options = {"model": None, "from_config": tmp_path / "config.json", "mode": mode, "codec": codec}
    head = "sequence-classification" if family == "bert" else "causal-lm"
    code, report, _ = verify(**options, head=head, steps=3, gradient_accumulation_steps=2)
    assert (code, report["max_parameter_difference"]) == (0, 0.0)
    code, plain, _ = verify(**{**options, "codec": "float32"}, head=head, steps=3, gradient_accumulation_steps=2)
    assert plain["last_loss"] != report["last_loss"]


@pytest.mark.parametrize("family", ["bert", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_a_codec_that_is_fitted(verify: Callable[..., tuple[int, dict, str]], tmp_path: Path, family: str) -> None:
    tiny_config(family, layers=3).save_pretrained(tmp_path)
    options = {"model": None, "from_config": tmp_path / "config.json", "mode": "sl", "freeze_edge": True}
    head = "sequence-classification" if family == "bert" else "causal-lm"
    code, report, _ = verify(**options, codec="fitted", head=head, steps=3, gradient_accumulation_steps=2)
    assert (code, report["max_loss_difference"], report["max_parameter_difference"]) == (0, 0.0, 0.0)
    code, plain, _ = verify(**options, head=head, steps=3, gradient_accumulation_steps=2)
    assert plain["last_loss"] != report["last_loss"]


def test_what_both_halves_hold_is_downloaded_once(verify: Callable[..., tuple[int, dict, str]], tmp_path: Path) -> None:
    """DeBERTa's relative positions: every parameter of the model is in one of the two files."""
    code, report, _ = verify(model=make_tiny_model(tmp_path / "deberta", "deberta-v2", layers=3), steps=2)
    assert (code, report["max_loss_difference"], report["max_parameter_difference"]) == (0, 0.0, 0.0)


def test_weights_drawn_from_the_seed(verify: Callable[..., tuple[int, dict, str]], tmp_path: Path) -> None:
    tiny_config("electra", layers=2).save_pretrained(tmp_path)
    code, report, _ = verify(model=None, from_config=tmp_path / "config.json")
    assert (code, report["max_loss_difference"], report["max_parameter_difference"]) == (0, 0.0, 0.0)


def test_the_model_it_brings_along(verify: Callable[..., tuple[int, dict, str]]) -> None:
    """Without --model, MiniLM-L6's shape."""
    code, report, _ = verify(model=None, split_layer=3, split_rank=8, steps=2, per_device_train_batch_size=2)
    assert (code, report["max_loss_difference"], report["max_parameter_difference"]) == (0, 0.0, 0.0)
    assert report["parameters_compared"] > 10_000_000


# A side that does something else. The differences are as small as they come: one update of one side.


def tamper(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, wrong: Callable[..., object]) -> None:
    """`wrong` is called in place of the method, with it as first argument, at the step that goes wrong."""
    right = getattr(owner, name)
    steps = iter(range(1, 1000))

    def method(self, *arguments):
        if next(steps) == TAMPERED_STEP:
            return wrong(right, self, *arguments)
        return right(self, *arguments)

    monkeypatch.setattr(owner, name, method)


def skip_the_update(right, session, commit):
    for group in session._optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None
    right(session, commit)


def scale_the_gradient(right, session, commit):
    commit.clip_scale *= 1.05
    right(session, commit)


def forget_the_schedule(right, session, commit):
    for index in range(len(commit.learning_rates)):
        commit.learning_rates[index] *= 1.5
    right(session, commit)


@pytest.mark.first_only
@pytest.mark.parametrize("wrong", [skip_the_update, scale_the_gradient, forget_the_schedule])
def test_a_cloud_that_updates_otherwise_is_found_out(
    verify: Callable[..., tuple[int, dict, str]], monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., object]
) -> None:
    tamper(monkeypatch, Session, "_commit", wrong)
    code, report, stderr = verify(**MOMENTUM)
    assert code == 8
    assert report["passed"] is False
    assert report["first_step_over_tolerance"] == TAMPERED_STEP
    assert report["max_parameter_difference"] > 1e-6
    assert error_line(stderr).endswith(f"over 1e-06 from step {TAMPERED_STEP} on")


def test_an_edge_that_updates_otherwise_is_found_out(
    verify: Callable[..., tuple[int, dict, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tamper(monkeypatch, SplitSystem, "update", lambda right, system, step, scale: right(system, step, scale * 0.9))
    code, report, stderr = verify(**MOMENTUM)
    assert (code, report["first_step_over_tolerance"]) == (8, TAMPERED_STEP)
    assert f"from step {TAMPERED_STEP} on" in error_line(stderr)


def test_a_loss_that_is_told_wrong_is_found_out(
    verify: Callable[..., tuple[int, dict, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def exaggerate(right, system, *arguments):
        return right(system, *arguments) + 1e-4

    tamper(monkeypatch, SplitSystem, "forward_backward", exaggerate)
    code, report, _ = verify()
    assert (code, report["first_step_over_tolerance"], report["max_parameter_difference"]) == (8, TAMPERED_STEP, 0.0)
    assert report["max_loss_difference"] == pytest.approx(1e-4, rel=1e-3)


def test_a_parameter_that_became_nan_is_found_out(
    verify: Callable[..., tuple[int, dict, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN is smaller than no tolerance, and larger than none either."""

    def spoil(right, session, commit):
        right(session, commit)
        session._optimizer.param_groups[0]["params"][0].data[0] = float("nan")

    tamper(monkeypatch, Session, "_commit", spoil)
    code, report, stderr = verify()
    assert (code, report["first_step_over_tolerance"]) == (8, TAMPERED_STEP)
    assert "nan" in error_line(stderr)


def test_half_precision_is_found_out(
    verify: Callable[..., tuple[int, dict, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What float32 on the wire promises, sixteen bits do not hold."""
    from sft_edge.commands.verify import verify as verify_module

    def halve_for_half_precision(*arguments, halve=verify_module.halve, **named):
        return halve(*arguments[:-1], codecs_named("bfloat16"), **named)

    monkeypatch.setattr(verify_module, "halve", halve_for_half_precision)
    code, report, _ = verify()
    assert (code, report["first_step_over_tolerance"]) == (8, 1)
    assert verify(tolerance=1)[0] == 0


def test_a_report_to_be_read(verify: Callable[..., tuple[int, dict, str]], cloud: str, model: Path, capsys) -> None:
    assert main(["verify", *flags(model=model, server=cloud, split_layer=2, split_rank=4, steps=1)]) == 0
    lines = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    assert lines["mode"] == "sft"
    assert lines["max_parameter_difference"] == "0.0"
    assert lines["first_step_over_tolerance"] == "None"
