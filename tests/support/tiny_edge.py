"""What an edge sends to a cloud, without an edge: requests, blobs and messages for one tiny model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Tuple

import torch
from support.tables import made_up_tables
from torch import Tensor
from transformers import PretrainedConfig

from sft.batch import Batch
from sft.models import Cut, build_net_2
from sft.models.seeding import derive_seed
from sft.models.weights import factor_tensors, pretrained_tensors
from sft.optim.spec import GroupSpec, OptimizerSpec, decay_groups, spec_to_proto
from sft.tensors.pretrained import PretrainedWeights
from sft.tensors.stream import StoredTensor, copied, in_memory, safetensors_chunks, sha256_of
from sft.v1 import split_training_pb2 as pb
from sft.version import __version__
from sft.wire.codec.elements import IN_FULL, codecs_named, encode_tensor
from sft.wire.codec.messages import encode_activation, encode_labels
from sft.wire.codec.packing import pack
from sft.wire.cut import cut_to_proto, head_to_proto
from sft.wire.protocol import PROTOCOL_VERSION

SEQUENCES = "sequence-classification"
QUESTIONS = "question-answering"
TOKENS = "causal-lm"


class _Known(NamedTuple):
    """What of an edge is the same whoever it is."""

    weights: Tuple[StoredTensor, ...]
    factors: Tuple[StoredTensor, ...]
    groups: Tuple[GroupSpec, ...]
    width: int


def _read_once(tensors: List[StoredTensor]) -> Tuple[StoredTensor, ...]:
    return tuple(copied(x) for x in in_memory({tensor.name: tensor.read() for tensor in tensors}))


_MADE: Dict[Tuple[Path, str, str, Cut, int], _Known] = {}
"""Hundreds of tests have the same edge. None of them changes the files of a directory that it has edges of."""


@dataclass
class TinyEdge:
    """The edge's knowledge of one model: enough to open sessions and to write the messages of a run."""

    directory: Path
    config: PretrainedConfig
    head: str = SEQUENCES
    cut: Cut = field(default_factory=lambda: Cut("sft", 2, 4))
    seed: int = 7
    optimizer_name: str = "AdamW"
    learning_rate: float = 1e-2
    lengths: Tuple[int, ...] = (7, 3, 5)
    fitted: bool = False
    """Whether its codec is, to nothing in particular; for a cut of mode sl."""

    def __post_init__(self) -> None:
        key = self.directory, self.config.to_json_string(use_diff=False), self.head, self.cut, self.seed
        known = _MADE[key] = _MADE.get(key) or self._make()
        self.weights: List[StoredTensor] = list(known.weights)
        self.factors: List[StoredTensor] = list(known.factors)
        self.groups: List[GroupSpec] = [
            GroupSpec(list(group.parameter_names), {**group.arguments, "lr": self.learning_rate})
            for group in known.groups
        ]
        self.width: int = known.width
        self.codecs = IN_FULL
        if self.fitted:
            self.codecs = codecs_named("float32", "fitted").with_tables(made_up_tables(self.width), torch.device("cpu"))
        self.tables: List[StoredTensor] = list(in_memory(dict(self.codecs.tables)))

    def _make(self) -> _Known:
        net_2 = build_net_2(self.config, self.head, self.cut)
        checkpoint = PretrainedWeights(self.directory)
        weights = pretrained_tensors(net_2, checkpoint)
        generator = torch.Generator().manual_seed(self.seed)
        ids_BS = torch.randint(5, self.config.vocab_size, (8, 16), generator=generator)
        calibration = [Batch({"input_ids": ids_BS}, [16] * 8, {})] if self.cut.residual == "low-rank" else []
        _, factors = factor_tensors(self.config, self.head, self.cut, checkpoint, self.seed, calibration)
        groups = decay_groups(net_2, {"lr": self.learning_rate, "weight_decay": 0.1})
        return _Known(_read_once(weights), _read_once(factors), tuple(groups), net_2.width)

    def request(self, **overrides: object) -> pb.OpenSessionRequest:
        """A sound request; `overrides` replace fields."""
        request = pb.OpenSessionRequest(
            protocol_version=PROTOCOL_VERSION,
            package_version=__version__,
            model_name="tiny",
            config_json=self.config.to_json_string(use_diff=False),
            head=head_to_proto(self.head),
            cut=cut_to_proto(self.cut),
            seed=self.seed,
            weights_sha256=sha256_of(self.weights),
            factors_sha256=sha256_of(self.factors) if self.factors else "",
            optimizer=spec_to_proto(OptimizerSpec(self.optimizer_name, self.groups)),
            wire_data_type=pb.DATA_TYPE_FLOAT32,
            activation_codec=self.codecs.activation if self.fitted else pb.DATA_TYPE_UNSPECIFIED,
            codec_tables_sha256=sha256_of(self.tables) if self.tables else "",
        )
        for name, value in overrides.items():
            request.ClearField(name)
            request.MergeFrom(pb.OpenSessionRequest(**{name: value}))
        return request

    def blobs(self) -> Dict[str, bytes]:
        """Content by hash of what a cloud that has nothing asks for."""
        stored = [tensors for tensors in (self.weights, self.factors, self.tables) if tensors]
        return {sha256_of(tensors): b"".join(safetensors_chunks(tensors)) for tensors in stored}

    def activation(self, *seed: int) -> pb.Activation:
        """Random numbers in the shape that net_1 would give."""
        generator = torch.Generator().manual_seed(derive_seed(0, *seed))
        a_BSR = torch.randn(len(self.lengths), max(self.lengths), self.width, generator=generator)
        codec, codes = self.codecs.activation, self.codecs.codes
        return encode_activation(pack(a_BSR, self.lengths), codec, self.lengths, a_BSR.shape[1], codes)

    def forward(
        self, step: int, micro_batch: int = 0, commit: Optional[pb.Commit] = None, **fields: object
    ) -> pb.EdgeMessage:
        """A training micro-batch with labels; the same numbers give the same message. `fields` are the Forward's."""
        values = {"activation": self.activation(step, micro_batch), "labels": self.labels(), "loss_scale": 0.5}
        forward = pb.Forward(**{**values, **fields})
        return pb.EdgeMessage(step=step, micro_batch=micro_batch, forward=forward, commit=commit)

    def unlabelled(self, step: int, micro_batch: int = 0, **values: object) -> pb.EdgeMessage:
        """As `forward`, with labels that stay here."""
        return self.forward(step, micro_batch, labels=None, loss_scale=0.0, **values)

    def backward(self, step: int, micro_batch: int, gradient: Tensor) -> pb.EdgeMessage:
        """The second half of it: the gradient of outputs, packed as these are."""
        body = pb.Backward(gradient=encode_tensor(gradient))
        return pb.EdgeMessage(step=step, micro_batch=micro_batch, backward=body)

    def evaluate(self, batch: int = 0, commit: Optional[pb.Commit] = None) -> pb.EdgeMessage:
        """An evaluation batch."""
        evaluate = pb.Evaluate(activation=self.activation(1000, batch))
        return pb.EdgeMessage(micro_batch=batch, evaluate=evaluate, commit=commit)

    def labels(self) -> pb.Labels:
        """Labels that fit the head, one for each sequence."""
        B, C = len(self.lengths), self.config.num_labels
        if self.head == QUESTIONS:
            positions = torch.arange(B)
            return encode_labels({"start_positions": positions, "end_positions": positions + 1})
        if self.head == TOKENS:
            return encode_labels({"labels": torch.arange(B * max(self.lengths)).reshape(B, -1)}, self.lengths)
        kind = self.config.problem_type
        if kind == "single_label_classification":
            return encode_labels({"labels": torch.arange(B) % C})
        return encode_labels({"labels": torch.ones(B) if kind == "regression" else torch.ones(B, C)})

    def commit(self, step: int, clip_scale: float = 1.0) -> pb.EdgeMessage:
        """A message that only commits."""
        return pb.EdgeMessage(step=step, commit=self.commit_part(step, clip_scale))

    def commit_part(self, step: int, clip_scale: float = 1.0) -> pb.Commit:
        """A commit, to ride with another message or alone."""
        rates = [self.learning_rate] * len(self.groups)
        return pb.Commit(step=step, learning_rates=rates, clip_scale=clip_scale)


def attach(session_id: str) -> pb.EdgeMessage:
    return pb.EdgeMessage(attach=pb.Attach(session_id=session_id))
