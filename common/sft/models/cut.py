"""Algorithm 1, lines 1 to 3: cut a model inside one feed-forward layer.

With W = u S v at block l, the halves are

    net_1 (edge)                                    net_2 (cloud)
    embeddings, blocks 1..l-1,                      S, v and the bias, dropout, norm of block l,
    block l up to its FFN, u   -- a_BSR -->         blocks l+1..L, head

and every other line of the forward pass stays the library's own. Plain split learning (`sl`) cuts the undecomposed
model after block l instead, and sends h_BSD.

Shape suffixes: B batch, S sequence, D model width, F the FFN's inner width, R split rank, C labels.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification, PretrainedConfig

from sft.batch import attention_mask
from sft.errors import CutError, UnsupportedModelError
from sft.models.bert import BERT
from sft.models.distilbert import DISTILBERT
from sft.models.family import Family
from sft.models.residual import WithoutResidual
from sft.models.roberta import ROBERTA

_FAMILIES = {model_type: family for family in (BERT, ROBERTA, DISTILBERT) for model_type in family.model_types}

_AUTO_CLASSES: Dict[str, Any] = {
    "sequence-classification": AutoModelForSequenceClassification,
    "question-answering": AutoModelForQuestionAnswering,
}

HEADS = tuple(_AUTO_CLASSES)


@dataclass(frozen=True)
class Cut:
    """Where a model is cut, and what crosses there."""

    mode: str
    """`sft`: inside block `split_layer`, rank-R activation; `sl`: after it, full-width activation."""

    split_layer: int
    """The paper's l, counted from 1."""

    split_rank: int = 0
    """The paper's R; 0 for `sl`."""


class Output(NamedTuple):
    """What a head gives."""

    loss: Optional[Tensor]
    """0-dim mean over the batch, by the library's own loss; None without labels."""

    logits: Tensor
    """(B, C), or (B, S, 2) start and end logits for question answering."""


class Net(nn.Module):
    """A model or a half of one, built by the library; its parameters know their names in the whole model."""

    def __init__(self, library_model: Any, family: Family, head: str) -> None:
        super().__init__()
        self.model = library_model
        self.family = family
        self.head = head
        self.whole_names: Dict[str, str] = {}
        """Own parameter name -> name in the whole model, such as `bert.encoder.layer.4.output.dense.ffn1.weight`."""

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def whole_parameters(self) -> Dict[str, nn.Parameter]:
        """The parameters under their names in the whole model."""
        return {self.whole_names[name]: parameter for name, parameter in self.named_parameters()}

    def _inputs(self, inputs: Dict[str, Tensor]) -> Dict[str, Tensor]:
        # A tokenizer may make token types for a model that has none, or only one.
        if getattr(self.model.config, "type_vocab_size", 0) < 2:
            inputs = {name: x_BS for name, x_BS in inputs.items() if name != "token_type_ids"}
        return {name: x_BS.to(self.device) for name, x_BS in inputs.items()}

    def _head(self, hidden: Dict[str, Tensor], lengths: List[int], labels: Dict[str, Tensor]) -> Output:
        padded_length = next(iter(hidden.values())).shape[1]
        mask_BS = attention_mask(lengths, padded_length).to(self.device)
        labels = {name: label.to(self.device) for name, label in labels.items()}
        if self.head == "sequence-classification":
            output = self.model(**hidden, attention_mask=mask_BS, **labels)
            return Output(output.loss, output.logits)
        output = self.model(**hidden, attention_mask=mask_BS)
        logits_BS2 = torch.stack([output.start_logits, output.end_logits], dim=-1)
        return Output(_span_loss(logits_BS2, mask_BS, labels) if labels else None, logits_BS2)


def _span_loss(logits_BS2: Tensor, mask_BS: Tensor, labels: Dict[str, Tensor]) -> Tensor:
    """The library's loss of question answering, over tokens only.

    The library's own counts padding among the places where an answer may start or end: padding would have to travel.
    """
    logits_BS2 = logits_BS2.masked_fill(mask_BS[:, :, None] == 0, torch.finfo(logits_BS2.dtype).min)
    start = nn.functional.cross_entropy(logits_BS2[:, :, 0], labels["start_positions"])
    end = nn.functional.cross_entropy(logits_BS2[:, :, 1], labels["end_positions"])
    return (start + end) / 2


