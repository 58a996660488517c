"""What a session trains: net_2, whatever it is made of, and how it goes over the wire.

Shape suffixes: B batch, S padded sequence, R width on the wire, C outputs of the head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from sft.errors import ProtocolError
from sft.models import HEADS, Net2, max_positions
from sft.models.lora import merged_tensors
from sft.models.losses import head_loss, token_scores
from sft.tensors.stream import StoredTensor, in_memory
from sft.v1 import split_training_pb2 as pb
from sft.wire.codec.elements import Codecs, encode_tensor
from sft.wire.codec.messages import (
    decode_activation,
    decode_labels,
    decode_logits,
    encode_logits,
    is_packed,
    outputs_of,
)
from sft.wire.codec.packing import pack
from sft.wire.codec.rows import Codes
from sft.wire.protocol import MAX_MESSAGE_BYTES, MAX_PADDED_TOKENS
from sft_cloud.session.memory import UNKNOWN, BatchMemory, half_precision_bytes


class Given(NamedTuple):
    """An activation as net_2 takes it."""

    a: Tensor
    """On net_2's device: a_BSR with zeros at padding, or of any shape where there are no lengths."""

    lengths: list[int]
    """Tokens of each sequence; empty for a model of a script."""

    rounding: int = 0
    """The seed of what is drawn where its gradient is rounded by chance."""

    y_BS: Tensor | None = None
    """Labels of tokens whose scores are the outputs."""

    variant: int = 0
    other_mode: Sequence[str] = ()
    """As `pb.Activation` has them."""


class UpperHalf(Protocol):
    """A net_2. It checks what it finds in messages, before anything is computed."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""

    @property
    def codes(self) -> Codes:
        """In which activations may be written."""

    def train(self, mode: bool) -> object:
        """With dropout, or without."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """All of them, those that are not trained included; always in the same order."""

    def whole_parameters(self) -> dict[str, nn.Parameter]:
        """Those that the edge has not, by names in the whole model: what is trained of them, and what is not."""

    def all_parameters(self) -> dict[str, nn.Parameter]:
        """Those that both halves have included, which nobody trains: what a checkpoint holds."""

    def stored_parameters(self) -> Sequence[StoredTensor]:
        """What a download holds: those, with adapters merged into what they adapt unless the edge has drawn them."""

    def training_bytes(self, activation: pb.Activation) -> int:
        """About what a training micro-batch with it would take, seen before anything is made of it; 0 if unknown."""

    def cast_bytes(self) -> int:
        """Of the copies in half precision that autocast makes of parameters in each forward pass, for its backward."""

    def logits_bytes(self, activation: pb.Activation) -> int:
        """Of the outputs for an activation as they travel, seen before anything is made of it; 0 if unknown."""

    def decode(self, activation: pb.Activation, scored: pb.Labels | None = None) -> Given:
        """Raises ProtocolError when the activation, or what is scored unless that is empty, is none of this model's."""

    def outputs(self, given: Given) -> Tensor:
        """The forward pass."""

    def check_outputs(self, activation: pb.Activation) -> None:
        """Raises ProtocolError when the outputs would be too large for a message."""

    def encode_outputs(self, outputs: Tensor, given: Given) -> pb.Tensor:
        """For the wire, as float32."""

    def encode_gradient(self, gradient: Tensor, given: Given) -> pb.Tensor:
        """For the wire: the gradient by `given.a`, of its shape."""

    def decode_output_gradient(self, message: pb.Tensor, outputs: Tensor, given: Given) -> Tensor:
        """The gradient by `outputs`, of their shape and type. Raises ProtocolError."""

    def decode_labels(self, message: pb.Labels, given: Given) -> dict[str, Tensor]:
        """Raises ProtocolError when they are not what the model learns from."""

    def loss(self, outputs: Tensor, labels: dict[str, Tensor], given: Given) -> Tensor:
        """0-dim, of labels that `decode_labels` gave."""


