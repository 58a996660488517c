"""The eight GLUE tasks of the paper, laid out as the official download: DIR/SST-2/train.tsv, DIR/SST-2/dev.tsv, ..."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from sft.errors import DataError, UsageError
from sft_edge.tasks.base import Label, Row
from sft_edge.tasks.files import MAX_LINE_BYTES, Record, column_of, numbered_lines, read_table, read_tsv, shown
from sft_edge.tasks.labels import REGRESSION, SINGLE_LABEL, class_name
from sft_edge.tasks.sequence import SequenceTask, parse_number, texts_of

if TYPE_CHECKING:
    from numpy.typing import NDArray


class GlueSpec(NamedTuple):
    """Where a task lies and what its columns mean."""

    folder: str
    text_fields: Tuple[str, ...]
    label_field: str
    labels: Dict[str, str]
    """Name by the spelling in the file, in the order of the class ids; empty for a score of 0 to 5."""

    metric_names: Tuple[str, ...]
    """As in transformers' run_glue; the first is the one the paper's Table I goes by."""

    validation: str = "dev.tsv"
    header: Optional[Tuple[str, ...]] = None
    """Names of the columns where the file does not name them."""

    torn_lines: int = 0
    """How many lines with too few fields to pass over: the official QQP has a few questions with a line end inside."""


_ENTAILMENT = {"entailment": "entailment", "not_entailment": "not_entailment"}
_MNLI = {name: name for name in ("entailment", "neutral", "contradiction")}
_PAIR = ("sentence1", "sentence2")

GLUE = {
    "sst2": GlueSpec("SST-2", ("sentence",), "label", {"0": "negative", "1": "positive"}, ("accuracy",)),
    "cola": GlueSpec(
        "CoLA",
        ("sentence",),
        "label",
        {"0": "unacceptable", "1": "acceptable"},
        ("matthews_correlation",),
        header=("source", "label", "star", "sentence"),
    ),
    "mrpc": GlueSpec(
        "MRPC",
        ("#1 String", "#2 String"),
        "Quality",
        {"0": "not_equivalent", "1": "equivalent"},
        ("accuracy", "f1"),
    ),
    "rte": GlueSpec("RTE", _PAIR, "label", _ENTAILMENT, ("accuracy",)),
    "stsb": GlueSpec("STS-B", _PAIR, "score", {}, ("pearson", "spearmanr")),
    "qnli": GlueSpec("QNLI", ("question", "sentence"), "label", _ENTAILMENT, ("accuracy",)),
    "qqp": GlueSpec(
        "QQP",
        ("question1", "question2"),
        "is_duplicate",
        {"0": "not_duplicate", "1": "duplicate"},
        ("accuracy", "f1"),
        torn_lines=20,
    ),
    "mnli": GlueSpec("MNLI", _PAIR, "gold_label", _MNLI, ("accuracy",), validation="dev_matched.tsv"),
}


class GlueTask(SequenceTask):
    """One of `GLUE`."""

    def __init__(self, name: str, data_dir: Optional[Path] = None, label_names: Optional[Sequence[str]] = None) -> None:
        """`label_names` is the order of the class ids in a model trained before; without it, GLUE's own.

        Raises UsageError if those are other labels than the task's.
        """
        super().__init__(data_dir)
        self.name = name
        self.spec = GLUE[name]
        self.text_fields = self.spec.text_fields
        self.metric_names = self.spec.metric_names
        self.main_metric = self.metric_names[0]
        if self.spec.labels:
            self.problem_type = SINGLE_LABEL
            self.label_names = _order(name, list(self.spec.labels.values()), label_names)
            self.num_labels = len(self.label_names)
        else:
            self.problem_type = REGRESSION
            self.num_labels = 1

    def read(self, split: str, limit: Optional[int] = None) -> List[Row]:
        path = self.file(self.spec.folder, {"train": "train.tsv", "validation": self.spec.validation}, split)
        records = read_tsv(path, self.spec.header, self.spec.torn_lines)
        rows = [Row(texts_of(record, self.text_fields), self._label(record)) for record in islice(records, limit)]
        if not rows:
            raise DataError(f"{path}: holds no rows")
        return rows

    def records(self, path: Path) -> Iterator[Record]:
        """See SequenceTask; where the official files have no header, one to predict need not have one either."""
        if path.suffix != ".tsv" or self.spec.header is None:
            return read_table(path)
        _, first = next(numbered_lines(path, MAX_LINE_BYTES), (1, ""))
        values = [value.strip() for value in first.split("\t")]
        named = any(set(fields) <= set(values) for fields in self.input_fields())
        return read_tsv(path, None if named or len(values) != len(self.spec.header) else self.spec.header)

    def as_scored(self, labels: NDArray[np.float64]) -> NDArray[np.float64]:
        """Class ids as GLUE numbers them, in whatever order the model has them: F1 is that of class 1."""
        if self.label_names is None:
            return labels
        own = list(self.spec.labels.values())
        of_id: NDArray[np.float64] = np.asarray([own.index(name) for name in self.label_names], dtype=np.float64)
        scored: NDArray[np.float64] = of_id[labels.astype(int)]
        return scored

    def _label(self, record: Record) -> Label:
        value = column_of(record, self.spec.label_field)
        if self.label_names is None:
            return parse_number(value, record)
        name = self.spec.labels.get(class_name(value, "label", record.place))
        if name is None:
            record.fail(f"label {shown(value)} is not one of {', '.join(self.spec.labels)}")
        return self.label_names.index(name)


def _order(name: str, own: List[str], given: Optional[Sequence[str]]) -> List[str]:
    if given is None or [f"LABEL_{index}" for index in range(len(own))] == list(given):  # transformers' placeholders
        return own
    if sorted(given) != sorted(own):
        raise UsageError(f"task {name} has the labels {', '.join(own)}; the model's are {', '.join(given)}")
    return list(given)
