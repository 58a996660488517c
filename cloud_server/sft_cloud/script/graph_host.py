"""Any module of a script, cut at a named `nn.Linear`. Labels stay on the edge."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from sft.errors import CutError, ProtocolError, SFTError, UsageError
from sft.graphs.cut import GraphCut, cut
from sft.graphs.variants import Variants
from sft.graphs.wrappers import never_compiled
from sft.tensors.stream import StoredTensor, in_memory
from sft.v1 import split_training_pb2 as pb
from sft.wire.codec.elements import MAX_DIMENSIONS, codecs_of, decode_tensor, encode_tensor
from sft.wire.codec.rows import CODES, Codes
from sft.wire.cut import layer_cut_to_proto
from sft.wire.protocol import MAX_MESSAGE_BYTES
from sft_cloud.errors import is_out_of_memory
from sft_cloud.script.hosted_model import ADVICE, HostedModel, check_same_cut
from sft_cloud.session import Given, UpperHalf, half_precision_bytes

_OWN_BYTES = 8
"""Of a number of the activation and of its gradient, float32."""


class GraphHost(HostedModel):
    """A module that torch.fx can trace down to the layer."""

    def __init__(self, model: nn.Module, layer_name: str, split_rank: int, residual: str) -> None:
        """Cuts the model. Raises CutError and UsageError; the model is then as it was."""
        if residual != "none":
            raise CutError(f"residual={residual!r} is for transformers models; a module of a script is cut without")
        if "forward" in vars(model):
            raise UsageError(f"the forward of this {type(model).__name__} was replaced, or the model is cut already")
        self.layer_name = layer_name
        self._cut: GraphCut = cut(model, layer_name, split_rank)
        self.factor_names = self._cut.factor_names
        ffn_2, ffn_3 = self._cut.keep_net_2()
        self.tensors = self._cut.upper_tensors()
        named = {"ffn2": ffn_2, "ffn3": ffn_3}
        self.factors = {
            f"{layer_name}.{factor}.{own}": parameter
            for factor, linear in named.items()
            for own, parameter in linear.named_parameters()
        }
        model.forward = never_compiled(self._cut.run_net_2)

    def make_half(self, request: pb.OpenSessionRequest) -> UpperHalf:
        """See HostedModel."""
        check_same_cut(request, layer_cut_to_proto(self.layer_name, self._cut.split_rank))
        tensors = {**self.tensors, **self.factors}
        return GraphHalf(self._cut, self._cut.split_rank, tensors, codecs_of(request).gradient)


class GraphHalf:
    """Net_2 of a module, as a session takes it."""

    def __init__(
        self, graph_cut: Variants, width: int, tensors: dict[str, Tensor], gradient_codec: pb.DataType
    ) -> None:
        """`graph_cut` of a model that is net_2 already; `width` of what crosses; `tensors` that a download holds."""
        self._cut = graph_cut
        self._width = width
        self._tensors = tensors
        self._gradient_codec = gradient_codec
        self._upper_modules = graph_cut.upper_modules()
        self._largest: dict[int, int] = {}  # by variant: numbers of the largest activation so far
        self._bytes_per_number: dict[int, float] = {}  # that it took

    @property
    def device(self) -> torch.device:
        """See UpperHalf."""
        return next(self._cut.model.parameters()).device

    @property
    def codes(self) -> Codes:
        """See UpperHalf."""
        return CODES

    def train(self, mode: bool) -> object:
        """See UpperHalf."""
        return self._cut.model.train(mode)

    def parameters(self) -> Iterator[nn.Parameter]:
        """See UpperHalf."""
        return self._cut.model.parameters()

    def whole_parameters(self) -> dict[str, nn.Parameter]:
        """See UpperHalf: buffers, too, such as a norm's statistics."""
        return cast("dict[str, nn.Parameter]", dict(self._tensors))

    def all_parameters(self) -> dict[str, nn.Parameter]:
        """See UpperHalf."""
        return self.whole_parameters()

    def stored_parameters(self) -> Sequence[StoredTensor]:
        """See UpperHalf."""
        return in_memory(self._tensors)

    def training_bytes(self, activation: pb.Activation) -> int:
        """See UpperHalf: the activation and its gradient, and beside them in proportion to the largest so far. What a
        script's module does is known once it has run."""
        numbers = math.prod(activation.packed.shape[: MAX_DIMENSIONS + 1])
        return int((_OWN_BYTES + self._bytes_per_number.get(activation.variant, 0.0)) * max(0, numbers))

    def cast_bytes(self) -> int:
        """See UpperHalf."""
        return half_precision_bytes(self.parameters())

    def logits_bytes(self, activation: pb.Activation) -> int:
        """See UpperHalf: known once they are computed."""
        return 0

    def decode(self, activation: pb.Activation, scored: pb.Labels | None = None) -> Given:
        """See UpperHalf."""
        self._check_asked(activation, scored)
        shape, rank = list(activation.packed.shape[: MAX_DIMENSIONS + 1]), self._width
        if activation.lengths or activation.padded_length:
            raise ProtocolError("the activation of a script's module has no lengths")
        if len(shape) < 2 or shape[-1] != rank or 0 in shape:
            raise ProtocolError(f"the activation has shape {shape}; its last dimension must be the rank, {rank}")
        return self._asked(Given(decode_tensor(activation.packed, self.device), []), activation)

    def outputs(self, given: Given) -> Tensor:
        """See UpperHalf. Raises ProtocolError when the model gives something that does not cross."""
        for name in given.other_mode:
            self._upper_modules[name].training = not self._cut.model.training
        largest = self._largest.get(given.variant, 0)
        is_largest = torch.is_grad_enabled() and given.a.numel() > largest
        with _Made(self.parameters()) if is_largest else contextlib.nullcontext() as made, blames_model():
            y: Any = self.run(given)
        if made is not None:
            self._largest[given.variant] = given.a.numel()
            self._bytes_per_number[given.variant] = made.total_bytes / given.a.numel()
        if not isinstance(y, Tensor) or not y.is_floating_point():
            kind = f"a tensor of {y.dtype}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
            raise ProtocolError(f"the model's output is {kind}; one floating-point tensor can cross")
        if 4 * y.numel() > MAX_MESSAGE_BYTES:
            raise ProtocolError(f"the output of shape {list(y.shape)} is too large for a message; send smaller batches")
        return y

    def run(self, given: Given) -> Any:
        """What the model makes of an activation."""
        return self._cut.run_net_2(given.a, given.variant)

    def check_outputs(self, activation: pb.Activation) -> None:
        """See UpperHalf. How large they are is known once they are computed."""

    def encode_outputs(self, outputs: Tensor, given: Given) -> pb.Tensor:
        """See UpperHalf."""
        return encode_tensor(outputs)

    def encode_gradient(self, gradient: Tensor, given: Given) -> pb.Tensor:
        """See UpperHalf."""
        return encode_tensor(gradient, self._gradient_codec, given.rounding)

    def decode_output_gradient(self, message: pb.Tensor, outputs: Tensor, given: Given) -> Tensor:
        """See UpperHalf."""
        theirs, ours = list(message.shape[: outputs.dim() + 1]), list(outputs.shape)
        if theirs != ours:
            raise ProtocolError(f"the gradient has shape {theirs}, the output {ours}")
        return decode_tensor(message, self.device).to(outputs.dtype)

    def decode_labels(self, message: pb.Labels, given: Given) -> dict[str, Tensor]:
        """Refused: what a script's own criterion makes of labels is not known here."""
        raise ProtocolError("the labels of a script's module stay on the edge; send the activation alone")

    def loss(self, outputs: Tensor, labels: dict[str, Tensor], given: Given) -> Tensor:
        """Refused."""
        raise ProtocolError("the loss of a script's module is computed on the edge")

    def _check_asked(self, activation: pb.Activation, scored: pb.Labels | None) -> None:
        if scored is not None and scored.WhichOneof("kind") is not None:
            raise ProtocolError("labels of a script's own model stay on the edge; leave them out")
        if not self._cut.has_variant(activation.variant):
            raise ProtocolError(f"the cloud's model has no variant {activation.variant} of its arguments; {ADVICE}")
        for name in activation.other_mode:
            if name not in self._upper_modules:
                raise ProtocolError(f"the cloud's model has no module '{name[:200]}' above the cut; {ADVICE}")

    @staticmethod
    def _asked(given: Given, activation: pb.Activation) -> Given:
        """What `_check_asked` has seen, added."""
        return given._replace(variant=activation.variant, other_mode=activation.other_mode)


@contextlib.contextmanager
def blames_model() -> Iterator[None]:
    """Whatever a forward method raises in the block becomes a ProtocolError, but for what is one of ours, and want of
    memory."""
    try:
        yield
    except SFTError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise ProtocolError(f"on the cloud the model's forward raised {type(error).__name__}: {reason}") from error


class _Made(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the memory of all tensors that are made meanwhile: what a graph holds of them, and of a step besides."""

    def __init__(self, known: Iterator[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._sizes: dict[int, int] = {}

    @property
    def total_bytes(self) -> int:
        return sum(self._sizes.values())

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        is_copy = function is torch.ops.aten._to_copy.default and self._is_known(args[0])
        for tensor in tree_flatten(made)[0]:
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                memory = tensor.untyped_storage()
                if is_copy:  # of a weight, as large for every batch: `cast_bytes` has those
                    self._known.add(memory.data_ptr())
                elif not self._is_known(tensor):
                    # What was let go of is counted once with what has its place now.
                    self._sizes[memory.data_ptr()] = max(memory.nbytes(), self._sizes.get(memory.data_ptr(), 0))
        return made

    def _is_known(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._known
