"""Randomness that belongs to a session, not to a process.

Dropout draws from torch's global generators, which all sessions of a device share. Seeding them anew for every
(session, side, step, micro-batch), and putting them back afterwards, makes a step's bits depend on nothing else: not on
other sessions, nor on evaluations in between, nor on where a run was interrupted.
"""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from typing import Iterator

import torch


def derive_seed(seed: int, *parts: object) -> int:
    """A seed of 63 bits that depends on `seed` and every part, the same on every machine."""
    text = "/".join(str(part) for part in (seed,) + parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


@contextmanager
def seeded(device: torch.device, seed: int, *parts: object) -> Iterator[None]:
    """Seeds torch's generators of the CPU and of `device` for the block, and restores them after it."""
    devices = [device] if device.type == "cuda" else []
    derived = derive_seed(seed, *parts)
    with torch.random.fork_rng(devices=devices):
        # Not `torch.manual_seed`: that seeds every kind of device there could be, and for each that is not there it
        # writes down the whole stack, which takes a millisecond, for every parameter that is drawn.
        torch.default_generator.manual_seed(derived)
        if devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(derived)
        yield
