"""What all tasks with one prediction a sequence share: GLUE's and the user's own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Dict, Iterator, List, Sequence, Tuple, cast

import numpy as np
import torch
from torch import Tensor

from sft.errors import DataError
from sft_edge.tasks import metrics
from sft_edge.tasks.base import Feature, Row, Task, check_finite, padding_of, sequence_limit
from sft_edge.tasks.files import Record, clean_text, column_of, no_column, numbered_lines, read_table, shown
from sft_edge.tasks.labels import MULTI_LABEL, REGRESSION, SINGLE_LABEL

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase


COMMON_TEXT_FIELDS = (("text",), ("sentence",), ("sentence1", "sentence2"))
"""Columns in which any file may hold its texts."""

ROWS_AT_ONCE = 1000
"""Rows a call of the tokenizer: enough to be fast, few enough that what it returns stays small."""


class SequenceTask(Task):
    """One label, several labels or a number for one text or a pair of texts."""

    head = "sequence-classification"
    problem_type: str
    metric_names: Tuple[str, ...]

    def read_inputs(self, path: Path) -> List[Row]:
        candidates = self.input_fields()
        if path.suffix == ".txt" and any(len(fields) == 1 for fields in candidates):
            rows = [Row((line,)) for _, line in numbered_lines(path)]
        else:
            rows = []
            fields: Tuple[str, ...] = ()
            for record in self.records(path):
                fields = fields or choose_fields(record, candidates)
                rows.append(Row(texts_of(record, fields)))
        if all(row.is_blank for row in rows):
            raise DataError(f"{path}: holds no rows")
        return rows

    def records(self, path: Path) -> Iterator[Record]:
        """The rows of a table to predict."""
        return read_table(path)

    def input_fields(self) -> List[Tuple[str, ...]]:
        """Columns that may hold the texts of a file to predict, best first."""
        common = [fields for fields in COMMON_TEXT_FIELDS if len(fields) == len(self.text_fields)]
        return [self.text_fields, *common]

    def config_overrides(self) -> Dict[str, object]:
        # num_labels first: setting it resets the two names below.
        overrides: Dict[str, object] = {"num_labels": self.num_labels, "problem_type": self.problem_type}
        if self.label_names is not None:
            overrides["id2label"] = dict(enumerate(self.label_names))
            overrides["label2id"] = {name: index for index, name in enumerate(self.label_names)}
        return overrides

    def encode(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> List[Feature]:
        features: List[Feature] = []
        if not rows:
            return features
        limit = sequence_limit(tokenizer, max_seq_length, room=len(rows[0].texts), pair=len(rows[0].texts) == 2)
        for begin in range(0, len(rows), ROWS_AT_ONCE):
            some = rows[begin : begin + ROWS_AT_ONCE]
            columns = [list(column) for column in zip(*(row.texts for row in some))]
            encoding = tokenizer(*columns, truncation=True, max_length=limit, return_attention_mask=False)
            padding = padding_of(tokenizer, list(encoding.keys()))
            for index, row in enumerate(some):
                inputs = {name: np.asarray(encoding[name][index], dtype=np.int32) for name in padding}
                features.append(Feature(begin + index, inputs, padding, row.label))
        return features

    def collate_labels(self, features: Sequence[Feature]) -> Dict[str, Tensor]:
        labels = [feature.label for feature in features]
        if any(label is None for label in labels):
            return {}
        return {
            "labels": torch.tensor(labels, dtype=torch.int64 if self.problem_type == SINGLE_LABEL else torch.float32)
        }

    def metrics(self, logits: Sequence[Tensor], features: Sequence[Feature], rows: Sequence[Row]) -> Dict[str, float]:
        check_finite(logits)
        logits_BC = torch.stack(list(logits)).double()
        if self.problem_type == SINGLE_LABEL:
            predictions = logits_BC.argmax(dim=-1)
        elif self.problem_type == MULTI_LABEL:
            predictions = logits_BC > 0
        else:
            predictions = logits_BC[:, 0]
        references = np.asarray([rows[feature.row].label for feature in features], dtype=np.float64)
        pair = (self.as_scored(predictions.double().numpy()), self.as_scored(references))
        return metrics.compute(self.metric_names, *pair)

    def as_scored(self, labels: NDArray[np.float64]) -> NDArray[np.float64]:
        """Labels as the task's metrics are defined on them; those of the model unless a task says otherwise."""
        return labels

    def predictions(
        self, logits: Sequence[Tensor], features: Sequence[Feature], rows: Sequence[Row]
    ) -> List[Dict[str, object]]:
        check_finite(logits)
        return [self._prediction(one_C.double()) for one_C in logits]

    def _prediction(self, logits_C: Tensor) -> Dict[str, object]:
        """`label` and `score`, `labels`, or `score` alone for regression; `scores` are probabilities by name."""
        if self.problem_type == REGRESSION:
            return {"score": float(logits_C[0])}
        names = cast(List[str], self.label_names)
        if self.problem_type == MULTI_LABEL:
            scores = dict(zip(names, logits_C.sigmoid().tolist()))
            return {"labels": [name for name, logit in zip(names, logits_C.tolist()) if logit > 0], "scores": scores}
        scores = dict(zip(names, logits_C.softmax(dim=-1).tolist()))
        label = names[int(logits_C.argmax())]
        return {"label": label, "score": scores[label], "scores": scores}


def choose_fields(record: Record, candidates: Sequence[Tuple[str, ...]]) -> Tuple[str, ...]:
    """The first candidate whose columns the row has; a file's first row decides for all. Raises DataError."""
    for fields in candidates:
        if all(field in record.fields for field in fields):
            return fields
    wanted = " or ".join(" and ".join(fields) for fields in dict.fromkeys(candidates))
    return no_column(record, wanted)


def texts_of(record: Record, fields: Sequence[str]) -> Tuple[str, ...]:
    """The texts in these columns. Raises DataError."""
    return tuple(clean_text(_text(column_of(record, field)), field, record.place) for field in fields)


def _text(value: object) -> object:
    """A number is its digits, as in a table that has no other types; what is none has no text."""
    if isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
        return value
    return str(value) if isinstance(value, (int, float)) else value


_LARGEST = float(torch.finfo(torch.float32).max)


def parse_number(value: object, record: Record) -> float:
    """The value as a finite number. Raises DataError."""
    try:
        number = float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= _LARGEST:  # nor for NaN
        record.fail(f"score {shown(value)} is not a finite number, or more than float32 holds")
    return number
