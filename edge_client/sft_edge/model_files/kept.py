"""A model in which a layer is decomposed already: what a run left, what was exported of it, or what a script saved."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Dict, NamedTuple, Optional

from transformers import PretrainedConfig

from sft.errors import CheckpointError
from sft.models import HEADS, RESIDUALS, Cut, max_positions
from sft.models.families.catalogue import library_class
from sft.tensors.pretrained import index_file, single_file
from sft_edge.model_files.config_file import config_from, read_values
from sft_edge.model_files.description import DECOMPOSED, Description, read_description
from sft_edge.tasks import REGRESSION, SINGLE_LABEL

_TASKS = {"sequence-classification": "text", "question-answering": "squad"}
"""What a model whose task nobody has told can be asked; others are asked with transformers."""


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
    if _is_export(values):
        return Kept(_of_library(values), "model", _cut_of_export(path, values["sft"]))
    return Kept(values, "model", None)


def description_of(path: Path) -> Optional[Description]:
    """What the config.json at `path` says of a model that nobody has described: one that was exported, or saved by a
    script. None where it says of no head. Raises CheckpointError."""
    if not path.is_file():
        return None
    values = read_values(path)
    is_export = _is_export(values)
    config = config_from(path, _of_library(values) if is_export else values, {})
    cut = _cut_of_export(path, values["sft"]) if is_export else None
    classes = values.get("architectures") or []
    if not isinstance(classes, list):
        raise CheckpointError(f"{path}: its 'architectures' is no list of classes")
    head = next((head for head in HEADS if _class_name(config, head) in classes), None)
    if head is None:
        return None
    kind, names = None, None
    if head == "sequence-classification":
        kind = config.problem_type or (REGRESSION if config.num_labels == 1 else SINGLE_LABEL)
        # The library makes up names where nobody has given any.
        names = None if kind == REGRESSION else [str(name) for _, name in sorted((config.id2label or {}).items())]
    return Description(
        task=_TASKS.get(head, ""),
        head=head,
        problem_type=kind,
        label_names=names,
        max_seq_length=max_positions(config),
        base_model="",
        mode="",
        split_layer=None if cut is None else cut.split_layer,
        split_rank=None if cut is None else cut.split_rank,
        residual="none" if cut is None else cut.residual,
    )


def _class_name(config: PretrainedConfig, head: str) -> Optional[str]:
    known = library_class(config, head)
    return None if known is None else str(known.__name__)


def _is_export(values: Dict[str, Any]) -> bool:
    return str(values["model_type"]).startswith("sft-") and isinstance(values.get("sft"), dict)


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
