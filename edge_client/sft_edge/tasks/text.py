"""The user's own texts: DIR/train.tsv (or .csv, .jsonl) and DIR/dev.tsv (or validation.*), columns text and label."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import List, Optional, Sequence, Tuple

from sft.errors import DataError, UsageError
from sft_edge.tasks.base import Label, Row
from sft_edge.tasks.files import SUFFIXES, Record, clean_text, read_table, shown
from sft_edge.tasks.sequence import (
    COMMON_TEXT_FIELDS,
    MULTI_LABEL,
    PROBLEM_TYPES,
    REGRESSION,
    SINGLE_LABEL,
    SequenceTask,
    choose_fields,
    column_of,
    parse_number,
    texts_of,
)

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
        self._class_ids = {name: index for index, name in enumerate(self.label_names or [])}
        self._number_of_texts: Optional[int] = None

    @classmethod
    def from_train_file(cls, data_dir: Path, problem_type: Optional[str] = None) -> TextTask:
        """The task that DIR/train.* describes: its labels in sorted order are the classes.

        Without `problem_type`, labels that are lists mean multi_label_classification, numbers of which some are not
        whole mean regression, and all else means single_label_classification. Raises DataError and UsageError.
        """
        path = find_file(data_dir, "train")
        labels = [Record(one.place, {"label": column_of(one, "label")}) for one in read_table(path)]
        if not labels:
            raise DataError(f"{path}: holds no rows")
        problem_type = problem_type or infer_problem_type(labels)
        if problem_type not in (SINGLE_LABEL, MULTI_LABEL):
            return cls(data_dir, problem_type)
        names = sorted({name for record in labels for name in label_names_of(record, problem_type)})
        if len(names) < (2 if problem_type == SINGLE_LABEL else 1):
            raise DataError(f"{path}: all rows have the same label {shown(names)}; there is nothing to learn")
        return cls(data_dir, problem_type, names)

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
        names = label_names_of(record, self.problem_type)
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


def infer_problem_type(labels: Sequence[Record]) -> str:
    """The problem type that labels speak of. Raises DataError naming the row that does not go with the others."""
    lists = [isinstance(record.fields["label"], list) for record in labels]
    if any(lists):
        if not all(lists):
            labels[lists.index(False)].fail("label is not a list of names, as in other rows")
        return MULTI_LABEL
    numbers = [_as_number(record.fields["label"]) for record in labels]
    if all(whole for _, whole in numbers):
        return SINGLE_LABEL
    strange = [record for record, (is_number, _) in zip(labels, numbers) if not is_number]
    if strange:
        value = shown(strange[0].fields["label"])
        strange[0].fail(f"label {value} is not a number, as in other rows; correct it, or pass --problem-type")
    return REGRESSION


def _as_number(value: object) -> Tuple[bool, bool]:
    """Whether the label is a number at all, and whether it may be a class: all but numbers spelled with a fraction."""
    if isinstance(value, float):
        return True, False
    if isinstance(value, str):
        try:
            float(value)
        except ValueError:
            return False, True
        return True, value.strip().lstrip("+-").isdigit() or not any(character.isdigit() for character in value)
    return isinstance(value, int) and not isinstance(value, bool), True


def label_names_of(record: Record, problem_type: str) -> List[str]:
    """Names in the label column: one, or any number of them for several labels. Raises DataError."""
    value = column_of(record, "label")
    if problem_type == MULTI_LABEL:
        if not isinstance(value, list):
            record.fail(f"label {shown(value)} is not a list of names; several labels need a .jsonl file")
        return [clean_text(name, "a label", record.place).strip() for name in value]
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    return [clean_text(value, "label", record.place).strip()]
