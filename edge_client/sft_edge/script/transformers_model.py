"""A transformers model of a script, cut at a block; `sft-cloud serve` has the other half.

Shape suffixes: B batch, S padded sequence, T tokens without padding, R split rank, C labels.
"""

from __future__ import annotations

import copy
import inspect
import logging
from typing import Any, Dict, Iterable, List, Optional

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from sft.batch import IGNORED
from sft.errors import ProtocolError, UsageError
from sft.models import (
    HEADS,
    Cut,
    Net1,
    Net2,
    build_net_2,
    cut_live,
    decomposed_by,
    family_of,
    has_fused_head,
    head_of,
    layer_to_cut,
    live_parameters,
    name_of_w,
    whole_name,
)
from sft.models.lora import LoraSpec, adapter_shapes, lora_to_json
from sft.models.losses import head_loss
from sft.models.weights import live_factors, renew_buffers
from sft.tensors.stream import in_memory
from sft.v1 import split_training_pb2 as pb
from sft.wire.codec.elements import encoded_size
from sft.wire.codec.messages import encode_labels, is_packed, outputs_of
from sft.wire.codec.packing import pack, unpack
from sft_edge.link import model_fields
from sft_edge.model_files import told_name
from sft_edge.script.adapters import adapters_of, adapters_of_cloud, without_peft
from sft_edge.script.arguments import Call, calibration_batch, count_learned, may_travel, problem_type, read_call
from sft_edge.script.block_modes import BlockModes
from sft_edge.script.cut_model import Cross, Crossed, CutModel
from sft_edge.script.forward import replace_forward
from sft_edge.script.fused_head import FusedHead
from sft_edge.script.late_logits import LateLogits
from sft_edge.script.origin import by_origin
from sft_edge.script.outputs import make_output, output_class
from sft_edge.script.padding import Moved
from sft_edge.script.saving import Saving
from sft_edge.systems import check_size

_log = logging.getLogger("sft_edge")


