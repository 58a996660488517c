"""A script's own module around a base model of transformers, which is cut at a block. Labels stay on the edge.

Shape suffixes: B batch, S padded sequence, R split rank, D model width.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from sft.batch import attention_mask
from sft.errors import ProtocolError, UsageError
from sft.graphs.body import BodyCut, cut_around, find_body
from sft.graphs.wrappers import never_compiled
from sft.models import Cut, Net2, body_of, max_positions
from sft.models.seeding import undisturbed
from sft.v1 import split_training_pb2 as pb
from sft.wire.codec.elements import Codecs, codecs_of, encode_tensor
from sft.wire.codec.messages import decode_activation
from sft.wire.codec.packing import pack
from sft.wire.codec.rows import Codes
from sft.wire.cut import body_cut_to_proto
from sft.wire.protocol import MAX_PADDED_TOKENS
from sft_cloud.script.graph_host import GraphHalf, blames_model
from sft_cloud.script.hosted_model import HostedModel, check_same_cut
from sft_cloud.script.hosted_net_2 import host_net_2
from sft_cloud.session import Given, UpperHalf


class BodyHost(HostedModel):
    """A module that torch.fx can trace around the transformers model in it."""

    def __init__(self, model: nn.Module, transformers_cut: Cut, body_name: str | None) -> None:
        """Cuts the model. Raises CutError, UsageError and UnsupportedModelError; the model is then as it was."""
        if "forward" in vars(model):
            raise UsageError(f"the forward of this {type(model).__name__} was replaced, or the model is cut already")
        self._around = cut_around(model, find_body(model, body_name))
        self._transformers_cut = transformers_cut
        self.tensors = self._around.upper_tensors()
        body, prefix = self._around.body, f"{self._around.body_name}."
        hosted = self._hosted = host_net_2(body, str(body_of(body)), transformers_cut)
        self._around.keep_net_2()
        self.layer_name = prefix + hosted.layer_name
        self.factor_names = {
            prefix + name: [prefix + one for one in factors] for name, factors in hosted.factor_names.items()
        }
        self.factors = {prefix + name: parameter for name, parameter in hosted.factors.items()}
        self.tensors.update({prefix + name: tensor for name, tensor in hosted.tensors.items()})
        self._shared = {prefix + name for name in hosted.shared_names}
        model.forward = never_compiled(_Forward(model, self._around, hosted.net_2))

    def make_half(self, request: pb.OpenSessionRequest) -> UpperHalf:
        """See HostedModel."""
        check_same_cut(request, body_cut_to_proto(self.layer_name, self._transformers_cut))
        own = {name: tensor for name, tensor in {**self.tensors, **self.factors}.items() if name not in self._shared}
        net_2 = self._hosted.net_2.to(self.device)
        return BodyHalf(self._around, net_2, max_positions(self._hosted.config), own, codecs_of(request))


class BodyHalf(GraphHalf):
    """Net_2 of a module around a transformers model, as a session takes it."""

    def __init__(self, around: BodyCut, net_2: Net2, longest: int, tensors: dict[str, Tensor], codecs: Codecs) -> None:
        """`longest`: tokens of a sequence; `tensors` that a download holds."""
        super().__init__(around, net_2.width, tensors, codecs.gradient)
        self._net_2 = net_2
        self._longest = longest
        self._codes = codecs.codes
        self._looked_at: dict[
            int, int
        ] = {}  # by variant: tokens of the shortest text by which it was looked whether padding is read

    @property
    def codes(self) -> Codes:
        """See UpperHalf."""
        return self._codes

    def train(self, mode: bool) -> object:
        """See UpperHalf."""
        self._net_2.train(mode)
        return super().train(mode)

    def decode(self, activation: pb.Activation, scored: pb.Labels | None = None) -> Given:
        """See UpperHalf."""
        self._check_asked(activation, scored)
        padded_tokens = len(activation.lengths) * max(1, activation.padded_length)
        if padded_tokens > MAX_PADDED_TOKENS:
            raise ProtocolError(f"a batch of {padded_tokens} padded tokens is too large; at most {MAX_PADDED_TOKENS}")
        given = decode_activation(activation, self._width, self._longest, self.device, self.codes)
        return self._asked(Given(*given), activation)

    def outputs(self, given: Given) -> Tensor:
        """See UpperHalf. Raises ProtocolError where what the model does with hidden states reads those of padding."""
        if min(given.lengths) < min(given.a.shape[1], self._looked_at.get(given.variant, given.a.shape[1])):
            with blames_model():
                self._check_reads_no_padding(given)
            self._looked_at[given.variant] = min(given.lengths)
        return super().outputs(given)

    def run(self, given: Given) -> Any:
        """See GraphHalf."""
        mask_BS = self._mask(given)
        returned = _filled(self._net_2.hidden(given.a, given.lengths), mask_BS, 0.0)
        hidden_BSD = returned["last_hidden_state"]
        if hidden_BSD.requires_grad and not mask_BS.all():
            hidden_BSD.register_hook(lambda gradient_BSD: _check_learns_nothing(gradient_BSD[mask_BS == 0]))
        return self._cut.run_net_2((returned, mask_BS), given.variant)

    def encode_gradient(self, gradient: Tensor, given: Given) -> pb.Tensor:
        """See UpperHalf."""
        return encode_tensor(pack(gradient, given.lengths), self._gradient_codec, given.rounding)

    def _mask(self, given: Given) -> Tensor:
        return attention_mask(given.lengths, given.a.shape[1]).to(self.device)

    def _check_reads_no_padding(self, given: Given) -> None:
        """Without dropout: what is read in training alone shows in its gradient."""
        mask_BS, mode, seen = self._mask(given), self._cut.model.training, []
        with torch.no_grad():
            try:
                self.train(False)
                returned = self._net_2.hidden(given.a, given.lengths)
                for value in (0.0, 1.0):
                    with undisturbed(self.device):
                        seen.append(self._cut.run_net_2((_filled(returned, mask_BS, value), mask_BS), given.variant))
            finally:
                self.train(mode)
        if isinstance(seen[0], Tensor) and _differ(seen[0], seen[1], mask_BS):
            raise ProtocolError(_READS_PADDING)


_READS_PADDING = (
    "what the model makes of hidden states depends on those of padding, which does not cross: leave them out by the "
    "attention_mask, as a mean over tokens does, and out of the loss, as labels of -100 are; or make all texts of a "
    "batch equally long"
)


def _check_learns_nothing(gradient: Tensor) -> None:
    if ((gradient != 0) & gradient.isfinite()).any():
        raise ProtocolError(_READS_PADDING)


def _differ(some: Tensor, other: Tensor, mask_BS: Tensor) -> bool:
    """Whether they do at more than padding, wherever tokens are counted."""
    (B, S), real = mask_BS.shape, mask_BS == 1
    views = [(some, other)]
    if some.shape[:1] == (B * S,):
        views.append((some[real.flatten()], other[real.flatten()]))
    for place in range(1, some.dim()):
        if (some.shape[0], some.shape[place]) == (B, S):
            views.append((some.movedim(place, 1)[real], other.movedim(place, 1)[real]))
    return not any(torch.allclose(*pair, rtol=1e-4, atol=1e-5, equal_nan=True) for pair in views)


class _Forward:
    """Stands where the model's forward was: net_2's."""

    def __init__(self, model: nn.Module, around: BodyCut, net_2: Net2) -> None:
        self._model = model
        self._around = around
        self._net_2 = net_2

    def __call__(self, a_BSR: Tensor, lengths: list[int] | None = None) -> Any:
        """`lengths` of the sequences; None where none is padded. As where no argument that is None by default is
        given."""
        B, S = a_BSR.shape[:2]
        lengths = lengths or [S] * B
        mask_BS = attention_mask(lengths, S).to(a_BSR.device)
        returned = self._net_2.train(self._model.training).hidden(a_BSR, lengths)
        return self._around.run_net_2((_filled(returned, mask_BS, 0.0), mask_BS))


def _filled(returned: Any, mask_BS: Tensor, value: float) -> Any:
    """What a base model has returned, with a value in the place of the hidden states of padding."""
    if bool(mask_BS.all()):
        return returned
    filled = copy.copy(returned)
    filled["last_hidden_state"] = returned["last_hidden_state"].masked_fill(mask_BS[..., None] == 0, value)
    return filled
