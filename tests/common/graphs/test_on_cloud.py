"""What is left on the edge of a module that is on the cloud."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any, Callable, ClassVar, Set

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sft.errors import UsageError
from sft.graphs.cut import cut
from sft.graphs.on_cloud import OnCloud


class Upper(nn.Module):
    """Modules that hold more than parameters, and classes with ways of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.rest, self.rnn = nn.BatchNorm1d(4), nn.LSTM(4, 4)
        self.kept = torch.ones(3)

    def train(self, mode: bool = True) -> Upper:
        super().train(mode)
        assert self.kept.sum() == 3
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(self.rest(x)[:, None])[0][:, 0]


def lower_of(model: nn.Sequential) -> nn.Sequential:
    split = cut(model, "1", 2)
    split.keep_net_1()
    return model


def test_modes_stay_and_nothing_else() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4), Upper(), nn.Sequential(nn.Dropout(0.3), nn.Linear(4, 2)))
    model[3].eval()
    upper: Any = model[2]
    weight, kept = weakref.ref(upper.rnn.weight_ih_l0), weakref.ref(upper.kept)
    lower_of(model)
    gc.collect()
    assert weight() is None
    assert kept() is None
    assert model[2] is upper, "for whoever holds it"
    assert isinstance(upper, Upper)
    assert [type(one).__name__ for one in upper.modules()] == ["Upper", "BatchNorm1d", "LSTM"]
    assert [module.training for module in model[3].modules()] == [False] * 3
    assert all(module.training for module in upper.modules())
    model.eval()
    assert not any(module.training for module in model.modules())
    upper.rest.train()
    assert [one for one in model.modules() if isinstance(one, OnCloud) and one.training] == [upper.rest]
    model.to(torch.float64).zero_grad()
    assert set(model.state_dict()) == {"0.weight", "0.bias", "1.ffn1.weight"}
    assert {name for name, _ in model.named_parameters()} == set(model.state_dict())
    assert model.load_state_dict({**model.state_dict(), "3.1.weight": torch.ones(1)}, strict=False).unexpected_keys
    assert "LSTM(on the cloud)" in repr(model)
    assert {name: tuple(one.shape) for name, one in upper.named_parameters()}["rnn.weight_ih_l0"] == (16, 4)
    assert sum(one.numel() for one in model[3][1].parameters()) == 4 * 2 + 2, "as Lightning's summary counts them"
    assert all(one.is_meta for one in upper.parameters())
    assert not list(upper.buffers())
    model[3][1].register_forward_hook(print).remove()
    assert type(upper.rest) == nn.BatchNorm1d, "as scripts ask that rest their norms"  # noqa: E721
    assert type(upper.rest) != nn.BatchNorm2d  # noqa: E721
    assert type(upper.rest) in (nn.LayerNorm, nn.BatchNorm1d)
    assert not hasattr(model[3][1], "weight")


def set_dropout(module: Any) -> None:
    module.p = 0.0


@pytest.mark.parametrize(
    ("what", "says"),
    [
        (lambda dropout: dropout(torch.ones(2)), "this Dropout is on the cloud, and does not run here: call the model"),
        (lambda dropout: dropout.p, "and 'p' with it: read that before the model is cut"),
        (lambda dropout: dropout.state_dict(), r"and its weights with it: they are in model\.state_dict\(\)"),
        (lambda dropout: dropout.load_state_dict({}), r"load them with model\.load_state_dict\(\)"),
        (copy.deepcopy, "can be neither copied nor pickled"),
        (set_dropout, r"hears of nothing but train\(\) and eval\(\): set 'p' before the model is cut"),
    ],
)
def test_what_else_is_wanted_of_it_is_refused(what: Callable[[Any], Any], says: str) -> None:
    model = lower_of(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4), nn.Dropout(0.3), nn.Linear(4, 2)))
    with pytest.raises(UsageError, match=says):
        what(model[2])


@pytest.mark.parametrize(
    "what",
    [
        lambda p: p.data.clamp_(0, 1),
        lambda p: p.square().sum(),
        nn.init.zeros_,
        lambda p: torch.optim.SGD([p], lr=0.1),
    ],
)
def test_a_stand_in_is_there_to_be_counted(what: Callable[[Any], Any]) -> None:
    model = lower_of(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 2)))
    weight = next(model[2].parameters())
    assert (weight.numel(), weight.shape, weight.grad, weight.requires_grad) == (8, (2, 4), None, True)
    assert repr(weight) == "parameter on the cloud, of shape [2, 4]"
    with pytest.raises(UsageError, match="this parameter is on the cloud"):
        what(weight)


class Registered(type):
    """Knows every class by name, and none twice."""

    seen: ClassVar[Set[str]] = set()

    def __new__(cls, name: str, bases: Any, names: Any) -> Any:
        if name in cls.seen:
            raise ValueError(f"{name} is registered already")
        cls.seen.add(name)
        return super().__new__(cls, name, bases, names)


class Head(nn.Linear, metaclass=Registered):
    """A script's own."""


def test_a_class_that_has_a_metaclass_of_its_own() -> None:
    head = Head(4, 2)
    lower_of(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4), head))
    assert isinstance(head, Head)
    assert isinstance(head, OnCloud)


class Inner(nn.Module):
    """Contains the layer."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.layer, self.p = nn.Linear(4, 4), p

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(functional.dropout(x, self.p, self.training) if self.p else x)


def test_a_module_that_contains_the_layer_and_decides_by_its_mode() -> None:
    for p in (0.0, 0.5):
        model = nn.Sequential(nn.Linear(6, 4), Inner(p), nn.Linear(4, 2))
        split = cut(model, "1.layer", 2)
        split.keep_net_1()
        model[1].eval()

        def run(split: Any = split) -> Any:
            return split.run(lambda a, variant: a, (torch.ones(3, 6),), {})

        if not p:
            assert run().shape == (3, 2)
            continue
        with pytest.raises(UsageError, match="'1', in which the model is cut, is not in its mode"):
            run()
