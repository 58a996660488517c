"""What `SFTOptimizer` refuses, with a clear error and without touching the script's model, optimizer or session."""

from __future__ import annotations

import functools
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, Optional

import pytest
import torch
from support.opened import code_copied_to
from support.script import adamw, batches, sgd, tiny_model, wrap
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
)

import sft.optimizer
from sft import SFTOptimizer
from sft.errors import CutError, ProtocolError, ServerUnavailableError, UnsupportedModelError, UsageError


def check_refused(model: Any, optimizer: Any, error: type, match: Optional[str], **options: Any) -> None:
    """The error is raised, and model and optimizer are what they were."""
    parameters = [(name, p, p.detach().clone()) for name, p in model.named_parameters()]
    groups = [dict(group, params=list(group["params"])) for group in optimizer.param_groups]
    forward = model.forward
    values: Dict[str, Any] = {
        "role": "edge",
        "model": model,
        "server": "127.0.0.1:9",
        "split_layer": 2,
        "split_rank": 4,
    }
    with pytest.raises(error, match=match):
        SFTOptimizer(optimizer, **{**values, **options})
    assert model.forward == forward
    now = list(model.named_parameters())
    assert [(name, id(p)) for name, p in now] == [(name, id(p)) for name, p, _ in parameters]
    assert all(p.equal(before) for _, p, before in parameters)
    for group, before in zip(optimizer.param_groups, groups):
        assert all(p is q for p, q in zip(group["params"], before["params"]))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"role": "phone"}, "role must be 'edge' or 'cloud', not 'phone'"),
        ({"server": None}, "needs the cloud's address"),
        ({"server": "somewhere"}, "^server must be HOST:PORT, such as .*, not 'somewhere'"),
        ({"split_layer": None}, "split_layer must be given"),
        ({"split_at": "bert.encoder.layer.1.output.dense"}, "not split_at"),
        ({"wire_dtype": "int8"}, "wire_dtype must be one of float32"),
        ({"codec": "int3"}, "codec must be one of float32, bfloat16, float16, int8, int4, fitted, not 'int3'"),
        ({"codec": "fitted"}, "codec='fitted' is for `sft-edge train --freeze-edge`; choose another"),
        ({"gradient_codec": "fitted"}, "gradient_codec must be one of float32, bfloat16, float16, int8, int4, not"),
        ({"seed": -1}, "seed must be"),
        ({"reply_timeout_seconds": 0}, "reply_timeout_seconds must be above 0"),
        ({"connect_timeout_seconds": -1}, "connect_timeout_seconds must be above 0"),
        ({"calibration": [{}]}, "calibration is for residual='low-rank'"),
        ({"residual": "low-rank"}, "give batches to calibrate with"),
        ({"residual": "low-rank", "calibration": [{"labels": torch.zeros(1)}]}, "a calibration batch is a dict"),
    ],
)
def test_arguments_that_do_not_fit(options: Dict[str, Any], match: str) -> None:
    model = tiny_model()
    check_refused(model, adamw(model), UsageError, match, **options)


@pytest.mark.parametrize(
    "options", [{"split_layer": 0}, {"split_layer": 4}, {"split_rank": 33}, {"residual": "full"}, {"residual": "some"}]
)
def test_a_cut_that_the_model_cannot_have(options: Dict[str, Any]) -> None:
    model = tiny_model()
    check_refused(model, adamw(model), CutError, None, **options)


def test_models_that_cannot_be_cut() -> None:
    model = AutoModel.from_config(tiny_model().config)
    check_refused(model, sgd(model), UnsupportedModelError, None)
    model = tiny_model().double()
    check_refused(model, sgd(model), UsageError, "float32")
    model = nn.Sequential(nn.Linear(2, 2))
    check_refused(model, sgd(model), UsageError, "split_layer is for transformers models")
    check_refused(model, sgd(model), UsageError, "split_at must be given", split_layer=None)


def test_models_that_are_not_as_the_cloud_will_build_them() -> None:
    class Own(BertForSequenceClassification):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    model = Own(tiny_model().config)
    check_refused(model, sgd(model), CutError, "the forward method of this Own takes whatever it is given")
    model = tiny_model()
    model.forward = functools.partial(model.forward)
    check_refused(model, sgd(model), UsageError, "has a forward of its own")
    for head in (nn.Linear(32, 5), nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 3)), nn.Linear(32, 3, bias=False)):
        model = tiny_model()
        model.classifier = head
        with pytest.raises(ProtocolError, match="has to be hosted by the script that makes it"):
            wrap(model, sgd(model))

    class Named(BertForSequenceClassification):
        """Nothing but a name."""

    model = Named(tiny_model().config)
    with wrap(model, sgd(model)) as optimizer:
        _one_step(model, optimizer)


