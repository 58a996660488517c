"""Net_2 of a script's transformers model, with the weights that it has."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sft.models import Cut, Net2, build_net_2, check_live, decomposed_by, layer_to_cut
from sft.models.weights import fill, live_tensors
from sft.tensors.stream import in_memory
from sft_cloud.script.hosted_model import keep_parameters


class HostedNet2(NamedTuple):
    """What `sft_cloud.script.hosted_model.HostedModel` has to say of it; names are those in the transformers model."""

    net_2: Net2
    config: Any
    layer_name: str
    factor_names: Mapping[str, Sequence[str]]
    factors: Mapping[str, nn.Parameter]
    tensors: dict[str, Tensor]
    shared_names: frozenset[str]
    """Of `tensors`: what both halves have, and nobody trains."""


def host_net_2(model: PreTrainedModel, head: str, cut: Cut) -> HostedNet2:
    """Takes from the model, in place, all parameters but net_2's.

    Raises UsageError, CutError, UnsupportedModelError; the model is then as it was.
    """
    check_live(model, head, cut)
    config: Any = copy.deepcopy(model.config)
    layer_name, w = layer_to_cut(model, cut)
    is_decomposed = decomposed_by(model) is not None
    weights = [f"{layer_name}.{factor}.weight" for factor in ("ffn1", "ffn2", "ffn3")]
    bias = [f"{layer_name}.ffn3.bias"]
    factor_names: dict[str, list[str]] = {f"{layer_name}.weight": weights, f"{layer_name}.bias": bias}
    if is_decomposed:
        factor_names = {}
    elif w.bias is None:  # a fitted low rank brings one along
        factor_names = {f"{layer_name}.weight": weights + bias}
    net_2 = build_net_2(config, head, cut)
    live = live_tensors(model, net_2)
    trained = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    for name, factors in factor_names.items():
        trained.update(dict.fromkeys(factors, trained[name]))
    unset = {
        name: torch.zeros(parameter.shape)
        for name, parameter in net_2.whole_parameters().items()
        if name.startswith(f"{layer_name}.ffn")
    }
    fill(net_2, [*live, *in_memory(unset)], 0, next(model.parameters()).device)
    whole = net_2.whole_parameters()
    shared = frozenset(name for name, parameter in whole.items() if not parameter.requires_grad)
    for name, parameter in whole.items():
        parameter.requires_grad_(parameter.requires_grad and trained[name])
    keep_parameters(model, whole)
    return HostedNet2(
        net_2,
        config,
        layer_name,
        factor_names,
        {name: parameter for name, parameter in whole.items() if name in unset},
        {tensor.name: whole[tensor.name] for tensor in live},
        shared,
    )
