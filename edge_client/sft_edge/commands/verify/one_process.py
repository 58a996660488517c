"""The reference of `sft-edge verify`: the cut model in one piece, trained as anyone would."""

from __future__ import annotations

import math
from typing import Any, Dict, List, Optional, Sequence

import torch
from torch import Tensor

from sft.batch import Batch
from sft.models import Cut, build_net_1, build_whole, last_of_edge
from sft.models.weights import fill
from sft.optim.gradients import squared_norm
from sft.optim.spec import make_optimizer
from sft.v1 import split_training_pb2 as pb
from sft.wire.codec.elements import IN_FULL, Codecs, codecs_named, decode_tensor, encode_tensor
from sft.wire.codec.packing import pack, unpack
from sft.wire.codec.rows import Codes, rounding_of
from sft_edge.model_files import Source
from sft_edge.options import OptimizerOptions, VerifyOptions
from sft_edge.systems import optimizer_spec, whole_tensors


class OneProcess:
    """Has no wire; what crosses one elsewhere is written and read here as a codec has it."""

    def __init__(
        self,
        source: Source,
        options: VerifyOptions,
        cut: Cut,
        optimizer: OptimizerOptions,
        calibration: Sequence[Batch],
    ) -> None:
        """`calibration`: what a low-rank residual is fitted to."""
        self.config = source.config
        self._net = build_whole(source.config, options.head, cut)
        if options.freeze_edge:
            of_edge = build_net_1(source.config, options.head, cut).whole_names.values()
            for name, parameter in self._net.whole_parameters().items():
                parameter.requires_grad_(parameter.requires_grad and name not in of_edge)
        fill(self._net, whole_tensors(self._net, source, cut, options.seed, calibration), options.seed)
        self.optimizer_spec = optimizer_spec(optimizer, self._net)
        self._optimizer = make_optimizer(self.optimizer_spec, self._net.whole_parameters())
        self._scheduler = optimizer.scheduler(self._optimizer, options.steps)
        self._max_grad_norm = optimizer.max_grad_norm
        self._steps = 0
        self._coded = Coded(codecs_named("float32", options.codec, options.gradient_codec), options.seed)
        if self._coded.codecs != IN_FULL:
            last_of_edge(self._net, cut).register_forward_hook(self._coded.hook)

    def code_as(self, codecs: Codecs) -> None:
        """Before the first step: what crosses is written by these, whose tables are known now."""
        self._coded.codecs = codecs

    def step(self, batches: List[Batch]) -> float:
        """The loss of a step, which is taken."""
        self._net.train()
        self._optimizer.zero_grad()
        total = 0.0
        for micro_batch, batch in enumerate(batches):
            self._coded.begin(self._steps, micro_batch, batch.lengths)
            loss = self._net(*batch).loss / len(batches)
            loss.backward()
            total += loss.item()
        if self._max_grad_norm > 0:
            self._clip()
        self._optimizer.step()
        self._scheduler.step()
        self._steps += 1
        return total

    def _clip(self) -> None:
        """As torch's clip_grad_norm_, but for the sum of squares, which is added in double precision.

        Added in single precision it depends on the order, so on where the model is cut. One last bit is enough for Adam
        to go another way: it divides gradients that are nothing but rounding (those of the keys' biases) by themselves.
        """
        gradients = [parameter.grad for parameter in self._net.parameters() if parameter.grad is not None]
        norm = math.sqrt(squared_norm(gradients))
        for gradient in gradients:
            gradient.mul_(min(1.0, self._max_grad_norm / (norm + 1e-6)))

    def parameters(self) -> Dict[str, Tensor]:
        """As they are now, by name."""
        return {name: parameter.detach() for name, parameter in self._net.whole_parameters().items()}


class Coded:
    """What the wire does to an activation and to its gradient, where there is none."""

    def __init__(self, codecs: Codecs, seed: int) -> None:
        self.codecs = codecs
        self._seed = seed
        self._rounding = 0
        self._lengths: List[int] = []

    def begin(self, step: int, micro_batch: int, lengths: List[int]) -> None:
        """A micro-batch with sequences of so many tokens."""
        self._rounding, self._lengths = rounding_of(self._seed, step, micro_batch), lengths

    def hook(self, module: Any, inputs: Any, output: Any) -> Any:
        """A forward hook of what ends on the edge: a tensor, or a tuple that begins with it."""
        if isinstance(output, tuple):
            return (self._cross(output[0]), *output[1:])
        return self._cross(output)

    def _cross(self, a: Tensor) -> Tensor:
        crossed: Tensor = _Cross.apply(a, self.codecs, self._lengths, self._rounding)  # type: ignore[no-untyped-call]
        return crossed


class _Cross(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, codecs: Codecs, lengths: List[int], rounding: int) -> Tensor:
        ctx.gradient = (codecs.gradient, codecs.codes, lengths, rounding)
        return _there(a, codecs.activation, codecs.codes, lengths)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _there(gradient, *ctx.gradient), None, None, None


def _there(a: Tensor, codec: pb.DataType, codes: Codes, lengths: List[int], rounding: Optional[int] = None) -> Tensor:
    """As it arrives: (B, S, R), or (B * S, R) where a block has flattened it."""
    a_BSR = a.reshape(len(lengths), -1, a.shape[-1])
    packed = decode_tensor(encode_tensor(pack(a_BSR, lengths), codec, rounding, codes), a.device, codes)
    return unpack(packed, lengths, a_BSR.shape[1]).reshape(a.shape)
