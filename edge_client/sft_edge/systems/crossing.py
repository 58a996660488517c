"""The split step, Algorithm 1, lines 7 to 11: an activation goes to the cloud's half, and its gradient comes back.

    labels travel     Forward(labels)     -> Result
    labels stay       Forward             -> Outputs
                      Backward(gradient)  -> Result

Two cross here: `SplitSystem` under the loop of the commands, and `SFTOptimizer` under a loop of anybody's, by an
autograd function. The first says with the labels what the loss counts in the step. The other hears of that no sooner
than in backward(): it sends them with `loss_scale` 0, has the cloud keep the gradients aside, and weighs them later.
"""

from __future__ import annotations

from typing import Callable, NamedTuple, Optional, Sequence

from torch import Tensor

from sft.errors import ProtocolError, UsageError
from sft.v1 import split_training_pb2 as pb
from sft.wire.codec.elements import Codecs, decode_tensor, encoded_size, shown
from sft.wire.codec.messages import encode_activation
from sft.wire.codec.rows import name_of
from sft.wire.protocol import MAX_MESSAGE_BYTES, MAX_PADDED_TOKENS
from sft_edge.link import Link, PendingReply

_BESIDE_BYTES = 4 << 20
"""For labels and lengths, and all else of a message."""


class Activation(NamedTuple):
    """Net_1's output as it is to cross."""

    packed: Tensor
    """(T, R), padding left out, with the `lengths` of the sequences; any (..., R) without lengths."""

    lengths: Sequence[int] = ()
    padded_length: int = 0
    rows: Optional[bytes] = None
    """Of `packed` as the wire has them, where they were kept: its elements are then of no account."""
    keep: Sequence[int] = ()
    kept: Sequence[int] = ()
    """As `pb.Activation` has them: `rows` are then of the sequences alone that the cloud does not hold."""
    variant: int = 0
    other_mode: Sequence[str] = ()
    """As `pb.Activation` has them."""

    def encoded(self, codecs: Codecs) -> pb.Activation:
        """For the wire. Raises UsageError for more than the cloud would take, which would end the session."""
        tokens = len(self.lengths) * self.padded_length
        if tokens > MAX_PADDED_TOKENS:
            raise UsageError(f"a batch of {tokens} padded tokens is too large; at most {MAX_PADDED_TOKENS} go at once")
        codec, codes = codecs.activation, codecs.codes
        check_size("activation", encoded_size(self.packed.shape, codec, codes))
        if self.rows is None:
            message = encode_activation(self.packed, codec, self.lengths, self.padded_length, codes)
            check_size("activation", len(message.packed.data))
            message.variant = self.variant
            message.other_mode.extend(self.other_mode)
            return message
        check_size("activation", len(self.rows))
        held = sum(length for length, number in zip(self.lengths, self.kept) if number)
        shape = [self.packed.shape[0] - held, *self.packed.shape[1:]]
        packed = pb.Tensor(data_type=codec, shape=shape, data=self.rows)
        return pb.Activation(
            packed=packed, lengths=self.lengths, padded_length=self.padded_length, keep=self.keep, kept=self.kept
        )


def check_size(what: str, size: int) -> None:
    """Raises UsageError for a tensor of so many bytes if it does not go into a message."""
    if size > MAX_MESSAGE_BYTES - _BESIDE_BYTES:
        raise UsageError(
            f"the {what} of this batch takes {size} bytes, a message at most {MAX_MESSAGE_BYTES - _BESIDE_BYTES}: "
            "make the batches smaller"
        )


