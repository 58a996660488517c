"""Algorithm 1, lines 1 to 3: cut a model inside one feed-forward layer.

With W = u S v at block l, the halves are

    net_1 (edge)                                    net_2 (cloud)
    embeddings, blocks 1..l-1,                      S, v and the bias, dropout, norm of block l,
    block l up to its FFN, u   -- a_BSR -->         blocks l+1..L, head

and every other line of the forward pass stays the library's own. Plain split learning (`sl`) cuts the undecomposed
model after block l instead, and sends h_BSD.

Shape suffixes: B batch, S sequence, D model width, F the FFN's inner width, R split rank.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Tuple, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutput

from sft.errors import CutError, UnsupportedModelError
from sft.models.families.catalogue import check_head, family_of
from sft.models.families.family import Family
from sft.models.heads import head_named, is_body
from sft.models.nets import Net, Net1, Net2, TiedHead, Whole
from sft.models.split_layer import RESIDUALS, SplitLayer


@dataclass(frozen=True)
class Cut:
    """Where a model is cut, and what crosses there."""

    mode: str
    """`sft`: inside block `split_layer`, rank-R activation; `sl`: after it, full-width activation."""

    split_layer: int
    """The paper's l, counted from 1."""

    split_rank: int = 0
    """The paper's R; 0 for `sl`."""

    residual: str = "none"
    """What becomes of the residual around the layer that is cut: `none` (the paper's), `low-rank` (kept as far as the
    rank-R activation holds it) or `full` (Fig. 2 of the paper; only one process can). `none` for `sl`."""


AnyNet = TypeVar("AnyNet", bound=Net)


def build_whole(config: PretrainedConfig, head: str, cut: Optional[Cut] = None) -> Whole:
    """The model in one piece, on the meta device; with a cut of mode `sft`, block l is decomposed.

    With a cut of either mode, what halves do not share is not shared here: a tied head is a parameter of its own, and
    what both halves would need is not trained. Raises UnsupportedModelError and CutError.
    """
    model, family, untied = _build(config, head, cut is not None)
    if cut is not None:
        check_cut(cut, model, family)
        prepare(model, family, cut)
    return _named(Whole(model, family, head), _names(model), untied)


def build_net_1(config: PretrainedConfig, head: str, cut: Cut) -> Net1:
    """The edge's half, on the meta device. Raises UnsupportedModelError and CutError."""
    model, family, _ = _build(config, head, cuts=True)
    check_cut(cut, model, family, halves=True)
    return lower_half(model, family, head, cut)


def lower_half(model: Any, family: Family, head: str, cut: Cut) -> Net1:
    """Takes from a model what is not net_1's, in place; FFN-1 is on the meta device."""
    prepare(model, family, cut)
    names = _names(model)
    base = model.base_model
    kept = blocks_of(base, family)[: cut.split_layer]
    if cut.mode == "sft":
        block = kept[-1]
        ffn_1 = block.get_submodule(family.ffn_out).ffn1
        replace_module(block, family.ffn_out, SplitLayer({"ffn1": ffn_1}, cut.residual, last=True))
        if family.ffn_norm is not None:
            replace_module(block, family.ffn_norm, nn.Identity())
    replace_module(base, family.blocks, nn.ModuleList(kept))
    if family.final_norm is not None:
        replace_module(base, family.final_norm, nn.Identity())
    if getattr(base, "pooler", None) is not None:
        base.pooler = None
    return _named(Net1(base, family, head), names, [])


def build_net_2(config: PretrainedConfig, head: str, cut: Cut) -> Net2:
    """The cloud's half, on the meta device. Raises UnsupportedModelError and CutError."""
    model, family, untied = _build(config, head, cuts=True)
    check_cut(cut, model, family, halves=True)
    prepare(model, family, cut)
    names = _names(model)
    base = model.base_model
    blocks = blocks_of(base, family)
    entry, width = nn.Sequential(), int(config.hidden_size)
    if cut.mode == "sft":
        block, width = blocks[cut.split_layer - 1], cut.split_rank
        parts = OrderedDict(block.get_submodule(family.ffn_out).named_children())
        del parts["ffn1"]
        if family.ffn_norm is not None:
            parts["norm"] = block.get_submodule(family.ffn_norm)
        entry = nn.Sequential(parts)
    replace_module(base, family.blocks, nn.ModuleList(blocks[cut.split_layer :]))
    replace_module(base, family.embeddings, _PassThrough())
    for name in family.added_to_embeddings:
        replace_module(base, name, _Zero())
    for name in family.after_embeddings:
        if _has(base, name):
            replace_module(base, name, nn.Identity())
    if family.after_block_1 is not None and _has(base, family.after_block_1):
        replace_module(base, family.after_block_1, None)
    if family.runs_blocks is not None and cut.split_layer == len(blocks):
        replace_module(base, family.runs_blocks, _NoBlocks())
    _fit_config(base, family, cut)
    return _named(Net2(model, family, head, entry, width), names, untied)


