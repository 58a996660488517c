"""The micro-batches of one step: what they add to the gradients, and what of them still waits.

    Forward with labels, loss_scale > 0     gradients are added at once
    Forward with labels, loss_scale = 0     gradients are kept aside ---- Weight --> added so many times
                                                                     --- dropped --> let go
    Forward without labels                  outputs' graph is kept ---- Backward --> gradients are added
                                                                     --- dropped --> let go

Nothing here is checked against the order of messages; that is the session's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sft.errors import ProtocolError
from sft.optim.gradients import scalar_product, scale_gradients, squared_gradient_norm, squared_norm
from sft.v1 import split_training_pb2 as pb
from sft.wire.protocol import MAX_WAITING
from sft_cloud.errors import PreconditionError
from sft_cloud.session.upper_half import Given, UpperHalf

_LARGEST = torch.finfo(torch.float32).max

_DROPPED = None
"""Stands for the weight of what was dropped."""


class _Graph(NamedTuple):
    """A forward pass that waits for the gradient of its outputs."""

    given: Given
    outputs: Tensor


class MicroBatches:
    """The step that is being accumulated on one net_2."""

    def __init__(self, half: UpperHalf) -> None:
        self._half = half
        self._graphs: dict[int, _Graph] = {}
        self._kept: dict[int, list[Tensor | None]] = {}  # gradients, in the order of `_trained`
        self._weights: dict[int, float | None] = {}  # of those that were weighed, or `_DROPPED`
        self._sizes: dict[int, int] = {}  # bytes of what waits, as estimated
        self.losses_are_finite = True
        """Of all micro-batches with labels, as far as `note_loss` has heard of them."""
        self._squared_norm: float | None = None  # of the gradients as they are now, once it was asked for

    def check_room(self, weights: Sequence[pb.Weight]) -> None:
        """Raises PreconditionError when one more may not wait, once `weights` are applied."""
        if len(self._left(weights)) >= MAX_WAITING:
            raise PreconditionError(
                f"{MAX_WAITING} results of the model are waiting for a backward(); use torch.no_grad() where none will "
                "follow, or let go of them"
            )

    def waiting_bytes(self, weights: Sequence[pb.Weight] = ()) -> int:
        """About how much memory what waits takes, once `weights` are applied."""
        return sum(self._sizes.get(micro_batch, 0) for micro_batch in self._left(weights))

    def check_nothing_waits(self, weights: Sequence[pb.Weight]) -> None:
        """Raises PreconditionError when something would, once `weights` are applied."""
        left = self._left(weights)
        if left:
            raise PreconditionError(
                f"a state is loaded while {len(left)} results of the model are waiting for a backward(); go backward, "
                "or let go of them, first"
            )

    def check_weights(self, weights: Sequence[pb.Weight]) -> None:
        """Raises ProtocolError for weights that make no sense. One that was applied before does no harm."""
        seen = dict(self._weights)
        for micro_batch, weight in map(_meaning, weights):
            if seen.setdefault(micro_batch, weight) != weight:
                raise ProtocolError(f"micro-batch {micro_batch} was given another weight before, or dropped")
            if micro_batch in self._graphs and weight is not _DROPPED:
                raise ProtocolError(
                    f"micro-batch {micro_batch} came without labels: it takes a Backward, or is dropped"
                )
            if micro_batch not in self._waiting() and micro_batch not in self._weights:
                raise PreconditionError(f"nothing of micro-batch {micro_batch} waits for a weight")

    def weigh(self, weights: Sequence[pb.Weight]) -> None:
        """Adds the gradients that were kept aside, so many times; lets go of what is dropped."""
        for micro_batch, weight in map(_meaning, weights):
            self._weights[micro_batch] = weight
            self._graphs.pop(micro_batch, None)
            self._sizes.pop(micro_batch, None)
            gradients = self._kept.pop(micro_batch, None)
            if gradients is not None and weight is not _DROPPED:
                self._squared_norm = None
                for parameter, gradient in zip(self._trained(), gradients, strict=True):
                    _add(parameter, gradient, weight)

    def check_backward(self, micro_batch: int, weights: Sequence[pb.Weight], gradient: pb.Tensor) -> Tensor:
        """The gradient of a graph that waits. Raises PreconditionError and ProtocolError."""
        graph = self._graphs.get(micro_batch)
        if graph is None or any(weight.micro_batch == micro_batch for weight in weights):
            raise PreconditionError(f"micro-batch {micro_batch} does not wait for a Backward")
        return self._half.decode_output_gradient(gradient, graph.outputs, graph.given)

    def gradient_answer_bytes(self, micro_batch: int) -> int:
        """At most, of the gradient that the answer to a Backward holds."""
        return 4 * self._graphs[micro_batch].given.a.numel()

    def backward(self, micro_batch: int, gradient: Tensor, result: pb.Result) -> None:
        """From the outputs down; `result` is what the edge gets."""
        graph = self._graphs.pop(micro_batch)
        self._squared_norm = None
        self._sizes.pop(micro_batch, None)
        if graph.outputs.requires_grad:
            torch.autograd.backward(graph.outputs, gradient)
        self._answer_gradient(graph.given, graph.given.a.grad, result)
        result.squared_gradient_norm = self.squared_norm()

    def keep_graph(self, micro_batch: int, given: Given, outputs: Tensor, size: int = 0) -> None:
        """For a Backward to come; `size`: bytes that it takes."""
        self._graphs[micro_batch] = _Graph(given, outputs)
        self._sizes[micro_batch] = size

    def add(self, given: Given, loss: Tensor, result: pb.Result) -> None:
        """Adds the gradients of `loss`."""
        self._squared_norm = None
        if loss.requires_grad:
            torch.autograd.backward(loss)
        self._answer_gradient(given, given.a.grad, result)
        result.squared_gradient_norm = self.squared_norm()

    def keep_gradients(self, micro_batch: int, given: Given, loss: Tensor, result: pb.Result) -> None:
        """Computes the gradients of `loss`, and keeps net_2's aside until they are weighed."""
        trained = self._trained()
        inputs = [given.a, *trained] if given.a.requires_grad else list(trained)
        gradients: list[Tensor | None] = [None] * len(inputs)
        if loss.requires_grad:
            gradients = _own(torch.autograd.grad(loss, inputs, allow_unused=True))
        self._answer_gradient(given, gradients.pop(0) if given.a.requires_grad else None, result)
        self._kept[micro_batch] = gradients
        self._sizes[micro_batch] = self.gradient_bytes()
        result.squared_gradient_norm = self.squared_norm()
        result.own_squared_norm = squared_norm(gradients)
        result.gradient_product = scalar_product(gradients, (parameter.grad for parameter in trained))

    def note_loss(self, loss: float) -> None:
        """Of a micro-batch with labels, as it is answered."""
        self.losses_are_finite &= math.isfinite(loss)

    def scale(self, scale: float) -> None:
        """Multiplies the gradients added so far; 0 forgets them, and -0 makes zeros of them, whatever they are."""
        forgets = scale == 0.0 and math.copysign(1.0, scale) > 0
        self._squared_norm = None
        for parameter in self._half.parameters():
            if forgets:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad = parameter.grad.zero_() if scale == 0.0 else parameter.grad.mul_(scale)

    def clip(self, scale: float) -> None:
        """Multiplies the gradients added so far for the step that is taken with them."""
        self._squared_norm = None
        scale_gradients(self._half.parameters(), scale)

    def clear(self) -> None:
        """The step is over: whatever waits is dropped. Gradients stay."""
        self._graphs.clear()
        self._kept.clear()
        self._weights.clear()
        self._sizes.clear()
        self.losses_are_finite = True

    def gradient_bytes(self) -> int:
        """Of one set of gradients that is kept aside."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self._trained())

    def squared_norm(self) -> float:
        """Of the gradients added so far."""
        if self._squared_norm is None:
            self._squared_norm = squared_gradient_norm(self._half.parameters())
        return self._squared_norm

    def _answer_gradient(self, given: Given, gradient: Tensor | None, result: pb.Result) -> None:
        if given.a.requires_grad:
            result.no_gradient = gradient is None
            by_a = torch.zeros_like(given.a) if gradient is None else gradient
            result.packed_gradient.CopyFrom(self._half.encode_gradient(by_a, given))

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self._half.parameters() if parameter.requires_grad]

    def _waiting(self) -> set[int]:
        return self._graphs.keys() | self._kept.keys()

    def _left(self, weights: Sequence[pb.Weight]) -> set[int]:
        """What waits once `weights` are applied."""
        return self._waiting().difference(weight.micro_batch for weight in weights)


def _meaning(message: pb.Weight) -> tuple[int, float | None]:
    """Micro-batch, and its weight or `_DROPPED`. Raises ProtocolError."""
    weight = message.weight
    if not math.isfinite(weight) or abs(weight) > _LARGEST:
        raise ProtocolError(f"the weight of a micro-batch must be finite, and so as a float32, not {weight}")
    if message.dropped and weight != 0.0:
        raise ProtocolError(f"micro-batch {message.micro_batch} is dropped, so that it cannot have weight {weight}")
    return message.micro_batch, _DROPPED if message.dropped else weight


def _own(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The same gradients, each with memory of its own: autograd may give one tensor twice, or an expanded one."""
    memory: set[int] = set()
    own = []
    for gradient in gradients:
        if gradient is not None:
            address = gradient.untyped_storage().data_ptr()
            if address in memory or not gradient.is_contiguous():
                gradient = gradient.clone(memory_format=torch.contiguous_format)
            memory.add(address)
        own.append(gradient)
    return own


def _add(parameter: nn.Parameter, gradient: Tensor | None, weight: float) -> None:
    if gradient is None:
        return
    if parameter.grad is None:
        parameter.grad = gradient if weight == 1.0 else gradient.mul_(weight)
    else:
        parameter.grad.add_(gradient, alpha=weight)


def check_scale(message: pb.EdgeMessage) -> None:
    """Raises ProtocolError for one that gradients cannot be multiplied by, or that has no place in the message."""
    if message.HasField("gradient_scale"):
        if message.WhichOneof("body") in ("evaluate", "load_state"):
            raise ProtocolError("a gradient_scale rides on a forward or a backward, or comes without a body")
        if not math.isfinite(message.gradient_scale):
            raise ProtocolError(f"gradient_scale must be finite, not {message.gradient_scale}")
