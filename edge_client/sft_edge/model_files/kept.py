"""A model in which a layer is decomposed already: what a run left, or what was exported of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Dict, NamedTuple, Optional

from sft.errors import CheckpointError
from sft.models import RESIDUALS, Cut
from sft.tensors.pretrained import index_file, single_file
from sft_edge.model_files.saved import DECOMPOSED, read_description


class Kept(NamedTuple):
    """A directory's config.json as the library knows such models, and what else its weights are."""

    values: Dict[str, Any]
    stem: str
    """What the weight files are called."""
    cut: Optional[Cut]
    """None where no layer is decomposed."""


def kept_of(path: Path, values: Dict[str, Any]) -> Kept:
    """`values` is the content of the config.json at `path`. Raises CheckpointError."""
    directory = path.parent
    if any((directory / name(DECOMPOSED)).is_file() for name in (single_file, index_file)):
        return Kept(values, DECOMPOSED, read_description(directory).cut)
    if values["model_type"].startswith("sft-") and isinstance(values.get("sft"), dict):
        return Kept(_of_library(values), "model", _cut_of_export(path, values["sft"]))
    return Kept(values, "model", None)


def _of_library(values: Dict[str, Any]) -> Dict[str, Any]:
    """Without the code that travels with an export: what it computes is built in here."""
    rest = {name: value for name, value in values.items() if name not in ("sft", "auto_map")}
    return {**rest, "model_type": values["model_type"][len("sft-") :]}


def _cut_of_export(path: Path, split: Dict[str, Any]) -> Cut:
    block = re.search(r"\.(\d{1,4})\.", str(split.get("layer")))
    rank, residual = split.get("rank"), split.get("residual")
    if block is None or type(rank) is not int or residual not in RESIDUALS:
        raise CheckpointError(f"{path}: its 'sft' does not say which layer is split; export the model again")
    return Cut("sft", int(block.group(1)) + 1, rank, residual)
