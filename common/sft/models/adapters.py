"""The values of LoRA's adapters: drawn for each layer by its name in the whole model, or given."""

from __future__ import annotations

from typing import Any, Iterator, Sequence, Union

import torch

from sft.models.nets import Net
from sft.models.seeding import seeded
from sft.tensors.stream import StoredTensor

ADAPTER = "default"
"""As peft names the only one."""

_CPU = torch.device("cpu")
_LAYER = ".base_layer"


def is_adapter(name: str) -> bool:
    """Whether a parameter of the whole model is one of an adapter, by its name."""
    return ".lora_" in name


def draw_adapter(layer: Any, init_lora_weights: Union[bool, str], seed: int, whole_name: str) -> None:
    """Of one of peft's layers, called `whole_name` in the whole model; of none on the meta device."""
    parts = [layer.lora_A, layer.lora_B, layer.lora_embedding_A, layer.lora_embedding_B]
    device = layer.get_base_layer().weight.device
    if device.type == "meta":
        return
    for part in parts:
        part.to(_CPU)  # wherever they go: a GPU's generator gives other numbers
    with seeded(_CPU, seed, "lora", whole_name):
        layer.reset_lora_parameters(ADAPTER, init_lora_weights)
    for part in parts:
        part.to(device)


def draw_adapters(
    net: Net, init_lora_weights: Union[bool, str], seed: int, values: Sequence[StoredTensor]
) -> Iterator[None]:
    """Of a net that had its adapters on the meta device, and was filled since; others may compute where it yields.

    Those that `values` hold are as they are there.
    """
    layers = {own.rpartition(".")[0]: whole.rpartition(".")[0] for own, whole in net.whole_names.items()}
    for own, whole in layers.items():
        if own.endswith(_LAYER):
            draw_adapter(net.get_submodule(own[: -len(_LAYER)]), init_lora_weights, seed, whole)
            yield
    set_adapters(net, values)


def set_adapters(net: Net, values: Sequence[StoredTensor]) -> None:
    """Copies what `values` hold of a net's adapters."""
    adapters = {name: p for name, p in net.whole_parameters().items() if is_adapter(name)}
    with torch.no_grad():
        for tensor in values:
            if tensor.name in adapters:
                adapters[tensor.name].copy_(tensor.read())
