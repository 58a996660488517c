from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sft.errors import DataError
from sft_edge.tasks import files
from sft_edge.tasks.files import column_of, read_json, read_table, read_tsv


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_tsv_fields_are_not_quoted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", b'text\tlabel\n"open quote\t1\na "b" c"\t0\n')
    records = list(read_table(path))
    assert [record.fields["text"] for record in records] == ['"open quote', 'a "b" c"']
    assert [record.place for record in records] == [f"{path}:2", f"{path}:3"]


def test_tsv_drops_byte_order_mark_and_carriage_returns_and_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", b"\xef\xbb\xbftext\tlabel\r\none\t1\r\n\r\ntwo\t0")
    assert [record.fields for record in read_table(path)] == [
        {"text": "one", "label": "1"},
        {"text": "two", "label": "0"},
    ]


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    text = "one\u2028two\x85three\x0bfour"
    path = write(tmp_path / "a.tsv", f"text\n{text}\n".encode())
    assert [record.fields["text"] for record in read_table(path)] == [text]


def test_csv_quotes_as_spreadsheets_do_and_counts_lines_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b'text,label\n"one, ""two""\nthree",1\nfour,0\n')
    first, second = read_table(path)
    assert first.fields == {"text": 'one, "two"\nthree', "label": "1"}
    assert (first.place, second.place) == (f"{path}:2", f"{path}:4")


def test_jsonl_keeps_json_values(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "one", "label": ["a", "b"]}\n\n{"text": "two", "label": 2.5}\n')
    assert [(record.place, record.fields["label"]) for record in read_table(path)] == [
        (f"{path}:1", ["a", "b"]),
        (f"{path}:3", 2.5),
    ]


