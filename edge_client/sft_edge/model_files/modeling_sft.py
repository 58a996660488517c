# mypy: allow-untyped-calls
"""A model of the transformers library in which one feed-forward layer is split. Needs torch and transformers alone.

A block of the library's computes `W(x) + residual` with a layer W. In one block something else stands where W was;
`sft` in config.json says what:

- `layer`: the name of W in the model;
- `form`: "dense", one matrix; or "factored", three layers ffn1, ffn2 and ffn3, the first two of width `rank`;
- `residual`: "none", it is not added; "low-rank", it is not added but goes into the first layer beside x; or "full",
  it is added as ever;
- `dropout`: the name of the dropout between W and the addition, if it has another place here.

Shape suffixes: B batch, S sequence, D model width, F the feed-forward layer's inner width.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, Optional, Sequence  # noqa: F401

import torch
import transformers
from torch import Tensor, nn

from sft.models.split_layer import AwaitingResidual


class SplitLayer(nn.Sequential):
    """Stands where W was."""

    def __init__(self, children: Dict[str, nn.Module], residual: str) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)
        self.residual = residual
        # Under W's name, and of no shape that W could have: the library's own class, which would draw a W that it does
        # not find, refuses these files.
        self.register_buffer("weight", torch.empty(0, device="cpu"))

    def forward(self, x_BSF: Tensor) -> Any:
        if self.residual == "low-rank":
            return AwaitingResidual(lambda r_BSD: self._run(torch.cat([x_BSF, r_BSD], dim=-1)))
        out_BSD = self._run(x_BSF)
        return out_BSD if self.residual == "full" else AwaitingResidual(lambda _: out_BSD)

    def _run(self, x: Tensor) -> Tensor:
        for child in self:
            x = child(x)
        return x


_NAMES = ("layer", "dropout")
"""Which of split's arguments name a module or an attribute."""


def split(model: nn.Module, form: str, layer: str, residual: str, rank: int, dropout: Optional[str]) -> None:
    """Puts a `SplitLayer` into a model of the library's, once; the arguments are `sft` in config.json."""
    w: Any = model.get_submodule(layer)
    if isinstance(w, SplitLayer):
        return
    D, F = w.weight.shape if isinstance(w, nn.Linear) else reversed(w.weight.shape)  # GPT-2 holds the transpose
    low_rank = residual == "low-rank"
    width, bias = F + D if low_rank else F, low_rank or w.bias is not None
    children: Dict[str, nn.Module] = {}
    if form == "factored":
        children["ffn1"] = nn.Linear(width, rank, bias=False)
        children["ffn2"] = nn.Linear(rank, rank, bias=False)
        children["ffn3"] = nn.Linear(rank, D, bias=bias)
    else:
        children["dense"] = nn.Linear(width, D, bias=bias)
    if dropout is not None:
        parent, _, name = dropout.rpartition(".")
        module: Any = getattr(model.get_submodule(parent), name)
        if isinstance(module, nn.Module):
            setattr(model.get_submodule(parent), name, nn.Identity())
        else:  # a probability: what `SplitLayer` returns is left alone by that dropout
            module = nn.Dropout(float(module))
        if not low_rank:  # there it would drop the residual stream, too
            children["dropout"] = module
    parent, _, name = layer.rpartition(".")
    setattr(model.get_submodule(parent), name, SplitLayer(children, residual))


class SplitBertConfig(transformers.BertConfig):
    """The library's configuration and `sft`, under a name of its own: the library's model would ignore the latter."""

    model_type = "sft-bert"


class SplitBertModel(transformers.BertModel):
    """The library's base model with its layer split; some of the library's models ask `AutoModel` for theirs."""

    config_class = SplitBertConfig

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        start = len(f"{self.base_model_prefix}.")  # names in config.json are those in the model with a head
        split(self, **{**config.sft, **{key: config.sft[key] and config.sft[key][start:] for key in _NAMES}})


class BertForSequenceClassification(transformers.BertForSequenceClassification):
    """The library's model with its layer split; it keeps the name, which pipelines go by."""

    config_class = SplitBertConfig

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        split(self, **config.sft)


transformers.AutoModel.register(SplitBertConfig, SplitBertModel)
# So that save_pretrained writes this file, too.
SplitBertConfig.register_for_auto_class()
SplitBertModel.register_for_auto_class("AutoModel")
BertForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
