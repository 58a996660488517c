"""The cloud's gradients as the script sees them: the gradient of one parameter of two numbers, of the same norm.

The parameter `cloud_gradients` belongs to the script's model and to the first group of its optimizer. After every
backward its `.grad` has the L2 norm of net_2's gradients, so whatever takes the norm of all gradients takes it of both
halves. Whatever a script does to gradients, it does to this one, too, and the cloud is told before it needs to know:

    clip_grad_norm_, GradScaler.unscale_    .grad multiplied     all of net_2's gradients are multiplied by as much
    zero_grad of optimizer or model         .grad None or 0      net_2's gradients are forgotten, or become 0
    clip_grad_value_, noise                 its two numbers have another ratio: refused
    torch.autograd.grad                     autograd does not come to it: net_2's new gradients are forgotten

While a backward is under way, and after one that was broken off, nobody here knows what the cloud has: `.grad` is NaN.
"""

from __future__ import annotations

import math
import weakref
from contextlib import contextmanager
from typing import Any, Iterator, Optional

import torch
from torch import Tensor, nn

from sft.errors import NonFiniteLossError, UsageError
from sft_edge.link import Link

PARAMETER_NAME = "cloud_gradients"
"""Of the parameter, in the script's model."""

_SHARES = (math.sqrt(1 - 0.01**2), 0.01)
"""Of the norm, in `.grad`: the first is so near to 1 that clipping single values touches it when it touches any of the
cloud's, and the second so small that it then leaves it."""

_ROUNDING = 1e-3
"""How far the ratio of the two may be from that of the shares."""


