"""Draws that depend on a session's seed alone, and disturb nobody else's."""

from __future__ import annotations

import threading
from typing import Callable, ContextManager

import pytest
import torch

from sft.models.seeding import derive_seed, seeded, undisturbed

CPU = torch.device("cpu")


def test_the_draws_are_those_of_torch_s_own_seed() -> None:
    torch.manual_seed(derive_seed(7, "net_1", 3, 0))
    expected = torch.rand(5), torch.nn.functional.dropout(torch.ones(50))
    with seeded(CPU, 7, "net_1", 3, 0):
        drawn = torch.rand(5), torch.nn.functional.dropout(torch.ones(50))
    assert all(one.equal(other) for one, other in zip(drawn, expected))


def test_what_is_drawn_outside_goes_on_as_if_nothing_had_been() -> None:
    torch.manual_seed(1)
    expected = torch.rand(4)
    torch.manual_seed(1)
    before = torch.rand(2)
    with seeded(CPU, 7):
        torch.rand(100)
    with pytest.raises(KeyError), seeded(CPU, 8):
        raise KeyError("in the middle")
    assert torch.cat([before, torch.rand(2)]).equal(expected)


def test_every_part_counts() -> None:
    seeds = [
        derive_seed(7),
        derive_seed(8),
        derive_seed(7, 1),
        derive_seed(7, 1, 2),
        derive_seed(7, 12),
        derive_seed(7, "a"),
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 1 << 63 for seed in seeds)


@pytest.mark.parametrize("other", [lambda: undisturbed(CPU), lambda: seeded(CPU, 9)], ids=["restores", "seeds"])
def test_nobody_comes_between(other: Callable[[], ContextManager[None]]) -> None:
    """The cloud's thread, where edge and cloud are one process."""
    with seeded(CPU, 7):
        expected = torch.rand(4)
    entered = threading.Event()

    def enter() -> None:
        with other():
            entered.set()

    thread = threading.Thread(target=enter)
    with seeded(CPU, 7):
        before = torch.rand(2)
        thread.start()
        assert not entered.wait(0.05)
        assert torch.cat([before, torch.rand(2)]).equal(expected)
    thread.join(60)
    assert entered.is_set()