class Crossing:
    """One micro-batch on its way: sent when made. Whoever asks for what comes back waits for it, if it is not here.

    Several may be on their way. All that waits raises what `wait` does, and ProtocolError for an answer of the wrong
    shape.
    """

    def __init__(
        self,
        link: Link,
        step: int,
        micro_batch: int,
        activation: Activation,
        codecs: Codecs,
        labels: Optional[pb.Labels],
        loss_scale: float,
        wait: Callable[[PendingReply], pb.CloudMessage],
        *,
        eval_mode: bool = False,
        want_logits: bool = False,
        autocast: pb.DataType = pb.DATA_TYPE_UNSPECIFIED,
        draws: Optional[pb.Draws] = None,
        scored: Optional[pb.Labels] = None,
    ) -> None:
        """`codecs`: of the session. `labels` are None where they stay here.

        `loss_scale`: what the loss is multiplied by before backward, 0 where `weigh` says it later; of no account
        without labels. `scored`: without labels, see `pb.Forward`. `wait` waits for an answer, and keeps account of it.
        Where the activation needs no gradient none comes.
        """
        self.micro_batch = micro_batch
        self.labels_travel = labels is not None
        self._link, self._step, self._wait = link, step, wait
        self._gradient_codec = codecs.gradient
        packed = activation.packed
        self._shape, self._device, self._is_frozen = packed.shape, packed.device, not packed.requires_grad
        self._answer = pb.CloudMessage()
        self._pending: Optional[PendingReply]
        self._pending = link.forward(
            step,
            micro_batch,
            activation.encoded(codecs),
            labels,
            loss_scale if self.labels_travel else 0.0,
            eval_mode=eval_mode,
            want_logits=want_logits,
            frozen_edge=self._is_frozen,
            autocast=autocast,
            draws=draws,
            scored=scored,
        )
        self.traffic = self._pending.traffic
        """Of what was sent."""

    def wait(self) -> pb.CloudMessage:
        """Until the answer to what was asked last is here."""
        if self._pending is not None:
            self._answer, self._pending = self._wait(self._pending), None
        return self._answer

    def loss(self) -> float:
        """Where labels travel: as the cloud has computed it, unscaled."""
        return self.wait().result.loss

    def outputs(self) -> Optional[pb.Tensor]:
        """Net_2's, as they are on the wire, where labels stay; where they travel, the logits if they were wanted."""
        answer = self.wait()
        if self.labels_travel:
            if not answer.result.HasField("logits"):
                return None
            logits = pb.Tensor()
            logits.CopyFrom(answer.result.logits)
            answer.result.ClearField("logits")  # likewise
            return logits
        self._answer = pb.CloudMessage()  # they may be large, and it may be long until the answer to `go_back`
        return answer.outputs.logits

    def go_back(self, gradient: pb.Tensor) -> None:
        """Where labels stay, after `outputs`: the gradient of the loss by them. Returns at once."""
        self._pending = self._link.backward(self._step, self.micro_batch, gradient)

    def gradient(self) -> Optional[Tensor]:
        """By the activation, of its shape, float32, on its device; None where none was wanted, or there is none."""
        if self._is_frozen or self.wait().result.no_gradient:
            return None
        message = self.wait().result.packed_gradient
        if message.data_type != self._gradient_codec:
            theirs, ours = name_of(message.data_type), name_of(self._gradient_codec)
            raise ProtocolError(f"the cloud sent a gradient in {theirs}; {ours} was agreed on")
        if list(message.shape) != list(self._shape):
            raise ProtocolError(f"the cloud sent a gradient of shape {shown(message.shape)}")
        return decode_tensor(message, self._device)

    @property
    def squared_norm(self) -> float:
        """Of the gradients that net_2 has added up in the step, this micro-batch's included, unless it is weighed."""
        return self.wait().result.squared_gradient_norm

    def weigh(self, weight: float) -> None:
        """Where labels went with `loss_scale` 0: the gradients count so many times. The cloud hears of it later."""
        self._link.weigh(self.micro_batch, weight)

    def weighed_squared_norm(self, weight: float, is_first: bool) -> float:
        """As `squared_norm`, after `weigh`. `is_first`: nothing else has been added up, whatever was there when this
        was sent; otherwise what was there then still has to be all."""
        result = self.wait().result
        before = 0.0 if is_first else result.squared_gradient_norm + 2.0 * weight * result.gradient_product
        return before + weight * weight * result.own_squared_norm
