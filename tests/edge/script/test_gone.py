"""What a cut model has no more says where it is, and a parameter that a script still holds is not forgotten."""

from __future__ import annotations

from typing import Any, Callable

import pytest
import torch
from support.script import batches, sgd, tiny_model, wrap
from torch import nn

from sft.errors import UsageError


def train(model: Any, optimizer: Any) -> None:
    optimizer.zero_grad()
    model(**batches(1, model)[0]).loss.backward()
    optimizer.step()


def set_dropout(model: Any) -> None:
    model.dropout.p = 0.3


@pytest.mark.parametrize(
    ("does", "says"),
    [
        (lambda model: model.classifier.weight, "this Linear is on the cloud, and 'weight' with it: read that before"),
        (lambda model: model.classifier.requires_grad_(False), "is trained as it was when the model was cut: freeze"),
        (lambda model: model.classifier(torch.zeros(1, 32)), "this Linear is on the cloud, .* call the model"),
        (set_dropout, "this Dropout is on the cloud, and hears of nothing but"),
        (
            lambda model: model.bert.encoder.layer[2].requires_grad_(False),
            "block 3 of 3 is on the cloud: .* before",
        ),
        (lambda model: model.bert.encoder.layer[-1], "block 3 of 3 is on the cloud"),
        (lambda model: model.bert.encoder.layer[2:], "block 3 of 3 is on the cloud"),
        (lambda model: model.bert.encoder.layer[-2:], "block 3 of 3 is on the cloud"),
        (lambda model: model.classifier.state_dict(), "this Linear is on the cloud, and its weights with it: they are"),
        (lambda model: model.classifier.load_state_dict({}), "load them with model.load_state_dict"),
        (lambda model: sgd(model.classifier), "this parameter is on the cloud"),
        (lambda model: [p.mul_(2) for p in model.classifier.parameters()], "this parameter is on the cloud"),
    ],
)
def test_it_says_that_it_is_on_the_cloud(does: Callable[[Any], object], says: str) -> None:
    model = tiny_model()
    with wrap(model, sgd(model)) as optimizer:
        with pytest.raises(UsageError, match=says):
            does(model)
        train(model, optimizer)


def test_who_looks_around_finds_nothing_to_stumble_over() -> None:
    model = tiny_model()
    with wrap(model, sgd(model)) as optimizer:
        assert not hasattr(model.classifier, "weight")
        assert "a Linear, on the cloud" in repr(model)
        assert [len(model.bert.encoder.layer), len(model.bert.encoder.layer[1:])] == [2, 1]
        assert [type(block).__name__ for block in model.bert.encoder.layer] == ["BertLayer"] * 2
        with pytest.raises(IndexError):
            model.bert.encoder.layer[3]  # of which there never was one
        model.apply(lambda module: nn.init.ones_(module.bias) if isinstance(module, nn.LayerNorm) else None)
        model.eval().train()
        assert [list(parameter.shape) for parameter in model.classifier.parameters()] == [[3, 32], [3]]
        assert not [name for name, _ in model.named_parameters() if "classifier" in name]
        assert len(model.bert.encoder.layer[:3]) == 2  # as the library asks for them
        assert model.bert.encoder.layer[-2] is model.bert.encoder.layer[1]
        train(model, optimizer)


def test_a_head_that_is_frozen_once_it_is_on_the_cloud() -> None:
    model = tiny_model()
    with wrap(model, sgd(model)) as optimizer:
        for parameter in model.classifier.parameters():
            parameter.requires_grad = False
        with pytest.raises(UsageError, match=r"requires_grad of 'classifier.weight' has become False since the model"):
            train(model, optimizer)


def test_a_parameter_that_was_held_since_before() -> None:
    """Frozen by who knows it from before the cut; on the edge it is in no module any more."""
    model = tiny_model()
    head = list(model.classifier.parameters())
    with wrap(model, sgd(model)) as optimizer:
        train(model, optimizer)
        for parameter in head:
            parameter.requires_grad_(False)
        with pytest.raises(UsageError, match=r"requires_grad of 'classifier.weight' has become False since the model"):
            train(model, optimizer)
        for parameter in head:
            parameter.requires_grad_(True)
        train(model, optimizer)
