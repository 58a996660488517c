"""What forward methods keep in attributes, which halves would lose, is refused, and the model is left as it was."""

from __future__ import annotations

import copy
from typing import Any, Callable

import pytest
import torch
from torch import Tensor, nn

from sft.errors import CutError
from sft.graphs.cut import cut

D, R = 8, 4


class Model(nn.Module):
    """Two layers, and whatever a test does between them."""

    def __init__(self, kept: Any, keep: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)
        self.kept, self.keep = kept, keep

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        self.keep(self, h)
        y: Tensor = self.b(h) * 2.0
        return y


def check_keeps(value: Any, keep: Callable[[Any, Tensor], Any]) -> None:
    model, before = Model(value, keep), copy.copy(value)
    with pytest.raises(CutError, match=r"of Model keeps what it computes in its attribute 'kept', which"):
        cut(model, "b", R)
    assert model.kept is value
    assert value == before


@pytest.mark.parametrize(
    ("value", "keep"),
    [
        ([1], lambda m, h: (m.kept.clear(), m.kept.append(h.square().mean()))),
        ({"a": 1}, lambda m, h: m.kept.update(h=h)),
        ({}, lambda m, h: m.kept.update(all=[h])),
    ],
)
def test_what_is_kept_in_a_container(value: Any, keep: Callable[[Any, Tensor], Any]) -> None:
    check_keeps(value, keep)


@pytest.mark.parametrize(
    ("value", "change"),
    [
        (1.0, lambda kept, h: kept * 0.5),
        (0, lambda kept, h: kept + h.shape[0]),
        (3, lambda kept, h: h.shape[1]),
        (torch.tensor(1.0), lambda kept, h: kept * 0.5),
    ],
)
def test_a_number_that_changes_from_call_to_call(value: Any, change: Callable[[Any, Tensor], Any]) -> None:
    check_keeps(value, lambda m, h: setattr(m, "kept", change(m.kept, h)))


@pytest.mark.parametrize("again", [lambda: 6, lambda: torch.arange(3)])
def test_what_is_set_to_what_it_is(again: Callable[[], Any]) -> None:
    cut(Model(again(), lambda m, h: setattr(m, "kept", again())), "b", R)
