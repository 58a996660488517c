"""The parts of `sft-edge verify` that need no cloud; the rest is in tests/end_to_end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.jobs import error_line, flags
from support.tiny import make_tiny_model, tiny_config

from sft.errors import VerificationError
from sft_edge.cli import main
from sft_edge.commands.verify import verify as verify_module
from sft_edge.commands.verify.verify import Report, verify_and_report
from sft_edge.options.commands import VerifyOptions
from sft_edge.options.link import LinkOptions
from sft_edge.options.optimizer import OptimizerOptions


def report(**changes: Any) -> Report:
    values = {
        "mode": "sft",
        "split_layer": 3,
        "split_rank": 8,
        "steps": 20,
        "max_loss_difference": 0.0,
        "max_parameter_difference": 0.0,
        "parameters_compared": 1000,
        "first_step_over_tolerance": None,
        "tolerance": 1e-6,
        "first_loss": 1.0,
        "last_loss": 0.5,
    }
    return Report(**{**values, **changes})


def tell(monkeypatch: pytest.MonkeyPatch, found: Report, as_json: bool) -> None:
    monkeypatch.setattr(verify_module, "verify", lambda *options: found)
    verify_and_report(VerifyOptions(json=as_json), OptimizerOptions(), LinkOptions())


def test_what_passed_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tell(monkeypatch, report(), as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["passed"] is True
    assert told["first_step_over_tolerance"] is None
    tell(monkeypatch, report(), as_json=False)
    assert "max_parameter_difference: 0.0\n" in capsys.readouterr().out


@pytest.mark.parametrize("as_json", [True, False])
def test_what_failed_is_told_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    found = report(max_loss_difference=0.25, max_parameter_difference=0.5, first_step_over_tolerance=7)
    with pytest.raises(
        VerificationError, match=r"differ by 0\.25 in the loss and 0\.5 in a parameter, over 1e-06 from step 7 on"
    ):
        tell(monkeypatch, found, as_json)
    assert "first_step_over_tolerance" in capsys.readouterr().out


def test_differences() -> None:
    expected = {"a": torch.zeros(2), "b": torch.ones(3)}
    assert verify_module._difference(expected, expected) == 0.0
    assert verify_module._difference(expected, {**expected, "b": torch.tensor([1.0, 0.75, 1.0])}) == 0.25
    assert math.isnan(verify_module._difference(expected, {**expected, "a": torch.tensor([0.0, math.nan])}))
    for other in ({"a": expected["a"]}, {**expected, "c": torch.zeros(1)}):
        with pytest.raises(VerificationError, match=r"parameter '[bc]' is on one side only"):
            verify_module._difference(expected, other)


@pytest.mark.parametrize(("a", "b", "worse"), [(1, 2, 2), (2, 1, 2), (1, math.nan, math.nan), (math.nan, 1, math.nan)])
def test_nan_is_worse_than_any_number(a: float, b: float, worse: float) -> None:
    assert verify_module._worse(a, b) == pytest.approx(worse, nan_ok=True)


@pytest.mark.parametrize("head", ["sequence-classification", "question-answering"])
@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification", "regression"])
def test_batches_are_of_the_seed_and_the_step(head: Any, problem_type: Any) -> None:
    options = VerifyOptions(head=head, problem_type=problem_type, gradient_accumulation_steps=2, max_seq_length=9)
    config = tiny_config(num_labels=1 if problem_type == "regression" else 3)

    def batches(seed: int, step: int) -> list:
        options.seed = seed
        return list(verify_module._batches(options, config, step))

    one, same = batches(0, 4), batches(0, 4)
    assert len(one) == 2
    for batch, again in zip(one, same):
        assert batch.lengths == again.lengths
        assert batch.inputs["input_ids"].equal(again.inputs["input_ids"])
        assert all(batch.labels[name].equal(again.labels[name]) for name in batch.labels)
        assert 1 <= min(batch.lengths) <= max(batch.lengths) <= 9
        if head == "question-answering":
            for start, end, length in zip(*batch.labels.values(), batch.lengths):
                assert 0 <= start <= end < length
    lengths = [batch.lengths for batch in one]
    assert lengths != [batch.lengths for batch in batches(1, 4)]
    assert lengths != [batch.lengths for batch in batches(0, 5)]
    assert one[0].lengths != one[1].lengths


@pytest.mark.parametrize("head", ["causal-lm", "masked-lm", "token-classification"])
def test_batches_with_labels_of_tokens(head: str) -> None:
    options = VerifyOptions(head=head, from_config=Path("gpt2.json"), max_seq_length=9)
    (batch,) = verify_module._batches(options, tiny_config("gpt2", num_labels=3), 0)
    y_BS = batch.labels["labels"]
    assert y_BS.shape == batch.inputs["input_ids"].shape
    learned = y_BS != -100
    expected_BS = batch.inputs["input_ids"] % 3 if head == "token-classification" else batch.inputs["input_ids"]
    assert y_BS[learned].equal(expected_BS[learned])
    assert not any(bool(learned[row, length:].any()) for row, length in enumerate(batch.lengths))
    assert not bool(learned[torch.arange(9)[None, : y_BS.shape[1]] < torch.tensor(batch.lengths)[:, None]].all())


@pytest.mark.parametrize(("sequences", "labels"), [(8, 4), (3, 1), (1, 1)])
def test_batches_of_choices(sequences: int, labels: int) -> None:
    options = VerifyOptions(head="multiple-choice", per_device_train_batch_size=sequences)
    (batch,) = verify_module._batches(options, tiny_config(), 0)
    assert len(batch.labels["labels"]) == labels
    assert int(batch.labels["labels"].max()) < sequences // labels


@pytest.mark.parametrize("family", ["distilbert", "gpt2", "opt", "deberta-v2"])
def test_dropout_is_switched_off_wherever_it_is(family: str) -> None:
    config = tiny_config(family)
    verify_module._switch_dropout_off(config)
    left = {name: value for name, value in config.to_dict().items() if "drop" in name}
    assert left
    assert set(left.values()) == {0.0}


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        ({"split_layer": 9}, 2, "split_layer is 9, but this model has blocks 1 to 2"),
        ({"split_rank": 33}, 2, "split_rank is 33, but this layer has ranks 1 to 32"),
        ({"max_seq_length": 129}, 2, "--max-seq-length must be at most 128 for this model"),
        ({"model": None, "head": "causal-lm"}, 2, "--head causal-lm needs --from-config or --model of a decoder"),
        ({"head": "causal-lm"}, 4, "models of type 'bert' are not trained with head 'causal-lm'"),
        ({"mode": "sl", "residual": "low-rank"}, 2, "--residual low-rank needs --mode sft"),
        ({"residual": "full"}, 2, "--residual"),
        ({"labels": "nowhere"}, 2, "--labels"),
        ({"from_config": "x.json"}, 2, "only one of --model and --from-config may be given"),
        ({"model": "/nowhere/at/all"}, 4, "'/nowhere/at/all': no such directory"),
        ({"tolerance": 0}, 2, "--tolerance must be above 0"),
        ({"steps": 0}, 2, "--steps must be 1 or more"),
    ],
    ids=str,
)
def test_bad_options(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: Any, code: int, says: str) -> None:
    model = make_tiny_model(tmp_path / "tiny", layers=2)
    values = {"model": model, "split_layer": 1, "split_rank": 4, "server": "127.0.0.1:1", **options}
    assert main(["verify", *flags(**values)]) == code
    assert says in error_line(capsys.readouterr().err)
