"""The seam between the script's model and the session: what a kind of model has to say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sft.errors import ProtocolError
from sft.v1 import split_training_pb2 as pb
from sft.wire.cut import mode_name, residual_name
from sft_cloud.session import UpperHalf

ADVICE = "run the same script on both sides"
"""For whoever finds that edge and cloud do not fit."""


class HostedModel(ABC):
    """A script's model, cut in place: what is left of it is net_2. All names are those in the whole model."""

    layer_name: str
    """The layer that was cut."""

    factor_names: Mapping[str, Sequence[str]]
    """Parameter of the layer -> parameters, of either half, that take its place."""

    tensors: Mapping[str, Tensor]
    """Net_2's parameters and stored buffers, as they are; without the factors, which come from the edge."""

    factors: Mapping[str, nn.Parameter]
    """FFN-2 and FFN-3, unset until an edge has sent them."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(iter(self.factors.values())).device

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All that may be trained here."""
        named = {name: tensor for name, tensor in self.tensors.items() if isinstance(tensor, nn.Parameter)}
        return {**named, **self.factors}

    @abstractmethod
    def make_half(self, request: pb.OpenSessionRequest) -> UpperHalf:
        """Net_2 as a session takes it. Raises ProtocolError when the edge has cut another model, or elsewhere."""


def check_same_cut(request: pb.OpenSessionRequest, own: pb.Cut) -> None:
    """Raises ProtocolError where the edge's cut is another."""
    for field, argument in _ARGUMENTS.items():
        theirs, ours = (_plain(cut, field) for cut in (request.cut, own))
        if theirs != ours:
            raise ProtocolError(f"the edge's script has {argument} {theirs}, the cloud's {ours}; {ADVICE}")


_ARGUMENTS = {
    "split_layer": "split_layer",
    "layer_name": "split_at",
    "split_rank": "split_rank",
    "residual": "residual",
    "mode": "mode",
}
"""Fields of `pb.Cut`, and what scripts call them."""


def _plain(cut: pb.Cut, field: str) -> Any:
    value = getattr(cut, field)
    if field == "residual":
        return residual_name(value)
    if field == "mode":
        return mode_name(value)
    return (repr(value[:80]) if isinstance(value, str) else value) if value else "none"


def keep_parameters(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Takes all but these from a model, in place, and puts them where their names say."""
    for module in list(model.modules()):
        for name in (*module._parameters, *module._buffers):
            delattr(module, name)
    for name, parameter in parameters.items():
        parent = model
        *path, own = name.split(".")
        for child in path:
            if not isinstance(getattr(parent, child, None), nn.Module):
                parent.add_module(child, nn.Module())
            parent = getattr(parent, child)
        parent.register_parameter(own, parameter)
    _drop_empty(model)


def _drop_empty(module: nn.Module) -> bool:
    for name, child in list(module._modules.items()):
        if child is None or _drop_empty(child):
            delattr(module, name)
    return not (module._modules or module._parameters)