class Whole(Net):
    """The model in one piece, decomposed or not."""

    def forward(self, inputs: Dict[str, Tensor], lengths: List[int], labels: Dict[str, Tensor]) -> Output:
        """`inputs`: (B, S) each, as in `sft.batch.Batch`; `labels` may be empty."""
        return self._head(self._inputs(inputs), lengths, labels)


class Net1(Net):
    """The edge's half: token ids to the activation that crosses the wire."""

    def forward(self, inputs: Dict[str, Tensor], lengths: List[int]) -> Tensor:
        """`inputs`: (B, S) each. Returns a_BSR (`sft`) or h_BSD (`sl`); rows of padding mean nothing."""
        mask_BS = attention_mask(lengths, next(iter(inputs.values())).shape[1]).to(self.device)
        a_BSR: Tensor = self.model(**self._inputs(inputs), attention_mask=mask_BS).last_hidden_state
        return a_BSR


class Net2(Net):
    """The cloud's half: the activation to loss and logits."""

    def __init__(self, library_model: Any, family: Family, head: str, entry: nn.Module, width: int) -> None:
        super().__init__(library_model, family, head)
        self.entry = entry
        self.width = width
        """R for `sft`, D for `sl`."""

    def forward(self, a_BSR: Tensor, lengths: List[int], labels: Dict[str, Tensor]) -> Output:
        """`a_BSR` on the device of the parameters; `labels` may be empty."""
        return self._head({"inputs_embeds": self.entry(a_BSR)}, lengths, labels)


AnyNet = TypeVar("AnyNet", bound=Net)


class _PassThrough(nn.Module):
    """Stands where the embeddings were: hidden states come in as `inputs_embeds` and go on unchanged."""

    def __init__(self) -> None:
        super().__init__()
        # Older releases read the base model's dtype off its tensors; cut after the last block, it has no other.
        self.register_buffer("dtype_witness", torch.zeros(()), persistent=False)

    def forward(self, input_ids: None = None, inputs_embeds: Optional[Tensor] = None, *_: Any, **__: Any) -> Any:
        return inputs_embeds


def family_of(config: PretrainedConfig) -> Family:
    """The family file for a configuration. Raises UnsupportedModelError."""
    family = _FAMILIES.get(config.model_type)
    if family is None:
        known = ", ".join(sorted(_FAMILIES))
        raise UnsupportedModelError(f"models of type '{config.model_type}' cannot be cut; supported types: {known}")
    return family


def max_positions(config: PretrainedConfig) -> int:
    """The longest sequence, in tokens, that a model takes."""
    return int(config.max_position_embeddings) - family_of(config).reserved_positions


def build_whole(config: PretrainedConfig, head: str, cut: Optional[Cut] = None, keep_residual: bool = False) -> Whole:
    """The model in one piece, on the meta device; with a cut of mode `sft`, block l is decomposed.

    `keep_residual` keeps the residual around the decomposed layer (Fig. 2 of the paper); only one process can do that.
    Raises UnsupportedModelError and CutError.
    """
    model, family = _build(config, head)
    if cut is not None:
        _check(cut, model, family)
        if cut.mode == "sft":
            _decompose(model, family, cut, keep_residual)
    return _named(Whole(model, family, head), _names(model))


def build_net_1(config: PretrainedConfig, head: str, cut: Cut) -> Net1:
    """The edge's half, on the meta device. Raises UnsupportedModelError and CutError."""
    model, family = _build(config, head)
    _check(cut, model, family)
    base = model.base_model
    if cut.mode == "sft":
        _decompose(model, family, cut, keep_residual=False)
    names = _names(model)
    kept = _blocks(base, family)[: cut.split_layer]
    if cut.mode == "sft":
        block = kept[-1]
        ffn_1 = block.get_submodule(family.ffn_out).ffn1
        _replace(block, family.ffn_out, nn.Sequential(OrderedDict(ffn1=ffn_1)))
        _replace(block, family.ffn_dropout, WithoutResidual(nn.Identity()))
        _replace(block, family.ffn_norm, nn.Identity())
    _replace(base, family.blocks, nn.ModuleList(kept))
    if getattr(base, "pooler", None) is not None:
        base.pooler = None
    return _named(Net1(base, family, head), names)


