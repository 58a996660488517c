"""What is trained is decided before the cut; from then on learning rates decide."""

from __future__ import annotations

from typing import Any, Dict, List

import pytest
import torch
from support.script import adamw, batches, sgd, tiny_model, wrap

from sft.errors import UsageError


def one_step(model: Any, optimizer: Any) -> None:
    (batch,) = batches(1, model)
    optimizer.zero_grad()
    model(**batch).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("flag", [True, False])
def test_a_flag_that_changes_after_the_cut_is_refused_at_the_step(flag: bool) -> None:
    model = tiny_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not ("embeddings" in name and flag))
    with wrap(model, sgd(model)) as optimizer:
        one_step(model, optimizer)
        model.bert.embeddings.requires_grad_(flag)
        before = {name: x.clone() for name, x in model.state_dict().items()}
        with pytest.raises(UsageError, match=f"'bert.embeddings.word_embeddings.weight' has become {flag} since"):
            one_step(model, optimizer)
        assert all(x.equal(before[name]) for name, x in model.state_dict().items())
        model.bert.embeddings.requires_grad_(not flag)
        one_step(model, optimizer)


@pytest.mark.parametrize("make", [sgd, adamw])
def test_a_group_without_a_learning_rate_rests_on_both_sides(make: Any) -> None:
    """Gradual unfreezing: blocks of the edge and of the cloud, when the script says."""
    model = tiny_model()

    def rests(name: str) -> bool:
        return "layer.0" in name or "layer.2" in name

    groups: List[Dict[str, Any]] = [{"params": [], "lr": 1e-2}, {"params": [], "lr": 0.0}]
    for name, parameter in model.named_parameters():
        groups[rests(name)]["params"].append(parameter)
    made = torch.optim.AdamW(groups) if make is adamw else torch.optim.SGD(groups, momentum=0.9)
    with wrap(model, made) as optimizer:
        before = {name: x.clone() for name, x in model.state_dict().items()}
        one_step(model, optimizer)
        after = {name: x.clone() for name, x in model.state_dict().items()}
        assert {name for name in after if after[name].equal(before[name]) and rests(name)} == set(filter(rests, after))
        assert not after["classifier.weight"].equal(before["classifier.weight"])
        optimizer.param_groups[1]["lr"] = 1e-2
        one_step(model, optimizer)
        last = model.state_dict()
        for name in ("bert.encoder.layer.0.output.dense.weight", "bert.encoder.layer.2.output.dense.weight"):
            assert not last[name].equal(after[name])


def test_a_frozen_layer_that_is_cut_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model()
    model.bert.encoder.requires_grad_(False)
    with wrap(model, sgd(model)) as optimizer:
        assert "'bert.encoder.layer.1.output.dense', is frozen, and its factors with it" in caplog.text
        one_step(model, optimizer)
    caplog.clear()
    model = tiny_model()
    with wrap(model, sgd(model.classifier)) as optimizer:
        assert "'bert.encoder.layer.1.output.dense', is in no group of the optimizer, and its factors" in caplog.text
        one_step(model, optimizer)
    caplog.clear()
    model = tiny_model()
    with wrap(model, sgd(model)):
        assert "and its factors with it" not in caplog.text