class TransformersModel(CutModel):
    """Any model that `sft.models` can cut, with LoRA's adapters of peft or without."""

    def __init__(
        self,
        model: nn.Module,
        split_layer: int,
        split_rank: int,
        residual: str = "none",
        calibration: Iterable[Dict[str, Tensor]] = (),
        model_name: Optional[str] = None,
    ) -> None:
        """`model` may be a PeftModel around the library's; `calibration`: batches as the model takes them.

        Raises UsageError, CutError, UnsupportedModelError.
        """
        self._given = model
        adapters = self._adapters = adapters_of(model)
        self._script_names = {whole_name(name): name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._prefix = "" if isinstance(model, PreTrainedModel) else "base_model.model."
        library: Any = without_peft(model)
        self._model = library
        self._head = head_of(library)
        name = self.layer_name = name_of_w(library, family_of(library.config), split_layer)
        if ".modules_to_save." in self._script_names.get(f"{name}.weight", ""):
            raise UsageError(
                f"modules_to_save holds '{name}', the layer that is cut: leave it out, its factors are trained anyway"
            )
        self._cut = Cut("sft", split_layer, split_rank, residual)
        self._config = copy.deepcopy(library.config)
        if self._head == "sequence-classification":
            self._config.update({"problem_type": problem_type(self._config)})
        fitted_to = [calibration_batch(batch, self._config, self._head) for batch in calibration]
        self._edge_factors, self.cloud_factors = live_factors(library, self._head, self._cut, fitted_to)
        net_2 = build_net_2(self._config, self._head, self._cut)
        known_by, self.cloud_tensors, own = by_origin(library, net_2)
        self._told_name = known_by if model_name is None else told_name("", model_name)
        # Beside the factors, not with the other weights: those the cloud may have of another session, or of its own.
        self.cloud_factors = sorted([*self.cloud_factors, *own], key=lambda tensor: tensor.name)
        self.frozen_names = [name for name, p in net_2.whole_parameters().items() if not p.requires_grad]
        self.cloud_names = sorted(set(net_2.whole_names.values()).difference(self.frozen_names))
        is_decomposed = decomposed_by(library) is not None
        if is_decomposed:
            if adapters is not None:
                raise UsageError("a model with adapters is decomposed where it is cut: leave decompose() out")
            self._edge_factors = []  # the parameters that the script has
        _, w = layer_to_cut(library, self._cut)
        weights = [f"{name}.{factor}.weight" for factor in ("ffn1", "ffn2", "ffn3")]
        bias = [f"{name}.ffn3.bias"]
        if is_decomposed:
            self.factor_names = {}
        elif w.bias is None:  # a fitted low rank brings one along
            self.factor_names = {f"{name}.weight": weights + bias}
        else:
            self.factor_names = {f"{name}.weight": weights, f"{name}.bias": bias}
        self._tied = net_2.other_names()
        live = live_parameters(library)
        for other, tied_to in self._tied.items():
            if live[other] is not live[tied_to]:
                raise UsageError(f"'{other}' and '{tied_to}' are tied in the library's model: train both, or neither")
        self._lora_json = ""
        if adapters is not None:
            self.trained_factors = weights + bias
            self._take(adapters, net_2)

    def _take(self, adapters: LoraSpec, net_2: Net2) -> None:
        live = live_parameters(self._model)
        of_cloud = adapters_of_cloud(adapters, net_2, live)
        if of_cloud is not None:
            self._lora_json = lora_to_json(of_cloud)
            names = adapter_shapes(net_2, of_cloud)
            self.cloud_factors = [*self.cloud_factors, *in_memory({name: live[name] for name in names})]
            self.cloud_factors.sort(key=lambda tensor: tensor.name)
            self.cloud_names = sorted([*self.cloud_names, *names])

    def whole_name(self, name: str) -> str:
        """See CutModel."""
        return whole_name(name)

    def script_name(self, name: str) -> str:
        """See CutModel."""
        return self._script_names.get(name, self._prefix + name)  # a factor is no parameter of it yet

    def request_fields(self) -> Dict[str, Any]:
        """See CutModel."""
        return model_fields(self._told_name, self._config, self._head, self._cut, self._lora_json)

    def describe(self) -> str:
        """See CutModel."""
        cut = self._cut
        return f"split_layer={cut.split_layer}, split_rank={cut.split_rank}, residual={cut.residual!r}"

    def install(self, cross: Cross) -> Dict[str, nn.Parameter]:
        """See CutModel."""
        model = self._model
        device = next(model.parameters()).device
        forward = _CutForward(model, self._head, self._config, cross)
        frozen = {name for name, parameter in live_parameters(model).items() if not parameter.requires_grad}
        held = next((str(p.dtype) for p in model.parameters() if p.dtype != torch.float32), None)
        net_1 = cut_live(model, self._head, self._cut)
        if held is not None:
            renew_buffers(net_1)
            _log.warning(
                "parameters of this model are %s: both halves train them in float32; torch.autocast computes in half "
                "precision",
                held,
            )
        self.cloud_tensors, self.cloud_factors = [], []  # what the model does not hold any more nobody shall
        parameters = {whole_name(name): parameter for name, parameter in net_1.whole_parameters().items()}
        for factor in self._edge_factors:
            own = next(own for own, whole in net_1.whole_names.items() if whole == factor.name)
            parent, _, child = own.rpartition(".")
            is_trained = parameters[factor.name].requires_grad or factor.name in self.trained_factors
            parameters[factor.name] = nn.Parameter(factor.read().to(device), requires_grad=is_trained)
            setattr(net_1.get_submodule(parent), child, parameters[factor.name])
        forward.net_1 = net_1
        forward.modes = BlockModes(model.base_model, model.base_model_prefix, self._cut)
        replace_forward(model, forward)
        names = [*self._given.state_dict(), *map(self.script_name, self.cloud_names)]
        saving = Saving(self._given, self._head, self._cut, self._adapters, names, frozen, self._tied)
        saving.follow(model)
        if self._given is not model:
            saving.follow(self._given)
        model.accepts_loss_kwargs = False  # Trainer then divides the loss by its accumulation steps itself
        return parameters


class _CutForward:
    """Stands where the model's forward was."""

    net_1: Net1
    modes: BlockModes

    def __init__(self, model: Any, head: str, config: PretrainedConfig, cross: Cross) -> None:
        """`model` not cut yet; `config` as the cloud has it, whatever becomes of the model's own."""
        self._head = head
        self._config = config
        self._cross = cross
        self._signature = inspect.signature(type(model).forward)
        self._output_class = output_class(model, head)
        self._fused_head = FusedHead(model.forward) if has_fused_head(model) else None

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        fused = kwargs.pop("fused_lm_head", False) if self._fused_head is not None else False
        named = self._named(model, *args, **kwargs)
        for name in ("output_hidden_states", "output_attentions"):
            if getattr(model.config, name, False) and named.get(name) is None:
                raise UsageError(f"config.{name} asks for what stays on the cloud: set it to False")
        self.modes.check(model.training)
        call = read_call(named, self._config, self._head)
        inputs, lengths, labels = call.batch
        if "position_ids" in inputs and "position_ids" not in self._signature.parameters:
            raise UsageError("in this release the model takes no position_ids: pad on the right")
        a_BSR = self.net_1(inputs, lengths)
        if fused:
            return self._fused_output(a_BSR, call, model.training)
        is_language_model = HEADS[self._head].of_vocabulary
        wants_loss = torch.is_grad_enabled()
        if is_language_model and not wants_loss and not model.training:
            wants_loss = self._cross.evaluates_labels
        travelling = encode_labels(labels, lengths) if may_travel(labels) and wants_loss else None
        if travelling is None or not is_language_model:
            self._check_size(lengths)
        crossed = self._cross(
            pack(a_BSR, lengths),
            lengths,
            a_BSR.shape[1],
            training=model.training,
            labels=travelling,
            want_outputs=not is_language_model,  # a row of the vocabulary for every token: far more than all the rest
        )
        logits, loss = crossed.outputs, crossed.loss
        if logits is not None:
            logits = self._logits(logits, self._config, lengths, a_BSR.shape[1])
        elif crossed.fetch is not None:
            logits = self._late(crossed, self._config.vocab_size, lengths, a_BSR.shape[1], call.moved)
        if logits is not None and self._head == "multiple-choice":
            logits = logits.reshape(-1, call.choices)
        if labels and loss is None:
            assert logits is not None  # nothing travelled that could have made them unwanted
            labels = {name: y.to(logits.device) for name, y in labels.items()}
            loss = head_loss(self._head, problem_type(self._config), logits, labels, lengths)
        if loss is not None and call.items_in_batch is not None:
            learned = count_learned(labels["labels"])
            # Their mean is NaN where there are none; their sum is 0.
            loss = (loss if learned else loss.nan_to_num(0.0)) * (learned / call.items_in_batch)
        if call.moved is not None and is_packed(self._head) and logits is not None and crossed.fetch is None:
            logits = call.moved.back(logits)
        as_dict = model.config.return_dict if call.return_dict is None else call.return_dict
        return make_output(self._output_class, self._head, loss, logits, as_dict)

    def _fused_output(self, a_BSR: Tensor, call: Call, training: bool) -> Any:
        """What each label scores, in the place of logits; labels travel, the loss is the script's."""
        assert self._fused_head is not None
        lengths, labels, S = call.batch.lengths, call.batch.labels, a_BSR.shape[1]
        if not labels:
            raise UsageError("fused_lm_head=True needs labels")
        scored = encode_labels(labels, lengths)
        scores_T3 = self._cross(pack(a_BSR, lengths), lengths, S, training=training, scored=scored).outputs
        if scores_T3 is None or list(scores_T3.shape) != [sum(lengths), 3]:
            raise ProtocolError("the cloud sent no scores of labels: it is of an older release; upgrade it")
        y_BS = labels["labels"].to(scores_T3.device)
        scores_BS3 = unpack(scores_T3, lengths, S)
        if call.moved is not None:
            y_BS = torch.cat([torch.full_like(y_BS[:, :1], IGNORED), y_BS[:, 1:]], dim=1)  # nothing scores the first
            y_BS, scores_BS3 = call.moved.back(y_BS), call.moved.back(scores_BS3)
        return self._fused_head.output(scores_BS3, y_BS, call.items_in_batch)

    def _named(self, *args: Any, **kwargs: Any) -> Dict[str, Any]:
        """All arguments by name. Raises TypeError as the model's own forward would."""
        named: Dict[str, Any] = {}
        bound = self._signature.bind(*args, **kwargs).arguments
        for name, value in list(bound.items())[1:]:  # the first is the model
            more = self._signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
            named.update(value if more else {name: value})
        return named

    def _check_size(self, lengths: List[int]) -> None:
        """Raises UsageError where logits would be too large for a message."""
        rows = sum(lengths) if is_packed(self._head) else len(lengths)
        check_size("output", encoded_size([rows, outputs_of(self._config, self._head)], pb.DATA_TYPE_FLOAT32))

    def _late(self, crossed: Crossed, V: int, lengths: List[int], padded_length: int, moved: Optional[Moved]) -> Tensor:
        best_T, fetch = crossed.best_T, crossed.fetch
        assert best_T is not None
        assert fetch is not None
        if len(best_T) != sum(lengths) or int(best_T.max()) >= V:
            raise ProtocolError(f"the cloud sent {len(best_T)} best tokens of {sum(lengths)}, or one that is none")

        def logits() -> Tensor:
            self._check_size(lengths)
            logits_BSV = self._logits(fetch(), self._config, lengths, padded_length)
            return logits_BSV if moved is None else moved.back(logits_BSV)

        best_BS = unpack(best_T[:, None], lengths, padded_length)[..., 0]
        return LateLogits(best_BS if moved is None else moved.back(best_BS), V, logits)

    def _logits(self, logits: Tensor, config: Any, lengths: List[int], padded_length: int) -> Tensor:
        """As `head_loss` takes them, from what the wire brought."""
        rows = sum(lengths) if is_packed(self._head) else len(lengths)
        if list(logits.shape) != [rows, outputs_of(config, self._head)]:
            raise ProtocolError(f"the cloud sent logits of shape {list(logits.shape)}")
        if not is_packed(self._head):
            return logits
        unpacked = unpack(logits, lengths, padded_length)
        if self._head == "question-answering":
            # No answer begins or ends in padding, whatever the script makes of these.
            padding_BS = torch.arange(padded_length)[None, :] >= torch.tensor(lengths)[:, None]
            lowest = torch.finfo(unpacked.dtype).min
            unpacked = unpacked.masked_fill(padding_BS[:, :, None].to(unpacked.device), lowest)
        return unpacked
