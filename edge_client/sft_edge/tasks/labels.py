"""What a column of labels says: classes, lists of them or numbers; a value says the same in every format of a table."""

from __future__ import annotations

import ast
import json
import math
import re
from contextlib import suppress
from typing import List, Optional, Sequence, Tuple

from sft_edge.tasks.files import Record, clean_text, column_of, shown

SINGLE_LABEL = "single_label_classification"
MULTI_LABEL = "multi_label_classification"
REGRESSION = "regression"
PROBLEM_TYPES = (SINGLE_LABEL, MULTI_LABEL, REGRESSION)

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_WHOLE = re.compile(r"\+?(-?)(0|[1-9]\d*)\.0*", re.ASCII)
_MISSING = ("nan", "na", "n/a", "<na>", "null", "none", "inf", "+inf", "-inf", "infinity", "-infinity")
"""What programs write, in capitals or not, where a column of numbers has none."""

_HUGE = 1e300
"""For whole numbers that no float holds."""


def label_of(record: Record) -> object:
    """The value of the label column; a list that a table spells as text is one, as in JSON lines: whether as JSON does
    or as Python, and pandas with it. Raises DataError."""
    value = column_of(record, "label")
    if isinstance(value, str) and value.strip().startswith("["):
        for read in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                content = read(value.strip())
                if isinstance(content, list):
                    return content
    return value


def class_name(value: object, what: str, place: str) -> str:
    """What a class is called by its value: 1, 1.0 and "1.0" are all 1. Raises DataError for what names none."""
    if isinstance(value, bool):
        return str(value)  # as tables spell it
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else repr(value)
    text = clean_text("" if _is_missing(value) else value, what, place).strip()
    whole = _WHOLE.fullmatch(text)
    if whole is not None:
        return (whole[1] if whole[2] != "0" else "") + whole[2]
    return text


def class_names(record: Record, problem_type: Optional[str]) -> List[str]:
    """Those in the label column: one, or any number of them for several labels. Raises DataError."""
    if problem_type != MULTI_LABEL:
        return [class_name(column_of(record, "label"), "label", record.place)]
    value = label_of(record)
    if not isinstance(value, list):
        record.fail(f'label {shown(value)} is not a list of names; several labels need one, such as ["a", "b"]')
    return [class_name(name, "a label", record.place) for name in value]


def infer_problem_type(labels: Sequence[Record]) -> Tuple[str, str]:
    """The problem type that labels speak of, and what it was seen from, for people.

    Lists mean several labels, numbers of which some are not whole mean a regression, all else means classes. Raises
    DataError naming the row that does not go with the others.
    """
    values = [label_of(record) for record in labels]
    lists = [isinstance(value, list) for value in values]
    if any(lists):
        if not all(lists):
            labels[lists.index(False)].fail("label is not a list of names, as in other rows")
        return MULTI_LABEL, "the labels are lists"
    numbers = [_number(value) for value in values]
    known = [number for number in numbers if number is not None]
    if all(number.is_integer() for number in known):
        for record, value in zip(labels, values):
            if known and isinstance(value, str) and value.strip().lower() in _MISSING:
                record.fail(
                    f"label {shown(value)} is none, where other rows have whole numbers; delete the row, or pass "
                    f"--problem-type {SINGLE_LABEL} to make it a class"
                )
        return SINGLE_LABEL, "the labels are whole numbers" if len(known) == len(values) else "the labels are names"
    for record, value, number in zip(labels, values, numbers):
        is_none = _is_missing(value) or str(value).strip().lower() in _MISSING  # as a number it is refused later
        if number is None and not is_none:
            record.fail(f"label {shown(value)} is not a number, as in other rows; correct it, or pass --problem-type")
    (example,) = [number for number in known if not number.is_integer()][:1]
    return REGRESSION, f"the labels are numbers such as {example:g}"


def _number(value: object) -> Optional[float]:
    """The label as a number; None where it is none."""
    if isinstance(value, str):
        value = float(value) if _NUMBER.fullmatch(value.strip()) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or _is_missing(value):
        return None
    return max(min(value, _HUGE), -_HUGE) + 0.0


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
