"""Checkpoints of a script: state of model and optimizer, both halves in one, taken to another session."""

from __future__ import annotations

import copy
import io
from typing import Any, Dict, List

import pytest
import torch
from support.script import Wire, adamw, batches, one_machine, sgd, tiny_model, with_dropout_above, wrap
from torch import Tensor

from sft.errors import UsageError
from sft.models import Cut

pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # torch 2.1, of its own loader


def train(model: Any, optimizer: Any, data: List[Dict[str, Tensor]]) -> None:
    for batch in data:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


def saved(state: Any) -> Any:
    """Through a file and back, with the loader that takes nothing but tensors."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_the_models_state_is_that_of_the_whole_decomposed_model() -> None:
    model = tiny_model()
    expected = {name: p.detach() for name, p in one_machine(model, Cut("sft", 2, 4)).named_parameters()}
    with wrap(model, adamw(model)):
        state = model.state_dict()
    assert expected.keys() <= state.keys()
    assert all(state[name].equal(tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("make_optimizer", [adamw, sgd])
def test_a_run_goes_on_in_another_session(make_optimizer: Any) -> None:
    model = tiny_model()
    data = batches(6, model)
    with wrap(model, make_optimizer(model)) as optimizer:
        train(model, optimizer, data[:3])
        checkpoint = saved({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        train(model, optimizer, data[3:])
        expected = model.state_dict()
    again = tiny_model()
    with wrap(again, make_optimizer(again)) as optimizer:
        again.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        train(again, optimizer, data[3:])
        got = again.state_dict()
    assert all(got[name].equal(tensor) for name, tensor in expected.items())


def test_without_the_optimizers_state_it_is_another_run() -> None:
    model = tiny_model()
    data = batches(4, model)
    with wrap(model, adamw(model)) as optimizer:
        train(model, optimizer, data[:2])
        checkpoint = saved(model.state_dict())
        train(model, optimizer, data[2:])
        expected = model.state_dict()
    again = tiny_model()
    with wrap(again, adamw(again)) as optimizer:
        again.load_state_dict(checkpoint)
        train(again, optimizer, data[2:])
        got = again.state_dict()
    for half in ("bert.encoder.layer.0.output.dense.weight", "classifier.weight"):
        assert not got[half].allclose(expected[half], atol=1e-4)


def test_settings_are_loaded_too() -> None:
    model = tiny_model()
    with wrap(model, adamw(model)) as optimizer:
        train(model, optimizer, batches(1, model))
        optimizer.param_groups[0]["lr"] = 0.5
        optimizer.param_groups[0]["betas"] = (0.5, 0.6)
        state = saved(optimizer.state_dict())
    again = tiny_model()
    with wrap(again, adamw(again)) as optimizer:
        optimizer.load_state_dict(state)
        assert optimizer.param_groups[0]["lr"] == 0.5
        assert optimizer.param_groups[0]["betas"] == (0.5, 0.6)
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
            id(p) for p in again.parameters()
        }


def test_a_round_trip_before_the_first_step_asks_the_cloud_nothing() -> None:
    model, wire = tiny_model(), Wire()
    with wrap(model, adamw(model), transport=wire) as optimizer:
        state = optimizer.state_dict()  # as accelerate does when it takes an optimizer
        optimizer.load_state_dict(state)
    assert wire.downloads == 0
    assert set(state) == {"state", "param_groups"}
    assert not state["state"]


def test_a_round_trip_in_the_middle_of_a_run_changes_nothing() -> None:
    model = tiny_model()
    data = batches(4, model)
    ends = []
    for disturbed in (False, True):
        model = tiny_model()
        with wrap(model, adamw(model)) as optimizer:
            train(model, optimizer, data[:2])
            if disturbed:
                optimizer.load_state_dict(optimizer.state_dict())
                model.load_state_dict(model.state_dict())
            train(model, optimizer, data[2:])
            ends.append(model.state_dict())
    assert all(ends[1][name].equal(tensor) for name, tensor in ends[0].items())


def test_a_part_of_a_models_state() -> None:
    model = tiny_model()
    with wrap(model, adamw(model)):
        before = model.state_dict()
        found = model.load_state_dict({"classifier.bias": torch.tensor([1.0, 2.0, 3.0])}, strict=False)
        after = model.state_dict()
    assert after["classifier.bias"].tolist() == [1.0, 2.0, 3.0]
    assert not found.unexpected_keys
    assert "classifier.weight" in found.missing_keys
    assert "classifier.bias" not in found.missing_keys
    assert all(after[name].equal(tensor) for name, tensor in before.items() if name != "classifier.bias")


@pytest.mark.parametrize("name", ["classifier.weight", "bert.encoder.layer.0.output.dense.weight"])
def test_a_models_state_that_does_not_fit(name: str) -> None:
    model = tiny_model()
    with wrap(model, adamw(model)) as optimizer:
        state = model.state_dict()
        with pytest.raises(RuntimeError, match=f"(?s)Missing key.*{name}"):
            model.load_state_dict({key: tensor for key, tensor in state.items() if key != name})
        with pytest.raises(RuntimeError, match="Unexpected key"):
            model.load_state_dict({**state, "what": torch.zeros(1)})
        with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
            model.load_state_dict({**state, name: torch.zeros(5, 5)})
        train(model, optimizer, batches(1, model))  # the session has not suffered


@pytest.mark.one_in(5)
@pytest.mark.parametrize("travels", [True, False])
@pytest.mark.parametrize("end", ["held", "let go", "gone backward through"])
def test_a_state_is_loaded_in_the_middle_of_a_step(end: str, travels: bool) -> None:
    """As a script does that has seen a loss that is not finite, or has micro-batches left over."""
    model = tiny_model()
    data = batches(4, model)
    with wrap(model, adamw(model)) as optimizer:
        train(model, optimizer, data[:2])
        states = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        train(model, optimizer, data[2:3])
        if travels:
            loss = model(**data[3]).loss
        else:
            loss = model(data[3]["input_ids"], data[3]["attention_mask"]).logits.sum()
        if end == "let go":
            del loss
        elif end == "gone backward through":
            loss.backward()
        model.load_state_dict(states[0])
        optimizer.load_state_dict(states[1])
        if end == "held":
            with pytest.raises(UsageError, match="before a state was loaded"):
                loss.backward()
        train(model, optimizer, data[2:])
        got = model.state_dict()
    model = tiny_model()
    with wrap(model, adamw(model)) as optimizer:
        train(model, optimizer, data)
        expected = model.state_dict()
    assert all(got[name].equal(tensor) for name, tensor in expected.items())


def test_an_optimizers_state_that_does_not_fit_changes_nothing() -> None:
    model = tiny_model()
    data = batches(4, model)
    with wrap(model, adamw(model)) as optimizer:
        train(model, optimizer, data[:1])
        old = copy.deepcopy(optimizer.state_dict())
        train(model, optimizer, data[1:2])
        on_cloud = {key: tensor for key, tensor in old["cloud"].items() if key != "classifier.weight/exp_avg"}
        of_edge = {index: dict(state) for index, state in old["state"].items()}
        of_edge[0]["exp_avg"] = torch.zeros(5, 5)
        for change, match in (
            ({"cloud": {}}, "lacks the key 'cloud'"),
            ({"cloud": {**on_cloud, "classifier.weight/exp_avg": torch.zeros(5, 5)}}, "another model or cut"),
            ({"cloud": {**on_cloud, "some.weight/exp_avg": torch.zeros(1)}}, "'some.weight' is not trained"),
            ({"state": of_edge}, r"'exp_avg' has shape \[5, 5\]"),
        ):
            with pytest.raises(UsageError, match=match):
                optimizer.load_state_dict({**old, **change})
            assert all(state["step"] == 2 for state in optimizer.state.values())
        train(model, optimizer, data[2:])
        got = model.state_dict()
    model = tiny_model()
    with wrap(model, adamw(model)) as optimizer:
        train(model, optimizer, data)
        expected = model.state_dict()
    assert all(got[name].equal(tensor) for name, tensor in expected.items())


def test_an_optimizers_state_that_the_cloud_refuses() -> None:
    model = tiny_model()
    with wrap(model, adamw(model)) as optimizer:
        train(model, optimizer, batches(1, model))
        state = copy.deepcopy(optimizer.state_dict())
        train(model, optimizer, batches(1, model))
        del state["cloud"]["classifier.weight/exp_avg"]
        with pytest.raises(UsageError, match=r"lacks 'exp_avg' for 'classifier\.weight'"):
            optimizer.load_state_dict(state)
        assert all(state["step"] == 2 for state in optimizer.state.values())


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ["Adagrad", "ASGD", "NAdam", "Rprop"])
def test_optimizers_that_begin_with_a_state(name: str) -> None:
    model = tiny_model()
    data = batches(2, model)
    with wrap(model, getattr(torch.optim, name)(model.parameters(), lr=1e-3)) as optimizer:
        optimizer.load_state_dict(optimizer.state_dict())
        train(model, optimizer, data)
        optimizer.load_state_dict(optimizer.state_dict())
        train(model, optimizer, data)


def test_no_state_in_the_place_of_one() -> None:
    model = tiny_model()
    with wrap(model, adamw(model)) as optimizer:
        fresh = optimizer.state_dict()
        train(model, optimizer, batches(1, model))
        with pytest.raises(UsageError, match="before the first step"):
            optimizer.load_state_dict(fresh)
        with pytest.raises(ValueError, match="parameter group"):
            optimizer.load_state_dict({**optimizer.state_dict(), "param_groups": []})


def dropping(seed: int) -> Any:
    """A model with dropout in both halves."""
    model: Any = with_dropout_above(tiny_model(), hidden_dropout_prob=0.3)
    model.bert.embeddings.dropout.p = 0.3
    torch.manual_seed(seed)
    return model


def test_a_run_with_dropout_goes_on_to_the_same_bits() -> None:
    """In a process that was seeded otherwise, with the generator's state that the script has kept, as a Trainer has."""
    model = dropping(1)
    data = batches(6, model)
    with wrap(model, sgd(model), seed=None) as optimizer:
        train(model, optimizer, data[:3])
        checkpoint = saved(
            {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "draws": torch.get_rng_state()}
        )
        train(model, optimizer, data[3:])
        expected = saved(model.state_dict())
    for goes_on in (True, False):
        again, wire = dropping(2), Wire()
        with wrap(again, sgd(again), seed=None, transport=wire) as optimizer:
            again.load_state_dict(checkpoint["model"])
            state = saved(checkpoint["optimizer"])
            if not goes_on:
                del state["cloud_draws"]
            optimizer.load_state_dict(state)
            torch.set_rng_state(checkpoint["draws"])
            train(again, optimizer, data[3:5])
            if goes_on:  # and once more from there
                optimizer.load_state_dict(saved(optimizer.state_dict()))
            train(again, optimizer, data[5:])
            got = again.state_dict()
        assert all(got[name].equal(tensor) for name, tensor in expected.items()) is goes_on
        sent = [message.forward.HasField("draws") for message in wire.sent if message.HasField("forward")]
        assert sent == [goes_on] * 3


def test_going_back_in_the_same_session_draws_the_same_again() -> None:
    model, ends = dropping(1), []
    data = batches(4, model)
    with wrap(model, sgd(model)) as optimizer:
        train(model, optimizer, data[:2])
        checkpoint = saved({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        draws = torch.get_rng_state()
        for _ in range(2):
            model.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(saved(checkpoint["optimizer"]))  # torch goes on in the tensors it is given
            torch.set_rng_state(draws)
            train(model, optimizer, data[2:])
            ends.append(saved(model.state_dict()))
    assert all(ends[1][name].equal(tensor) for name, tensor in ends[0].items())


@pytest.mark.parametrize(
    "draws", [3, {"seed": 1}, {"seed": -1, "step": 1}, {"seed": 1, "step": "x"}, {"seed": 1 << 64, "step": 1}]
)
def test_draws_that_make_no_sense(draws: Any) -> None:
    model = tiny_model()
    with wrap(model, sgd(model)) as optimizer:
        train(model, optimizer, batches(1, model))
        with pytest.raises(UsageError, match="'cloud_draws' is none of SFTOptimizer's"):
            optimizer.load_state_dict({**optimizer.state_dict(), "cloud_draws": draws})
        train(model, optimizer, batches(1, model))
