"""A model's configuration: what of it the other side is told, and what of it is about the model.

Told is what the forward pass of net_2 reads: sizes, flags, and words of a short list. Everything else stays: names of
classes, where the model lies, settings that the family's own configuration does not have.
"""

from __future__ import annotations

import json
from typing import Any, Dict, Mapping

from transformers import CONFIG_MAPPING, PretrainedConfig

from sft.errors import UnsupportedModelError

_OF_EVERY_FAMILY = (
    *("model_type", "problem_type", "is_decoder", "is_encoder_decoder", "add_cross_attention"),
    *("tie_word_embeddings", "chunk_size_feed_forward", "pruned_heads"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
)
"""Of what the library's base class declares, which has much that is for people, or for generating text."""

_UNDECLARED = (
    *("norm_rel_ebd", "position_buckets", "share_att_key", "attention_head_size", "head_dim", "embedding_size"),
    *("conv_kernel_size", "conv_act", "conv_groups", "cls_dropout", "classifier_dropout", "hidden_dropout"),
    *("sliding_window", "layer_types", "is_causal", "use_bidirectional_attention"),
)
"""What the library's modules look for, whether or not the family's configuration has it."""

_NEVER_READ = ("dtype", "torch_dtype")
"""What settings begin with that no head here reads, whatever a family declares."""

_WORDS = {
    *("regression", "single_label_classification", "multi_label_classification"),
    *("absolute", "relative_key", "relative_key_query", "p2c", "c2p", "p2p", "layer_norm", "none"),
    *("full_attention", "sliding_attention", "chunked_attention"),
    *("first", "last", "mean", "cls_index"),
    *("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional"),
}
"""That settings may have for values, those of rotary positions included, beside names of activations."""

_ROTARY = {
    *("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor"),
    *("low_freq_factor", "high_freq_factor", "short_factor", "long_factor", "attention_factor"),
    *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "full_attention", "sliding_attention"),
}
"""Names within `rope_parameters`, or `rope_scaling` as it was called before."""


def config_text(config: PretrainedConfig) -> str:
    """JSON for the other side, defaults included: they may be others in the release that reads it.

    Raises UnsupportedModelError for a setting that is a word of its own.
    """
    return json.dumps(told_settings(config.to_dict()), indent=2, sort_keys=True)


def told_settings(config: Mapping[str, Any]) -> Dict[str, Any]:
    """Of a configuration, with its `model_type`, what the other side is told; that of what was told is the same.

    Raises UnsupportedModelError for a setting that is a word of its own: it cannot be told what it means.
    """
    model_type = str(config["model_type"])
    declared = CONFIG_MAPPING[model_type]().to_dict()
    names = (declared.keys() - PretrainedConfig().to_dict().keys()).union(_OF_EVERY_FAMILY, _UNDECLARED)
    told: Dict[str, Any] = {"model_type": model_type}
    for name in sorted(names.intersection(config)):
        if name == "model_type" or name.startswith(("_", *_NEVER_READ)):
            continue
        if name.startswith("summary_") and model_type != "electra":  # its multiple choice reads them
            continue
        value = config[name]
        if isinstance(value, Mapping) and name != "pruned_heads":
            value = {key: one for key, one in value.items() if key in _ROTARY}
        if not _is_plain(value):
            raise UnsupportedModelError(
                f"the configuration's {name} is {str(value)[:80]!r}: only numbers, flags and words of the library go "
                "to a cloud"
            )
        told[name] = value
    told["num_labels"] = config.get("num_labels", len(config.get("id2label") or ()))
    return told


def _is_activation(word: str) -> bool:
    from transformers.activations import ACT2FN  # takes seconds, and most of a server's start

    return word in ACT2FN


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        return all(word in _WORDS or _is_activation(word) for word in value.split("|"))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, Mapping):
        return all(str(key).isdigit() or key in _ROTARY for key in value) and all(map(_is_plain, value.values()))
    return value is None or isinstance(value, (bool, int, float))


def settings_of(config: Mapping[str, Any]) -> Dict[str, Any]:
    """What says what the model is, and not where it was found or by which release it was written down."""
    return {key: value for key, value in config.items() if key != "transformers_version" and not key.startswith("_")}
