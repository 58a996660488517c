"""Randomness that belongs to a session, not to a process.

Dropout draws from torch's global generators, which all sessions of a device share. Seeding them anew for every
(session, side, step, micro-batch), and putting them back afterwards, makes a step's bits depend on nothing else: not on
other sessions, nor on evaluations in between, nor on where a run was interrupted.

The generators are the process's, so what seeds or restores them takes turns: an edge and a cloud in one process (tests,
a notebook) would otherwise draw from each other's.
"""

from __future__ import annotations

import hashlib
import threading
from contextlib import contextmanager
from typing import Iterator

import torch

TURN = threading.RLock()
"""Of the process's generators: whoever seeds or restores them holds it."""


def derive_seed(seed: int, *parts: object) -> int:
    """A seed of 63 bits that depends on `seed` and every part, the same on every machine."""
    text = "/".join(str(part) for part in (seed,) + parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Puts torch's generators of the CPU and of `device` back after the block. Nobody else draws in between."""
    devices = [device] if device.type == "cuda" else []
    with TURN, torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def seeded(device: torch.device, seed: int, *parts: object) -> Iterator[None]:
    """Seeds torch's generators of the CPU and of `device` for the block, and restores them after it."""
    derived = derive_seed(seed, *parts)
    with undisturbed(device):
        # Not `torch.manual_seed`: that seeds every kind of device there could be, and for each that is not there it
        # writes down the whole stack, which takes a millisecond, for every parameter that is drawn.
        torch.default_generator.manual_seed(derived)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(derived)
        yield
