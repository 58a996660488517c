"""Heads, architectures and residuals through `SFTOptimizer`: the one machine's weights, the library's outputs."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from support.script import adamw, assert_same_training, batches, sgd, tiny_model, wrap
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers.modeling_outputs import (
    CausalLMOutputWithCrossAttentions,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)

from sft.errors import UnsupportedModelError, UsageError


def travelling(model: Any, optimizer: Any) -> None:
    for batch in batches(4, model):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


@pytest.mark.one_in(5)
@pytest.mark.parametrize("residual", ["none", "low-rank"])
@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("roberta", "sequence-classification"),
        ("electra", "sequence-classification"),
        ("distilbert", "question-answering"),
        ("deberta-v2", "sequence-classification"),
        ("gpt2", "sequence-classification"),
        ("gpt2", "causal-lm"),
        ("llama", "sequence-classification"),
        ("llama", "causal-lm"),
        ("bert", "token-classification"),
        ("llama", "token-classification"),
        ("roberta", "multiple-choice"),
        ("electra", "multiple-choice"),
        ("bert", "masked-lm"),
        ("distilbert", "masked-lm"),
    ],
)
def test_labels_travel(family: str, head: str, residual: str) -> None:
    model = tiny_model(family, head)
    calibration = batches(2, model, labels=False) if residual == "low-rank" else []
    assert_same_training(travelling, sgd, model, tolerance=1e-5, calibration=calibration, residual=residual)


def test_spans_whose_positions_stay() -> None:
    def script(model: Any, optimizer: Any) -> None:
        for batch in batches(4, model):
            start, end = batch.pop("start_positions"), batch.pop("end_positions")
            optimizer.zero_grad()
            output = model(**batch)
            padding = batch["attention_mask"] == 0
            loss = cross_entropy(output.start_logits.masked_fill(padding, -1e9), start)
            loss = loss + cross_entropy(output.end_logits.masked_fill(padding, -1e9), end)
            (loss / 2).backward()
            optimizer.step()

    assert_same_training(script, sgd, tiny_model("bert", "question-answering"))


@pytest.mark.parametrize("head", ["token-classification", "masked-lm"])
def test_labels_of_tokens_that_stay(head: str) -> None:
    def script(model: Any, optimizer: Any) -> None:
        for batch in batches(4, model):
            y = batch.pop("labels")
            optimizer.zero_grad()
            cross_entropy(model(**batch).logits.flatten(0, 1), y.flatten()).backward()
            optimizer.step()

    assert_same_training(script, sgd, tiny_model("bert", head))


def test_choices_that_stay() -> None:
    def script(model: Any, optimizer: Any) -> Any:
        for batch in batches(4, model):
            y = batch.pop("labels")
            optimizer.zero_grad()
            logits = model(**batch).logits
            assert logits.shape == (2, 2)
            cross_entropy(logits, y).backward()
            optimizer.step()
        return logits.detach()

    assert_same_training(script, sgd, tiny_model("bert", "multiple-choice"))


@pytest.mark.parametrize("travels", [True, False])
def test_a_class_of_100_below_zero_is_not_learned(travels: bool) -> None:
    def script(model: Any, optimizer: Any) -> None:
        for batch in batches(4, model):
            batch["labels"][1] = -100
            optimizer.zero_grad()
            if travels:
                loss = model(**batch).loss
            else:
                y = batch.pop("labels")
                loss = cross_entropy(model(**batch).logits, y)
            loss.backward()
            optimizer.step()

    assert_same_training(script, sgd, tiny_model())


def test_tokens_that_stay() -> None:
    def script(model: Any, optimizer: Any) -> None:
        for batch in batches(4, model):
            y = batch.pop("labels")
            optimizer.zero_grad()
            logits = model(**batch).logits
            cross_entropy(logits[:, :-1].flatten(0, 1), y[:, 1:].flatten()).backward()
            optimizer.step()

    assert_same_training(script, sgd, tiny_model("gpt2", "causal-lm"))


def test_regression() -> None:
    assert_same_training(travelling, sgd, tiny_model(num_labels=1))


def test_several_labels() -> None:
    assert_same_training(travelling, adamw, tiny_model(problem_type="multi_label_classification"))

    def staying(model: Any, optimizer: Any) -> None:
        for batch in batches(4, model):
            y = batch.pop("labels")
            optimizer.zero_grad()
            binary_cross_entropy_with_logits(model(**batch).logits, y).backward()
            optimizer.step()

    assert_same_training(staying, adamw, tiny_model(problem_type="multi_label_classification"))


@pytest.mark.parametrize(
    ("family", "head", "kind"),
    [
        ("bert", "sequence-classification", SequenceClassifierOutput),
        ("gpt2", "sequence-classification", SequenceClassifierOutputWithPast),
        ("bert", "question-answering", QuestionAnsweringModelOutput),
        ("gpt2", "causal-lm", CausalLMOutputWithCrossAttentions),
        ("bert", "token-classification", TokenClassifierOutput),
        ("bert", "multiple-choice", MultipleChoiceModelOutput),
        ("bert", "masked-lm", MaskedLMOutput),
    ],
)
def test_the_output_is_of_the_librarys_class(family: str, head: str, kind: type) -> None:
    model = tiny_model(family, head)
    (batch,) = batches(1, model)
    with wrap(model, adamw(model)):
        assert type(model(**batch)) is kind
        as_tuple = model(**batch, return_dict=False)
        assert isinstance(as_tuple, tuple)
        assert as_tuple[0].equal(model(**batch).loss)


def test_logits_come_with_the_loss_but_not_those_of_a_vocabulary() -> None:
    for family, head in (("bert", "sequence-classification"), ("gpt2", "causal-lm"), ("bert", "masked-lm")):
        model = tiny_model(family, head)
        (batch,) = batches(1, model)
        with wrap(model, adamw(model)):
            assert (model(**batch).logits is None) is (head != "sequence-classification")
            model.eval()
            with torch.no_grad():
                assert model(**batch).logits is not None


def test_spans_never_lie_in_padding() -> None:
    model = tiny_model("bert", "question-answering")
    (batch,) = batches(1, model, labels=False)
    with wrap(model, adamw(model)):
        probabilities = model(**batch).start_logits.softmax(-1)
    assert probabilities[batch["attention_mask"] == 0].eq(0).all()


@pytest.mark.parametrize("travels", [True, False])
def test_a_micro_batch_that_a_language_model_learns_nothing_from(travels: bool) -> None:
    model = tiny_model("llama", "causal-lm")
    one, other = batches(2, model)
    other["labels"] = torch.full_like(other["labels"], -100)
    ends = []
    for disturbed in (False, True):
        model = tiny_model("llama", "causal-lm")
        with wrap(model, sgd(model)) as optimizer:
            model(**one, num_items_in_batch=20).loss.backward()
            if disturbed:
                with torch.set_grad_enabled(travels):
                    loss = model(**other, num_items_in_batch=20).loss
                assert loss.item() == 0.0
                if travels:
                    loss.backward()
            optimizer.step()
            ends.append(model.state_dict())
    assert all(ends[1][name].equal(tensor) for name, tensor in ends[0].items())


def test_a_language_models_loss_by_the_number_of_items() -> None:
    model = tiny_model("llama", "causal-lm")
    (batch,) = batches(1, model)
    learned = int((batch["labels"][:, 1:] != -100).sum())
    with wrap(model, adamw(model)):
        model.eval()
        mean = model(**batch).loss
        torch.testing.assert_close(model(**batch, num_items_in_batch=2 * learned).loss, mean / 2)


def test_a_classifications_loss_is_a_mean_whatever_the_number_of_items() -> None:
    """As the library's own, to which a Trainer that was made before the cut gives that number."""
    model = tiny_model("llama")
    _skip_without_items(model)
    (batch,) = batches(1, model)
    whole = model.eval()(**batch, num_items_in_batch=9).loss
    assert whole.equal(model(**batch).loss)
    with wrap(model, adamw(model)):
        assert model(**batch, num_items_in_batch=9).loss.equal(model(**batch).loss)


