"""Cutting a model object that somebody else made and goes on using."""

from __future__ import annotations

from types import FunctionType
from typing import Any, Dict, Mapping, Optional, Tuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sft.errors import UnsupportedModelError, UsageError
from sft.models.built_anew import BY_PEFT, check_built_anew, whole_name
from sft.models.cut import Cut, blocks_of, build_whole, check_cut, lower_half, name_of_w, prepare, replace_module
from sft.models.families.catalogue import body_of, family_of, head_of, library_class
from sft.models.gone import Gone, LowerBlocks
from sft.models.heads import head_named, is_body
from sft.models.nets import Net1
from sft.models.split_layer import SplitLayer


def check_live(model: Any, head: str, cut: Cut) -> None:
    """Raises UsageError for a model that is cut already, in no type that is trained, or not what its configuration
    describes, CutError and UnsupportedModelError."""
    family = family_of(model.config)
    whole = len(blocks_of(model.base_model, family)) == model.config.num_hidden_layers
    if not whole or any(isinstance(module, SplitLayer) and module.last for module in model.modules()):
        raise UsageError(f"this {type(model).__name__} is cut already; load the model again to cut it again")
    for name, parameter in model.named_parameters():
        if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise UsageError(f"parameter '{name}' is {parameter.dtype}; load the model in float32")
    own = what_is_own(model, head)
    if own:
        raise UsageError(own)
    if is_body(head):
        _check_body(model, cut)
    kept = decomposed_by(model)
    check_built_anew(model, head, cut, kept)
    if kept is None:
        check_cut(cut, model, family, halves=True)
    elif kept != cut:
        raise UsageError(
            f"this model is decomposed with split_layer={kept.split_layer}, split_rank={kept.split_rank}, "
            f"residual={kept.residual!r}: cut it with the same"
        )


def _check_body(model: Any, cut: Cut) -> None:
    """Raises UsageError for adapters inside somebody's own module."""
    family = family_of(model.config)
    for name, _ in model.named_parameters():
        place = name[len(family.blocks) + 1 :].partition(".")[0]
        is_clouds = name.startswith(f"{family.blocks}.") and int(place) >= cut.split_layer - 1
        if is_clouds and BY_PEFT.search(f".{name}"):
            raise UsageError(
                f"'{BY_PEFT.split(name)[0]}' has adapters, which are not for a model inside a module of your own: "
                "merge them"
            )


def what_is_own(model: Any, head: str) -> str:
    """What of a library model is not as its configuration describes it, and what to do; nothing where all is.

    Both halves are the library's, made from the configuration: nothing but weights can be a model's own.
    """
    kind = type(model)
    is_own = "forward" in vars(model) and not has_fused_head(model)
    if kind.forward is not library_class(model.config, head).forward or is_own:
        return (
            f"this {kind.__name__} has a forward of its own, which a cut would lose: give the library's model, and "
            "compute what is your own from its logits"
        )
    described = build_whole(model.config, head, decomposed_by(model)).model.named_parameters(remove_duplicate=False)
    shapes = {name: parameter.shape for name, parameter in described}
    live = {name: p for name, p in live_parameters(model).items() if not BY_PEFT.search(name)}
    odd = sorted(
        name
        for name in live.keys() | shapes.keys()
        if name not in live or name not in shapes or live[name].shape != shapes[name]
    )
    if not odd:
        return ""
    return (
        f"parameter '{odd[0]}' is not as model.config describes it; the cloud builds its half from that, so that "
        "nothing but weights of a model can be its own"
    )


def is_stock(model: Any) -> bool:
    """Whether a model is one of the library's, with one of its heads: nothing but weights is its own.

    Also where there is nothing inside that could be cut in its place: then `check_live` or `head_of` says why not.
    """
    if not isinstance(model, PreTrainedModel):
        return False
    has_body = model.base_model is not model and body_of(model.base_model) is not None and "forward" not in vars(model)
    try:
        head = head_of(model)
    except UnsupportedModelError:
        return not has_body
    return not has_body or not what_is_own(model, head)


