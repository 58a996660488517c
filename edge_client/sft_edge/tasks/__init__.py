"""What can be trained: the nine tasks of the paper and the user's own texts."""

from __future__ import annotations

from pathlib import Path
from typing import Optional, Sequence

from sft.errors import UsageError
from sft_edge.tasks.base import SPLITS, Answer, Feature, Row, Task, batches_of
from sft_edge.tasks.glue import GLUE, GlueTask
from sft_edge.tasks.labels import PROBLEM_TYPES, REGRESSION, SINGLE_LABEL
from sft_edge.tasks.squad import SquadTask
from sft_edge.tasks.synthetic import examples, write_synthetic
from sft_edge.tasks.text import TextTask

TASK_NAMES = (*GLUE, SquadTask.name, TextTask.name)

__all__ = [
    "PROBLEM_TYPES",
    "REGRESSION",
    "SINGLE_LABEL",
    "SPLITS",
    "TASK_NAMES",
    "Answer",
    "Feature",
    "Row",
    "Task",
    "batches_of",
    "examples",
    "make_task",
    "write_synthetic",
]


def make_task(
    name: str,
    data_dir: Optional[Path] = None,
    problem_type: Optional[str] = None,
    label_names: Optional[Sequence[str]] = None,
) -> Task:
    """The task that `--task` names.

    A trained model's problem type and label names, in the order of its class ids, rebuild the task that it was trained
    for, without its train file. Otherwise task "text" reads `data_dir`'s train file once to find them. Raises
    UsageError for what does not go together, and DataError.
    """
    if name not in TASK_NAMES:
        raise UsageError(f"no task {name!r}; there are {', '.join(TASK_NAMES)}")
    if name == TextTask.name:
        # Of a regression nothing else is to be found in the train file.
        if label_names is not None or problem_type == REGRESSION:
            return TextTask(data_dir, problem_type or SINGLE_LABEL, label_names)
        if data_dir is None:
            raise UsageError("task text finds its labels in the train file: pass --data-dir")
        return TextTask.from_train_file(data_dir, problem_type)
    task = SquadTask(data_dir) if name == SquadTask.name else GlueTask(name, data_dir, label_names)
    if problem_type is not None and problem_type != task.problem_type:
        raise UsageError(f"task {name} is {task.problem_type or task.head}: --problem-type is for task text")
    return task
