"""From a checked request and its weights to a session: what of it takes memory, and net_2 filled."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sft.models import Net2, build_net_2, max_positions
from sft.models.adapters import draw_adapters, is_adapter
from sft.models.lora import adapter_shapes, add_lora
from sft.models.seeding import seeded
from sft.models.weights import fill_in_pieces
from sft.optim.spec import make_optimizer
from sft.tensors.stream import StoredTensor
from sft_cloud.engine.request import SessionSpec, blames_config
from sft_cloud.engine.tables import tables_bytes, with_tables
from sft_cloud.engine.turns import in_pieces
from sft_cloud.engine.worker import at_once
from sft_cloud.errors import NoMemoryError
from sft_cloud.identity import ANONYMOUS, Identity
from sft_cloud.memory import Kind, MemoryBudget, MemoryShare
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
    """The net_2 that a request asks for, on the meta device: in any thread, but not while another model is made.

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
    if spec.lora is not None:
        adapters = adapter_shapes(net_2, spec.lora)
        own.update((name, nn.Parameter(torch.empty(shape, device="meta"))) for name, shape in adapters.items())
    weights = sum(parameter.numel() for parameter in own.values())
    # Buffers such as masks and tables of positions can be large where a configuration wants them to.
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in net_2.buffers())
    objects = _OBJECTS_OF_BLOCK * int(spec.config.num_hidden_layers)
    return session_bytes(weights, make_optimizer(spec.optimizer, own)) + buffers + objects


_OBJECTS_OF_BLOCK = 32 << 10
"""What Python's objects for a block take: some twenty modules, and as many parameters."""

_PROBE_TOKENS = 16
"""Of the longest sequence that is run to find out what a batch takes."""
_PROBE_COPIES = 4
"""Of what a layer gives for them."""


def objects_bytes(spec: SessionSpec) -> int:
    """What a model takes while it is built, and has no weights yet."""
    return _OBJECTS_OF_BLOCK * (1 + int(spec.config.num_hidden_layers))


def _passing_bytes(spec: SessionSpec, net_2: Net2) -> int:
    """What making a session takes beside what it then keeps: a parameter that is drawn, buffers, and the probe."""
    parameters = [parameter for parameter in net_2.parameters() if parameter.ndim > 1]
    largest = max((4 * parameter.numel() for parameter in parameters), default=0)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in net_2.buffers())
    rows = sum(max(parameter.shape) for parameter in parameters)
    # Every head of every block looks up each row of a table that all blocks read.
    heads, blocks = int(getattr(spec.config, "num_attention_heads", 1)), int(spec.config.num_hidden_layers)
    tables = [
        parameter
        for name, parameter in net_2.model.base_model.named_parameters()
        if name.rpartition(".")[0] in net_2.family.for_every_block
    ]
    looked_up = sum(heads * blocks * int(max(table.shape)) for table in tables)
    return largest + 3 * buffers + 4 * _PROBE_COPIES * _PROBE_TOKENS * (rows + looked_up)


def adapt(spec: SessionSpec, built: Built) -> None:
    """Puts adapters into what `build` gave, where they are wanted; in any thread, as `build`. Raises UsageError."""
    if spec.lora is not None:
        with blames_config():
            add_lora(built.net_2, spec.lora, spec.seed)


def make_session(
    spec: SessionSpec,
    built: Built,
    tensors: Sequence[StoredTensor],
    device: torch.device,
    find_blob: Callable[[str], Path | None] = lambda sha256: None,
    budget: MemoryBudget | None = None,
    owner: Identity = ANONYMOUS,
) -> Session:
    """As `adapt` and `session_in_pieces`, in one piece."""
    adapt(spec, built)
    return in_pieces(at_once, session_in_pieces(spec, built, tensors, device, find_blob, budget, owner))


def session_in_pieces(
    spec: SessionSpec,
    built: Built,
    tensors: Sequence[StoredTensor],
    device: torch.device,
    find_blob: Callable[[str], Path | None],
    budget: MemoryBudget | None,
    owner: Identity = ANONYMOUS,
) -> Generator[None, None, Session]:
    """Fills what `build` and `adapt` gave for the spec with `tensors` and the seed's draws, and makes its optimizer.

    On the device's thread; where it yields others may compute. Adapters that are among `tensors` are the edge's own:
    downloads then hold them as they are, and merge nothing.
    Raises ProtocolError and UsageError, and NoMemoryError where it does not fit into the `budget` beside the others.
    """
    budget = MemoryBudget() if budget is None else budget
    needed = built.needed_bytes + tables_bytes(spec, built.net_2.width, find_blob)
    share = MemoryShare(budget, needed, owner)
    try:
        with budget.charge(Kind.BUILDS, _passing_bytes(spec, built.net_2), owner):
            session = yield from _make_session(spec, built.net_2, tensors, device, find_blob, share)
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
) -> Generator[None, None, Session]:
    with blames_config():
        yield from fill_in_pieces(net_2, tensors, spec.seed, device)
        if spec.lora is not None:
            yield from draw_adapters(net_2, spec.lora.init_lora_weights, spec.seed, tensors)
        # One token shows whether the configuration gives a model that runs, before any training is lost on it.
        with torch.no_grad():
            net_2.eval()(torch.zeros(1, 1, net_2.width, device=device), [1], {})
    yield
    optimizer = make_optimizer(spec.optimizer, net_2.whole_parameters())
    trained = {name for group in spec.optimizer.groups for name in group.parameter_names}
    for name, parameter in net_2.whole_parameters().items():
        # No gradients, and no part in their norm, for nothing.
        parameter.requires_grad_(parameter.requires_grad and name in trained)
    yield
    merges = not any(is_adapter(tensor.name) for tensor in tensors)
    codecs = with_tables(spec, net_2.width, find_blob, device)
    half = TransformersUpperHalf(net_2, spec.config, codecs, merges, _batch_memory(spec, net_2))
    return Session(half, optimizer, spec.seed, find_blob, share)


def _batch_memory(spec: SessionSpec, net_2: Net2) -> BatchMemory:
    def run(length: int) -> Tensor:
        a = torch.zeros(1, length, net_2.width, device=net_2.device, requires_grad=True)
        logits: Tensor = net_2(a, [length], {}).logits
        return logits

    net_2.train()
    with blames_config(), seeded(net_2.device, spec.seed, "batch memory"):
        return measure(run, list(net_2.parameters()), max_positions(spec.config))
