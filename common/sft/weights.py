"""Giving values to a net that was built on the meta device: from stored tensors, else from the seed."""

from __future__ import annotations

import copy
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from torch import nn
from transformers import PretrainedConfig

from sft.checkpoint import Checkpoint
from sft.decompose import decompose
from sft.models import Cut, Net, build_whole, ffn_out_name
from sft.seeding import seeded
from sft.tensor_stream import StoredTensor, in_memory

_CPU = torch.device("cpu")


def fill(net: Net, tensors: Sequence[StoredTensor], seed: int, device: torch.device = _CPU) -> None:
    """Gives every parameter float32 memory on `device`.

    `tensors` go by whole-model names; those that are not the net's are left. What they do not hold is drawn by the
    library's own initialization, seeded for each module by its name in the whole model: both halves, and one process,
    draw the same values, whoever else exists.
    """
    own_names = {whole: own for own, whole in net.whole_names.items()}
    stored = {own_names[tensor.name]: tensor for tensor in tensors if tensor.name in own_names}
    for module_name, module in net.named_modules():
        for name, _ in list(module.named_parameters(prefix=module_name, recurse=False)):
            if name not in stored:
                _draw(net.model, module, net.whole_names[name].rpartition(".")[0], seed, device)
                break
        for name, parameter in list(module.named_parameters(prefix=module_name, recurse=False)):
            if name in stored:
                value = stored[name].read().to(device, torch.float32, copy=True)
                setattr(module, name.rpartition(".")[2], nn.Parameter(value, requires_grad=parameter.requires_grad))
    _fill_buffers(net)
    net.to(device)


def shapes(net: Net) -> Dict[str, Tuple[int, ...]]:
    """Shape of every parameter, under whole-model names."""
    return {name: tuple(parameter.shape) for name, parameter in net.whole_parameters().items()}


def pretrained_tensors(net: Net, checkpoint: Optional[Checkpoint]) -> List[StoredTensor]:
    """The net's tensors that a checkpoint holds; none without one. FFN-1 to FFN-3 are in no checkpoint."""
    if checkpoint is None:
        return []
    wanted = {name: shape for name, shape in shapes(net).items() if ".ffn1." not in name and ".ffn2." not in name}
    wanted = {name: shape for name, shape in wanted.items() if ".ffn3." not in name}
    return checkpoint.tensors(wanted, net.model.base_model_prefix)


def factor_tensors(
    config: PretrainedConfig, head: str, cut: Cut, checkpoint: Optional[Checkpoint], seed: int
) -> Tuple[List[StoredTensor], List[StoredTensor]]:
    """FFN-1 for the edge, and FFN-2 and FFN-3 (with W's bias) for the cloud, under whole-model names (eq. 2).

    W comes from the checkpoint, or from the seed without one. Both lists are empty for `sl`. This runs once, on the
    edge: the signs of singular vectors differ between machines.
    """
    if cut.mode != "sft":
        return [], []
    name = ffn_out_name(config, head, cut.split_layer)
    linear = _original_layer(config, head, name, checkpoint, seed)
    u_FR, s_RR, v_RD = decompose(linear.weight.T, cut.split_rank)
    edge = {f"{name}.ffn1.weight": u_FR.T.contiguous()}
    cloud = {f"{name}.ffn2.weight": s_RR.T.contiguous(), f"{name}.ffn3.weight": v_RD.T.contiguous()}
    if linear.bias is not None:
        cloud[f"{name}.ffn3.bias"] = linear.bias.detach()
    return list(in_memory(edge)), list(in_memory(cloud))


def _original_layer(
    config: PretrainedConfig, head: str, name: str, checkpoint: Optional[Checkpoint], seed: int
) -> nn.Linear:
    whole = build_whole(config, head)
    linear = whole.model.get_submodule(name)
    wanted = {f"{name}.{own}": tuple(parameter.shape) for own, parameter in linear.named_parameters()}
    if checkpoint is None:
        _draw(whole.model, linear, name, seed, _CPU)
    else:
        for tensor in checkpoint.tensors(wanted, whole.model.base_model_prefix):
            value = tensor.read().to(torch.float32, copy=True)
            setattr(linear, tensor.name.rpartition(".")[2], nn.Parameter(value))
    return linear  # type: ignore[no-any-return]


def _draw(library_model: Any, module: nn.Module, whole_name: str, seed: int, device: torch.device) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        # Drawn on the CPU wherever it goes: a GPU's generator gives other numbers.
        empty = torch.empty(parameter.shape, dtype=torch.float32)
        setattr(module, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
    with seeded(_CPU, seed, "weights", whole_name), torch.no_grad():
        library_model._init_weights(module)
    module.to(device)


def _fill_buffers(net: Net) -> None:
    """Buffers are in no checkpoint: the library computes them when it builds a module for real."""
    missing = [name for name, buffer in net.named_buffers() if buffer.is_meta]
    if missing:
        base = net.model.base_model
        embeddings = base.get_submodule(net.family.embeddings)
        config = copy.deepcopy(base.config)
        config.vocab_size = (config.pad_token_id or 0) + 1  # no buffer depends on it, and the table is the large part
        with torch.random.fork_rng(devices=[]):
            twin = type(embeddings)(config)
        for name, buffer in twin.named_buffers():
            embeddings.register_buffer(name, buffer, persistent=False)
    still = [name for name, buffer in net.named_buffers() if buffer.is_meta]
    if still:
        raise AssertionError(f"no value for buffer '{still[0]}'; its family file must say where it comes from")
