"""Batches that the cloud would end the session for: refused here, or computed here; the session goes on."""

from __future__ import annotations

import math
from typing import Any, Dict

import pytest
import torch
from support.script import assert_same_training, batches, sgd, tiny_model, wrap

from sft.errors import NonFiniteLossError, UsageError
from sft_edge.systems import crossing


@pytest.mark.one_in(3)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
def test_a_script_passes_over_a_batch_whose_loss_is_none(kind: str, value: float) -> None:
    config: Dict[str, Any] = {"problem_type": kind, "num_labels": 1 if kind == "regression" else 3}

    def script(model: Any, optimizer: Any) -> torch.Tensor:
        data, losses = batches(4, model), []
        data[1]["labels"].reshape(-1)[2] = value
        for batch in data:
            optimizer.zero_grad()
            loss = model(**batch).loss
            losses.append(float(loss.detach()))
            if math.isfinite(losses[-1]):
                loss.backward()
                optimizer.step()
        assert [math.isfinite(loss) for loss in losses] == [True, False, True, True]
        return torch.tensor([losses[0], *losses[2:]])

    assert_same_training(script, sgd, tiny_model(**config))


def test_who_goes_backward_through_it_is_told_and_goes_on() -> None:
    model = tiny_model(num_labels=1, problem_type="regression")
    good, bad = batches(2, model)
    bad["labels"][0] = math.nan
    with wrap(model, sgd(model)) as optimizer:
        model(**bad).loss.backward()
        with pytest.raises(NonFiniteLossError, match="gradients on the cloud are not finite"):
            optimizer.step()
        optimizer.zero_grad()
        model(**good).loss.backward()
        optimizer.step()
        assert all(bool(torch.isfinite(x).all()) for x in model.state_dict().values())


def test_what_is_too_large_is_refused_before_it_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    (batch,) = batches(1, model)
    long = {"input_ids": torch.ones(1, 129, dtype=torch.long), "labels": torch.tensor([0])}
    with wrap(model, sgd(model)) as optimizer:

        def goes_on() -> None:
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()

        with pytest.raises(UsageError, match="sequences of 129 tokens are longer than the model's 128 positions"):
            model(**long)
        goes_on()
        with monkeypatch.context() as patch:
            patch.setattr(crossing, "MAX_PADDED_TOKENS", 20)
            for enabled in (True, False):
                with torch.set_grad_enabled(enabled), pytest.raises(UsageError, match="of 28 padded tokens is too"):
                    model(**batch)
        goes_on()
        for most, what in ((200, "activation of this batch takes 336"), (40, "output of this batch takes 48")):
            with monkeypatch.context() as patch:
                patch.setattr(crossing, "MAX_MESSAGE_BYTES", most)
                patch.setattr(crossing, "_BESIDE_BYTES", 0)
                with pytest.raises(UsageError, match=what):
                    model(**batch)
        goes_on()


def test_a_configuration_that_is_changed_after_the_cut_changes_nothing() -> None:
    """The cloud has it as it was."""
    model = tiny_model()
    (batch,) = batches(1, model)
    with wrap(model, sgd(model)) as optimizer:
        model.config.problem_type, model.config.num_labels = "multi_label_classification", 7
        with pytest.raises(UsageError, match="the head was cut for one class a sequence"):
            model(**{**batch, "labels": torch.zeros(4, 3)})
        with pytest.raises(UsageError, match="labels must be from 0 to 2"):
            model(**{**batch, "labels": torch.tensor([0, 1, 2, 6])})
        model(**batch).loss.backward()
        optimizer.step()
