"""Replacing what a session has learned: parameters, or the optimizer's state, by those of a blob."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from sft.errors import ProtocolError
from sft.models.adapters import is_adapter
from sft.optim.state import checked_state, copied_state
from sft.v1 import split_training_pb2 as pb
from sft_cloud.session.upper_half import UpperHalf
from sft_cloud.storage import check_sha256, read_blob


class StateLoader:
    """Loads blobs into one net_2 and its optimizer."""

    def __init__(
        self, half: UpperHalf, optimizer: torch.optim.Optimizer, find_blob: Callable[[str], Path | None]
    ) -> None:
        self._half = half
        self._optimizer = optimizer
        self._find_blob = find_blob

    def check(self, message: pb.LoadState) -> tuple[Callable[[], None], int]:
        """What does it, and the bytes that are made meanwhile: a state takes the place of the one before once it is
        there whole; parameters are overwritten.

        Raises ProtocolError when the blob is not here, or not one of this net_2.
        """
        path = self._find_blob(check_sha256(message.sha256))
        if path is None:
            raise ProtocolError(f"there is no blob {message.sha256}; upload it first")
        parameters, tensors = self._half.whole_parameters(), read_blob(path)
        if message.optimizer_state:
            state = checked_state(self._optimizer, parameters, tensors)
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            return lambda: self._optimizer.load_state_dict(copied_state(state)), size
        adapters = {name for name in parameters if is_adapter(name)}
        if adapters and not adapters & tensors.keys():
            raise ProtocolError(
                f"blob {path.stem} holds weights without LoRA adapters, or with adapters merged into them; this "
                "session trains adapters, and takes a file that has them"
            )
        odd = sorted(tensors.keys() ^ parameters.keys())
        if odd:
            where = "is missing" if odd[0] in parameters else "does not belong there"
            raise ProtocolError(f"blob {path.stem}: '{odd[0][:200]}' {where}")
        for name, parameter in parameters.items():
            if tensors[name].shape != parameter.shape or not tensors[name].is_floating_point():
                raise ProtocolError(
                    f"blob {path.stem}: '{name}' has type {tensors[name].dtype} and shape {list(tensors[name].shape)}, "
                    f"not {list(parameter.shape)}"
                )

        def load() -> None:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(tensors[name])

        return load, 0
