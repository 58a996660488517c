"""What was trained how: the content of `sft.json`, or what the configuration of a split model says of it."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import List, Optional

import sft
from sft.errors import CheckpointError
from sft.models import HEADS, RESIDUALS, Cut

DESCRIPTION_FILE = "sft.json"

DECOMPOSED = "decomposed"
"""What the weight files of a decomposed model are called."""


@dataclass(frozen=True)
class Description:
    """How a saved model was made, as far as using it needs that: the content of `sft.json`.

    `mode` is empty where nobody has said how the model was trained, and on what.
    """

    task: str
    head: str
    problem_type: Optional[str]
    label_names: Optional[List[str]]
    max_seq_length: int
    base_model: str
    mode: str
    text_fields: Optional[List[str]] = None
    split_layer: Optional[int] = None
    split_rank: Optional[int] = None
    residual: str = "none"
    package_version: str = sft.__version__

    @property
    def cut(self) -> Optional[Cut]:
        """The decomposition that the model kept; None where no layer was decomposed."""
        if self.split_rank is None or self.split_layer is None:
            return None
        return Cut("sft", self.split_layer, self.split_rank, self.residual)

    @property
    def stem(self) -> str:
        """What the weight files are called."""
        return "model" if self.cut is None else DECOMPOSED


def read_description(directory: Path) -> Description:
    """The content of `sft.json`. Raises CheckpointError."""
    path = directory / DESCRIPTION_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{directory}: not a trained model: it holds no {DESCRIPTION_FILE}, as sft-edge train writes it, and no "
            "config.json of a model with a head"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("keep_residual"):  # of a release that knew nothing else
            content["residual"] = "full"
        known = {field.name for field in fields(Description)}
        description = Description(**{name: value for name, value in content.items() if name in known})
        sizes = (description.max_seq_length, description.split_layer, description.split_rank)
        if not all(size is None or type(size) is int for size in sizes) or description.head not in HEADS:
            raise ValueError("a value of the wrong type")
        if description.residual not in RESIDUALS:
            raise ValueError(f"unknown residual {description.residual!r}")
        return description
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not the description of a saved model ({error})") from error
