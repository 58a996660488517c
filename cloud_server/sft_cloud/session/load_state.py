"""Replacing what a session has learned: parameters, or the optimizer's state, by those of a blob."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sft.errors import ProtocolError
from sft.models.adapters import is_adapter
from sft.models.weights import copied_in_pieces
from sft.optim.spec import arguments_from_proto
from sft.optim.state import checked_state, state_in_pieces
from sft.v1 import split_training_pb2 as pb
from sft_cloud.session.commit import check_counts
from sft_cloud.session.upper_half import UpperHalf
from sft_cloud.storage import check_sha256, read_blob


class Blob(NamedTuple):
    """One that was read."""

    name: str
    tensors: dict[str, Tensor]
    """Mapped from the file."""


class StateLoader:
    """Loads blobs into one net_2 and its optimizer."""

    def __init__(
        self, half: UpperHalf, optimizer: torch.optim.Optimizer, find_blob: Callable[[str], Path | None]
    ) -> None:
        self._half = half
        self._optimizer = optimizer
        self._find_blob = find_blob

    def read(self, message: pb.LoadState) -> Blob:
        """What is to be loaded; in any thread. Raises ProtocolError when it is not here, or nothing that can be."""
        path = self._find_blob(check_sha256(message.sha256))
        if path is None:
            raise ProtocolError(f"there is no blob {message.sha256}; upload it first")
        return Blob(path.stem, read_blob(path))

    def check(self, message: pb.LoadState, blob: Blob) -> tuple[Callable[[], Iterator[None]], int]:
        """What does it, piece by piece, and the bytes that are made meanwhile: a state takes the place of the one
        before once it is there whole; parameters are overwritten.

        Raises ProtocolError when the blob is not one of this net_2.
        """
        parameters, tensors = self._half.whole_parameters(), blob.tensors
        if message.optimizer_state:
            state = checked_state(self._optimizer, parameters, tensors)
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            check_counts(self._optimizer, message.group_arguments)
            counts = [arguments_from_proto(group.arguments) for group in message.group_arguments]
            return lambda: self._load_optimizer(state, counts), size
        adapters = {name for name in parameters if is_adapter(name)}
        if adapters and not adapters & tensors.keys():
            raise ProtocolError(
                f"blob {blob.name} holds weights without LoRA adapters, or with adapters merged into them; this "
                "session trains adapters, and takes a file that has them"
            )
        odd = sorted(tensors.keys() ^ parameters.keys())
        if odd:
            where = "is missing" if odd[0] in parameters else "does not belong there"
            raise ProtocolError(f"blob {blob.name}: '{odd[0][:200]}' {where}")
        for name, parameter in parameters.items():
            if tensors[name].shape != parameter.shape or not tensors[name].is_floating_point():
                raise ProtocolError(
                    f"blob {blob.name}: '{name}' has type {tensors[name].dtype} and shape {list(tensors[name].shape)}, "
                    f"not {list(parameter.shape)}"
                )
        return lambda: copied_in_pieces(parameters, tensors), 0

    def _load_optimizer(self, state: dict[str, Any], counts: list[dict[str, Any]]) -> Iterator[None]:
        copied_state: dict[str, Any] = {}
        yield from state_in_pieces(state, copied_state)
        self._optimizer.load_state_dict(copied_state)
        for group, own in zip(self._optimizer.param_groups, counts, strict=False):  # there may be none
            group.update(own)