class CloudGradients:
    """Keeps the parameter and the cloud in agreement."""

    def __init__(self, link: Link, device: torch.device) -> None:
        self.parameter = nn.Parameter(torch.tensor([[0.0, 1.0]], dtype=torch.float32, device=device))
        """Its `.grad` is what counts. Its value never changes: a penalty or a mask that a script computes of all values
        touches one of the two gradients, and not the other. It is a matrix, so that noise on all matrices does, too."""
        self._node: Any = None  # autograd's, that adds to `.grad`
        self.generation = 0
        """Changes whenever the gradients that the cloud has added up change."""
        self._link = link
        self._norm: Optional[float] = None  # what .grad was last known to be; None where the cloud has none
        self._committed = False  # a commit is held: the cloud will forget its gradients, unless it is told to keep them
        self._stays_unknown = False  # what the backward that is under way adds to was not known before
        self._is_come_to = False  # by autograd, in the backward that was begun last
        self._is_mixed = False  # with gradients that nobody has on the edge

    @property
    def is_empty(self) -> bool:
        """Whether the cloud has no gradients, as of the last `tell`."""
        return self._norm is None

    def begin(self) -> None:
        """A backward is about to add to the cloud's gradients; whether it has is known with `show`. After `tell`.

        To be called within it, by autograd.
        """
        self._stays_unknown = self._norm is not None and math.isnan(self._norm)
        self._is_come_to, had_none = False, self._norm is None
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(lambda: self._ended(had_none))
        self._set(math.nan)

    def _ended(self, had_none: bool) -> None:
        """A backward is over. One that accumulates nothing, as `torch.autograd.grad` or `backward(inputs=...)`, has not
        come to the parameter, and the cloud has accumulated."""
        if self._is_come_to:
            return
        if had_none:
            self.parameter.grad = None  # the cloud is told as it is of `zero_grad`
        elif self.parameter.grad is not None:
            self._is_mixed = True

    def watch(self) -> None:
        """Before each forward. Raises UsageError where the script has given the parameter a hook."""
        if self.parameter._backward_hooks or getattr(self.parameter, "_post_accumulate_grad_hooks", None):
            raise UsageError(
                f"'{PARAMETER_NAME}' stands for all gradients on the cloud, and has been given a hook, which sees none "
                "of them: leave it out of those that hooks are for, as by `if name != 'cloud_gradients'`"
            )
        view: Any = self.parameter.expand_as(self.parameter)
        if view.grad_fn is None:  # there will be no backward
            return
        node = view.grad_fn.next_functions[0][0]
        if node is not self._node:  # the first, or another, as the parameter has moved to another device
            self._node, own = node, weakref.ref(self)
            # Not of the parameter: `torch.autograd.grad` calls its hooks, too, where it is among what is asked for.
            node.register_hook(lambda *_: _come_to(own()))

    def show(self, norm: float) -> None:
        """A backward has added to the cloud's gradients, and this is their norm now. After `begin`."""
        self._set(math.nan if self._stays_unknown else norm)

    def _set(self, norm: float) -> None:
        self.generation += 1
        # One that is too large becomes infinity.
        self.parameter.grad = torch.tensor([_SHARES], dtype=torch.float32).mul(norm).to(self.parameter)
        self._norm = _norm_of(self.parameter.grad)  # as rounded

    def undone(self) -> None:
        """The cloud has forgotten its gradients by itself."""
        self.parameter.grad = self._norm = None
        self._committed = self._stays_unknown = self._is_mixed = False
        self.generation += 1

    def tell(self) -> None:
        """Tells the link what the script has done with gradients since; to be called before every message.

        Raises UsageError for what the cloud cannot do with its own.
        """
        if self._norm is None:
            return
        left = self._left()
        self._check_mixed(left)
        if left is None:
            are_zeros = self.parameter.grad is not None  # with which an optimizer goes on decaying what gets no others
            if are_zeros and self._committed:
                self._link.keep_gradients()
            if are_zeros or not self._committed:
                self._link.scale_gradients(-0.0 if are_zeros else 0.0)
            self._norm = None
            self.generation += 1
        else:
            if self._committed:
                self._link.keep_gradients()
            scale = _quotient(left, self._norm)
            if scale != 1.0:
                self._link.scale_gradients(scale)
                self.generation += 1
            self._norm = left
        self._committed = False

    def clip_scale(self) -> float:
        """What the cloud has to multiply its gradients by before it takes a step with them.

        Raises UsageError when the script has zeroed them, or edited them as the cloud cannot, NonFiniteLossError when
        they are not finite.
        """
        if self._norm is None or self.parameter.grad is None:
            raise UsageError(
                "step() without gradients on the cloud: they were zeroed after the last backward() through it"
            )
        self._check_mixed(self._left())
        left = _norm_of(self.parameter.grad)  # 0 where a script has made zeros of them, and steps with these
        if not (math.isfinite(self._norm) and math.isfinite(left)):
            raise NonFiniteLossError(
                "the gradients on the cloud are not finite, or a backward() was broken off; neither side has taken the "
                "step: zero_grad() drops them"
            )
        return _quotient(left, self._norm)

    def committed(self) -> None:
        """A commit with `clip_scale` is held."""
        if self.parameter.grad is not None:
            self._norm = _norm_of(self.parameter.grad)
        self._committed = True

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """No gradient for the block, in which the script's optimizer takes its step."""
        grad, self.parameter.grad = self.parameter.grad, None
        try:
            yield
        finally:
            self.parameter.grad = grad

    def _check_mixed(self, left: Optional[float]) -> None:
        if left is None:  # zeroed
            self._is_mixed = False
        if self._is_mixed:
            raise UsageError(
                "torch.autograd.grad() or backward(inputs=...) went through the cloud, which has added its gradients "
                "to those of a backward() before it: call zero_grad(), and the latter after the former"
            )

    def _left(self) -> Optional[float]:
        """What the script has left of the norm; None where it zeroed the gradients."""
        if self.parameter.grad is None:
            return None
        left = _norm_of(self.parameter.grad)
        return None if left == 0.0 and self._norm != 0.0 else left


def _come_to(gradients: Optional[CloudGradients]) -> None:
    """Autograd is done with what leads to the parameter, and would add to its gradient."""
    if gradients is not None:
        gradients._is_come_to = True


def _quotient(left: float, norm: float) -> float:
    if norm == 0.0 or not (math.isfinite(left) and math.isfinite(norm)):
        return 1.0  # nothing that can be scaled
    return left / norm


def _norm_of(grad: Tensor) -> float:
    """The cloud's norm, with the sign of what the script has multiplied it by, from the gradient that stands for it."""
    first, second = grad.flatten().tolist()
    norm = first / _SHARES[0]
    if math.isfinite(first) and math.isfinite(second):
        expected = norm * _SHARES[1]
        allowed = max(_ROUNDING, 4 * torch.finfo(grad.dtype).eps)
        if abs(second - expected) > allowed * abs(expected) + torch.finfo(torch.float32).tiny:
            raise UsageError(
                "gradients were edited otherwise than by multiplying all of them by one number, which does not reach "
                "those on the cloud: leave out clip_grad_value_ (clip_grad_norm_ works), noise, and the like"
            )
    return float(norm)