def test_optimizers_that_do_not_fit() -> None:
    model = tiny_model()
    check_refused(model, torch.optim.LBFGS(model.parameters()), UsageError, "several times a step")

    class Own(torch.optim.SGD):
        pass

    says = r"Own is none that it knows: use one of torch\.optim's, transformers'"
    check_refused(model, Own(model.parameters(), lr=0.1), UsageError, says)
    with pytest.raises(UsageError, match=r"model must be a torch.nn.Module, not str"):
        SFTOptimizer(sgd(model), role="edge", model="bert", server="127.0.0.1:9")
    with pytest.raises(UsageError, match=r"must be a torch.optim.Optimizer, not list"):
        SFTOptimizer([], role="edge", model=model, server="127.0.0.1:9")
    foreign = torch.optim.SGD([*model.parameters(), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))], lr=0.1)
    check_refused(model, foreign, UsageError, "2 of the optimizer's .* are not the model's")


def test_an_optimizer_that_has_begun() -> None:
    model = tiny_model()
    for make in (adamw, sgd, lambda m: torch.optim.Adagrad(m.parameters(), lr=0.1)):
        optimizer = make(model)
        model(**batches(1, model)[0]).loss.backward()
        optimizer.step()
        check_refused(model, optimizer, UsageError, "has taken steps already")


def test_nobody_answers() -> None:
    model = tiny_model()
    check_refused(model, adamw(model), ServerUnavailableError, "nobody answers")
    assert torch.isfinite(model(**batches(1, model)[0]).loss), "the model is whole, and runs"


def test_twice() -> None:
    model = tiny_model()
    with wrap(model, adamw(model)) as optimizer:
        check_refused(model, optimizer, UsageError, "SFTOptimizer already")
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        check_refused(model, torch.optim.SGD(parameters, lr=0.1), UsageError, "cut already")


def test_a_side_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    monkeypatch.setattr(sft.optimizer, "_entry_points", lambda: [])
    check_refused(model, adamw(model), UsageError, r"pip install 'split-fine-tuning\[edge\]'")
    check_refused(model, adamw(model), UsageError, r"pip install 'split-fine-tuning\[cloud\]'", role="cloud")
    broken = metadata.EntryPoint("cloud", "sft_nowhere.role:Role", "sft.roles")
    monkeypatch.setattr(sft.optimizer, "_entry_points", lambda: [broken])
    check_refused(model, adamw(model), UsageError, r"cannot be had here .*sft_nowhere", role="cloud")


def test_serving_is_for_the_cloud() -> None:
    model = tiny_model()
    with wrap(model, adamw(model)) as optimizer, pytest.raises(UsageError, match="role='cloud'"):
        optimizer.serve("0.0.0.0:50051")


def _one_step(model: Any, optimizer: Any) -> None:
    optimizer.zero_grad()
    model(**batches(1, model)[0]).loss.backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"output_hidden_states": True}, "the argument output_hidden_states cannot cross"),
        ({"input_ids": None}, "needs input_ids"),
        ({"input_ids": torch.arange(7)}, "needs input_ids"),
        ({"attention_mask": torch.ones(4, 1, 7, 7)}, "attention_mask has shape"),
        ({"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1]] * 4)}, "reads the first token, .* pad on the right"),
        ({"attention_mask": torch.zeros(4, 7, dtype=torch.long)}, "and a one at least"),
        ({"attention_mask": torch.full((4, 7), 2)}, "attention_mask must be ones"),
        ({"labels": torch.tensor([0, 1, 2, 3])}, "labels must be from 0 to 2; they are from 0 to 3"),
        ({"labels": torch.tensor([0, 1, 2])}, "labels must be whole numbers of shape"),
        ({"labels": torch.zeros(4, 3)}, "set model.config.problem_type"),
    ],
)
def test_calls_that_cannot_cross(change: Dict[str, Any], match: str) -> None:
    model = tiny_model()
    with wrap(model, adamw(model)) as optimizer:
        (batch,) = batches(1, model)
        with pytest.raises(UsageError, match=match):
            model(**{**batch, **change})
        _one_step(model, optimizer)  # the session has not suffered