def decomposed_by(model: Any) -> Optional[Cut]:
    """The cut that a library model is decomposed for; None where it is not."""
    family = family_of(model.config)
    for index, block in enumerate(blocks_of(model.base_model, family)):
        layer = block.get_submodule(family.ffn_out)
        if isinstance(layer, SplitLayer) and not layer.last:
            ffn_1: Any = layer.get_submodule("ffn1")
            return Cut("sft", index + 1, ffn_1.out_features, layer.residual)
    return None


def decompose_live(model: Any, head: str, cut: Cut, factors: Mapping[str, Tensor]) -> None:
    """Decomposes a layer of a library model in place (eq. 3): it stays whole, and computes what both halves would.

    `factors`: FFN-1 to FFN-3 by names in the whole model, as `live_factors` gives them. A head that is tied is untied.
    Raises what `check_live` raises.
    """
    check_live(model, head, cut)
    family = family_of(model.config)
    device = layer_to_cut(model, cut)[1].weight.device
    if head_named(head).of_vocabulary and model.config.tie_word_embeddings:
        out = model.get_output_embeddings()
        out.weight = nn.Parameter(out.weight.detach().clone(), requires_grad=out.weight.requires_grad)
        model.config.tie_word_embeddings = False
        if getattr(model, "all_tied_weights_keys", None):
            model.all_tied_weights_keys = {}
    prepare(model, family, cut)
    for whole, value in factors.items():
        parent, _, child = whole.rpartition(".")
        layer = model.get_submodule(parent)
        trained = layer.get_parameter(child).requires_grad
        setattr(layer, child, nn.Parameter(value.to(device), requires_grad=trained))
    model.float()


def has_fused_head(model: Any) -> bool:
    """Whether trl has given this model object a forward that also takes `fused_lm_head=True`."""
    function = getattr(vars(model).get("forward"), "__func__", None)
    if not isinstance(function, FunctionType):
        return False
    # Its name, signature and module are said to be those of the library's.
    home = str(function.__globals__.get("__name__"))
    return home.startswith("trl.") and "fused_lm_head" in function.__code__.co_varnames


def cut_live(model: Any, head: str, cut: Cut) -> Net1:
    """Cuts a library model in place: what is left of it is net_1, which is returned.

    Blocks above the cut, final norm, pooler and head are gone from the object, so that their memory is freed once
    nobody else holds them; who asks for a block or a head is told so (`sft.models.gone`). FFN-1 is on the meta device:
    its value is the caller's to fill in. What both halves need is frozen, a tied head untied, and all of it float32.
    Where parameters are, and what else is trained, stays. Raises what `check_live` raises.
    """
    check_live(model, head, cut)
    family = family_of(model.config)
    for module in model.modules():
        if getattr(module, "chunk_size_feed_forward", 0):
            module.chunk_size_feed_forward = 0  # it would cut the feed-forward layer along the sequence
    if getattr(model.config, "pretraining_tp", 1) != 1:
        model.config.pretraining_tp = 1  # likewise
    count = len(blocks_of(model.base_model, family))
    net_1 = lower_half(model, family, head, cut)
    kept = blocks_of(model.base_model, family)
    replace_module(model.base_model, family.blocks, LowerBlocks(kept, count))
    for name, child in list(model.named_children()):
        if child is not model.base_model and not is_body(head):
            setattr(model, name, Gone(child))
    if head_named(head).of_vocabulary:  # the head is on the cloud, and no copy of the embeddings any more
        model.get_output_embeddings = lambda: None
        model.config.tie_word_embeddings = False
        if getattr(model, "all_tied_weights_keys", None):
            model.all_tied_weights_keys = {}
    net_1.float()  # the parameters stay the objects they were
    return net_1


def live_parameters(model: Any) -> Dict[str, nn.Parameter]:
    """A library model's parameters by names in the whole model, each tied one under all of its names."""
    return {whole_name(name): parameter for name, parameter in model.named_parameters(remove_duplicate=False)}


def layer_to_cut(model: Any, cut: Cut) -> Tuple[str, Any]:
    """W of a library model that is not cut yet, with its name."""
    name = name_of_w(model, family_of(model.config), cut.split_layer)
    return name, model.get_submodule(name)
