"""The states of the process's generators of random numbers, as tensors.

What decides over a run's bits is drawn from its seed anew for every step. These are kept for what may draw beside it: a
task of one's own, a library.
"""

from __future__ import annotations

import math
import random
from typing import Dict, Mapping

import numpy as np
import torch
from torch import Tensor

from sft.errors import CheckpointError
from sft.models.seeding import TURN


def generator_states() -> Dict[str, Tensor]:
    """Of Python, numpy, and torch on the CPU and on every CUDA device."""
    _, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # always an MT19937
    assert name == "MT19937"
    states = {
        "python/words": torch.tensor(words, dtype=torch.int64),
        "python/gauss": torch.tensor([math.nan if gauss is None else gauss], dtype=torch.float64),
        "numpy/keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy/position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy/gauss": torch.tensor([cached], dtype=torch.float64),
    }
    with TURN:
        states["torch/cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            for index, state in enumerate(torch.cuda.get_rng_state_all()):
                states[f"torch/cuda:{index}"] = state
    return states


def set_generator_states(states: Mapping[str, Tensor]) -> None:
    """Puts them back; those of devices that are not here are left. Raises CheckpointError."""
    try:
        gauss = float(states["python/gauss"][0])
        random.setstate((3, tuple(states["python/words"].tolist()), None if math.isnan(gauss) else gauss))
        position, has_gauss = states["numpy/position"].tolist()
        keys = states["numpy/keys"].numpy().astype(np.uint32)
        np.random.set_state(("MT19937", keys, position, has_gauss, float(states["numpy/gauss"][0])))
        with TURN:
            torch.set_rng_state(states["torch/cpu"].clone())
            for index in range(torch.cuda.device_count()):
                if f"torch/cuda:{index}" in states:
                    torch.cuda.set_rng_state(states[f"torch/cuda:{index}"].clone(), index)
    except (LookupError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"the states of random generators cannot be read ({error})") from error
