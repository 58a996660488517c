"""A script's own module around a base model of transformers, which is cut at a block; the same script with
`role="cloud"` has the rest of it, and what the module does with it.

Labels always stay on the edge: the loss is the script's own, or the module's.

Shape suffixes: B batch, S padded sequence, R split rank.
"""

from __future__ import annotations

import copy
import logging
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence

import torch
from torch import Tensor, nn

from sft.errors import UsageError
from sft.graphs.body import cut_around, find_body
from sft.graphs.sentences import embedding_dimension, is_sentence_model
from sft.models import Cut, Net1, body_of, build_net_2, cut_live, decomposed_by, layer_to_cut
from sft.models.weights import live_factors, live_tensors, renew_buffers
from sft.tensors.stream import StoredTensor, in_memory
from sft.wire.codec.packing import pack
from sft.wire.cut import body_cut_to_proto
from sft_edge.script.arguments import calibration_batch, read_call
from sft_edge.script.block_modes import BlockModes
from sft_edge.script.cut_model import Cross, CutModel, other_modes
from sft_edge.script.forward import replace_forward
from sft_edge.script.saving import follow_body, follow_modules

_log = logging.getLogger("sft_edge")


class BodyModel(CutModel):
    """A module that torch.fx can trace around the transformers model in it."""

    def __init__(
        self,
        model: nn.Module,
        cut: Cut,
        calibration: Iterable[Dict[str, Tensor]] = (),
        body_name: Optional[str] = None,
    ) -> None:
        """`calibration`: batches as the transformers model takes them; `body_name`: which, where there are several.

        Raises UsageError, CutError, UnsupportedModelError; the model is as it was.
        """
        if "forward" in vars(model):
            raise UsageError(
                f"the forward of this {type(model).__name__} was replaced; wrap it before anything else does"
            )
        self._model = model
        self._around = cut_around(model, find_body(model, body_name))
        body = self._around.body
        self._head, self._cut, self._config = str(body_of(body)), cut, copy.deepcopy(body.config)
        for asked in ("output_hidden_states", "output_attentions"):
            if getattr(self._config, asked, False):
                raise UsageError(f"config.{asked} asks for what stays on the cloud: set it to False")
        fitted_to = [calibration_batch(batch, self._config, self._head) for batch in calibration]
        edge, cloud = live_factors(body, self._head, cut, fitted_to)
        self._edge_factors, self.cloud_factors = self._within(edge), self._within(cloud)
        net_2 = build_net_2(self._config, self._head, cut)
        self.cloud_tensors = [*self._within(live_tensors(body, net_2)), *in_memory(self._around.upper_tensors())]
        self.cloud_tensors.sort(key=lambda tensor: tensor.name)
        names = {f"{self._around.body_name}.{name}": p for name, p in net_2.whole_parameters().items()}
        self.frozen_names: Sequence[str] = [name for name, p in names.items() if not p.requires_grad]
        self.cloud_names = sorted({*names, *self._around.upper_names}.difference(self.frozen_names))
        self.other_names = self._around.other_names
        own, w = layer_to_cut(body, cut)
        layer = self.layer_name = f"{self._around.body_name}.{own}"
        self.factor_names: Mapping[str, Sequence[str]] = {}
        if decomposed_by(body) is not None:
            self._edge_factors = []  # the parameters that the script has
            return
        weights = [f"{layer}.{factor}.weight" for factor in ("ffn1", "ffn2", "ffn3")]
        bias = [f"{layer}.ffn3.bias"]
        self.factor_names = {f"{layer}.weight": weights, f"{layer}.bias": bias}
        if w.bias is None:  # a fitted low rank brings one along
            self.factor_names = {f"{layer}.weight": weights + bias}

    def request_fields(self) -> Dict[str, Any]:
        """See CutModel."""
        return {"cut": body_cut_to_proto(self.layer_name, self._cut)}

    def describe(self) -> str:
        """See CutModel."""
        cut, kind = self._cut, type(self._model).__name__
        where = f"split_layer={cut.split_layer}, split_rank={cut.split_rank}, residual={cut.residual!r}"
        return f"{where} of the '{self._around.body_name}' of a {kind}"

    def install(self, cross: Cross) -> Dict[str, nn.Parameter]:
        """See CutModel."""
        body = self._around.body
        device = next(body.parameters()).device
        is_half = any(parameter.dtype != torch.float32 for parameter in body.parameters())
        net_1 = cut_live(body, self._head, self._cut)
        self._modes = BlockModes(body, self._around.body_name, self._cut)
        if is_half:
            renew_buffers(net_1)
            _log.warning("'%s' is in half precision: both halves train it in float32", self._around.body_name)
        modules = dict(self._model.named_children())
        dimension = embedding_dimension(self._model) if is_sentence_model(self._model) else 0
        upper = self._around.upper_modules()
        self._around.keep_net_1()
        left = set(map(id, self._model.modules()))
        self._upper = {name: module for name, module in upper.items() if id(module) in left}
        for factor in self._edge_factors:
            parent, _, child = factor.name.rpartition(".")
            module = self._model.get_submodule(parent)
            is_trained = module.get_parameter(child).requires_grad
            setattr(module, child, nn.Parameter(factor.read().to(device), requires_grad=is_trained))
        self.cloud_tensors, self.cloud_factors = [], []  # what the model does not hold any more nobody shall

        def forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            def there_and_back(named: Dict[str, Any], variant: int) -> Tensor:
                return self._there_and_back(net_1, cross, named, variant)

            return self._around.run(there_and_back, args, kwargs)

        replace_forward(self._model, forward)
        within = f"{self._around.body_name}."
        names = [*self._model.state_dict(), *self.cloud_names]
        of_body = [name[len(within) :] for name in names if name.startswith(within)]
        if is_sentence_model(self._model):
            follow_modules(self._model, modules, dimension)
        follow_body(self._model, self._around.body_name, self._head, self._cut, of_body)
        self._model.accepts_loss_kwargs = False  # type: ignore[assignment]  # as TransformersModel
        return dict(self._model.named_parameters())

    def _there_and_back(self, net_1: Net1, cross: Cross, named: Dict[str, Any], variant: int) -> Tensor:
        """What the cloud makes of a call of the body."""
        mask_BS = named.get("attention_mask")
        if mask_BS is not None and mask_BS.dtype != torch.int64 and self._around.reads_mask(variant):
            raise UsageError(
                f"attention_mask is {mask_BS.dtype}; the cloud's, of whole numbers, is torch.int64: give that"
            )
        call = read_call(named, self._config, self._head)
        inputs, lengths, _ = call.batch
        if call.moved is not None:
            raise UsageError("a model of your own finds its tokens where it expects them: pad on the right")
        a_BSR = net_1(inputs, lengths)
        training = self._model.training
        self._modes.check(training)
        others = other_modes(self._upper, training)
        outputs = cross(
            pack(a_BSR, lengths), lengths, a_BSR.shape[1], training=training, variant=variant, other_mode=others
        ).outputs
        assert outputs is not None  # labels stay
        return outputs

    def _within(self, tensors: Iterable[StoredTensor]) -> List[StoredTensor]:
        """By their names in the script's model."""
        return [tensor._replace(name=f"{self._around.body_name}.{tensor.name}") for tensor in tensors]
