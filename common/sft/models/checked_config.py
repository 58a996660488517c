"""What of a configuration is used, whoever wrote it: nothing that has code run, and numbers that are numbers."""

from __future__ import annotations

import math
from typing import Any, Dict, Mapping

import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig

from sft.errors import UnsupportedModelError
from sft.models.configuration import told_settings
from sft.models.families.catalogue import check_type, family_of

_IGNORED = (
    # Would have the library run code that travels with a model or lies on the hub, as would those that
    # `_is_ignored` finds by their names:
    "auto_map",
    "quantization_config",
    # Parameters are float32 and outputs are named here, whatever the checkpoint says:
    "dtype",
    "torch_dtype",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "torchscript",
)

_NEVER_NONE = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")

_COUNTS = (
    *_NEVER_NONE,
    *("num_key_value_heads", "head_dim", "embedding_size", "intermediate_size", "hidden_dim", "ffn_dim", "n_inner"),
)
"""What a model has one or more of; GPT-2 and DistilBERT know some under names of their own."""

_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


def without_code(values: Mapping[str, Any]) -> Dict[str, Any]:
    """The content of a config.json without what would have the library ask for code, fetch it or run it."""
    return {name: value for name, value in values.items() if not _is_ignored(name)}


def _is_ignored(name: str) -> bool:
    # The library's own notes in a configuration begin with an underscore, and some win over what they are notes of.
    return name in _IGNORED or name.startswith("_") or "implementation" in name or "kernel" in name


def config_of(values: Mapping[str, Any], **overrides: Any) -> PretrainedConfig:
    """The library's configuration, from the content of a config.json; `overrides` take the place of settings.

    A token of -1 is none: Meta's tokenizer says so, and conversions carry it into config.json. Raises
    UnsupportedModelError, ValueError for a setting that is no number where one is computed with, and whatever the
    library raises.
    """
    model_type = str(values.get("model_type"))
    check_type(model_type)
    if model_type not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} does not know models of type '{model_type}'"
        )
    own_class = CONFIG_MAPPING[model_type]
    _check_counts(values, own_class.attribute_map)
    config: PretrainedConfig = own_class.from_dict(without_code(values), **overrides)
    family_of(config)
    for name in _TOKENS:
        value = getattr(config, name, None)
        listed = value if name == "eos_token_id" and isinstance(value, (list, tuple)) else [value]
        if not all(one is None or type(one) is int for one in listed):
            raise ValueError(f"{name} must be the number of a token, not {_shown(value)}")
        if type(value) is int and value < 0:
            setattr(config, name, None)
    for name, usual in own_class().to_dict().items():
        value = getattr(config, name, None)
        if name not in _TOKENS and type(usual) in (int, float) and not (value is None or _is_number(value)):
            raise ValueError(f"{name} must be a number, not {_shown(value)}")
    return config


def _check_counts(values: Mapping[str, Any], attribute_map: Mapping[str, str]) -> None:
    """Before the library divides by one of them."""
    for name in _COUNTS:
        for key in dict.fromkeys((name, attribute_map.get(name, name))):
            value = values.get(key, 1)
            if not (type(value) is int and value >= 1) and (value is not None or name in _NEVER_NONE):
                raise ValueError(f"{key} must be a whole number of 1 or more, not {_shown(value)}")


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _shown(value: object) -> str:
    return repr(value)[:80]


def other_setting(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first setting in which two descriptions of a model differ; empty where they are of one model.

    Both are read as this release of the library reads them: a setting may have another name or default than in the one
    that wrote it down. One that only one of them has counts if it is on.
    """
    theirs, ours = _as_read(then), _as_read(now)
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name) and (
            (name in theirs and name in ours) or theirs.get(name) or ours.get(name)
        ):
            return name
    return ""


def _as_read(values: Mapping[str, Any]) -> Dict[str, Any]:
    try:
        return told_settings(config_of(values).to_dict())
    except Exception:  # of whatever kind: it is of a release that took it
        return told_settings(values)
