"""A transformers model of a script, decomposed before it is cut: weights of a run before can be loaded into it."""

from __future__ import annotations

from typing import Any, Set, Tuple

import torch
from torch import nn

from sft.errors import UsageError
from sft.graphs.body import check_single, find_body
from sft.models import (
    Cut,
    Net1,
    body_of,
    decompose_live,
    decomposed_by,
    family_of,
    head_of,
    is_stock,
    live_parameters,
)
from sft.models.weights import live_factors, renew_buffers
from sft.optimizer import SplitOptions
from sft_edge.script.arguments import calibration_batch
from sft_edge.script.saving import Saving, follow_body


def decompose(model: nn.Module, options: SplitOptions) -> None:
    """See `SFTOptimizer.decompose`. What the model saves opens as what it is, as when it is cut."""
    if options.split_layer is None:
        raise UsageError("split_layer must be given: the block, counted from 1, in which the model is cut")
    if is_stock(model):
        head = head_of(model)
        if head == "masked-lm":
            raise UsageError("decompose() is not for masked language models: load their weights after SFTOptimizer")
        cut, frozen = _decompose(model, head, options)
        Saving(model, head, cut, None, model.state_dict(), frozen, {}).follow(model)
        return
    name = find_body(model, options.split_at)
    check_single(model, name)
    body: Any = model.get_submodule(name)
    head = str(body_of(body))
    cut, _ = _decompose(body, head, options)
    follow_body(model, name, head, cut, body.state_dict(), is_cut=False)


def _decompose(model: Any, head: str, options: SplitOptions) -> Tuple[Cut, Set[str]]:
    """Of a transformers model. Returns the cut, and what was not trained before it, by names in the whole model."""
    if decomposed_by(model) is not None:
        raise UsageError("this model is decomposed already; load it again to decompose it otherwise")
    cut = Cut("sft", int(options.split_layer or 0), options.split_rank, options.residual)
    frozen = {name for name, parameter in live_parameters(model).items() if not parameter.requires_grad}
    batches = [calibration_batch(batch, model.config, head) for batch in options.calibration or ()]
    edge, cloud = live_factors(model, head, cut, batches)
    was_half = any(parameter.dtype != torch.float32 for parameter in model.parameters())
    decompose_live(model, head, cut, {tensor.name: tensor.read() for tensor in (*edge, *cloud)})
    if was_half:
        renew_buffers(Net1(model.base_model, family_of(model.config), head))
    return cut, frozen
