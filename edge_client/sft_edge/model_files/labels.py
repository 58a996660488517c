"""What a checkpoint says of its head, beside what a task makes of it."""

from __future__ import annotations

import math
import re
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence

from sft.models import build_whole
from sft_edge.model_files.source import Source, values_of
from sft_edge.options import ModelOptions
from sft_edge.tasks import Task


class Head(NamedTuple):
    """What config.json says a head is for."""

    label_names: List[str]
    """By class id; empty where it says nothing."""

    problem_type: Optional[str]

    @property
    def is_named(self) -> bool:
        """Whether the names are somebody's, not those that the library makes up."""
        return any(not re.fullmatch(rf"label_{i}", name, re.IGNORECASE) for i, name in enumerate(self.label_names))


def head_of(options: ModelOptions) -> Head:
    """Of the model that the options name. Raises CheckpointError."""
    return head_of_values(values_of(options))


def head_of_values(values: Mapping[str, Any]) -> Head:
    """Out of the content of a config.json, whatever stands there."""
    names: List[str] = []
    for key in ("id2label", "label2id"):
        found = values.get(key)
        if isinstance(found, dict) and found and not names:
            pairs = found.items() if key == "id2label" else [(number, name) for name, number in found.items()]
            by_id = {int(number): str(name) for number, name in pairs if re.fullmatch(r"\d{1,6}", str(number))}
            if sorted(by_id) == list(range(len(found))):
                names = [by_id[i] for i in range(len(found))]
    problem_type = values.get("problem_type")
    return Head(names, problem_type if isinstance(problem_type, str) else None)


def order_of(head: Head, own: Sequence[str], spellings: Mapping[str, str]) -> Optional[List[str]]:
    """A task's label names, in the order that the model's head has them; None where those are other labels.

    `spellings`: how else a task's files spell its labels. Case, and what stands between words, do not matter. Names
    that the library makes up are numbers: of labels that are numbers, too, each is its own.
    """
    if not head.is_named:
        if {_plain(name) for name in own} == {str(i) for i in range(len(own))}:
            return sorted(own, key=lambda name: int(_plain(name)))
        return list(own)
    if sorted(head.label_names) == sorted(own):
        return list(head.label_names)
    known: Dict[str, str] = {**{_plain(other): name for other, name in spellings.items()}}
    known.update({_plain(name): name for name in own})
    found = [known.get(_plain(name), "") for name in head.label_names]
    return found if sorted(found) == sorted(own) else None


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "_", re.sub(r"^label_(?=\d+$)", "", name.strip().casefold()))


def said_of_head(source: Source, head: Head, task: Task, usual: Optional[Sequence[str]]) -> List[str]:
    """Lines about a head that a run does not begin anew: what it was for, where the task is another.

    `usual` is the order in which the task has its labels by itself.
    """
    if source.checkpoint is None:
        return []
    whole = build_whole(source.config, task.head)
    prefix = whole.model.base_model_prefix
    shapes = {name: tuple(x.shape) for name, x in whole.whole_parameters().items() if not name.startswith(prefix + ".")}
    held = {name: source.checkpoint.shape_of(name, prefix) for name in shapes}
    if not any(held.values()):
        return []
    if any(shape is not None and math.prod(shape) != math.prod(shapes[name]) for name, shape in held.items()):
        had = next(shape[0] for name, shape in held.items() if shape and shape != shapes[name])
        had_them = f"the model's head has {had} outputs{_listed(head)}"
        return [f"{had_them}, the task {task.num_labels}: its last layer is drawn anew"]
    own = task.label_names
    if own is not None and head.is_named and order_of(head, own, spellings_of(task)) is None:
        return [f"the model's head was trained for other labels{_listed(head)}: it goes on as one for {_few(own)}"]
    if head.problem_type not in (None, task.problem_type):
        return [f"the model's head was trained for {head.problem_type}: it goes on with {task.problem_type}"]
    if own is not None and usual is not None and list(own) != list(usual):
        return [f"classes are in the order that the model has them: {_few(own)}"]
    return []


def spellings_of(task: Task) -> Mapping[str, str]:
    """How else a task's files spell its labels."""
    spec = getattr(task, "spec", None)
    return {} if spec is None else dict(spec.labels)


def _listed(head: Head) -> str:
    return f" ({_few(head.label_names)})" if head.is_named else ""


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(name[:40] for name in names[:8])
    return shown + (f", and {len(names) - 8} more" if len(names) > 8 else "")
