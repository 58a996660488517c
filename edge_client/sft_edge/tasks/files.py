"""Reading data files of people we do not know, row by row: whatever is wrong is a DataError naming file and line."""

from __future__ import annotations

import csv
import json
import logging
import re
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, NoReturn, Optional, Sequence, Tuple

from sft.errors import DataError
from sft.files.pointer import is_lfs_pointer, lfs_advice

logger = logging.getLogger(__name__)

SUFFIXES = (".tsv", ".csv", ".jsonl")

MAX_LINE_BYTES = 64 << 20
"""Of a line of a table: the most that one row takes of the memory. A model reads far less, and the rest is cut."""

_SEPARATORS = {"\t": "tabs", ",": "commas", ";": "semicolons", "|": "bars"}

_QUOTED_NAME = re.compile('".*"')

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


def numbered_lines(path: Path, max_bytes: int = -1) -> Iterator[Tuple[int, str]]:
    """Lines of a UTF-8 file without their ends, counted from 1; a byte order mark in front is dropped.

    Only a line feed ends a line, unlike str.splitlines, which also breaks at characters that texts contain. A line of
    more than `max_bytes` is a DataError, where that is not negative.
    """
    if is_lfs_pointer(path):
        raise DataError(lfs_advice(path))
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(iter(lambda: file.readline(max_bytes), b""), start=1):
                place = f"{path}:{number}"
                if len(raw) == max_bytes and not raw.endswith(b"\n"):
                    raise DataError(f"{place}: a line of more than {max_bytes:,} bytes")
                if number == 1 and raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
                    raise DataError(f"{place}: UTF-16, not UTF-8 text; save it as UTF-8")
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{place}: not UTF-8 text, byte {error.start + 1} of the line; save it as UTF-8"
                    ) from error
                if "\0" in line:
                    raise DataError(f"{place}: a NUL character; is it UTF-16, and not UTF-8 text?")
                yield number, line.rstrip("\r\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_tsv(path: Path, header: Optional[Sequence[str]] = None, torn_lines: int = 0) -> Iterator[Record]:
    """Rows of a tab-separated table. Fields are not quoted: a `"` is a character. Blank lines are passed over.

    `header` names the columns of a file that has no header line. Up to `torn_lines` lines with too few fields are
    passed over. What is passed over, and quotes that a program seems to have written, a warning tells.
    """
    columns = list(header) if header else []
    torn: List[int] = []
    quoted: List[int] = []
    passed = _PassedOver(path)
    for number, line in numbered_lines(path, MAX_LINE_BYTES):
        values = line.split("\t")
        if not "".join(values).strip():
            passed.blank(number)
        elif not columns:
            columns = _columns(values, f"{path}:{number}")
        elif len(values) < len(columns) and len(torn) < torn_lines:
            torn.append(number)
        else:
            if any(_is_quoted(value) for value in values):
                quoted.append(number)
            passed.row()
            yield _record(values, columns, f"{path}:{number}")
    if torn:
        logger.warning("%s: passed over torn lines %s", path, ", ".join(map(str, torn)))
    if quoted:
        logger.warning(
            "%s: %d lines (%d the first) have fields in quotes, with quotes doubled inside; in a .tsv all of them are "
            "characters of the text: if a program has quoted the table, save it as .csv",
            path,
            len(quoted),
            quoted[0],
        )
    passed.tell()


def read_csv(path: Path) -> Iterator[Record]:
    """Rows of a comma-separated table whose first line names the columns; quoting as spreadsheets do it.

    Rows of nothing but empty fields are passed over; a warning tells.
    """
    columns: List[str] = []
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader((line + "\n" for _, line in numbered_lines(path, MAX_LINE_BYTES)), strict=True)
    number, passed = 1, _PassedOver(path)  # where a row begins: a quoted field may span lines
    try:
        for values in reader:
            place, first = f"{path}:{number}", number
            number = reader.line_num + 1
            if not "".join(values).strip():
                passed.blank(first)
            elif not columns:
                columns = _columns(values, place)
            else:
                passed.row()
                yield _record(values, columns, place)
    except csv.Error as error:
        says = "a line ends in a carriage return alone; save it with line feeds" if "new-line" in str(error) else error
        raise DataError(f"{path}:{number}: not a CSV row: {says}") from error
    passed.tell()


def read_jsonl(path: Path) -> Iterator[Record]:
    """One JSON object a line; blank lines are passed over, which a warning tells."""
    passed = _PassedOver(path)
    for number, line in numbered_lines(path, MAX_LINE_BYTES):
        if not line.strip():
            passed.blank(number)
            continue
        passed.row()
        yield Record(f"{path}:{number}", as_object(_parse_json(line, path, number), f"{path}:{number}"))
    passed.tell()


class _PassedOver:
    """Blank lines between rows; those at the end of a file are nobody's rows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._between: List[int] = []
        self._since: List[int] = []

    def blank(self, number: int) -> None:
        self._since.append(number)

    def row(self) -> None:
        self._between += self._since
        self._since = []

    def tell(self) -> None:
        if self._between:
            count, first = len(self._between), self._between[0]
            logger.warning("%s: passed over %d blank lines, the first is line %d", self._path, count, first)


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


def column_of(record: Record, column: str) -> object:
    """The value in a column. Raises DataError if the row has no such column."""
    if column not in record.fields:
        no_column(record, column)
    return record.fields[column]


def no_column(record: Record, wanted: str) -> NoReturn:
    """Raise the DataError of a row without this column: it tells which there are, and what may be wrong with them."""
    names = list(record.fields)
    told = ", ".join(name if name.isprintable() and len(name) < 40 else shown(name) for name in names[:10])
    hint = ""
    if len(names) == 1 and record.place.rpartition(":")[0].endswith((".tsv", ".csv")):
        own = "," if ".csv:" in record.place else "\t"
        found = [separator for separator in _SEPARATORS if separator != own and separator in names[0]]
        if found:
            hint = f"; they seem to be separated by {_SEPARATORS[found[0]]}, not by {_SEPARATORS[own]}"
    elif any(_QUOTED_NAME.fullmatch(name) for name in names):
        hint = "; in a .tsv quotes are characters of the text: save it as .csv"
    record.fail(f"no column {wanted}; there are: {told}{', ...' if len(names) > 10 else ''}{hint}")


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
    """Their names; those without one, as spreadsheets leave them behind, are in no record."""
    columns = [value.strip() for value in values]
    for name in columns:
        if name and columns.count(name) > 1:
            raise DataError(f"{place}: the header names a column twice: {shown(name)}")
    return columns


def _record(values: List[str], columns: List[str], place: str) -> Record:
    wanted = len(columns)
    while wanted and not columns[wanted - 1] and wanted > len(values):
        wanted -= 1
    while len(values) > wanted and not values[-1].strip():
        values = values[:-1]
    if len(values) < wanted or len(values) > len(columns):
        raise DataError(f"{place}: {len(values)} fields, but the table has {len(columns)} columns")
    return Record(place, {name: value for name, value in zip(columns, values) if name})


def _is_quoted(value: str) -> bool:
    """Whether a field looks as programs write one that holds a quote: in quotes, and those inside doubled."""
    inside = value[1:-1]
    return len(value) > 3 and value[0] == value[-1] == '"' and '""' in inside and '"' not in inside.replace('""', "")


def _parse_json(text: str, path: Path, first_line: int) -> object:
    try:
        value: object = json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path}:{first_line + error.lineno - 1}"
        raise DataError(f"{place}: not JSON: {error.msg} at character {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets thousands deep
        raise DataError(f"{path}:{first_line}: not JSON that can be read: {error}") from error
    return value
