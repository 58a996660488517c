from __future__ import annotations

import json
from pathlib import Path
from typing import Dict, List

import pytest

from sft.errors import DataError, UsageError
from sft_edge.tasks import make_task


def write(folder: Path, **files: str) -> Path:
    """Files by name, with __ for the dot."""
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content, encoding="utf-8")
    return folder


def jsonl(rows: List[Dict[str, object]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_labels_are_those_of_the_train_file_in_sorted_order(tmp_path: Path) -> None:
    write(tmp_path, train__csv='text,label\n"a, b",spam\nc,ham\nd,odd\n', dev__tsv="text\tlabel\ne\todd\n")
    task = make_task("text", tmp_path)
    assert (task.problem_type, task.label_names, task.num_labels) == (
        "single_label_classification",
        ["ham", "odd", "spam"],
        3,
    )
    assert [row.label for row in task.read("train")] == [2, 0, 1]
    assert [(row.texts, row.label) for row in task.read("validation")] == [(("e",), 1)]
    assert task.config_overrides()["label2id"] == {"ham": 0, "odd": 1, "spam": 2}


def test_pairs_and_the_other_column_names(tmp_path: Path) -> None:
    pairs = "sentence1\tlabel\tsentence2\na\tx\tb\nc\ty\td\n"
    write(tmp_path, train__tsv=pairs, validation__csv="sentence1,sentence2,label\ne,f,y\n")
    task = make_task("text", tmp_path)
    assert [row.texts for row in task.read("train")] == [("a", "b"), ("c", "d")]
    assert task.text_fields == ("sentence1", "sentence2")
    assert task.read("validation")[0].texts == ("e", "f")
    write(tmp_path, validation__csv="sentence,label\ne,y\n")
    with pytest.raises(DataError, match=r"validation\.csv:2: no column sentence1 and sentence2"):
        task.read("validation")


def test_lists_mean_several_labels(tmp_path: Path) -> None:
    rows: List[Dict[str, object]] = [
        {"sentence": "a", "label": ["red", "blue"]},
        {"sentence": "b", "label": []},
        {"sentence": "c", "label": ["green"]},
    ]
    write(tmp_path, train__jsonl=jsonl(rows))
    task = make_task("text", tmp_path)
    assert task.problem_type == "multi_label_classification"
    assert task.label_names == ["blue", "green", "red"]
    assert [row.label for row in task.read("train")] == [(1.0, 0.0, 1.0), (0.0, 0.0, 0.0), (0.0, 1.0, 0.0)]


@pytest.mark.parametrize(
    ("labels", "problem_type"),
    [
        (["0", "1", "2"], "single_label_classification"),
        (["0.5", "1", "-2"], "regression"),
        (["1e3", "2"], "single_label_classification"),
        (["1.0", "0.0", "2."], "single_label_classification"),
        (["1e-3", "2"], "regression"),
        (["nan", "inf"], "single_label_classification"),
        (["a", "1"], "single_label_classification"),
    ],
)
def test_problem_type_is_inferred_where_it_is_clear(tmp_path: Path, labels: List[str], problem_type: str) -> None:
    write(tmp_path, train__tsv="text\tlabel\n" + "".join(f"a\t{label}\n" for label in labels))
    assert make_task("text", tmp_path).problem_type == problem_type


def test_regression(tmp_path: Path) -> None:
    write(tmp_path, train__jsonl=jsonl([{"text": "a", "label": 1}, {"text": "b", "label": 2.5}]))
    task = make_task("text", tmp_path)
    assert (task.problem_type, task.label_names, task.num_labels) == ("regression", None, 1)
    assert [row.label for row in task.read("train")] == [1.0, 2.5]


def test_problem_type_of_the_user_wins(tmp_path: Path) -> None:
    write(tmp_path, train__tsv="text\tlabel\na\t1\nb\t2\n")
    assert make_task("text", tmp_path, "regression").read("train")[1].label == 2.0
    with pytest.raises(DataError, match=r"train\.tsv:2: label '1' is not a list of names; several labels need"):
        make_task("text", tmp_path, "multi_label_classification")
    with pytest.raises(UsageError, match="no problem type 'ranking'; there are single_label_classification, "):
        make_task("text", tmp_path, "ranking")


def test_a_trained_model_rebuilds_its_task_without_the_train_file(tmp_path: Path) -> None:
    write(tmp_path, dev__tsv="text\tlabel\na\ty\n")
    task = make_task("text", tmp_path, "single_label_classification", ["x", "y"])
    assert task.read("validation")[0].label == 1
    assert make_task("text", None, "regression", ["LABEL_0"]).config_overrides()["num_labels"] == 1
    several = make_task("text", None, "multi_label_classification", ["x", "y", "z"])
    assert several.num_labels == 3
    assert several.row("a").texts == ("a",)
    assert several.row("a", "b").texts == ("a", "b")
    with pytest.raises(UsageError, match="pass --data-dir"):
        make_task("text")
    with pytest.raises(UsageError, match="pass --data-dir"):
        several.read("train")


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("train.tsv", "text\tlabel\n", "train.tsv: holds no rows"),
        ("train.tsv", "text\tlabel\na\tx\nb\tx\n", r"train.tsv: all rows have the same label \['x'\]"),
        ("train.tsv", "text\tlabel\na\t0.5\nb\tx\n", "train.tsv:3: label 'x' is not a number, as in other rows"),
        ("train.tsv", "text\tlabel\na\t0.5\nb\tnan\n", "train.tsv:3: score 'nan' is not a finite number"),
        ("train.tsv", "text\tlabel\na\tx\nb\t \n", "train.tsv:3: label is empty"),
        ("train.tsv", "text\tlabel\na\tx\n\ty\n", "train.tsv:3: text is empty"),
        ("train.tsv", "text\tname\na\tx\n", "train.tsv:2: no column label"),
        ("train.tsv", "x\tlabel\na\tx\nb\ty\n", "train.tsv:2: no column text or sentence or sentence1 and sentence2"),
        (
            "train.jsonl",
            '{"text": "a", "label": "x"}\n{"text": true, "label": "y"}\n',
            "train.jsonl:2: text must be text",
        ),
        ("train.jsonl", '{"text": "a", "label": "x"}\n{"text": "b", "label": null}\n', "train.jsonl:2: label is empty"),
        ("train.jsonl", '{"text": "a", "label": "x"}\n{"text": "b", "label": {}}\n', "train.jsonl:2: label must be"),
        ("train.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": NaN}\n', "train.jsonl:2: label is empty"),
        (
            "train.jsonl",
            '{"text": "a", "label": 1}\n{"text": NaN, "label": 2}\n',
            "train.jsonl:2: text must be text, not nan",
        ),
        ("train.tsv", "text\tlabel\na\t1\nb\tNA\n", "train.tsv:3: label 'NA' is none, where other rows have whole"),
        (
            "train.jsonl",
            '{"text": "a", "label": ["x"]}\n{"text": "b", "label": "x"}\n',
            "train.jsonl:2: label is not a",
        ),
        (
            "train.jsonl",
            '{"text": "a", "label": ["x"]}\n{"text": "b", "label": [null]}\n',
            "train.jsonl:2: a label is empty",
        ),
        ("train.jsonl", '{"text": "a", "label": 0.5}\n{"text": "b", "label": NaN}\n', "train.jsonl:2: score nan"),
        (
            "train.jsonl",
            '{"text": "a", "label": "x"}\n{"text": "\\ud800", "label": "y"}\n',
            "2: text holds a lone surr",
        ),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str, what: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=what) as raised:
        make_task("text", tmp_path).read("train")
    assert "\n" not in str(raised.value)


def test_labels_that_the_train_file_did_not_have(tmp_path: Path) -> None:
    write(tmp_path, train__tsv="text\tlabel\na\tx\nb\ty\n", dev__tsv="text\tlabel\na\tx\nb\tz\n")
    with pytest.raises(DataError, match=r"dev\.tsv:3: label 'z' is not one of x, y"):
        make_task("text", tmp_path).read("validation")


def test_which_file_is_meant_must_be_clear(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no train file; one of train\.tsv, train\.csv, train\.jsonl must be there"):
        make_task("text", tmp_path)
    write(tmp_path, train__tsv="text\tlabel\na\tx\nb\ty\n", dev__tsv="", validation__csv="")
    with pytest.raises(DataError, match=r"more than one validation file: dev\.tsv, validation\.csv; keep one"):
        make_task("text", tmp_path).read("validation")


def test_files_to_predict(tmp_path: Path) -> None:
    write(
        tmp_path, inputs__jsonl=jsonl([{"sentence": "a"}]), pairs__csv="sentence1,sentence2\na,b\n", lines__txt="a\nb\n"
    )
    task = make_task("text", None, "single_label_classification", ["x", "y"])
    assert task.read_inputs(tmp_path / "inputs.jsonl")[0].texts == ("a",)
    assert task.read_inputs(tmp_path / "pairs.csv")[0].texts == ("a", "b")
    assert [row.texts for row in task.read_inputs(tmp_path / "lines.txt")] == [("a",), ("b",)]
