"""A model's config.json: read without the library's looking anything up, asking or running anything."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator

import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig

from sft.errors import CheckpointError, SFTError
from sft.files.pointer import is_lfs_pointer, lfs_advice
from sft.models import build_whole
from sft.models.checked_config import config_of
from sft.printable import told_by
from sft.tensors.pretrained import MERGED

NO_OWN_CODE = "models that bring code of their own are not supported; code beside a model is never run"


def read_config(path: Path, overrides: Dict[str, Any]) -> PretrainedConfig:
    """A transformers configuration from its file. Raises CheckpointError, UnsupportedModelError."""
    return config_from(path, read_values(path), overrides)


def config_from(path: Path, values: Dict[str, Any], overrides: Dict[str, Any]) -> PretrainedConfig:
    """As `read_config`, of what was read there."""
    _check_known(path, values)
    with _blames(path):
        config = config_of(values, **overrides)
        build_whole(config, "sequence-classification")
    return config


def read_values(path: Path) -> Dict[str, Any]:
    """The content of a config.json. Raises CheckpointError."""
    if is_lfs_pointer(path):
        raise CheckpointError(lfs_advice(path))
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file{_instead(path.parent)}")
    with _blames(path):
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
            raise ValueError("it says no model_type")
    return values


def _check_known(path: Path, values: Dict[str, Any]) -> None:
    """Raises CheckpointError where a model's class is not the library's."""
    model_type = values["model_type"]
    if model_type not in CONFIG_MAPPING:
        more = f": {NO_OWN_CODE}" if "auto_map" in values else ""
        raise CheckpointError(
            f"{path}: '{model_type[:80]}' is no model of transformers {transformers.__version__}{more}"
        )


def check_plain_weights(path: Path, values: Dict[str, Any]) -> None:
    """Raises CheckpointError for a model whose weights are quantized."""
    quantization = values.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "") if isinstance(quantization, dict) else ""
        by = f" ({str(method)[:40]})" if method else ""
        raise CheckpointError(
            f"{path}: the weights are quantized{by}, which cannot be trained here: give the model that they were made "
            "from, in float32, float16 or bfloat16"
        )


def _instead(directory: Path) -> str:
    """What a directory without a config.json may be."""
    adapters = directory / "adapter_config.json"
    if adapters.is_file():
        try:
            base = json.loads(adapters.read_text(encoding="utf-8")).get("base_model_name_or_path")
        except (OSError, ValueError, AttributeError):
            base = None
        of = f" of {base!r:.100}" if base else ""
        return (
            f"; here are adapters{of}, not a model: give that model and train new ones (--lora-r), or, to go on from "
            f"these, {MERGED}"
        )
    return ""


@contextmanager
def _blames(path: Path) -> Iterator[None]:
    """What the library raises in the block, which can be almost anything, is the fault of the configuration."""
    try:
        yield
    except SFTError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path}: not a model's configuration ({told_by(error)})") from error
