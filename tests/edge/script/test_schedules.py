"""Settings of an optimizer that a script changes, and states that it loads meanwhile: as on one machine."""

from __future__ import annotations

import copy
from typing import Any, Dict, List, Tuple

import pytest
import torch
from support.script import EPS, TWO_STACKS, assert_same_training, batches, tiny_model, wrap

from sft.errors import UsageError

Settings = Dict[str, Any]
S = "SGD"


def _eps(larger: float) -> Dict[str, float]:
    """Adaptive optimizers divide gradients that are nothing but rounding by themselves, and two stacks differ there."""
    return {"eps": larger} if TWO_STACKS else {}


SCHEDULES: List[Tuple[str, Settings, List[Settings]]] = [
    (S, {"momentum": 0.9}, [{"momentum": 0.0}, {"momentum": 0.5}, {"momentum": 0}]),
    (S, {"momentum": 0}, [{}, {"momentum": 0.9}, {"momentum": 0.0}]),
    (S, {"momentum": 0.0}, [{"momentum": 0.1}, {"momentum": 0.2}, {"momentum": 0.3}]),
    (S, {"momentum": 0.9, "nesterov": True}, [{"momentum": 0.0}, {}, {"momentum": 0.9}]),
    (S, {"momentum": 0.9, "dampening": 0.5}, [{"dampening": 0}, {"nesterov": True}, {"nesterov": False}]),
    (S, {"weight_decay": 0}, [{"weight_decay": 0.1}, {"maximize": True}, {"weight_decay": 0.0, "maximize": False}]),
    (
        "Adam",
        _eps(EPS),
        [{"betas": (0.5, 0.9)}, {"eps": 1e-2 if TWO_STACKS else 1e-4}, {"betas": [0.8, 0.99], "weight_decay": 0.1}],
    ),
    (
        "AdamW",
        {"amsgrad": True, **_eps(EPS)},
        [{"amsgrad": False}, {"amsgrad": True}, {"eps": 1e-2 if TWO_STACKS else 1e-3}],
    ),
    ("NAdam", _eps(EPS), [{"momentum_decay": 1e-3}, {"betas": (0.5, 0.9)}, {}]),
    ("RMSprop", {"centered": True, **_eps(1e-2)}, [{"centered": False}, {"centered": True}, {"alpha": 0.5}]),
    ("RMSprop", {"momentum": 0.5, **_eps(1e-2)}, [{"momentum": 0.0}, {"momentum": 0.9}, {}]),
    ("Adagrad", _eps(EPS), [{"lr_decay": 0.1}, {"eps": 1e-2 if TWO_STACKS else 1e-3}, {}]),
    ("Adadelta", {}, [{"rho": 0.5}, {"eps": 1e-3}, {}]),
    ("ASGD", {}, [{"lambd": 1e-3}, {"alpha": 0.5}, {"weight_decay": 0.1}]),
    ("Rprop", {}, [{"etas": (0.4, 1.1)}, {"step_sizes": (1e-5, 10.0)}, {}]),
]


@pytest.mark.one_in(7)
@pytest.mark.parametrize("load", ["own", *(pytest.param(which, marks=pytest.mark.slow) for which in ("never", "old"))])
@pytest.mark.parametrize(("name", "begins", "changes"), SCHEDULES[:6], ids=lambda value: str(value)[:60])
def test_a_schedule_over_settings_of_sgd(name: str, begins: Settings, changes: List[Settings], load: str) -> None:
    check(name, begins, changes, load)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "begins", "changes"), SCHEDULES[6:], ids=lambda value: str(value)[:60])
def test_a_schedule_over_settings_of_others(name: str, begins: Settings, changes: List[Settings]) -> None:
    if name == "Rprop" and TWO_STACKS:
        pytest.skip("Rprop goes by signs, also of gradients that are nothing but rounding")
    check(name, begins, changes, "own")


def check(name: str, begins: Settings, changes: List[Settings], load: str) -> None:
    """`load`: the state that is loaded before every step."""

    def script(model: Any, optimizer: Any) -> None:
        first = None
        if load == "own":
            optimizer.load_state_dict(optimizer.state_dict())
        for batch, change in zip(batches(4, model), [{}, *changes]):
            for group in optimizer.param_groups:
                group.update(change)
            if load == "own":
                optimizer.load_state_dict(optimizer.state_dict())
            if load == "old" and first is not None:
                optimizer.load_state_dict(copy.deepcopy(first))  # torch takes the very tensors
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
            first = first or copy.deepcopy(optimizer.state_dict())
            if load == "own":
                optimizer.load_state_dict(optimizer.state_dict())

    assert_same_training(script, lambda model: getattr(torch.optim, name)(model.parameters(), lr=1e-2, **begins))


REFUSED: List[Tuple[Settings, str]] = [
    ({"weight_decay": float("nan")}, "'weight_decay' must be finite"),
    ({"weight_decay": True}, "'weight_decay' is 0; it cannot become True"),
    ({"nesterov": 1}, "'nesterov' is False; it cannot become 1"),
    ({"momentum": (0.5, 0.5)}, "'momentum' is 0; it cannot become"),
    ({"lr": -1.0}, "learning rates must be finite and not negative"),
    ({"lr": float("inf")}, "learning rates must be finite and not negative"),
]


def test_what_the_cloud_would_not_take_is_refused_here() -> None:
    model = tiny_model()
    with wrap(model, torch.optim.SGD(model.parameters(), lr=0.1)) as optimizer:
        was = {name: x.clone() for name, x in model.state_dict().items()}
        (group,) = optimizer.param_groups
        model(**batches(1, model)[0]).loss.backward()
        for change, says in REFUSED:
            kept = {name: group[name] for name in change}
            group.update(change)
            with pytest.raises(UsageError, match=says):
                optimizer.step()
            group.update(kept)
        now = model.state_dict()
        assert all(now[name].equal(x) for name, x in was.items())
        optimizer.step()
        assert not model.state_dict()["classifier.weight"].equal(was["classifier.weight"])
