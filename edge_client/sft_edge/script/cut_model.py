"""The seam between the script's model and the session: what a kind of model has to say, and the way through the cloud.

A cut model is made without touching the script's model; `install`, called when the session is open, cuts it. So
whatever is wrong, with the arguments, the model or the server, the script's model stays as it was.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence

from torch import Tensor, nn

from sft.tensors.stream import StoredTensor
from sft.v1 import split_training_pb2 as pb


class Crossed(NamedTuple):
    """What came back from the cloud; tensors are float32, and on the activation's device."""

    outputs: Optional[Tensor]
    """Of net_2, as they are on the wire. None where labels travelled and `want_outputs` was False.

    Without labels a loss of the script may be made of them. With labels going backward through them raises UsageError.
    """

    loss: Optional[Tensor]
    """0-dim, where labels travelled; None otherwise."""

    best_T: Optional[Tensor] = None
    """In evaluation, where labels travelled: the place of the largest output in each row, int64."""

    fetch: Optional[Callable[[], Tensor]] = None
    """Gets the outputs then. Raises UsageError once the model is another, and LinkError."""


class Cross(ABC):
    """The way through the cloud: `cross(a, training=model.training).outputs`.

    Differentiable where gradients are enabled: one autograd function crosses the wire forward and backward.
    """

    @property
    @abstractmethod
    def evaluates_labels(self) -> bool:
        """Whether labels that are given to an evaluation travel: once those of a training batch have."""

    @abstractmethod
    def __call__(
        self,
        activation: Tensor,
        lengths: Sequence[int] = (),
        padded_length: int = 0,
        *,
        training: bool,
        labels: Optional[pb.Labels] = None,
        want_outputs: bool = True,
        scored: Optional[pb.Labels] = None,
        variant: int = 0,
        other_mode: Sequence[str] = (),
    ) -> Crossed:
        """Runs net_2 on an activation.

        `activation`: what `pb.Activation.packed` holds: (T, R) with the `lengths` of B sequences, padding left out
        (`sft.wire.codec.packing.pack`), or any shape (..., R) without lengths. `training`: with dropout. `labels`:
        only where gradients are enabled; they travel, and the loss comes back. `scored`: labels that travel, too, and
        the outputs are their (T, 3) scores, see `pb.Forward`. `variant` and `other_mode`: as `pb.Activation` has
        them.

        Raises UsageError for one of these that the cloud's release does not know.

        Raises LinkError when the cloud or the way to it fails.
        """


class CutModel(ABC):
    """A script's model and where it is cut. All names are those of parameters in the whole model."""

    layer_name: str
    """The layer that is cut. FFN-1 to FFN-3 take its place: `LAYER_NAME.ffn1.weight` is the edge's."""

    cloud_tensors: List[StoredTensor]
    """Net_2's, as the model has them now, factors excluded. Read before `install`, never after it."""

    cloud_factors: List[StoredTensor]
    """Net_2's share of the layer that is cut; empty where nothing is decomposed."""

    cloud_names: List[str]
    """What the cloud's weights are called, factors included and `frozen_names` not: those that a download brings."""

    other_names: Mapping[str, str] = {}
    """What the script's model had some of those by, too: further name -> the one in `cloud_names`."""

    factor_names: Mapping[str, Sequence[str]]
    """Parameter of the layer that is cut -> parameters, of either half, that take its place: they get its group."""

    frozen_names: Sequence[str] = ()
    """What both halves hold: the cut has frozen it, and the edge has it already."""

    trained_factors: Sequence[str] = ()
    """Parameters that are trained although what they take the place of is frozen: in the first group that trains
    anything, unless the group of `factor_names` is there."""

    def whole_name(self, name: str) -> str:
        """The name in the whole model of a parameter that the script's model calls so."""
        return name

    def script_name(self, name: str) -> str:
        """How the script's model calls a parameter of the cloud's half. Asked before `install` and after it."""
        return name

    @abstractmethod
    def request_fields(self) -> Dict[str, Any]:
        """The fields of `pb.OpenSessionRequest` that describe the model and its cut."""

    @abstractmethod
    def describe(self) -> str:
        """How the model is cut, in the words of `SFTOptimizer`'s arguments."""

    @abstractmethod
    def install(self, cross: Cross) -> Dict[str, nn.Parameter]:
        """Cuts the model in place: its parameters are net_1's from now on, and its forward goes through `cross`.

        Returns net_1's parameters. Those that the model had before are the same objects, on the same device; what takes
        the place of the cut layer is trained where that was. A forward that does not know `self` or its signature any
        more would break scripts: it is replaced as `sft_edge.script.forward.replace_forward` does.
        """


def other_modes(upper: Mapping[str, nn.Module], training: bool) -> List[str]:
    """Names of those of net_2's modules that the script has put into another mode than the model's."""
    return [name for name, module in upper.items() if module.training is not training]
