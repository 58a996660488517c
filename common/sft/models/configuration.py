"""A model's configuration as text, and what of it is about the model."""

from __future__ import annotations

from typing import Any, Dict, Mapping

from transformers import PretrainedConfig


def config_text(config: PretrainedConfig) -> str:
    """JSON with every setting: a default may be another in the release that reads it."""
    return str(config.to_json_string(use_diff=False))


def settings_of(config: Mapping[str, Any]) -> Dict[str, Any]:
    """What says what the model is, and not where it was found or by which release it was written down."""
    return {key: value for key, value in config.items() if key != "transformers_version" and not key.startswith("_")}
