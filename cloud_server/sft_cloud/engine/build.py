"""From a checked request and its weights to a session: what of it takes memory, and net_2 filled."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sft.models import Net2, build_net_2, max_positions
from sft.models.lora import adapter_shapes, add_lora, is_adapter
from sft.models.seeding import seeded
from sft.models.weights import fill
from sft.optim.spec import make_optimizer
from sft.tensors.stream import StoredTensor
from sft_cloud.engine.request import SessionSpec, blames_config
from sft_cloud.errors import NoMemoryError
from sft_cloud.memory import MemoryBudget, MemoryShare
from sft_cloud.session import (
    BatchMemory,
    Session,
    TransformersUpperHalf,
    measure,
    memory_bytes,
    session_bytes,
)


class Built(NamedTuple):
    """A net_2 without weights."""

    net_2: Net2
    """On the meta device."""

    needed_bytes: int
    """What its session takes before its first batch."""


def build(spec: SessionSpec, device: torch.device) -> Built:
    """The net_2 that a request asks for, on the meta device. To be run by the worker, as is `make_session`.

    Raises CutError, UnsupportedModelError, ProtocolError, and NoMemoryError when `device` could never hold it.
    """
    with blames_config():
        net_2 = build_net_2(spec.config, spec.head, spec.cut)
    needed, memory = _needed_bytes(spec, net_2), memory_bytes(device)
    if needed > memory:
        raise NoMemoryError(f"training net_2 takes at least {needed} bytes, but {device} has {memory} in all")
    return Built(net_2, needed)


def _needed_bytes(spec: SessionSpec, net_2: Net2) -> int:
    own = net_2.whole_parameters()
    names = {name for group in spec.optimizer.groups for name in group.parameter_names}
    trained = sum(parameter.numel() for name, parameter in own.items() if name in names)
    weights = sum(parameter.numel() for parameter in own.values())
    if spec.lora is not None:
        adapters = sum(math.prod(shape) for shape in adapter_shapes(net_2, spec.lora).values())
        weights, trained = weights + adapters, trained + adapters
    # Buffers such as masks and tables of positions can be large where a configuration wants them to.
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in net_2.buffers())
    return session_bytes(weights, trained, spec.optimizer.name) + buffers


def make_session(
    spec: SessionSpec,
    built: Built,
    tensors: Sequence[StoredTensor],
    device: torch.device,
    find_blob: Callable[[str], Path | None] = lambda sha256: None,
    budget: MemoryBudget | None = None,
) -> Session:
    """Fills what `build` gave for the spec with `tensors` and the seed's draws, and makes its optimizer.

    Adapters that are among `tensors` are the edge's own: downloads then hold them as they are, and merge nothing.
    Raises ProtocolError and UsageError, and NoMemoryError where it does not fit into the `budget` beside the others.
    """
    share = MemoryShare(budget, built.needed_bytes)
    try:
        session = _make_session(spec, built.net_2, tensors, device, find_blob, share)
    except BaseException:
        share.release()
        raise
    share.release_with(session)
    return session


def _make_session(
    spec: SessionSpec,
    net_2: Net2,
    tensors: Sequence[StoredTensor],
    device: torch.device,
    find_blob: Callable[[str], Path | None],
    share: MemoryShare,
) -> Session:
    with blames_config():
        fill(net_2, tensors, spec.seed, device)
        if spec.lora is not None:
            add_lora(net_2, spec.lora, spec.seed, values=tensors)
        # One token shows whether the configuration gives a model that runs, before any training is lost on it.
        with torch.no_grad():
            net_2.eval()(torch.zeros(1, 1, net_2.width, device=device), [1], {})
    optimizer = make_optimizer(spec.optimizer, net_2.whole_parameters())
    trained = {name for group in spec.optimizer.groups for name in group.parameter_names}
    for name, parameter in net_2.whole_parameters().items():
        # No gradients, and no part in their norm, for nothing.
        parameter.requires_grad_(parameter.requires_grad and name in trained)
    merges = not any(is_adapter(tensor.name) for tensor in tensors)
    half = TransformersUpperHalf(net_2, spec.config, spec.data_type, merges, _batch_memory(spec, net_2))
    return Session(half, optimizer, spec.seed, find_blob, share)


def _batch_memory(spec: SessionSpec, net_2: Net2) -> BatchMemory:
    def run(length: int) -> Tensor:
        a = torch.zeros(1, length, net_2.width, device=net_2.device, requires_grad=True)
        logits: Tensor = net_2(a, [length], {}).logits
        return logits

    net_2.train()
    with blames_config(), seeded(net_2.device, spec.seed, "batch memory"):
        return measure(run, list(net_2.parameters()), max_positions(spec.config))
