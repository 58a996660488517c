"""Which architectures and heads there are."""

from __future__ import annotations

from typing import Any, Optional, Tuple

from transformers import PretrainedConfig

from sft.errors import UnsupportedModelError
from sft.models.families.bert import BERT
from sft.models.families.deberta import DEBERTA
from sft.models.families.distilbert import DISTILBERT
from sft.models.families.family import Family
from sft.models.families.gemma import GEMMA
from sft.models.families.gpt2 import GPT2
from sft.models.families.llama import LLAMA
from sft.models.families.opt import OPT
from sft.models.families.roberta import ROBERTA
from sft.models.heads import HEADS, head_named, is_body

_ALL = (BERT, ROBERTA, DISTILBERT, DEBERTA, GPT2, OPT, LLAMA, GEMMA)
_FAMILIES = {model_type: family for family in _ALL for model_type in family.model_types}


def family_of(config: PretrainedConfig) -> Family:
    """The family file for a configuration. Raises UnsupportedModelError."""
    check_type(config.model_type)
    family = _FAMILIES[config.model_type]
    reason = family.refuses(config)
    if reason:
        raise UnsupportedModelError(f"this model of type '{config.model_type}' cannot be cut: {reason}")
    return family


def check_type(model_type: object) -> None:
    """Raises UnsupportedModelError unless there is a family for it."""
    if model_type not in _FAMILIES:
        known = ", ".join(sorted(_FAMILIES))
        shown = str(model_type)[:80]
        if shown.startswith("sft-"):  # opened with the code that travels with it
            raise UnsupportedModelError(
                f"this model of type '{shown}' was split before: cut the model that it was made from alike, and load "
                "these weights with load_state_dict"
            )
        raise UnsupportedModelError(f"models of type '{shown}' cannot be cut; supported types: {known}")


def check_head(config: PretrainedConfig, head: str) -> None:
    """Raises UnsupportedModelError for a head that no model, or not this one, is trained with."""
    if is_body(head):
        return
    if head not in HEADS:
        raise UnsupportedModelError(f"there is no head '{head}'; supported heads: {', '.join(HEADS)}")
    heads = heads_of(config)
    if head not in heads:
        raise UnsupportedModelError(
            f"models of type '{config.model_type}' are not trained with head '{head}'; heads that they have: "
            f"{', '.join(heads)}"
        )
    if head == "multiple-choice" and getattr(config, "summary_type", "first") != "first":
        raise UnsupportedModelError(
            f"with summary_type {config.summary_type!r:.80} a choice is read off its padding, which does not travel: "
            "set it to 'first'"
        )


def heads_of(config: PretrainedConfig) -> Tuple[str, ...]:
    """Those that the library has for models of this type, and this package, too. Raises UnsupportedModelError."""
    return tuple(head for head in family_of(config).heads if library_class(config, head) is not None)


def max_positions(config: PretrainedConfig) -> int:
    """The longest sequence, in tokens, that a model takes."""
    positions = int(config.max_position_embeddings)
    return positions - int(config.pad_token_id) - 1 if family_of(config).positions_after_padding else positions


def library_class(config: PretrainedConfig, head: str) -> Any:
    """The library's class of models with a head; None where it has none."""
    return head_named(head).auto_class._model_mapping.get(type(config), None)


def head_of(model: Any) -> str:
    """The head of a model of the library. Raises UnsupportedModelError when it has none of ours."""
    config = getattr(model, "config", None)
    if isinstance(config, PretrainedConfig):
        for head in heads_of(config):
            if isinstance(model, library_class(config, head)):
                return head
    raise UnsupportedModelError(
        f"a {type(model).__name__} cannot be cut; give a transformers model with one of the heads {', '.join(HEADS)}"
    )


def body_of(model: Any) -> Optional[str]:
    """What `head_named` calls a base model of the library that can be cut; None for all others."""
    config = getattr(model, "config", None)
    if not isinstance(config, PretrainedConfig) or config.model_type not in _FAMILIES:
        return None
    if not isinstance(model, library_class(config, "body")):
        return None
    return "body-without-pooler" if getattr(model, "pooler", model) is None else "body"