def build_net_2(config: PretrainedConfig, head: str, cut: Cut) -> Net2:
    """The cloud's half, on the meta device. Raises UnsupportedModelError and CutError."""
    model, family = _build(config, head)
    _check(cut, model, family)
    base = model.base_model
    if cut.mode == "sft":
        _decompose(model, family, cut, keep_residual=False)
    names = _names(model)
    blocks = _blocks(base, family)
    entry, width = nn.Sequential(), int(config.hidden_size)
    if cut.mode == "sft":
        block, width = blocks[cut.split_layer - 1], cut.split_rank
        ffn = block.get_submodule(family.ffn_out)
        entry = nn.Sequential(
            OrderedDict(
                ffn2=ffn.ffn2,
                ffn3=ffn.ffn3,
                dropout=block.get_submodule(family.ffn_dropout).dropout,
                norm=block.get_submodule(family.ffn_norm),
            )
        )
    _replace(base, family.blocks, nn.ModuleList(blocks[cut.split_layer :]))
    _replace(base, family.embeddings, _PassThrough())
    for name in family.after_embeddings:
        if hasattr(base, name):
            delattr(base, name)
    return _named(Net2(model, family, head, entry, width), names)


def ffn_out_name(config: PretrainedConfig, head: str, split_layer: int) -> str:
    """The name of W in the whole model: the layer that is decomposed at block `split_layer`."""
    model, family = _build(config, head)
    return f"{model.base_model_prefix}.{family.blocks}.{split_layer - 1}.{family.ffn_out}"


def _build(config: PretrainedConfig, head: str) -> Tuple[Any, Family]:
    family = family_of(config)
    if head not in _AUTO_CLASSES:
        raise UnsupportedModelError(f"there is no head '{head}'; supported heads: {', '.join(HEADS)}")
    config = copy.deepcopy(config)
    config.return_dict = True  # outputs are read by name
    config.chunk_size_feed_forward = 0  # it would cut the feed-forward layer along the sequence; we cut it across
    with torch.device("meta"):
        model = _AUTO_CLASSES[head].from_config(config)
    return model, family


def _check(cut: Cut, model: Any, family: Family) -> None:
    blocks = _blocks(model.base_model, family)
    if not 1 <= cut.split_layer <= len(blocks):
        raise CutError(f"split_layer is {cut.split_layer}, but this model has blocks 1 to {len(blocks)}; choose one")
    if cut.mode == "sft":
        largest = min(blocks[0].get_submodule(family.ffn_out).weight.shape)
        if not 1 <= cut.split_rank <= largest:
            raise CutError(f"split_rank is {cut.split_rank}, but this layer has ranks 1 to {largest}; choose one")
    elif cut.mode != "sl":
        raise CutError(f"a model is cut for mode sft or sl, not '{cut.mode}'")


def _decompose(model: Any, family: Family, cut: Cut, keep_residual: bool) -> None:
    """Puts FFN-1, FFN-2 and FFN-3 where W of block l was (eq. 3); their values come later."""
    block = _blocks(model.base_model, family)[cut.split_layer - 1]
    w = block.get_submodule(family.ffn_out)
    F, D, R = w.in_features, w.out_features, cut.split_rank
    with torch.device("meta"):
        ffn: OrderedDict[str, nn.Module] = OrderedDict(
            ffn1=nn.Linear(F, R, bias=False),
            ffn2=nn.Linear(R, R, bias=False),
            ffn3=nn.Linear(R, D, bias=w.bias is not None),
        )
    _replace(block, family.ffn_out, nn.Sequential(ffn))
    if not keep_residual:
        _replace(block, family.ffn_dropout, WithoutResidual(block.get_submodule(family.ffn_dropout)))


def _blocks(base: Any, family: Family) -> Any:
    return base.get_submodule(family.blocks)


def _replace(module: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, new)


def _names(model: nn.Module) -> Dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters()}


def _named(net: AnyNet, names: Dict[int, str]) -> AnyNet:
    # The halves keep the very parameter objects of the model they were cut from, which names them without any rule.
    net.whole_names = {own: names[id(parameter)] for own, parameter in net.named_parameters()}
    return net
