"""What a run starts from: a task, with its classes in the model's order, a model, and what is said of the two."""

from __future__ import annotations

from typing import List, NamedTuple, Optional

from sft_edge.model_files import Head, Source, head_of, open_source, order_of, said_of_head, spellings_of
from sft_edge.options import DataOptions, ModelOptions
from sft_edge.tasks import Task, make_task


class Start(NamedTuple):
    """A task and a model that go together."""

    task: Task
    source: Source
    notes: List[str]
    """Lines for who started the run: what was inferred, and what is other than they may think."""


def open_start(data: DataOptions, options: ModelOptions) -> Start:
    """Finds the task and opens the model. Raises what `make_task` and `open_source` raise."""
    task = make_task(data.task, data.data_dir, data.problem_type)
    head = head_of(options)
    usual = task.label_names
    task = _in_order(task, head, data)
    source = open_source(options, task.config_overrides())
    notes = said_of_head(source, head, task, usual)
    reads = source.tokenizer.model_max_length
    if reads < options.max_seq_length:
        notes.append(
            f"texts are cut to {reads} tokens, which is all that the tokenizer gives (its model_max_length), not to "
            f"--max-seq-length {options.max_seq_length}"
        )
    return Start(task, source, notes)


def _in_order(task: Task, head: Head, data: DataOptions) -> Task:
    order: Optional[List[str]] = None
    if task.label_names is not None and head.label_names:
        order = order_of(head, task.label_names, spellings_of(task))
    if order is None or order == task.label_names:
        return task
    return make_task(data.task, data.data_dir, task.problem_type, order)