def ffn_out_name(config: PretrainedConfig, head: str, split_layer: int) -> str:
    """The name of W in the whole model: the layer that is decomposed at block `split_layer`."""
    model, family, _ = _build(config, head, cuts=False)
    return name_of_w(model, family, split_layer)


def name_of_w(model: Any, family: Family, split_layer: int) -> str:
    """As `ffn_out_name`, of a model that is there."""
    return f"{_base_prefix(model)}{family.blocks}.{split_layer - 1}.{family.ffn_out}"


def matrix_of(w: Any) -> Tensor:
    """The matrix of a layer, (F, D): a Linear holds the transpose, GPT-2's Conv1D the matrix itself.

    The adapter of a live model's layer is added.
    """
    layer, matrix = w, w.weight
    if hasattr(w, "get_delta_weight"):
        layer = w.get_base_layer()
        matrix = matrix + w.get_delta_weight("default")
    turned: Tensor = matrix.T if isinstance(layer, nn.Linear) else matrix
    return turned


def last_of_edge(net: Whole, cut: Cut) -> nn.Module:
    """Of a model in one piece that `build_whole` has cut: the module whose output would cross the wire."""
    if cut.mode == "sft":
        (layer,) = [module for module in net.modules() if isinstance(module, SplitLayer)]
        return layer.get_submodule("ffn1")
    block: nn.Module = blocks_of(net.model.base_model, net.family)[cut.split_layer - 1]
    return block


def blocks_of(base: Any, family: Family) -> Any:
    """The list of a base model's blocks."""
    return base.get_submodule(family.blocks)


def replace_module(module: nn.Module, name: str, new: Optional[nn.Module]) -> None:
    """Puts a module in the place of the one called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, new)


def check_cut(cut: Cut, model: Any, family: Family, halves: bool = False) -> None:
    """Raises CutError for a cut that this model, or halves of it, cannot have."""
    blocks = blocks_of(model.base_model, family)
    if not 1 <= cut.split_layer <= len(blocks):
        raise CutError(f"split_layer is {cut.split_layer}, but this model has blocks 1 to {len(blocks)}; choose one")
    if cut.mode not in ("sft", "sl"):
        raise CutError(f"a model is cut for mode sft or sl, not '{cut.mode}'")
    if cut.residual not in RESIDUALS:
        raise CutError(f"the residual can be {', '.join(RESIDUALS)}, not '{cut.residual}'")
    if cut.mode == "sl":
        if cut.residual != "none":
            raise CutError("mode sl cuts between two blocks, where there is no residual to keep; leave it 'none'")
    else:
        F, D = matrix_of(blocks[0].get_submodule(family.ffn_out)).shape
        largest = D if cut.residual == "low-rank" else min(F, D)
        if not 1 <= cut.split_rank <= largest:
            raise CutError(f"split_rank is {cut.split_rank}, but this layer has ranks 1 to {largest}; choose one")
        if halves and cut.residual == "full":
            raise CutError(
                "the full residual would have to cross at full width beside the activation; only one process can keep "
                "it: choose residual none or low-rank"
            )
        if halves and cut.split_layer == 1 and _has(model.base_model, family.after_block_1 or "-"):
            raise CutError("what this model computes after block 1 needs all of it; choose split_layer 2 or more")


def prepare(model: Any, family: Family, cut: Cut) -> None:
    """Freezes what both halves need, and for `sft` decomposes block l: FFN-1 to FFN-3 stand where W was (eq. 3).

    Their values come later: they are on the meta device.
    """
    for name in family.for_every_block:
        if _has(model.base_model, name):
            model.base_model.get_submodule(name).requires_grad_(False)
    if cut.mode == "sl":
        return
    block = blocks_of(model.base_model, family)[cut.split_layer - 1]
    w = block.get_submodule(family.ffn_out)
    if isinstance(w, SplitLayer):  # of a script's model, decomposed before
        return
    (F, D), R = matrix_of(w).shape, cut.split_rank
    low_rank = cut.residual == "low-rank"
    with torch.device("meta"):
        children: Dict[str, nn.Module] = {
            "ffn1": nn.Linear(F + D if low_rank else F, R, bias=False),
            "ffn2": nn.Linear(R, R, bias=False),
            "ffn3": nn.Linear(R, D, bias=low_rank or w.bias is not None),
        }
    for child in children.values():
        child.requires_grad_(w.weight.requires_grad)
    if cut.residual != "full" and family.ffn_dropout is not None:
        dropout = _take_dropout(block, family.ffn_dropout)
        if not low_rank:  # there the residual stream would be dropped out with the rest
            children["dropout"] = dropout
    replace_module(block, family.ffn_out, SplitLayer(children, cut.residual))


def _take_dropout(block: nn.Module, name: str) -> nn.Module:
    if not _has(block, name):  # a probability: `AwaitingResidual` keeps the function away
        return nn.Dropout(float(getattr(block, name)))
    dropout = block.get_submodule(name)
    replace_module(block, name, nn.Identity())
    return dropout


class _PassThrough(nn.Module):
    """Stands where the embeddings were: hidden states come in as `inputs_embeds` and go on unchanged."""

    def __init__(self) -> None:
        super().__init__()
        # Older releases read the base model's dtype off its tensors; cut after the last block, it has no other.
        self.register_buffer("dtype_witness", torch.zeros(()), persistent=False)

    def forward(self, input_ids: None = None, inputs_embeds: Optional[Tensor] = None, *_: Any, **__: Any) -> Any:
        return inputs_embeds


class _Zero(nn.Module):
    """Stands where embeddings of positions were: adding it changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.zero


