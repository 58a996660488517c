"""What each half of a model starts from: Algorithm 1, lines 1 to 3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor

from sft.batch import Batch
from sft.errors import CheckpointError, CutError, UsageError
from sft.models import Cut, Net1, Whole, build_net_1, build_net_2
from sft.models.lora import LoraSpec, add_lora, lora_to_json
from sft.models.weights import factor_tensors, fill, pretrained_tensors, shapes
from sft.optim.spec import OptimizerSpec, decay_groups, factors_apart, make_optimizer
from sft.tensors.stream import StoredTensor, in_memory
from sft.v1 import split_training_pb2 as pb
from sft.wire.codec.elements import IN_FULL, Codecs
from sft_edge.link import Blob, model_fields, offer, session_request
from sft_edge.model_files import Source
from sft_edge.options import OptimizerOptions
from sft_edge.systems.fit import activations_of, fit_tables
from sft_edge.systems.lora import NO_LORA, HalfLora


@dataclass(frozen=True)
class Halves:
    """A model that is cut, before anything is filled: net_1 is here, the cloud is asked for net_2."""

    net_1: Net1
    """On the meta device; frozen what is not trained."""

    net_1_tensors: List[StoredTensor]
    """What it is filled with, its factor among them; what is not here is drawn from the seed."""

    net_1_lora: Optional[LoraSpec]
    cloud_shapes: Dict[str, Tuple[int, ...]]
    """Of parameters that only net_2 has, by whole-model names, adapters excluded."""

    optimizer: OptimizerSpec
    """Of both halves."""

    request: pb.OpenSessionRequest
    """That the cloud makes net_2 and its optimizer."""

    blobs: Dict[str, Blob]
    """What the cloud may ask for, by the hashes that `request` names: net_2's pretrained tensors, its factors, and the
    tables of a codec."""

    codecs: Codecs
    """As asked for: one that is fitted to activations has no tables yet."""

    calibration: Sequence[Batch]
    """What it is fitted to."""

    tables: Optional[Mapping[str, Tensor]]
    """Of one that was fitted before; none in a new run."""

    def start_edge(self, device: torch.device) -> torch.optim.Optimizer:
        """Fills net_1 on `device`, adapters included, and makes its optimizer. Once."""
        net_1, seed = self.net_1, self.request.seed
        fill(net_1, self.net_1_tensors, seed, device)
        if self.net_1_lora is not None:
            add_lora(net_1, self.net_1_lora, seed)
        trained = [name for name, parameter in net_1.whole_parameters().items() if parameter.requires_grad]
        return make_optimizer(self.optimizer.restricted_to(trained), net_1.whole_parameters())

    def agree_on_codecs(self, device: torch.device, on_status: Callable[[str], None]) -> Codecs:
        """After `start_edge`: fits a codec where one is asked for that has no tables yet, and offers them to the cloud.

        Raises UsageError for activations that cannot be written in it, CheckpointError where there are none to fit to.
        """
        if not self.codecs.needs_tables:
            return self.codecs
        tables = self.tables
        if not tables:
            if not self.calibration:
                raise CheckpointError("the checkpoint lacks the tables of the codec: it is none of this release")
            on_status("fitting the codec")
            tables = fit_tables(activations_of(self.net_1, self.calibration), self.request.seed)
        self.request.codec_tables_sha256 = offer(list(in_memory(dict(tables))), self.blobs)
        return self.codecs.with_tables(tables, device)


def halve(
    source: Source,
    head: str,
    cut: Cut,
    optimizer: OptimizerSpec,
    seed: int,
    codecs: Codecs = IN_FULL,
    *,
    freeze_edge: bool = False,
    calibration: Sequence[Batch] = (),
    lora: HalfLora = NO_LORA,
    run_id: str = "",
    resume_from: Sequence[pb.CheckpointId] = (),
    tables: Optional[Mapping[str, Tensor]] = None,
) -> Halves:
    """Cuts the model and decomposes the layer. What the cloud lacks is read when it asks for it, a tensor at a time.

    `optimizer` is that of both halves, see `optimizer_spec`; `freeze_edge`: net_1 is not trained; `calibration`: what a
    low-rank residual is fitted to, or a codec that has no `tables` yet; `lora`: the adapters of the halves, whose
    parameters `optimizer` names; `run_id`: whose checkpoints are saved, if any are. With `resume_from` the cloud goes
    on from one of these, and net_1 gets memory, but no values of any worth: the caller loads those of the step that the
    cloud has got to, and gives the `tables` of the run's codec, if it has any.

    Raises CutError, CheckpointError, UsageError.
    """
    check_kept(source, cut)
    config, checkpoint = source.config, source.checkpoint
    net_1, net_2 = build_net_1(config, head, cut), build_net_2(config, head, cut)
    if freeze_edge:
        net_1.requires_grad_(False)
    for_edge: List[StoredTensor] = []
    for_cloud: List[StoredTensor] = []
    weights: List[StoredTensor] = []
    if not resume_from:
        for_edge, for_cloud = factor_tensors(config, head, cut, checkpoint, seed, calibration)
        for_edge += pretrained_tensors(net_1, checkpoint)
        weights = pretrained_tensors(net_2, checkpoint)
    on_edge = set(net_1.whole_names.values())
    cloud_shapes = {name: shape for name, shape in shapes(net_2).items() if name not in on_edge}
    if lora.cloud is not None:
        add_lora(net_2, lora.cloud, seed)  # for the names of what is trained there
    request, blobs = session_request(
        model_fields(source.told_name, config, head, cut, "" if lora.cloud is None else lora_to_json(lora.cloud)),
        optimizer.restricted_to(net_2.whole_names.values()),
        seed,
        codecs,
        weights,
        for_cloud,
        run_id,
        resume_from,
    )
    return Halves(
        net_1, for_edge, lora.edge, cloud_shapes, optimizer, request, blobs, codecs, list(calibration), tables
    )


def whole_tensors(
    net: Whole, source: Source, cut: Optional[Cut], seed: int, calibration: Sequence[Batch] = ()
) -> List[StoredTensor]:
    """What a model that stays in one piece is filled with, to start from where the halves start.

    Raises CheckpointError and UsageError.
    """
    if cut is not None:
        check_kept(source, cut)
    tensors = pretrained_tensors(net, source.checkpoint)
    if cut is not None:
        for factors in factor_tensors(source.config, net.head, cut, source.checkpoint, seed, calibration):
            tensors += factors
    return tensors


def check_kept(source: Source, cut: Cut) -> None:
    """Raises CutError where a model is decomposed already, and otherwise than this cut."""
    kept = source.cut
    if kept is not None and kept != cut:
        layer, rank, residual = kept.split_layer, kept.split_rank, kept.residual
        how = f"--mode sft --split-layer {layer} --split-rank {rank} --residual {residual}, or --mode local"
        raise CutError(
            f"this model is decomposed already, in block {layer} with rank {rank} and residual {residual}, and is "
            f"trained on as it is: give {how if residual != 'full' else '--mode local'}"
        )


def optimizer_spec(options: OptimizerOptions, whole: Whole) -> OptimizerSpec:
    """The optimizer that the options mean for the model in one piece, which may be on the meta device.

    Raises UsageError for a rate of factors where none is trained.
    """
    groups = decay_groups(whole, options.arguments())
    if options.factor_learning_rate is not None:
        groups = factors_apart(groups, options.factor_learning_rate)
        if not groups[-1].parameter_names:
            raise UsageError(
                "--factor-learning-rate needs --mode sft, or local with --residual: no layer is decomposed, or its "
                "factors are not trained"
            )
    return OptimizerSpec(options.optim, groups)
