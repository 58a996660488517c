"""The request that opens a session, and the files that the cloud may ask for then."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, Sequence, Tuple

from transformers import PretrainedConfig

from sft.models import Cut
from sft.models.configuration import config_text
from sft.optim.spec import OptimizerSpec, spec_to_proto
from sft.tensors.stream import StoredTensor, safetensors_chunks, safetensors_size, sha256_of
from sft.v1 import split_training_pb2 as pb
from sft.version import __version__
from sft.wire.codec.elements import Codecs
from sft.wire.cut import cut_to_proto, head_to_proto
from sft.wire.protocol import PROTOCOL_VERSION
from sft_edge.link.link import Blob


def session_request(
    model: Mapping[str, Any],
    optimizer: OptimizerSpec,
    seed: int,
    codecs: Codecs,
    weights: List[StoredTensor],
    factors: List[StoredTensor],
    run_id: str = "",
    resume_from: Sequence[pb.CheckpointId] = (),
) -> Tuple[pb.OpenSessionRequest, Dict[str, Blob]]:
    """The request, and its blobs by their hashes, which are read when the cloud asks for one.

    `model`: the fields that say what is cut and where, as `model_fields` gives them; `optimizer`: net_2's; `weights`
    and `factors`: net_2's tensors, the factors of the layer that is cut apart from the others; `run_id` and
    `resume_from` are of checkpoints. Raises UsageError for an optimizer with arguments that do not travel.
    """
    blobs: Dict[str, Blob] = {}
    request = pb.OpenSessionRequest(
        protocol_version=PROTOCOL_VERSION,
        package_version=__version__,
        seed=seed,
        weights_sha256=offer(weights, blobs),
        factors_sha256=offer(factors, blobs),
        optimizer=spec_to_proto(optimizer),
        wire_data_type=codecs.outputs,
        activation_codec=_beside(codecs.activation, codecs),
        gradient_codec=_beside(codecs.gradient, codecs),
        run_id=run_id,
        resume_from=resume_from,
        **model,
    )
    return request, blobs


def model_fields(name: str, config: PretrainedConfig, head: str, cut: Cut, lora_json: str = "") -> Dict[str, Any]:
    """Of a transformers model. `name` is what the cloud may know it by; `lora_json`: the adapters of net_2."""
    return {
        "model_name": name,
        "config_json": config_text(config),
        "head": head_to_proto(head),
        "cut": cut_to_proto(cut),
        "lora_json": lora_json,
    }


def offer(tensors: List[StoredTensor], blobs: Dict[str, Blob]) -> str:
    """Adds the tensors to `blobs`, as one blob; returns its hash, which is empty for no tensors."""
    if not tensors:
        return ""
    sha256 = sha256_of(tensors)
    blobs[sha256] = Blob(safetensors_size(tensors), lambda: safetensors_chunks(tensors))
    return sha256


def _beside(codec: pb.DataType, codecs: Codecs) -> pb.DataType:
    """What needs no word is not said: so a run that began before there were codecs is the same run."""
    return codec if codec != codecs.outputs else pb.DATA_TYPE_UNSPECIFIED