class _NoBlocks(nn.Module):
    """Stands where the library would run the blocks, where none is left."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=hidden_states, hidden_states=(hidden_states,))


class Undrawn(TorchFunctionMode):
    """Leaves out what `torch.nn.init` would draw: there is no memory yet. For the thread that enters it."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def _build(config: PretrainedConfig, head: str, cuts: bool) -> Tuple[Any, Family, List[TiedHead]]:
    family = family_of(config)
    check_head(config, head)
    config = copy.deepcopy(config)
    config.return_dict = True  # outputs are read by name
    config.chunk_size_feed_forward = 0  # it would cut the feed-forward layer along the sequence; we cut it across
    config.pretraining_tp = 1  # older Llamas': likewise
    with torch.device("meta"), Undrawn():
        model = head_named(head).auto_class.from_config(config, trust_remote_code=False, **head_named(head).options)
    # Some have their head before the embeddings that it is tied to, and a tied parameter goes by its first name.
    for name in [name for name in model._modules if name != model.base_model_prefix and not is_body(head)]:
        model._modules[name] = model._modules.pop(name)
    untied = []
    if head_named(head).of_vocabulary and cuts:
        out = model.get_output_embeddings()
        if out.weight.shape[0] != config.vocab_size:
            raise UnsupportedModelError("the head of this model reads the embeddings, which stay on the edge")
        if config.tie_word_embeddings:
            untied = [_untie(model, out)]
    return model, family, untied


def _untie(model: Any, out: Any) -> TiedHead:
    """The head's matrix becomes a parameter of its own. What is tied within the head, its bias, stays so."""
    embeddings = model.get_input_embeddings()
    names = {module: name for name, module in model.named_modules()}
    out.weight = nn.Parameter(torch.empty_like(out.weight))
    model.config.tie_word_embeddings = False
    return TiedHead(f"{names[out]}.weight", f"{names[embeddings]}.weight", embeddings)


def _fit_config(base: Any, family: Family, cut: Cut) -> None:
    """What a base model's forward reads of its configuration, for the blocks that are left of it."""
    base.config = copy.copy(base.config)
    if getattr(base.config, "layer_types", None) is not None:  # newer releases look up each block's mask here
        base.config.layer_types = list(base.config.layer_types)[cut.split_layer :]
    if family.scales_embeddings:
        base.config.hidden_size = 1  # what comes in is no embedding


def _has(module: nn.Module, name: str) -> bool:
    parent, _, child = name.rpartition(".")
    return isinstance(getattr(module.get_submodule(parent), child, None), nn.Module)


def _names(model: Any) -> Dict[int, str]:
    # Of a tied parameter's names the embedding's: some models come to their head first.
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    base = model.base_model.named_parameters()
    return {**names, **{id(parameter): f"{_base_prefix(model)}{name}" for name, parameter in base}}


def _base_prefix(model: Any) -> str:
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def _named(net: AnyNet, names: Dict[int, str], untied: List[TiedHead]) -> AnyNet:
    # The halves keep the very parameter objects of the model they were cut from, which names them without any rule.
    net.whole_names = {own: names[id(parameter)] for own, parameter in net.named_parameters()}
    net.untied = untied
    return net
