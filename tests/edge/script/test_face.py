"""`SFTOptimizer` as what takes an optimizer sees it."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import weakref
from typing import Any, Iterator, Tuple

import pytest
import torch
from support.script import Wire, adamw, batches, sgd, tiny_model, with_dropout_above, wrap
from transformers import BertForSequenceClassification, PreTrainedModel

import sft
from sft import SFTOptimizer
from sft.errors import SessionLostError, UsageError
from sft.v1 import split_training_pb2 as pb
from sft_edge.script.gradients import PARAMETER_NAME

Wrapped = Tuple[PreTrainedModel, SFTOptimizer]


@pytest.fixture
def wrapped() -> Iterator[Wrapped]:
    model = tiny_model()
    with wrap(model, adamw(model)) as optimizer:
        yield model, optimizer


def one_step(model: Any, optimizer: Any) -> None:
    optimizer.zero_grad()
    model(**batches(1, model)[0]).loss.backward()
    optimizer.step()


def test_the_package_offers_it() -> None:
    assert sft.SFTOptimizer is SFTOptimizer
    with pytest.raises(AttributeError, match="no attribute 'Optimizer'"):
        _ = sft.Optimizer


def test_is_an_optimizer_whose_groups_are_the_scripts(wrapped: Wrapped) -> None:
    model, optimizer = wrapped
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is optimizer.optimizer.param_groups
    assert optimizer.defaults["lr"] == 1e-2
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    one_step(model, optimizer)
    assert optimizer.state is optimizer.optimizer.state
    assert len(optimizer.state) == len(held) - 1, "the cloud's parameter has no state here"


def test_setters_reach_the_scripts_optimizer(wrapped: Wrapped) -> None:
    _, optimizer = wrapped
    groups, state, defaults = optimizer.param_groups, optimizer.state, dict(optimizer.defaults, lr=5.0)
    optimizer.param_groups = list(groups)
    optimizer.state = state.copy()
    optimizer.defaults = defaults
    assert optimizer.optimizer.param_groups is not groups
    assert optimizer.optimizer.state is not state
    assert optimizer.optimizer.defaults is defaults


def test_the_model_loses_what_the_cloud_has() -> None:
    model = tiny_model()
    kept = dict(model.named_parameters())["bert.encoder.layer.0.output.dense.weight"]
    gone = weakref.ref(dict(model.named_parameters())["bert.encoder.layer.2.output.dense.weight"])
    with wrap(model, adamw(model)):
        names = dict(model.named_parameters())
        assert names["bert.encoder.layer.0.output.dense.weight"] is kept
        assert names["bert.encoder.layer.1.output.dense.ffn1.weight"].shape == (4, 64)
        assert not any("layer.2." in name or "classifier" in name or "pooler" in name for name in names)
        gc.collect()
        assert gone() is None, "memory of the cloud's half is still held"


def test_the_forward_keeps_its_signature(wrapped: Wrapped) -> None:
    model, _ = wrapped
    assert inspect.signature(model.forward) == inspect.signature(BertForSequenceClassification.forward.__get__(model))
    assert model.forward.__doc__ == BertForSequenceClassification.forward.__doc__
    assert model.accepts_loss_kwargs is False


def test_step_hooks_run_once_with_this_optimizer(wrapped: Wrapped) -> None:
    model, optimizer = wrapped
    seen = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(("before", o)))
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(("after", o)))
    one_step(model, optimizer)
    assert seen == [("before", optimizer), ("after", optimizer)]


def test_state_dict_hooks_run(wrapped: Wrapped) -> None:
    _, optimizer = wrapped
    seen = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("before"))
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "mine": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, state: seen.append(state.pop("mine")))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before", 1, "loaded"]


def test_groups_cannot_be_added(wrapped: Wrapped) -> None:
    with pytest.raises(UsageError, match="cut already"):
        wrapped[1].add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})


def test_repr_says_what_it_is(wrapped: Wrapped) -> None:
    text = repr(wrapped[1])
    assert text.startswith(
        "SFTOptimizer(role='edge', server=None, split_layer=2, split_rank=4, residual='none', AdamW ("
    )


def test_is_neither_pickled_nor_copied(wrapped: Wrapped) -> None:
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(UsageError, match="save its state_dict"):
            attempt(wrapped[1])


def test_a_model_that_is_cut_is_neither_pickled_nor_copied() -> None:
    model = tiny_model()
    with wrap(model, adamw(model)):
        for attempt in (pickle.dumps, copy.deepcopy, torch.optim.swa_utils.AveragedModel):
            with pytest.raises(UsageError, match="use its state_dict"):
                attempt(model)


def test_a_scheduler_made_before_goes_on_working() -> None:
    model = tiny_model()
    inner = sgd(model)
    schedule = torch.optim.lr_scheduler.StepLR(inner, step_size=1, gamma=0.5)
    with wrap(model, inner) as optimizer:
        one_step(model, optimizer)
        schedule.step()
        assert optimizer.param_groups[0]["lr"] == 5e-3


def test_step_was_skipped_is_seen(wrapped: Wrapped) -> None:
    model, optimizer = wrapped
    assert not optimizer.step_was_skipped
    with pytest.raises(UsageError, match="without a backward"):
        optimizer.step()
    assert optimizer.step_was_skipped
    one_step(model, optimizer)
    assert not optimizer.step_was_skipped


def test_close_ends_the_session_and_the_model_says_so() -> None:
    model, wire = tiny_model(), Wire()
    optimizer = wrap(model, adamw(model), transport=wire)
    one_step(model, optimizer)
    optimizer.close()
    optimizer.close()
    assert wire.closed
    assert wire.ended.is_set()
    with pytest.raises(SessionLostError, match="session is over"):
        model(**batches(1, model)[0])
    with pytest.raises(SessionLostError, match="session is over"):
        optimizer.step()


def test_a_session_ends_when_nobody_can_use_it_any_more() -> None:
    model, wire = tiny_model(), Wire()
    optimizer = wrap(model, adamw(model), transport=wire)
    one_step(model, optimizer)
    del optimizer
    gc.collect()
    model(**batches(1, model)[0])  # the model holds on to its cloud
    assert not wire.ended.is_set()
    del model
    gc.collect()
    assert wire.ended.wait(20)
    wire.close()


def test_the_parameter_that_stands_for_the_cloud(wrapped: Wrapped) -> None:
    model, optimizer = wrapped
    stands_for = getattr(model, PARAMETER_NAME)
    assert stands_for.grad is None
    (batch,) = batches(1, model)
    model(**batch).loss.backward()
    assert stands_for.grad.norm() > 0
    assert PARAMETER_NAME not in model.state_dict()
    before = stands_for.detach().clone()
    optimizer.step()
    assert stands_for.equal(before)
    assert stands_for.grad is not None, "as with any parameter, step() leaves the gradient"
    optimizer.zero_grad()
    assert stands_for.grad is None


def test_the_cloud_computes_in_the_scripts_precision() -> None:
    model, wire = tiny_model(), Wire()
    with wrap(model, adamw(model), transport=wire):
        (batch,) = batches(1, model)
        model(**batch)
        with torch.autocast("cpu", torch.bfloat16):
            model(**batch).loss.backward()
            with torch.autocast("cpu", enabled=False):
                model(**batch)
            model.eval()
            with torch.no_grad():
                evaluated = model(**batch).logits
            assert evaluated.equal(model(**batch).logits)
    asked = [message.forward.autocast for message in wire.sent if message.HasField("forward")]
    assert asked == [pb.DATA_TYPE_UNSPECIFIED, pb.DATA_TYPE_BFLOAT16, pb.DATA_TYPE_UNSPECIFIED, pb.DATA_TYPE_BFLOAT16]
    asked = [message.evaluate.autocast for message in wire.sent if message.HasField("evaluate")]
    assert asked == [pb.DATA_TYPE_BFLOAT16]


def test_round_trips() -> None:
    """One where labels travel, two where they stay, and none for a step of its own but the last."""
    for travels, kinds in ((True, ["forward"]), (False, ["forward", "backward"])):
        model, wire = tiny_model(), Wire()
        with wrap(model, adamw(model), transport=wire) as optimizer:
            for batch in batches(3, model):
                optimizer.zero_grad()
                y = batch["labels"] if travels else batch.pop("labels")
                output = model(**batch)
                (output.loss if travels else torch.nn.functional.cross_entropy(output.logits, y)).backward()
                optimizer.step()
        assert [message.WhichOneof("body") for message in wire.sent] == ["attach", *kinds * 3, None]


@pytest.mark.parametrize("travels", [True, False])
def test_the_clouds_dropout_depends_on_the_seed_alone(travels: bool) -> None:
    losses = []
    for seed in (1, 1, 2):
        model = with_dropout_above(tiny_model(), hidden_dropout_prob=0.5)
        with wrap(model, adamw(model), seed=seed):
            batch = batches(1, model)[0]
            y = batch["labels"]
            torch.rand(1)  # the script's own draws do not matter
            if travels:
                losses.append(model(**batch).loss.item())
            else:
                del batch["labels"]
                losses.append(torch.nn.functional.cross_entropy(model(**batch).logits, y).item())
    assert losses[0] == losses[1] != losses[2]