@pytest.mark.parametrize(
    ("family", "head", "change", "match"),
    [
        ("bert", "question-answering", {"end_positions": None}, "both start_positions and end_positions"),
        (
            "bert",
            "question-answering",
            {"end_positions": torch.tensor([1, 2, 3, 7])},
            "end_positions must be from 0 to 6",
        ),
        (
            "bert",
            "question-answering",
            {"start_positions": torch.tensor([1, 3, 2, 3])},
            "start_positions must lie within the tokens",
        ),
        ("gpt2", "causal-lm", {"labels": torch.ones(4, 7, dtype=torch.long)}, "labels of padding must be -100"),
        ("gpt2", "causal-lm", {"labels": torch.ones(4, dtype=torch.long)}, "labels must be whole numbers of shape"),
        (
            "gpt2",
            "causal-lm",
            {"use_cache": True},
            "the argument use_cache cannot cross .* as generate\\(\\) does not: save the model",
        ),
        ("bert", "token-classification", {"labels": torch.ones(4, 7, dtype=torch.long)}, "padding must be -100"),
        ("bert", "token-classification", {"labels": torch.full((4, 7), 3)}, "labels must be from 0 to 2"),
        ("bert", "token-classification", {"labels": torch.ones(4, dtype=torch.long)}, "whole numbers of shape"),
        ("bert", "multiple-choice", {"labels": torch.tensor([0, 2])}, "labels must be from 0 to 1"),
        ("bert", "multiple-choice", {"labels": torch.tensor([0, 1, 0, 1])}, r"whole numbers of shape \[2\]"),
        ("bert", "multiple-choice", {"input_ids": torch.ones(4, 7).long()}, r"shape \(questions, choices, tokens\)"),
        ("bert", "masked-lm", {"labels": torch.full((4, 7), 1000)}, "labels must be from 0 to"),
    ],
)
def test_calls_of_other_heads(family: str, head: str, change: Dict[str, Any], match: str) -> None:
    model = tiny_model(family, head)
    with wrap(model, sgd(model)) as optimizer:
        (batch,) = batches(1, model)
        with pytest.raises(UsageError, match=match):
            model(**{**batch, **change})
        _one_step(model, optimizer)


def test_labels_of_several_kinds() -> None:
    model = tiny_model(problem_type="multi_label_classification")
    with wrap(model, adamw(model)) as optimizer:
        (batch,) = batches(1, model)
        with pytest.raises(UsageError, match=r"labels have shape \[4\], the head wants \[4, 3\]"):
            model(**{**batch, "labels": torch.zeros(4)})
        _one_step(model, optimizer)


def test_a_step_without_anything_to_step_with() -> None:
    model = tiny_model()
    with wrap(model, adamw(model)) as optimizer:
        (batch,) = batches(1, model)
        before = model.state_dict()
        with pytest.raises(UsageError, match="without a backward"):
            optimizer.step()
        model(**batch)  # a forward that nobody goes backward through
        with pytest.raises(UsageError, match="without a backward"):
            optimizer.step()
        model(**batch).loss.backward()
        optimizer.zero_grad()
        with pytest.raises(UsageError, match="zeroed"):
            optimizer.step()
        after = model.state_dict()
        assert all(after[name].equal(tensor) for name, tensor in before.items())
        _one_step(model, optimizer)
        with pytest.raises(UsageError, match="without a backward"):
            optimizer.step()


@pytest.mark.parametrize("rate", [-1e-3, float("nan")])
def test_a_learning_rate_that_nobody_can_step_with(rate: float) -> None:
    model = tiny_model()
    with wrap(model, adamw(model)) as optimizer:
        before = model.state_dict()
        model(**batches(1, model)[0]).loss.backward()
        optimizer.param_groups[0]["lr"] = rate
        with pytest.raises(UsageError, match="learning rates must be finite and not negative"):
            optimizer.step()
        after = model.state_dict()
        assert all(after[name].equal(tensor) for name, tensor in before.items())
        assert not optimizer.state
        optimizer.param_groups[0]["lr"] = 1e-3
        _one_step(model, optimizer)


@pytest.mark.parametrize("travels", [True, False])
def test_backward_twice_and_too_late(travels: bool) -> None:
    def loss_of(model: Any, batch: Dict[str, Tensor]) -> Tensor:
        if travels:
            return model(**batch).loss
        return model(batch["input_ids"], batch["attention_mask"]).logits.sum()

    model = tiny_model()
    with wrap(model, adamw(model)) as optimizer:
        one, other = batches(2, model)
        loss, late = loss_of(model, one), loss_of(model, other)
        loss.backward(retain_graph=True)
        with pytest.raises(UsageError, match="went through this forward before"):
            loss.backward()
        optimizer.step()
        with pytest.raises(UsageError, match="earlier step"):
            late.backward()
        _one_step(model, optimizer)


def test_a_loss_of_ones_own_from_logits_whose_labels_travelled() -> None:
    model = tiny_model()
    with wrap(model, adamw(model)) as optimizer:
        (batch,) = batches(1, model)
        output = model(**batch)
        with pytest.raises(UsageError, match="without labels"):
            (output.loss + output.logits.sum()).backward()
        _one_step(model, optimizer)


def test_a_model_that_was_split_before_and_opened_again(tmp_path: Path) -> None:
    model = tiny_model()
    with wrap(model, sgd(model)):
        model.save_pretrained(str(tmp_path / "split-before"))
    with code_copied_to(tmp_path / "modules"):
        again = AutoModelForSequenceClassification.from_pretrained(
            str(tmp_path / "split-before"), trust_remote_code=True
        )
    check_refused(again, sgd(again), UnsupportedModelError, "was split before: cut the model that it was made from")
