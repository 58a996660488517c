"""A model on disk: what a run starts from, and what it leaves."""

from sft_edge.model_files.card import PIPELINES, RESIDUAL_IS, model_card
from sft_edge.model_files.saved import (
    Description,
    SavedModel,
    load_model,
    read_description,
    save_model,
    task_of,
    try_saving,
)
from sft_edge.model_files.source import Source, open_model, open_source, told_name

__all__ = [
    "PIPELINES",
    "RESIDUAL_IS",
    "Description",
    "SavedModel",
    "Source",
    "load_model",
    "model_card",
    "open_model",
    "open_source",
    "read_description",
    "save_model",
    "task_of",
    "told_name",
    "try_saving",
]