class TransformersUpperHalf:
    """The upper half of a model of the library."""

    def __init__(
        self,
        net_2: Net2,
        config: PretrainedConfig,
        codecs: Codecs,
        merges: bool = True,
        batch_memory: BatchMemory = UNKNOWN,
    ) -> None:
        """`net_2` filled and on its device; `codecs`: how activations and their gradients are written.

        `merges`: whether adapters are merged in what is downloaded; `batch_memory`: as `sft_cloud.session.memory`
        measured it.
        """
        self.net_2 = net_2
        self._config = config
        self._codecs = codecs
        self._merges = merges
        self._batch_memory = batch_memory

    @property
    def device(self) -> torch.device:
        """See UpperHalf."""
        return self.net_2.device

    @property
    def codes(self) -> Codes:
        """See UpperHalf."""
        return self._codecs.codes

    def train(self, mode: bool) -> object:
        """See UpperHalf."""
        return self.net_2.train(mode)

    def parameters(self) -> Iterator[nn.Parameter]:
        """See UpperHalf."""
        return self.net_2.parameters()

    def whole_parameters(self) -> dict[str, nn.Parameter]:
        """See UpperHalf."""
        shared = {id(parameter) for module in self._shared_modules() for parameter in module.parameters()}
        return {name: p for name, p in self.net_2.whole_parameters().items() if id(p) not in shared}

    def all_parameters(self) -> dict[str, nn.Parameter]:
        """See UpperHalf."""
        return self.net_2.whole_parameters()

    def stored_parameters(self) -> Sequence[StoredTensor]:
        """See UpperHalf."""
        own = self.whole_parameters()
        if not self._merges:
            return in_memory(dict(own))
        return [tensor for tensor in merged_tensors(self.net_2) if tensor.name in own]

    def training_bytes(self, activation: pb.Activation) -> int:
        """See UpperHalf."""
        return self._batch_memory.of(len(activation.lengths), activation.padded_length)

    def cast_bytes(self) -> int:
        """See UpperHalf."""
        return half_precision_bytes(self.parameters())

    def logits_bytes(self, activation: pb.Activation) -> int:
        """See UpperHalf."""
        rows = sum(activation.lengths) if is_packed(self.net_2.head) else len(activation.lengths)
        return 4 * rows * outputs_of(self._config, self.net_2.head)

    def decode(self, activation: pb.Activation, scored: pb.Labels | None = None) -> Given:
        """See UpperHalf."""
        padded_tokens = len(activation.lengths) * max(1, activation.padded_length)
        if padded_tokens > MAX_PADDED_TOKENS:
            raise ProtocolError(f"a batch of {padded_tokens} padded tokens is too large; at most {MAX_PADDED_TOKENS}")
        if activation.variant:
            raise ProtocolError(f"variant {activation.variant} is for the activation of a script's module")
        if activation.other_mode:
            raise ProtocolError("modes of single modules are for the activation of a script's module")
        longest = max_positions(self._config)
        given = Given(*decode_activation(activation, self.net_2.width, longest, self.device, self.codes))
        if scored is None or scored.WhichOneof("kind") is None:
            return given
        if HEADS[self.net_2.head].learns != "tokens":
            raise ProtocolError(f"labels are scored where each token has one, not by a model for {self.net_2.head}")
        return given._replace(y_BS=self.decode_labels(scored, given)["labels"])

    def outputs(self, given: Given) -> Tensor:
        """See UpperHalf: (B, C), or (B, S, C) where every token has a row."""
        logits: Tensor = self.net_2(given.a, given.lengths, {}).logits
        return logits if given.y_BS is None else token_scores(self.net_2.head, logits, given.y_BS, given.lengths)

    def check_outputs(self, activation: pb.Activation) -> None:
        """See UpperHalf."""
        size = self.logits_bytes(activation)
        if size > MAX_MESSAGE_BYTES:
            raise ProtocolError(
                f"the logits of this batch take {size} bytes, a message at most {MAX_MESSAGE_BYTES}: send smaller "
                "batches, or the labels"
            )

    def encode_outputs(self, outputs: Tensor, given: Given) -> pb.Tensor:
        """See UpperHalf."""
        return encode_logits(outputs, given.lengths, self.net_2.head, pb.DATA_TYPE_FLOAT32)

    def encode_gradient(self, gradient: Tensor, given: Given) -> pb.Tensor:
        """See UpperHalf."""
        return encode_tensor(pack(gradient, given.lengths), self._codecs.gradient, given.rounding)

    def decode_output_gradient(self, message: pb.Tensor, outputs: Tensor, given: Given) -> Tensor:
        """See UpperHalf."""
        columns, S, head = outputs.shape[-1], given.a.shape[1], self.net_2.head
        return decode_logits(message, given.lengths, S, columns, head, self.device).to(outputs.dtype)

    def decode_labels(self, message: pb.Labels, given: Given) -> dict[str, Tensor]:
        """See UpperHalf."""
        labels = decode_labels(message, given.lengths, given.a.shape[1], self._config, self.net_2.head)
        return {name: y.to(self.device) for name, y in labels.items()}

    def loss(self, outputs: Tensor, labels: dict[str, Tensor], given: Given) -> Tensor:
        """See UpperHalf."""
        return head_loss(self.net_2.head, self._config.problem_type, outputs, labels, given.lengths)

    def _shared_modules(self) -> Iterator[nn.Module]:
        base = self.net_2.model.base_model
        present = dict(base.named_modules())
        yield from (present[name] for name in self.net_2.family.for_every_block if name in present)
