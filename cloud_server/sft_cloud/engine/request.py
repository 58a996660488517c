"""An OpenSessionRequest read into what it asks for: every field is checked, since anybody may have written it."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig

from sft.errors import ProtocolError, UsageError
from sft.models import Cut, max_positions
from sft.models.checked_config import config_of
from sft.models.lora import LoraSpec, lora_from_json
from sft.optim.listed import LISTED, listed_class
from sft.optim.spec import OptimizerSpec, spec_from_proto
from sft.tensors.manifest import is_run_id
from sft.v1 import split_training_pb2 as pb
from sft.version import __version__
from sft.wire.codec.elements import Codecs, codecs_of
from sft.wire.cut import cut_from_proto, head_from_proto
from sft.wire.protocol import PROTOCOL_VERSION
from sft_cloud.errors import PreconditionError, is_out_of_memory
from sft_cloud.storage import KEY_BYTES, check_sha256

_PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

_MAX_CONFIG_BYTES = 1 << 20
_MAX_BLOCKS, _MAX_LABELS, _MAX_POSITIONS = 256, 1 << 16, 1 << 17
_MAX_SETTINGS = 1000
"""Of a configuration; the library takes a second for a hundred times as many."""
_MAX_GROUPS = 1024
"""Of an optimizer, as for torch each costs as much as all before it: thirty times as many take minutes."""

_LIBRARY_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class SessionSpec:
    """A request to open a session, checked as far as it can be without building the model."""

    model_name: str
    """A hub id or the name of a directory, never a path to elsewhere; empty where the edge has no name for it."""
    config: PretrainedConfig
    head: str
    cut: Cut
    seed: int
    weights_sha256: str
    """Empty when no blob holds pretrained weights: all are drawn from the seed."""
    factors_sha256: str
    """Empty for `sl`."""
    optimizer: OptimizerSpec
    codecs: Codecs
    codec_tables_sha256: str
    """Empty where the codecs have no tables."""
    lora: LoraSpec | None
    """None where net_2 is trained whole."""


def check_version(request: pb.OpenSessionRequest) -> None:
    """Raises PreconditionError for an edge of another protocol version."""
    if request.protocol_version != PROTOCOL_VERSION:
        raise PreconditionError(
            f"the edge (release {request.package_version[:20]}) speaks protocol version {request.protocol_version}, "
            f"the cloud (release {__version__}) speaks version {PROTOCOL_VERSION}; install the same release on both"
        )


def check_optimizer(name: str, only_torch: bool) -> None:
    """Raises PreconditionError for an optimizer of another package than torch that is not here, or not let in."""
    if name not in LISTED:
        return  # `make_optimizer` looks for it in torch
    if only_torch:
        raise PreconditionError(
            f"this server makes optimizers of torch alone, and no {name}: use AdamW, or ask whoever runs it to leave "
            "out --only-torch-optimizers"
        )
    try:
        listed_class(name)
    except UsageError as error:
        raise PreconditionError(f"on the cloud {error}") from error


def check_request(request: pb.OpenSessionRequest, only_torch: bool = False) -> SessionSpec:
    """Raises PreconditionError for another protocol version, ProtocolError for fields that make no sense.

    `only_torch`: whether optimizers of other packages are refused, with PreconditionError.
    """
    check_version(request)
    if request.cut.layer_name:
        raise ProtocolError(
            f"this server builds models of the transformers library; one that is cut at layer "
            f'"{request.cut.layer_name[:80]}" has to be hosted by the script that makes it, with role="cloud"'
        )
    # An empty name is no hint at all.
    if not re.fullmatch(r"([\w.-]+(/[\w.-]+)?)?", request.model_name, re.ASCII) or ".." in request.model_name:
        raise ProtocolError(f"model_name {request.model_name[:80]!r} is neither a hub id nor the name of a directory")
    head, cut = head_from_proto(request.head), cut_from_proto(request.cut)
    codecs = codecs_of(request)
    if codecs.needs_tables and cut.mode != "sl":
        raise ProtocolError("the codec fitted is for mode sl")
    if request.run_id and not is_run_id(request.run_id):
        raise ProtocolError("run_id must be 32 lower-case hexadecimal digits")
    # A run that goes on has its weights on the cloud.
    if bool(request.factors_sha256) is not (cut.mode == "sft") and not request.resume_from:
        raise ProtocolError("factors_sha256 must name a blob for mode sft, and be empty for mode sl")
    if len(request.keep_key) not in (0, KEY_BYTES):
        raise ProtocolError(f"keep_key has {len(request.keep_key)} bytes; it has {KEY_BYTES}, or none")
    for sha256 in filter(None, (request.weights_sha256, request.factors_sha256, request.codec_tables_sha256)):
        check_sha256(sha256)
    groups = len(request.optimizer.groups)
    if groups > _MAX_GROUPS:
        raise ProtocolError(f"the optimizer has {groups} groups of parameters; at most {_MAX_GROUPS} are accepted")
    check_optimizer(request.optimizer.name, only_torch)
    if request.lora_json and "lora" in missing_features():
        raise PreconditionError(
            "the cloud lacks peft, so it trains no adapters: whoever runs it has to install 'split-fine-tuning[peft]' "
            "there; or leave LoRA out"
        )
    return SessionSpec(
        model_name=request.model_name,
        config=_parse_config(request.config_json, head),
        head=head,
        cut=cut,
        seed=request.seed,
        weights_sha256=request.weights_sha256,
        factors_sha256=request.factors_sha256,
        optimizer=spec_from_proto(request.optimizer),
        codecs=codecs,
        codec_tables_sha256=request.codec_tables_sha256,
        lora=lora_from_json(request.lora_json) if request.lora_json else None,
    )


def missing_features() -> list[str]:
    """What cannot be asked for, for want of a package that a cloud does without."""
    return ["lora"] if importlib.util.find_spec("peft") is None else []


def _parse_config(text: str, head: str) -> PretrainedConfig:
    if len(text) > _MAX_CONFIG_BYTES:
        raise ProtocolError(f"config_json has {len(text)} characters; at most {_MAX_CONFIG_BYTES} are accepted")
    with blames_config():
        values: dict[str, Any] = dict(json.loads(text))
        if len(values) > _MAX_SETTINGS:
            raise ProtocolError(f"config_json has {len(values)} settings; at most {_MAX_SETTINGS} are accepted")
        values.pop("sinusoidal_pos_embds", None)  # older releases compute that table, which net_2 has not, by number
        # Before the library makes a list of so many names or blocks.
        _check_limit("num_labels", int(values.get("num_labels", 1)), _MAX_LABELS)
        for name in ("num_hidden_layers", "n_layer", "n_layers"):
            _check_limit("num_hidden_layers", int(values.get(name, 1)), _MAX_BLOCKS)
        config = config_of(values)
        _check_limit("num_hidden_layers", int(config.num_hidden_layers), _MAX_BLOCKS)
        _check_limit("max_position_embeddings", max_positions(config), _MAX_POSITIONS)
        _check_limit("num_labels", int(config.num_labels or 0), _MAX_LABELS)
    if head == "question-answering" and config.num_labels != 2:
        raise ProtocolError(f"question answering needs num_labels 2 (start and end), not {config.num_labels}")
    if head == "sequence-classification" and config.problem_type not in _PROBLEM_TYPES:
        raise ProtocolError(f"problem_type must be one of {', '.join(_PROBLEM_TYPES)}, not {config.problem_type!r}")
    return config


def _check_limit(name: str, value: int, limit: int) -> None:
    if not 1 <= value <= limit:
        raise ProtocolError(f"{name} of the configuration must be from 1 to {limit}, not {value}")


@contextmanager
def blames_config() -> Iterator[None]:
    """What the library raises in the block, which can be almost anything, is the fault of the configuration; but for
    what is not installed here."""
    try:
        yield
    except ImportError as error:
        reason = " ".join(str(error).split())[:300]
        raise PreconditionError(f"this server has not installed what such a model needs: {reason}") from error
    except _LIBRARY_ERRORS as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise ProtocolError(
            f"config_json does not describe a model that runs: {type(error).__name__}: {reason}"
        ) from error
