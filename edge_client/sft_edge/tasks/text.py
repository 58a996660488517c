"""The user's own texts: DIR/train.tsv (or .csv, .jsonl) and DIR/dev.tsv (or validation.*), columns text and label."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import List, Optional, Sequence, Tuple

from sft.errors import DataError, UsageError
from sft_edge.tasks.base import Label, Row
from sft_edge.tasks.files import SUFFIXES, Record, column_of, read_table, shown
from sft_edge.tasks.labels import (
    MULTI_LABEL,
    PROBLEM_TYPES,
    REGRESSION,
    SINGLE_LABEL,
    class_name,
    class_names,
    infer_problem_type,
)
from sft_edge.tasks.sequence import COMMON_TEXT_FIELDS, SequenceTask, choose_fields, parse_number, texts_of

_STEMS = {"train": ("train",), "validation": ("dev", "validation")}

_METRICS = {
    SINGLE_LABEL: ("accuracy", "f1_macro"),
    MULTI_LABEL: ("f1", "accuracy"),
    REGRESSION: ("pearson", "spearmanr", "mse"),
}


class TextTask(SequenceTask):
    """Classification or regression of texts, or of pairs of texts.

    Whether a row is a pair is seen in the first file that is read; until then both are taken.
    """

    name = "text"
    text_fields: Tuple[str, ...] = ("text",)

    def __init__(
        self,
        data_dir: Optional[Path] = None,
        problem_type: str = SINGLE_LABEL,
        label_names: Optional[Sequence[str]] = None,
    ) -> None:
        """A task that is known, as that of a model trained before. `label_names` go with every type but regression."""
        super().__init__(data_dir)
        if problem_type not in PROBLEM_TYPES:
            raise UsageError(f"no problem type {problem_type!r}; there are {', '.join(PROBLEM_TYPES)}")
        self.problem_type = problem_type
        self.metric_names = _METRICS[problem_type]
        self.main_metric = self.metric_names[0]
        self.num_labels = 1
        if problem_type != REGRESSION:
            if not label_names:
                raise UsageError("task text needs --data-dir, to find its labels in the train file")
            self.label_names = list(label_names)
            self.num_labels = len(self.label_names)
        # As a file's labels are called now: a model of an earlier release may have a class 1.0.
        names = [class_name(name, "a label", "the model") for name in self.label_names or []]
        self._class_ids = {name: index for index, name in enumerate(names)}
        self._number_of_texts: Optional[int] = None

    @classmethod
    def from_train_file(cls, data_dir: Path, problem_type: Optional[str] = None) -> TextTask:
        """The task that DIR/train.* describes: its labels in sorted order are the classes.

        Without `problem_type` it is inferred, as `infer_problem_type` says. Raises DataError and UsageError.
        """
        path = find_file(data_dir, "train")
        labels = [Record(one.place, {"label": column_of(one, "label")}) for one in read_table(path)]
        if not labels:
            raise DataError(f"{path}: holds no rows")
        given = problem_type
        problem_type, seen = (given, "") if given else infer_problem_type(labels)
        if problem_type not in (SINGLE_LABEL, MULTI_LABEL):
            task = cls(data_dir, problem_type)
            task.inferred = (
                f"{path}: {seen}: a regression; --problem-type {SINGLE_LABEL} makes them classes" if seen else ""
            )
            return task
        names = sorted({name for record in labels for name in class_names(record, problem_type)})
        if len(names) < (2 if problem_type == SINGLE_LABEL else 1):
            raise DataError(f"{path}: all rows have the same label {shown(names)}; there is nothing to learn")
        task = cls(data_dir, problem_type, names)
        known = ", ".join(name[:40] for name in names[:10]) + (", ..." if len(names) > 10 else "")
        several = ", of which a row has any number" if problem_type == MULTI_LABEL else ""
        task.inferred = f"{path}: {seen + ': ' if seen else ''}{len(names)} classes{several}, in this order: {known}"
        if "number" in seen:
            task.inferred += f"; --problem-type {REGRESSION} makes them numbers"
        return task

    def read(self, split: str, limit: Optional[int] = None) -> List[Row]:
        if self.data_dir is None:
            raise UsageError("task text reads files: pass --data-dir")
        path = find_file(self.data_dir, split)
        rows: List[Row] = []
        fields: Tuple[str, ...] = ()
        for record in islice(read_table(path), limit):
            fields = fields or choose_fields(record, self.input_fields())
            rows.append(Row(texts_of(record, fields), self._label(record)))
        if not rows:
            raise DataError(f"{path}: holds no rows")
        self.text_fields = fields
        self._number_of_texts = len(fields)
        return rows

    def input_fields(self) -> List[Tuple[str, ...]]:
        wanted = self._number_of_texts
        return [fields for fields in COMMON_TEXT_FIELDS if wanted is None or len(fields) == wanted]

    def expect(self, text_fields: Sequence[str]) -> None:
        super().expect(text_fields)
        self._number_of_texts = len(self.text_fields)

    def row(self, *texts: str) -> Row:
        if self._number_of_texts is None and len(texts) == 2 and all(text.strip() for text in texts):
            return Row(texts)
        return super().row(*texts)

    def _label(self, record: Record) -> Label:
        if self.problem_type == REGRESSION:
            return parse_number(column_of(record, "label"), record)
        names = class_names(record, self.problem_type)
        for name in names:
            if name not in self._class_ids:
                known = ", ".join(list(self._class_ids)[:10]) + (", ..." if len(self._class_ids) > 10 else "")
                record.fail(f"label {shown(name)} is not one of {known}")
        if self.problem_type == SINGLE_LABEL:
            return self._class_ids[names[0]]
        return tuple(float(name in names) for name in self._class_ids)


def find_file(data_dir: Path, split: str) -> Path:
    """The one file of a split in the folder. Raises DataError when there is none, or more than one."""
    names = [stem + suffix for stem in _STEMS[split] for suffix in SUFFIXES]
    found = [data_dir / name for name in names if (data_dir / name).is_file()]
    if not found:
        raise DataError(f"{data_dir}: no {split} file; one of {', '.join(names)} must be there")
    if len(found) > 1:
        raise DataError(f"{data_dir}: more than one {split} file: {', '.join(path.name for path in found)}; keep one")
    return found[0]