@pytest.mark.parametrize(
    ("name", "content", "line", "what"),
    [
        ("a.tsv", b"text\tlabel\none\t1\ntwo\n", 3, "1 fields, but the table has 2 columns"),
        ("a.tsv", b"text\tlabel\none\t1\t1\n", 2, "3 fields"),
        ("a.tsv", b"text\ttext\none\t1\n", 1, "names a column twice"),
        ("a.tsv", b"text\tlabel\n\xff\xfe\t1\n", 2, "not UTF-8 text, byte 1"),
        ("a.tsv", b"text\tlabel\non\0e\t1\n", 2, "a NUL character"),
        ("a.csv", b"text,label\none,1\nx,y,z\n", 3, "3 fields"),
        ("a.csv", b'text,label\none,1\n"never closed,1\n', 3, "not a CSV row: unexpected end of data"),
        ("a.csv", b'text,label\n"one"x,1\n', 2, "not a CSV row"),
        ("a.csv", b"text,label\rone,1\rtwo,2\r", 1, "a carriage return alone; save it with line feeds"),
        ("a.tsv", "text\tlabel\none\t1\n".encode("utf-16"), 1, "UTF-16, not UTF-8 text; save it as UTF-8"),
        ("a.csv", b"text,label,text\n", 1, "names a column twice: 'text'"),
        ("a.csv", b"text,label\non\0e,1\n", 2, "a NUL character"),
        ("a.csv", b"text,label\none,1\n\xc3,1\n", 3, "not UTF-8"),
        ("a.jsonl", b'{"text": "one"}\n{"text": \n', 2, "not JSON"),
        ("a.jsonl", b'{"text": "one"}\n["one"]\n', 2, "expected a JSON object"),
        ("a.jsonl", b'{"a": ' + b"[" * 100_000 + b"\n", 1, "not JSON"),
        ("a.jsonl", b'{"text": "\xe9"}\n', 1, "not UTF-8"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path: Path, name: str, content: bytes, line: int, what: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}:{line}: .*{what}") as raised:
        list(read_table(path))
    assert "\n" not in str(raised.value)


def test_missing_files_directories_and_other_kinds(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.tsv: cannot be read: No such file"):
        list(read_table(tmp_path / "gone.tsv"))
    (tmp_path / "folder.tsv").mkdir()
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        list(read_table(tmp_path / "folder.tsv"))
    with pytest.raises(DataError, match=r"must end in \.tsv, \.csv, \.jsonl"):
        read_table(tmp_path / "a.parquet")


def test_torn_lines_are_passed_over_up_to_a_number(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.tsv", b"a\tb\tc\n1\t2\t3\n1\t2\n\t3\n4\t5\t6\n")
    assert [record.fields["a"] for record in read_tsv(path, torn_lines=2)] == ["1", "4"]
    assert "torn lines 3, 4" in caplog.text
    with pytest.raises(DataError, match=":4: 2 fields"):
        list(read_tsv(path, torn_lines=1))


def test_broken_json_file_names_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", b'{\n"data": [1,\n2 3]\n}')
    with pytest.raises(DataError, match=r"a\.json:3: not JSON: .* at character 3"):
        read_json(path)


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.jsonl"])
def test_long_texts_are_read_in_every_format_up_to_one_bound(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is longer than a model reads is cut after it is tokenized."""
    text = "word " * 30_000
    content = {"a.tsv": f"text\n{text}\n", "a.csv": f"text\n{text}\n", "a.jsonl": json.dumps({"text": text}) + "\n"}
    path = write(tmp_path / name, content[name].encode())
    assert [record.fields["text"] for record in read_table(path)] == [text]
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 100_000)
    with pytest.raises(DataError, match=r"a line of more than 100,000 bytes"):
        list(read_table(path))


def test_nameless_columns_are_nobodys(tmp_path: Path) -> None:
    """As spreadsheets leave them behind, and pandas in front."""
    path = write(tmp_path / "a.csv", b",text,label,,\n0,one,1,,\n1,two,0\n2,three,0,x,,,\n,,,,\n")
    assert [record.fields for record in read_table(path)] == [
        {"text": "one", "label": "1"},
        {"text": "two", "label": "0"},
        {"text": "three", "label": "0"},
    ]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            "a.csv",
            b"text;label\na;b\n",
            "there are: text;label; they seem to be separated by semicolons, not by commas",
        ),
        ("a.csv", b"text\tlabel\na\tb\n", "separated by tabs, not by commas"),
        ("a.tsv", b"text,label\na,b\n", "there are: text,label; they seem to be separated by commas, not by tabs"),
        ("a.tsv", b'"text"\t"label"\n"a"\t"b"\n', "in a .tsv quotes are characters of the text: save it as .csv"),
        ("a.jsonl", b'{"text": 1, "labels": 2}\n', "there are: text, labels$"),
    ],
)
def test_a_column_that_is_not_there(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    """The error says which there are."""
    (record,) = read_table(write(tmp_path / name, content))
    with pytest.raises(DataError, match=f":[12]: no column label; .*{says}"):
        column_of(record, "label")


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.tsv", b"a\n\n1\n\t\n\n2\n\n"), ("a.csv", b"a\n\n1\n,\n\n2\n\n"), ("a.jsonl", b'\n{"a":1}\n \n\n{"a":2}\n\n')],
)
def test_blank_lines_between_rows_are_told(
    tmp_path: Path, name: str, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / name, content)
    assert [str(record.fields["a"]) for record in read_table(path)] == ["1", "2"]
    count, first = (3, 1) if name == "a.jsonl" else (3, 2)
    assert caplog.messages == [f"{path}: passed over {count} blank lines, the first is line {first}"]


def test_quotes_that_a_program_wrote_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    list(read_table(write(tmp_path / "a.tsv", b'text\tlabel\n"so, he said"\t1\na "b" c\t0\n')))
    assert not caplog.messages
    list(read_table(write(tmp_path / "a.tsv", b'text\tlabel\n"he said ""no"" to it"\t1\n')))
    assert "1 lines (2 the first) have fields in quotes" in caplog.text


@pytest.mark.parametrize("name", ["train.tsv", "train.csv", "train.jsonl", "train.json"])
def test_a_pointer_of_git_is_told_as_such(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abab\nsize 9\n")
    with pytest.raises(DataError, match=rf"{name}: a Git LFS pointer stands here, .*git lfs pull"):
        read_json(path) if name.endswith(".json") else list(read_table(path))
