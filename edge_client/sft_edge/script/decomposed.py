"""A transformers model of a script, decomposed before it is cut: weights of a run before can be loaded into it."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from sft.errors import UsageError
from sft.models import Cut, Net1, decompose_live, decomposed_by, family_of, head_of, live_parameters
from sft.models.weights import live_factors, renew_buffers
from sft.optimizer import SplitOptions
from sft_edge.script.arguments import calibration_batch
from sft_edge.script.saving import Saving


def decompose(model: nn.Module, options: SplitOptions) -> None:
    """See `SFTOptimizer.decompose`. What the model saves opens as what it is, as when it is cut."""
    if not isinstance(model, PreTrainedModel):
        raise UsageError(f"decompose() is for transformers models, not for a {type(model).__name__}")
    head = head_of(model)
    if head == "masked-lm":
        raise UsageError("decompose() is not for masked language models: load their weights after SFTOptimizer")
    if options.split_layer is None:
        raise UsageError("split_layer must be given: the block, counted from 1, in which the model is cut")
    if decomposed_by(model) is not None:
        raise UsageError("this model is decomposed already; load it again to decompose it otherwise")
    cut = Cut("sft", options.split_layer, options.split_rank, options.residual)
    frozen = {name for name, parameter in live_parameters(model).items() if not parameter.requires_grad}
    batches = [calibration_batch(batch, model.config, head) for batch in options.calibration or ()]
    edge, cloud = live_factors(model, head, cut, batches)
    was_half = any(parameter.dtype != torch.float32 for parameter in model.parameters())
    decompose_live(model, head, cut, {tensor.name: tensor.read() for tensor in (*edge, *cloud)})
    if was_half:
        renew_buffers(Net1(model.base_model, family_of(model.config), head))
    Saving(model, head, cut, None, model.state_dict(), frozen, {}).follow(model)