def test_the_number_of_items_of_spans_is_refused() -> None:
    model = tiny_model("bert", "question-answering")
    _skip_without_items(model)
    (batch,) = batches(1, model)
    with wrap(model, adamw(model)), pytest.raises(UsageError, match="num_items_in_batch cannot cross"):
        model(**batch, num_items_in_batch=9)


def _skip_without_items(model: Any) -> None:
    parameters = inspect.signature(type(model).forward).parameters.values()
    if not any(one.kind is one.VAR_KEYWORD for one in parameters):
        pytest.skip("this release's model takes no number of items")


@pytest.mark.parametrize(("family", "residual"), [("llama", "none"), ("bert", "low-rank")])
def test_a_model_in_half_precision_is_trained_in_float32(
    family: str, residual: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As newer releases load what is stored so; one machine is given the same numbers in float32."""
    model, expected = tiny_model(family).bfloat16(), tiny_model(family)  # whose rotary frequencies are not rounded
    expected.load_state_dict(model.state_dict())
    ends = []
    for one in (model, expected):
        calibration = batches(1, one, labels=False) if residual == "low-rank" else None
        with wrap(one, sgd(one), residual=residual, calibration=calibration) as optimizer:
            travelling(one, optimizer)
            ends.append(one.state_dict())
    assert all(ends[0][name].equal(tensor) for name, tensor in ends[1].items())
    assert "of this model are torch.bfloat16: both halves train them in float32" in caplog.text


def test_the_head_of_a_cut_language_model_can_be_asked_for() -> None:
    for family, head in (("bert", "masked-lm"), ("llama", "causal-lm")):
        model = tiny_model(family, head)
        with wrap(model, sgd(model)):
            assert model.get_output_embeddings() is None


def test_choices_that_are_read_off_padding_are_refused() -> None:
    model = tiny_model("electra", "multiple-choice", summary_type="last")
    with pytest.raises(UnsupportedModelError, match="summary_type 'last' a choice is read off its padding"):
        wrap(model, sgd(model), server="127.0.0.1:1")
