"""The modeling file that travels with an exported model whose architecture the library does not have."""

from __future__ import annotations

import inspect
from typing import Any

from sft.models.split_layer import AwaitingResidual
from sft_edge.commands.export.exported import modeling_sft

CODE_FILE = "modeling_sft.py"

_FOR_MYPY = "# mypy: allow-untyped-calls\n"
_FOR_RUFF = "  # noqa: F401"  # what is put in uses all that is imported
_IMPORT = "from sft.models.split_layer import AwaitingResidual\n"


def modeling_code(model: Any, auto_class: str) -> str:
    """`exported/modeling_sft.py`, which is written for one of BERT's classes, for the class of this library model.

    What the model was trained with is put in where it is imported, so the two cannot differ.
    """
    text = inspect.getsource(modeling_sft)
    for old, new in (
        (_FOR_MYPY, ""),
        (_FOR_RUFF, ""),
        (_IMPORT, "\n" + inspect.getsource(AwaitingResidual)),
        ("AutoModelForSequenceClassification", auto_class),
        ("BertForSequenceClassification", type(model).__name__),
        ("BertModel", type(model.base_model).__name__),
        ("BertConfig", type(model.config).__name__),
        ("sft-bert", model_type(model)),
    ):
        if old not in text:
            raise AssertionError(f"'{old}' is not in the file that exports are made from")
        text = text.replace(old, new)
    return text


def model_type(model: Any) -> str:
    """What config.json calls the architecture."""
    return f"sft-{model.config.model_type}"


def config_name(model: Any) -> str:
    """The class of the configuration."""
    return f"Split{type(model.config).__name__}"


def base_name(model: Any) -> str:
    """The class of the base model."""
    return f"Split{type(model.base_model).__name__}"
