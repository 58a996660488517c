"""A transformers model of a script, cut at a block."""

from __future__ import annotations

import copy

from torch import Tensor, nn
from transformers import PreTrainedModel

from sft.errors import ProtocolError, UsageError
from sft.graphs.wrappers import never_compiled
from sft.models import Cut, Net2, Output, head_of
from sft.v1 import split_training_pb2 as pb
from sft.wire.cut import cut_to_proto
from sft_cloud.engine import check_request
from sft_cloud.script.hosted_model import ADVICE, HostedModel, check_same_cut
from sft_cloud.script.hosted_net_2 import host_net_2
from sft_cloud.session import TransformersUpperHalf, UpperHalf


class TransformersHost(HostedModel):
    """Any model that `sft.models` can cut."""

    def __init__(self, model: PreTrainedModel, split_layer: int, split_rank: int, residual: str) -> None:
        """Cuts the model. Raises UsageError, CutError, UnsupportedModelError; the model is then as it was."""
        if "forward" in vars(model):
            raise UsageError(f"the forward of this {type(model).__name__} was replaced, or the model is cut already")
        self._head, self._cut = head_of(model), Cut("sft", split_layer, split_rank, residual)
        hosted = host_net_2(model, self._head, self._cut)
        self._config, self._net_2 = hosted.config, hosted.net_2
        self.layer_name, self.factor_names = hosted.layer_name, hosted.factor_names
        self.factors, self.tensors = hosted.factors, hosted.tensors
        model.forward = never_compiled(_Forward(model, self._net_2))

    def make_half(self, request: pb.OpenSessionRequest) -> UpperHalf:
        """See HostedModel."""
        check_same_cut(request, cut_to_proto(self._cut))
        spec = check_request(request)
        theirs, ours = f"{spec.config.model_type} for {spec.head}", f"{self._config.model_type} for {self._head}"
        if theirs != ours:
            raise ProtocolError(f"the edge's model is {theirs}, the cloud's {ours}; {ADVICE}")
        if spec.lora is not None:
            raise ProtocolError("a script's model is trained whole; LoRA is for `sft-cloud serve`")
        config = copy.deepcopy(self._config)
        config.problem_type = spec.config.problem_type  # what the labels that travel are
        return TransformersUpperHalf(self._net_2.to(self.device), config, spec.codecs)


class _Forward:
    """Stands where the model's forward was: net_2's."""

    def __init__(self, model: nn.Module, net_2: Net2) -> None:
        self._model = model
        self._net_2 = net_2

    def __call__(
        self, a_BSR: Tensor, lengths: list[int] | None = None, labels: dict[str, Tensor] | None = None
    ) -> Output:
        """`lengths` of the sequences; None where none is padded."""
        B, S = a_BSR.shape[:2]
        output: Output = self._net_2.train(self._model.training)(a_BSR, lengths or [S] * B, labels or {})
        return output
