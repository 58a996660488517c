"""The states of random generators, there and back."""

from __future__ import annotations

import random
import threading
from typing import Dict, List

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from sft.errors import CheckpointError
from sft.models.seeding import seeded
from sft_edge.checkpoints.random_states import generator_states, set_generator_states


def draw() -> List[float]:
    numbers = [random.random(), random.gauss(0, 1), random.gauss(0, 1), random.random()]
    numbers += [np.random.rand(), np.random.randn(), np.random.randn(), np.random.randn()]
    return numbers + torch.randn(3).tolist()


@pytest.fixture(autouse=True)
def undisturbed() -> None:
    """Nobody else's draws change."""
    with torch.random.fork_rng(devices=[]):
        states = random.getstate(), np.random.get_state()
        yield
        random.setstate(states[0])
        np.random.set_state(states[1])


@pytest.mark.parametrize("before", range(3))
def test_what_is_drawn_next_is_the_same(before: int) -> None:
    """Also with one half of a pair of normal numbers drawn, the other kept back."""
    for _ in range(before):
        random.gauss(0, 1)
        np.random.randn()
    states: Dict[str, Tensor] = load(save(generator_states()))
    drawn = draw()
    assert draw() != drawn
    set_generator_states(states)
    assert draw() == drawn


def test_states_that_are_none() -> None:
    states = generator_states()
    drawn = draw()
    for name in states:
        odd = {**states, name: torch.zeros(1, dtype=torch.float64)}
        if name in ("python/gauss", "numpy/gauss"):
            continue  # any number is one
        with pytest.raises(CheckpointError, match="the states of random generators cannot be read"):
            set_generator_states(odd)
        with pytest.raises(CheckpointError, match="the states of random generators cannot be read"):
            set_generator_states({key: value for key, value in states.items() if key != name})
    set_generator_states(states)
    assert draw() == drawn


def test_they_are_neither_read_nor_restored_amid_another_thread_s_draws() -> None:
    """A cloud's, where edge and cloud are one process."""
    device = torch.device("cpu")
    torch.manual_seed(1)
    outside = torch.get_rng_state()
    with seeded(device, 7):
        expected = torch.rand(4)
    done, states = threading.Event(), {}

    def pass_them_on() -> None:
        states.update(generator_states())
        set_generator_states(states)
        done.set()

    thread = threading.Thread(target=pass_them_on)
    with seeded(device, 7):
        before = torch.rand(2)
        thread.start()
        assert not done.wait(0.05)
        assert torch.cat([before, torch.rand(2)]).equal(expected)
    thread.join(60)
    assert done.is_set()
    assert states["torch/cpu"].equal(outside)
