"""A transformers model of a script, cut at a block."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sft.errors import ProtocolError, UsageError
from sft.models import Cut, Net2, Output, build_net_2, check_live, head_of, layer_to_cut
from sft.models.weights import fill, live_tensors
from sft.tensors.stream import in_memory
from sft.v1 import split_training_pb2 as pb
from sft.wire.cut import cut_to_proto
from sft_cloud.engine import check_request
from sft_cloud.script.hosted_model import ADVICE, HostedModel, check_same_cut, keep_parameters
from sft_cloud.session import TransformersUpperHalf, UpperHalf


class TransformersHost(HostedModel):
    """Any model that `sft.models` can cut."""

    def __init__(self, model: PreTrainedModel, split_layer: int, split_rank: int, residual: str) -> None:
        """Cuts the model. Raises UsageError, CutError, UnsupportedModelError; the model is then as it was."""
        if "forward" in vars(model):
            raise UsageError(f"the forward of this {type(model).__name__} was replaced, or the model is cut already")
        self._head, self._cut = head_of(model), Cut("sft", split_layer, split_rank, residual)
        check_live(model, self._head, self._cut)
        self._config: Any = copy.deepcopy(model.config)
        self.layer_name, w = layer_to_cut(model, self._cut)
        weights = [f"{self.layer_name}.{factor}.weight" for factor in ("ffn1", "ffn2", "ffn3")]
        bias = [f"{self.layer_name}.ffn3.bias"]
        if w.bias is None:  # a fitted low rank brings one along
            self.factor_names = {f"{self.layer_name}.weight": weights + bias}
        else:
            self.factor_names = {f"{self.layer_name}.weight": weights, f"{self.layer_name}.bias": bias}
        net_2 = self._net_2 = build_net_2(self._config, self._head, self._cut)
        live = live_tensors(model, net_2)
        trained = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
        for name, factors in self.factor_names.items():
            trained.update(dict.fromkeys(factors, trained[name]))
        unset = {
            name: torch.zeros(parameter.shape)
            for name, parameter in net_2.whole_parameters().items()
            if name.startswith(f"{self.layer_name}.ffn")
        }
        fill(net_2, [*live, *in_memory(unset)], 0, next(model.parameters()).device)
        whole = net_2.whole_parameters()
        for name, parameter in whole.items():
            parameter.requires_grad_(parameter.requires_grad and trained[name])
        self.factors = {name: parameter for name, parameter in whole.items() if name in unset}
        self.tensors: dict[str, Tensor] = {tensor.name: whole[tensor.name] for tensor in live}
        keep_parameters(model, whole)
        model.forward = _Forward(model, net_2)

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
