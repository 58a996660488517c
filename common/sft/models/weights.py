"""Giving values to a net that was built on the meta device: from stored tensors, else from the seed."""

from __future__ import annotations

import copy
import re
from typing import Any, Collection, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from sft.batch import Batch
from sft.errors import CheckpointError, UsageError
from sft.models.adapters import is_adapter
from sft.models.calibration import Moments, output_moments
from sft.models.cut import Cut, Undrawn, build_net_1, build_whole, ffn_out_name, matrix_of
from sft.models.decompose import decompose, decompose_with_residual
from sft.models.families.catalogue import family_of
from sft.models.in_place import check_live, decomposed_by, layer_to_cut, live_parameters
from sft.models.nets import Net, Net1, TiedHead
from sft.models.seeding import seeded, undisturbed
from sft.tensors.pretrained import PretrainedWeights
from sft.tensors.stream import StoredTensor, in_memory

_CPU = torch.device("cpu")


def fill(net: Net, tensors: Sequence[StoredTensor], seed: int, device: torch.device = _CPU) -> None:
    """Gives every parameter float32 memory on `device`.

    `tensors` go by whole-model names; those that are not the net's are left. What they do not hold is drawn by the
    library's own initialization, seeded for each module by its name in the whole model: both halves, and one process,
    draw the same values, whoever else exists.
    """
    for _ in fill_in_pieces(net, tensors, seed, device):
        pass


def fill_in_pieces(net: Net, tensors: Sequence[StoredTensor], seed: int, device: torch.device = _CPU) -> Iterator[None]:
    """As `fill`, module by module: others may compute where it yields."""
    own_names = {whole: own for own, whole in net.whole_names.items()}
    stored = {own_names[tensor.name]: tensor for tensor in tensors if tensor.name in own_names}
    untied = {own_names[tied.head]: tied for tied in net.untied if tied.head in own_names}
    shared: Dict[nn.Parameter, nn.Parameter] = {}  # tied parameters stay one
    for module_name, module in net.named_modules():
        parameters = {}
        for name, parameter in list(module.named_parameters(prefix=module_name, recurse=False)):
            if parameter in shared:
                setattr(module, name.rpartition(".")[2], shared[parameter])
            else:
                parameters[name] = parameter
        if parameters and all(is_adapter(net.whole_names[name]) for name in parameters):
            for name, parameter in parameters.items():  # `draw_adapters` gives them values
                value = torch.empty(parameter.shape, device=device)
                setattr(module, name.rpartition(".")[2], nn.Parameter(value, requires_grad=parameter.requires_grad))
            continue
        new = [name for name in parameters if name not in stored]
        drawn = {name.rpartition(".")[2]: net.whole_names[name] for name in new if name not in untied}
        if drawn:
            whole_name = next(iter(drawn.values())).rpartition(".")[0]
            _draw(net.model, module, whole_name, seed, device, drawn)
        for name in untied.keys() & new:
            _copy_embedding(net.model, module, untied[name], seed, device)
        for name, parameter in parameters.items():
            if name in stored:
                value = stored[name].read().to(device, torch.float32, copy=True)
                setattr(module, name.rpartition(".")[2], nn.Parameter(value, requires_grad=parameter.requires_grad))
            shared[parameter] = getattr(module, name.rpartition(".")[2])
        if parameters:
            yield
    _fill_buffers(net)
    net.to(device)


def shapes(net: Net) -> Dict[str, Tuple[int, ...]]:
    """Shape of every parameter, under whole-model names."""
    return {name: tuple(parameter.shape) for name, parameter in net.whole_parameters().items()}


def pretrained_tensors(net: Net, checkpoint: Optional[PretrainedWeights]) -> List[StoredTensor]:
    """The net's tensors that a checkpoint holds; none without one. FFN-1 to FFN-3 are in no checkpoint.

    A head that the cut untied is the checkpoint's embedding under the head's name.
    """
    if checkpoint is None:
        return []
    wanted, prefix = _without_factors(shapes(net)), net.model.base_model_prefix
    copies = []
    for tied in net.untied:
        if tied.head in wanted:
            (embedding,) = checkpoint.tensors({tied.embedding: wanted.pop(tied.head)}, prefix)
            copies.append(embedding._replace(name=tied.head))
    return sorted(checkpoint.tensors(wanted, prefix) + copies, key=lambda tensor: tensor.name)


