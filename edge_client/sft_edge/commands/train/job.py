"""What is trained on what; and what only the end of a run would find out, tried before it begins."""

from __future__ import annotations

from pathlib import Path
from typing import List, NamedTuple, Sequence

import torch
from torch import Tensor

from sft.errors import DataError, UsageError
from sft.models import max_positions
from sft_edge.model_files import Description, Source, try_saving
from sft_edge.options import RunOptions
from sft_edge.systems import cut_of
from sft_edge.tasks import Feature, Task
from sft_edge.training import EvaluationSet, evaluate_with

_FEW = 8


class Job(NamedTuple):
    """What is trained on what."""

    task: Task
    source: Source
    features: List[Feature]
    validation: EvaluationSet
    notes: Sequence[str] = ()
    """What is said before it begins."""


def description_of(options: RunOptions, job: Job) -> Description:
    """What the model that comes of it says of itself."""
    task, source, cut = job.task, job.source, cut_of(options.cut, job.source)
    return Description(
        task=task.name,
        text_fields=list(task.text_fields),
        head=task.head,
        problem_type=task.problem_type,
        label_names=task.label_names,
        max_seq_length=options.model.max_seq_length,
        base_model=source.name or ("" if source.checkpoint is None else "a model of the device"),
        mode=options.cut.mode,
        split_layer=cut.split_layer if cut else None,
        split_rank=cut.split_rank or None if cut else None,
        residual=cut.residual if cut else options.cut.residual,
    )


def try_end(job: Job, options: RunOptions, output_dir: Path) -> None:
    """Judges a few rows and saves what is not weights: what is in the way of either is known before training.

    Raises DataError for tokens that the model does not have, UsageError for a package that is missing, StorageError.
    """
    check_tokens(job.source, job.features, "training")
    check_tokens(job.source, job.validation.features, "validation")
    _try_judging(job.task, job.validation)
    try_saving(output_dir, job.source.config, job.source.tokenizer, description_of(options, job))


def check_tokens(source: Source, features: Sequence[Feature], which: str) -> None:
    """Raises DataError where a row has ids or a length that the model has no embedding for."""
    config, longest = source.config, max_positions(source.config)
    sizes = {"input_ids": config.vocab_size, "token_type_ids": getattr(config, "type_vocab_size", 0)}
    for feature in features:
        if feature.length > longest:
            raise DataError(f"{which} row {feature.row + 1} has {feature.length} tokens, the model takes {longest}")
        for name, size in sizes.items():
            highest = int(feature.inputs[name].max(initial=0)) if size and name in feature.inputs else 0
            if highest >= (size or 1):
                raise DataError(
                    f"{which} row {feature.row + 1}: the tokenizer gives {name} up to {highest}, the model knows "
                    f"0 to {size - 1}; it is another model's tokenizer"
                )


def _try_judging(task: Task, data: EvaluationSet) -> None:
    few = data.features[:_FEW]
    rows = data.rows[: few[-1].row + 1] if few else []

    def no_answer(features: Sequence[Feature]) -> List[Tensor]:
        of_tokens = task.head == "question-answering"
        return [torch.zeros((f.length, task.num_labels) if of_tokens else task.num_labels) for f in features]

    try:
        evaluate_with(no_answer, task, EvaluationSet(rows, few), _FEW)
    except ImportError as error:
        raise UsageError(f"task {task.name} is judged with a package that is not installed here: {error}") from error
