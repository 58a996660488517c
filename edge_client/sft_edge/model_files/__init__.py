"""A model on disk: what a run starts from, and what it leaves."""

from sft_edge.model_files.card import PIPELINES, RESIDUAL_IS, model_card
from sft_edge.model_files.description import Description
from sft_edge.model_files.labels import Head, head_of, order_of, said_of_head, spellings_of
from sft_edge.model_files.modeling import DENSE, FACTORED, ModelingFile
from sft_edge.model_files.saved import SavedModel, load_model, remove_model, save_model, task_of, try_saving
from sft_edge.model_files.source import Source, open_model, open_source, told_name

__all__ = [
    "DENSE",
    "FACTORED",
    "PIPELINES",
    "RESIDUAL_IS",
    "Description",
    "Head",
    "ModelingFile",
    "SavedModel",
    "Source",
    "head_of",
    "load_model",
    "model_card",
    "open_model",
    "open_source",
    "order_of",
    "remove_model",
    "said_of_head",
    "save_model",
    "spellings_of",
    "task_of",
    "told_name",
    "try_saving",
]
