"""Reading data files of people we do not know, row by row: whatever is wrong is a DataError naming file and line."""

from __future__ import annotations

import csv
import json
import logging
import re
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, NoReturn, Optional, Sequence, Tuple

from sft.errors import DataError

logger = logging.getLogger(__name__)

SUFFIXES = (".tsv", ".csv", ".jsonl")

_SURROGATE = re.compile("[\ud800-\udfff]")


class Record(NamedTuple):
    """One row of a file, not yet understood."""

    place: str
    """Where it stands, as "FILE:LINE"."""

    fields: Dict[str, object]
    """Value by column: text from tables, any JSON value from JSON lines."""

    def fail(self, what: str) -> NoReturn:
        """Raise the DataError of this row."""
        raise DataError(f"{self.place}: {what}")


def shown(value: object) -> str:
    """The value for an error message: on one line and short, whatever it holds."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def numbered_lines(path: Path) -> Iterator[Tuple[int, str]]:
    """Lines of a UTF-8 file without their ends, counted from 1; a byte order mark in front is dropped.

    Only a line feed ends a line, unlike str.splitlines, which also breaks at characters that texts contain.
    """
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, start=1):
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(f"{path}:{number}: not UTF-8 text, byte {error.start + 1} of the line") from error
                if "\0" in line:
                    raise DataError(f"{path}:{number}: a NUL character")
                yield number, line.rstrip("\r\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_tsv(path: Path, header: Optional[Sequence[str]] = None, torn_lines: int = 0) -> Iterator[Record]:
    """Rows of a tab-separated table. Fields are not quoted: a `"` is a character. Blank lines are passed over.

    `header` names the columns of a file that has no header line. Up to `torn_lines` lines with too few fields are
    passed over with a warning.
    """
    columns = list(header) if header else []
    torn: List[int] = []
    for number, line in numbered_lines(path):
        if not line.strip():
            continue
        values = line.split("\t")
        if not columns:
            columns = _columns(values, f"{path}:{number}")
        elif len(values) < len(columns) and len(torn) < torn_lines:
            torn.append(number)
        else:
            yield _record(values, columns, f"{path}:{number}")
    if torn:
        logger.warning("%s: passed over torn lines %s", path, ", ".join(map(str, torn)))


def read_csv(path: Path) -> Iterator[Record]:
    """Rows of a comma-separated table whose first line names the columns; quoting as spreadsheets do it."""
    columns: List[str] = []
    reader = csv.reader((line + "\n" for _, line in numbered_lines(path)), strict=True)
    number = 1  # where a row begins: a quoted field may span lines
    try:
        for values in reader:
            place = f"{path}:{number}"
            number = reader.line_num + 1
            if not values:
                continue
            if not columns:
                columns = _columns(values, place)
            else:
                yield _record(values, columns, place)
    except csv.Error as error:
        raise DataError(f"{path}:{number}: not a CSV row: {error}") from error


def read_jsonl(path: Path) -> Iterator[Record]:
    """One JSON object a line; blank lines are passed over."""
    for number, line in numbered_lines(path):
        if line.strip():
            yield Record(f"{path}:{number}", as_object(_parse_json(line, path, number), f"{path}:{number}"))


def read_table(path: Path) -> Iterator[Record]:
    """Rows of a .tsv, .csv or .jsonl file, by its suffix."""
    readers: Dict[str, Callable[[Path], Iterator[Record]]] = {".tsv": read_tsv, ".csv": read_csv, ".jsonl": read_jsonl}
    if path.suffix not in readers:
        raise DataError(f"{path}: the name must end in {', '.join(SUFFIXES)}")
    return readers[path.suffix](path)


def read_json(path: Path) -> object:
    """The value of a whole JSON file."""
    return _parse_json("\n".join(line for _, line in numbered_lines(path)), path, 1)


def as_object(value: object, place: str) -> Dict[str, object]:
    """The value itself if it is a JSON object, else a DataError."""
    if not isinstance(value, dict):
        raise DataError(f"{place}: expected a JSON object, not {shown(value)}")
    return value


def clean_text(value: object, what: str, place: str) -> str:
    """The value itself if it is text that a tokenizer can take, else a DataError."""
    if not isinstance(value, str):
        raise DataError(f"{place}: {what} must be text, not {shown(value)}")
    if not value.strip():
        raise DataError(f"{place}: {what} is empty")
    if _SURROGATE.search(value):  # JSON can spell half a character
        raise DataError(f"{place}: {what} holds a lone surrogate")
    return value


def _columns(values: List[str], place: str) -> List[str]:
    columns = [value.strip() for value in values]
    if len(set(columns)) < len(columns):
        raise DataError(f"{place}: the header names a column twice")
    return columns


def _record(values: List[str], columns: List[str], place: str) -> Record:
    if len(values) != len(columns):
        raise DataError(f"{place}: {len(values)} fields, but the table has {len(columns)} columns")
    return Record(place, dict(zip(columns, values)))


def _parse_json(text: str, path: Path, first_line: int) -> object:
    try:
        value: object = json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path}:{first_line + error.lineno - 1}"
        raise DataError(f"{place}: not JSON: {error.msg} at character {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets thousands deep
        raise DataError(f"{path}:{first_line}: not JSON that can be read: {error}") from error
    return value
