"""The options of a run as a file that `--config` reads: what it was trained with, and how to train it again."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Dict

from sft_edge.options.train import RunOptions

OPTIONS_FILE = "options.json"
"""In the output directory."""

_OF_THE_PLACE = {
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "detach",
    "logging_dir",
    "disable_tqdm",
}


def repeatable(options: RunOptions) -> Dict[str, Any]:
    """By name of the field, defaults included, but not where the results go, and of the link its labels alone: where
    the server is, and what is shown to it, is nobody's business who gets the model.
    """
    found: Dict[str, Any] = {}
    for group in options:
        found.update({field.name: getattr(group, field.name) for field in fields(group)})
    link = {field.name for field in fields(options.link)} - {"labels"}
    return {name: value for name, value in found.items() if name not in link | _OF_THE_PLACE}
