"""Gradients that a script asks for itself: `torch.autograd.grad` accumulates none, on either half."""

from __future__ import annotations

from typing import Any, Dict, Optional

import pytest
import torch
from support.script import adamw, assert_same_training, batches, sgd, tiny_model, wrap
from torch import Tensor
from torch.nn import functional

from sft.errors import UsageError


def loss_of(model: Any, batch: Dict[str, Tensor], travels: bool, embeds: Optional[Tensor] = None) -> Tensor:
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    if embeds is not None:
        inputs["inputs_embeds"] = embeds
        del inputs["input_ids"]
    if travels:
        return model(**inputs, labels=batch["labels"]).loss
    return functional.cross_entropy(model(**inputs).logits, batch["labels"])


def embedded(ids: Tensor) -> Tensor:
    table = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    return table[ids].requires_grad_()


def words_of(model: Any) -> Tensor:
    return next(parameter for name, parameter in model.named_parameters() if "word_embeddings" in name)


both = pytest.mark.parametrize("travels", [True, False], ids=["labels-travel", "labels-stay"])


@both
def test_a_perturbation_by_the_gradient_of_embeddings(travels: bool) -> None:
    """FGSM: asked for by one forward, trained by another."""

    def script(model: Any, optimizer: Any) -> Any:
        for batch in batches(3, model):
            optimizer.zero_grad()
            x = embedded(batch["input_ids"])
            (gradient,) = torch.autograd.grad(loss_of(model, batch, travels, x), [x])
            loss_of(model, batch, travels, (x + 0.1 * gradient.sign()).detach()).backward()
            optimizer.step()
        return gradient

    assert_same_training(script, sgd)


@both
def test_a_backward_to_some_inputs_alone(travels: bool) -> None:
    def script(model: Any, optimizer: Any) -> None:
        for batch in batches(2, model):
            optimizer.zero_grad()
            loss_of(model, batch, travels).backward(inputs=[words_of(model)])
            loss_of(model, batch, travels).backward()
            optimizer.step()

    assert_same_training(script, sgd)


@both
def test_of_all_parameters(travels: bool) -> None:
    """As for the norms of gradients: `cloud_gradients` is among those asked for, and gets none."""

    def script(model: Any, optimizer: Any) -> None:
        for batch in batches(2, model):
            optimizer.zero_grad()
            torch.autograd.grad(loss_of(model, batch, travels), list(model.parameters()), allow_unused=True)
            loss_of(model, batch, travels).backward()
            optimizer.step()

    assert_same_training(script, sgd)


@both
def test_two_results_at_once(travels: bool) -> None:
    def script(model: Any, optimizer: Any) -> None:
        for batch in batches(2, model):
            optimizer.zero_grad()
            both = loss_of(model, batch, travels) + loss_of(model, batch, travels)
            torch.autograd.grad(both, [words_of(model)])
            (loss_of(model, batch, travels) + loss_of(model, batch, travels)).backward()
            optimizer.step()

    assert_same_training(script, adamw)


@both
def test_after_a_backward_it_cannot_be_told_apart(travels: bool) -> None:
    model = tiny_model()
    (batch,) = batches(1, model)
    with wrap(model, sgd(model)) as optimizer:
        loss_of(model, batch, travels).backward()
        before = model.state_dict()
        torch.autograd.grad(loss_of(model, batch, travels), [words_of(model)])
        for attempt in (optimizer.step, lambda: loss_of(model, batch, travels)):
            with pytest.raises(UsageError, match=r"torch.autograd.grad\(\) or backward\(inputs=...\) went through the"):
                attempt()
        optimizer.zero_grad()
        assert all(x.equal(before[name]) for name, x in model.state_dict().items())
        loss_of(model, batch, travels).backward()
        optimizer.step()


def test_a_step_with_gradients_that_nobody_has() -> None:
    model = tiny_model()
    (batch,) = batches(1, model)
    with wrap(model, sgd(model)) as optimizer:
        torch.autograd.grad(loss_of(model, batch, True), [words_of(model)])
        with pytest.raises(UsageError, match="without gradients on the cloud"):
            optimizer.step()
        loss_of(model, batch, True).backward()
        optimizer.step()


def test_a_gradient_of_gradients_is_refused() -> None:
    model = tiny_model(attn_implementation="eager")
    (batch,) = batches(1, model)
    with wrap(model, sgd(model)) as optimizer:
        x = embedded(batch["input_ids"])
        (gradient,) = torch.autograd.grad(loss_of(model, batch, False, x), x, create_graph=True)
        with pytest.raises(UsageError, match="create_graph=True: gradients of gradients do not cross"):
            gradient.square().sum().backward()
        optimizer.zero_grad()
        loss_of(model, batch, False).backward(create_graph=False)
        optimizer.step()


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_a_forward_before_the_first_that_is_trained(without: Any) -> None:
    def script(model: Any, optimizer: Any) -> None:
        (batch,) = batches(1, model)
        with without():
            loss_of(model, batch, True)
        loss_of(model, batch, True).backward()
        optimizer.step()

    assert_same_training(script, sgd)