def load_parameters(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    """Replaces the values of parameters, all of them. Raises CheckpointError unless names and shapes are the same."""
    for _ in load_in_pieces(parameters, tensors):
        pass


def load_in_pieces(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """As `load_parameters`, one by one: others may compute where it yields."""
    odd = sorted(tensors.keys() ^ parameters.keys())
    if odd:
        raise CheckpointError(f"'{odd[0][:200]}' {'is missing' if odd[0] in parameters else 'does not belong there'}")
    for name, parameter in parameters.items():
        if tensors[name].shape != parameter.shape or tensors[name].dtype != parameter.dtype:
            theirs, ours = (f"{x.dtype} {list(x.shape)}" for x in (tensors[name], parameter))
            raise CheckpointError(f"'{name}' is {theirs}, not {ours}")
    yield from copied_in_pieces(parameters, tensors)


def copied_in_pieces(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """The values into parameters of the same names and shapes, one by one, and nothing else."""
    for name, parameter in parameters.items():
        with torch.no_grad():  # not where it yields
            parameter.copy_(tensors[name])
        yield


def live_tensors(model: Any, net: Net) -> List[StoredTensor]:
    """The net's tensors out of a library model that is not cut yet; the factors are in none.

    `net` is a half of the same model. What is read later is the value then: take them before anything trains.
    """
    live = live_parameters(model)
    return list(in_memory({name: live[name] for name in _without_factors(shapes(net))}))


def factor_tensors(
    config: PretrainedConfig,
    head: str,
    cut: Cut,
    checkpoint: Optional[PretrainedWeights],
    seed: int,
    calibration: Sequence[Batch] = (),
) -> Tuple[List[StoredTensor], List[StoredTensor]]:
    """FFN-1 for the edge, and FFN-2 and FFN-3 (with its bias) for the cloud, under whole-model names (eq. 2).

    W comes from the checkpoint, or from the seed without one. A checkpoint of a model that was cut here before has the
    factors themselves, or their product, and nothing is decomposed anew. Both lists are empty for `sl`. A low-rank
    residual is fitted to the `calibration` batches, which the undecomposed blocks up to the cut are run on here;
    UsageError without any. This runs once, on the edge: the signs of singular vectors differ between machines.
    """
    if cut.mode != "sft":
        return [], []
    name = ffn_out_name(config, head, cut.split_layer)
    kept = None if checkpoint is None else kept_factors(config, head, cut, checkpoint)
    if kept is not None:
        return kept
    moments = None
    if cut.residual == "low-rank":
        _check_calibration(calibration)
        lower = build_net_1(config, head, Cut("sl", cut.split_layer))
        fill(lower, pretrained_tensors(lower, checkpoint), seed)
        moments = output_moments(lower, cut.split_layer, calibration)
    w = _original_layer(config, head, name, checkpoint, seed)
    return _factors(name, w, cut, moments)


def kept_factors(
    config: PretrainedConfig, head: str, cut: Cut, checkpoint: PretrainedWeights
) -> Optional[Tuple[List[StoredTensor], List[StoredTensor]]]:
    """The factors of a layer that is decomposed in the checkpoint, as `factor_tensors` has them; None where it is not.

    Raises CheckpointError.
    """
    name = ffn_out_name(config, head, cut.split_layer)
    whole = build_whole(config, head, cut)
    prefix = whole.model.base_model_prefix
    if checkpoint.shape_of(f"{name}.ffn1.weight", prefix) is not None:
        wanted = {own: shape for own, shape in shapes(whole).items() if own.startswith(f"{name}.ffn")}
        factors = checkpoint.tensors(wanted, prefix)
        edge = [tensor for tensor in factors if tensor.name == f"{name}.ffn1.weight"]
        return edge, [tensor for tensor in factors if tensor.name != f"{name}.ffn1.weight"]
    if checkpoint.shape_of(f"{name}.dense.weight", prefix) is None:
        return None
    first, last = (whole.model.get_submodule(f"{name}.{factor}") for factor in ("ffn1", "ffn3"))
    dense = nn.Linear(first.in_features, last.out_features, bias=last.bias is not None)
    wanted = {f"{name}.dense.{own}": tuple(parameter.shape) for own, parameter in dense.named_parameters()}
    for tensor in checkpoint.tensors(wanted, prefix):
        dense.get_parameter(tensor.name.rpartition(".")[2]).data = tensor.read().to(torch.float32, copy=True)
    return _factors(name, dense, cut, None)


def live_factors(
    model: Any, head: str, cut: Cut, calibration: Sequence[Batch] = ()
) -> Tuple[List[StoredTensor], List[StoredTensor]]:
    """As `factor_tensors`, of a library model that is not cut yet, with the weights it has now.

    Raises what `sft.models.check_live` raises.
    """
    check_live(model, head, cut)
    if cut.mode != "sft":
        return [], []
    if decomposed_by(model) is not None:
        name, layer = layer_to_cut(model, cut)
        kept = in_memory({f"{name}.{own}": parameter for own, parameter in layer.named_parameters()})
        return [t for t in kept if t.name == f"{name}.ffn1.weight"], [t for t in kept if ".ffn1." not in t.name]
    moments = None
    if cut.residual == "low-rank":
        _check_calibration(calibration)
        lower = Net1(model.base_model, family_of(model.config), head)
        if any(parameter.dtype != torch.float32 for parameter in lower.parameters()):
            lower = copy.deepcopy(lower).float()  # as it will be trained
            renew_buffers(lower)
        moments = output_moments(lower, cut.split_layer, calibration)
    name, w = layer_to_cut(model, cut)
    return _factors(name, w, cut, moments)


def _check_calibration(calibration: Sequence[Batch]) -> None:
    if not calibration:
        raise UsageError(
            "a low-rank residual is fitted to data: give batches to calibrate with, or choose residual none"
        )


def _factors(name: str, w: Any, cut: Cut, moments: Optional[Moments]) -> Tuple[List[StoredTensor], List[StoredTensor]]:
    if moments is None:
        factors = decompose(matrix_of(w), cut.split_rank)
        bias_D = None if w.bias is None else w.bias.detach().to(torch.float32, copy=True)
    else:
        factors, bias_D = decompose_with_residual(matrix_of(w), w.bias, *moments, split_rank=cut.split_rank)
    edge = {f"{name}.ffn1.weight": factors.u_FR.T.contiguous()}
    cloud = {f"{name}.ffn2.weight": factors.s_RR.T.contiguous(), f"{name}.ffn3.weight": factors.v_RD.T.contiguous()}
    if bias_D is not None:
        cloud[f"{name}.ffn3.bias"] = bias_D
    return list(in_memory(edge)), list(in_memory(cloud))


def _without_factors(shapes: Dict[str, Tuple[int, ...]]) -> Dict[str, Tuple[int, ...]]:
    return {name: shape for name, shape in shapes.items() if not re.search(r"\.ffn[123]\.(weight|bias)$", name)}


def _original_layer(
    config: PretrainedConfig, head: str, name: str, checkpoint: Optional[PretrainedWeights], seed: int
) -> Any:
    whole = build_whole(config, head)
    layer = whole.model.get_submodule(name)
    wanted = {f"{name}.{own}": tuple(parameter.shape) for own, parameter in layer.named_parameters()}
    if checkpoint is None:
        _draw(whole.model, layer, name, seed, _CPU)
    else:
        for tensor in checkpoint.tensors(wanted, whole.model.base_model_prefix):
            value = tensor.read().to(torch.float32, copy=True)
            setattr(layer, tensor.name.rpartition(".")[2], nn.Parameter(value))
    return layer


def _draw(
    library_model: Any,
    module: nn.Module,
    whole_name: str,
    seed: int,
    device: torch.device,
    names: Optional[Collection[str]] = None,
) -> None:
    """All parameters of a module, or those of these `names`: others may be another module's, too."""
    others = {name: p for name, p in module.named_parameters(recurse=False) if names is not None and name not in names}
    for name, parameter in list(module.named_parameters(recurse=False)):
        # Drawn on the CPU wherever it goes: a GPU's generator gives other numbers.
        unset = torch.full(parameter.shape, float("nan"), dtype=torch.float32)
        setattr(module, name, nn.Parameter(unset, requires_grad=parameter.requires_grad))
    with seeded(_CPU, seed, "weights", whole_name), torch.no_grad():
        library_model._init_weights(module)
        unset_ones = [
            name for name, parameter in module.named_parameters(recurse=False) if torch.isnan(parameter).any()
        ]
        if unset_ones:  # older releases leave norms and convolutions to their constructors
            _construct(module, unset_ones)
    for name, parameter in list(module.named_parameters(recurse=False)):
        value = parameter.detach().to(device)
        setattr(module, name, others.get(name, nn.Parameter(value, requires_grad=parameter.requires_grad)))


def _construct(module: Any, names: Sequence[str]) -> None:
    twin = copy.deepcopy(module)
    if hasattr(twin, "reset_parameters"):
        twin.reset_parameters()
    elif list(names) == ["bias"]:  # of a language model's head
        nn.init.zeros_(twin.bias)
    else:  # a norm of the library's own, which takes the width
        twin = type(module)(len(getattr(module, names[0])))
    for name in names:
        getattr(module, name).copy_(getattr(twin, name))


def _copy_embedding(library_model: Any, head: nn.Module, tied: TiedHead, seed: int, device: torch.device) -> None:
    embedding = copy.deepcopy(tied.module)
    _draw(library_model, embedding, tied.embedding.rpartition(".")[0], seed, _CPU)
    value: Tensor = embedding.get_parameter("weight").detach()
    head.weight = nn.Parameter(value.to(device))


def renew_buffers(net: Net) -> None:
    """Computes anew what the library computes when it builds a module, such as rotary frequencies: of a model that was
    in half precision they are rounded."""
    renewed = []
    for module in net.modules():
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers.get(name)
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to("meta")
                renewed.append((module, name, buffer.device))
    _fill_buffers(net)
    for module, name, device in renewed:
        module._buffers[name] = module.get_buffer(name).to(device)


class _WithoutParameters(Undrawn):
    """Has the library build a model whose buffers alone take memory: parameters begin as `torch.empty`."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.empty:
            kwargs = {**(kwargs or {}), "device": "meta"}
        if getattr(function, "__module__", None) == "transformers.initialization":  # of newer releases
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:  # where drawing takes longer than with memory
                return tensor
        return super().__torch_function__(function, types, args, kwargs)


def _fill_buffers(net: Net) -> None:
    """Buffers are in no checkpoint: the library computes them when it builds a module for real."""
    base = net.model.base_model
    missing = [name for name, buffer in base.named_buffers() if buffer.is_meta]
    if missing:
        config = copy.deepcopy(net.model.config)
        config.num_hidden_layers = 1  # every block has the same ones
        with undisturbed(_CPU), _WithoutParameters():
            twin = dict(type(base)(config).named_buffers())
        for name in missing:
            of_twin = re.sub(rf"^({re.escape(net.family.blocks)})\.\d+\.", r"\1.0.", name)
            if of_twin in twin:
                parent, _, child = name.rpartition(".")
                base.get_submodule(parent).register_buffer(child, twin[of_twin].clone(), persistent=False)
    still = [name for name, buffer in net.named_buffers() if buffer.is_meta]
    if still:
        raise AssertionError(f"no value for buffer '{still[0]}'; its family file must say where it comes from")
