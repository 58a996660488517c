"""The request that opens a session for a transformers model."""

from __future__ import annotations

from typing import Dict, List, Sequence

from transformers import PretrainedConfig

from sft.models import Cut
from sft.models.configuration import config_text
from sft.optim.spec import OptimizerSpec, spec_to_proto
from sft.tensors.stream import StoredTensor, safetensors_chunks, safetensors_size, sha256_of
from sft.v1 import split_training_pb2 as pb
from sft.version import __version__
from sft.wire.codec.elements import DATA_TYPES
from sft.wire.cut import cut_to_proto, head_to_proto
from sft.wire.protocol import PROTOCOL_VERSION
from sft_edge.link.link import Blob


def session_request(
    model_name: str,
    config: PretrainedConfig,
    head: str,
    cut: Cut,
    optimizer_spec: OptimizerSpec,
    seed: int,
    wire_dtype: str,
    weights_sha256: str,
    factors_sha256: str,
    lora_json: str = "",
    run_id: str = "",
    resume_from: Sequence[pb.CheckpointId] = (),
) -> pb.OpenSessionRequest:
    """`model_name` is what the cloud may know it by; `optimizer_spec` is net_2's.

    The blobs are named by their hashes, see `offer`; `run_id` and `resume_from` are of checkpoints.
    """
    return pb.OpenSessionRequest(
        protocol_version=PROTOCOL_VERSION,
        package_version=__version__,
        model_name=model_name,
        config_json=config_text(config),
        head=head_to_proto(head),
        cut=cut_to_proto(cut),
        seed=seed,
        weights_sha256=weights_sha256,
        factors_sha256=factors_sha256,
        optimizer=spec_to_proto(optimizer_spec),
        wire_data_type=DATA_TYPES[wire_dtype],
        lora_json=lora_json,
        run_id=run_id,
        resume_from=resume_from,
    )


def offer(tensors: List[StoredTensor], blobs: Dict[str, Blob]) -> str:
    """Adds the tensors to `blobs`, as one blob; returns its hash, which is empty for no tensors."""
    if not tensors:
        return ""
    sha256 = sha256_of(tensors)
    blobs[sha256] = Blob(safetensors_size(tensors), lambda: safetensors_chunks(tensors))
    return sha256
