"""What goes wrong in the middle of a script that trains through `SFTOptimizer`, and how it goes on."""

from __future__ import annotations

from typing import Any, Dict

import pytest
import torch
from support.script import Wire, adamw, batches, sgd, tiny_model, wrap
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sft.errors import NonFiniteLossError, SessionLostError, UsageError
from sft.wire.protocol import MAX_WAITING
from sft_edge.link.replies import PendingReply


def _one_step(model: Any, optimizer: Any) -> None:
    optimizer.zero_grad()
    model(**batches(1, model)[0]).loss.backward()
    optimizer.step()


@pytest.mark.first_only
@pytest.mark.parametrize("travels", [True, False])
def test_more_results_than_the_cloud_keeps(travels: bool) -> None:
    model = tiny_model()
    with wrap(model, adamw(model)) as optimizer:
        (batch,) = batches(1, model)

        def ask() -> Tensor:
            return model(**batch).loss if travels else model(batch["input_ids"]).logits

        kept = [ask() for _ in range(MAX_WAITING)]
        with pytest.raises(UsageError, match=r"64 results of the model wait for a backward.*no_grad.*detach"):
            ask()
        kept.pop()
        kept.append(ask())
        kept.pop().sum().backward()
        ask()
        optimizer.step()
        kept += [ask() for _ in range(MAX_WAITING)]  # those of an earlier step do not count
        del kept
        _one_step(model, optimizer)


@pytest.mark.parametrize("question", ["labels stay", "labels travel"])
def test_a_backward_that_is_broken_off(monkeypatch: pytest.MonkeyPatch, question: str) -> None:
    """Ctrl-C while the answer is under way, or when it is here: what the cloud has added nobody knows."""
    model = tiny_model()
    data = batches(3, model)

    def loss_of(batch: Dict[str, Tensor]) -> Tensor:
        if question == "labels travel":
            return model(**batch).loss
        return cross_entropy(model(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"])

    def interrupted(pending: PendingReply) -> Any:
        result(pending)
        raise KeyboardInterrupt

    result = PendingReply.result
    with wrap(model, sgd(model)) as optimizer:
        first, second = loss_of(data[0]), loss_of(data[1])
        first.backward()  # so that the norm after the second one's is asked for
        monkeypatch.setattr(PendingReply, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            second.backward(retain_graph=True)
        with pytest.raises(KeyboardInterrupt):
            loss_of(data[2])
        monkeypatch.undo()
        with pytest.raises(NonFiniteLossError, match="was broken off"):
            optimizer.step()
        with pytest.raises(UsageError, match="went through this forward before"):
            second.backward()
        loss_of(data[2]).backward()
        with pytest.raises(NonFiniteLossError, match="was broken off"):
            optimizer.step()
        del first, second
        optimizer.zero_grad()
        loss_of(data[2]).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        optimizer.step()
        got = model.state_dict()
        model.load_state_dict(got)
    model = tiny_model()
    with wrap(model, sgd(model)) as optimizer:
        loss_of(data[2]).backward()
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(model.parameters(), 1e9))
        optimizer.step()
        expected = model.state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("travels", [True, False])
def test_gradients_that_are_not_finite(travels: bool) -> None:
    model = tiny_model()
    with wrap(model, adamw(model)) as optimizer:
        (batch,) = batches(1, model)
        if travels:
            with torch.no_grad():
                model.bert.embeddings.word_embeddings.weight[int(batch["input_ids"][0, 0])] = 1e38
            loss = model(**batch).loss
        else:
            loss = cross_entropy(model(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"]) * float(
                "nan"
            )
        assert torch.isnan(loss)
        loss.backward()
        with pytest.raises(NonFiniteLossError, match="neither side has taken the step"):
            optimizer.step()
        optimizer.zero_grad()
        if not travels:
            _one_step(model, optimizer)


def test_a_loss_that_counts_infinitely() -> None:
    model = tiny_model()
    with wrap(model, adamw(model)) as optimizer:
        (batch,) = batches(1, model)
        with pytest.raises(NonFiniteLossError, match="inf"):
            (model(**batch).loss * float("inf")).backward()
        _one_step(model, optimizer)


def test_what_is_lost_mid_loop_is_told_and_leaves_the_scripts_own_alone() -> None:
    for at in ("forward", "backward"):
        model, wire = tiny_model(), Wire()
        with wrap(model, adamw(model), transport=wire, reconnect_timeout_seconds=0) as optimizer:
            _one_step(model, optimizer)
            wire.lose = lambda message, at=at: message.step == 1 and message.WhichOneof("body") == at
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            state = {key: value.clone() for key, value in optimizer.state[next(iter(model.parameters()))].items()}
            batch = batches(2, model)[1]
            optimizer.zero_grad()

            def step(batch: Dict[str, Tensor] = batch, model: Any = model, optimizer: Any = optimizer) -> None:
                logits = model(batch["input_ids"], batch["attention_mask"]).logits
                cross_entropy(logits, batch["labels"]).backward()
                optimizer.step()

            for _ in range(2):  # and again
                with pytest.raises(SessionLostError):
                    step()
            with pytest.raises(SessionLostError):
                optimizer.step()
            assert optimizer.step_was_skipped
            assert all(p.equal(before[name]) for name, p in model.named_parameters())
            now = optimizer.state[next(iter(model.parameters()))]
            assert all(now[key].equal(value) for key, value in state.items())


@pytest.mark.parametrize("travels", [True, False])
def test_gradients_whose_norm_no_float_can_hold(travels: bool) -> None:
    model = tiny_model()
    with wrap(model, sgd(model)) as optimizer:
        (batch,) = batches(1, model)
        loss = model(**batch).loss if travels else model(batch["input_ids"]).logits.sum()
        (loss * 3e38).backward()
        with pytest.raises(NonFiniteLossError, match="not finite"):
            optimizer.step()
        _one_step(model, optimizer)
