"""A value of the label column says the same in every format of a table."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, List

import pytest

from sft.errors import DataError
from sft_edge.tasks import Task, make_task


def write(folder: Path, suffix: str, labels: List[Any], stem: str = "train") -> Path:
    """A file of the format with these labels, as programs write it."""
    path = folder / f"{stem}{suffix}"
    with path.open("w", newline="") as file:
        if suffix == ".jsonl":
            file.write(
                "".join(json.dumps({"text": f"film {i}", "label": label}) + "\n" for i, label in enumerate(labels))
            )
        else:
            # Lists as json spells them; None as nothing.
            cells = [json.dumps(label) if isinstance(label, list) else label for label in labels]
            if suffix == ".csv":
                csv.writer(file).writerows([["text", "label"], *([f"film {i}", cell] for i, cell in enumerate(cells))])
            else:
                file.write("text\tlabel\n" + "".join(f"film {i}\t{cell}\n" for i, cell in enumerate(cells)))
    return path


SUFFIXES = pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])


@SUFFIXES
@pytest.mark.parametrize(
    ("labels", "problem_type", "names"),
    [
        ([1.0, 0.0, 1.0], "single_label_classification", ["0", "1"]),
        ([1, 0.0, "1.0"], "single_label_classification", ["0", "1"]),
        ([-1.0, 2, 10], "single_label_classification", ["-1", "10", "2"]),
        (["01", "1"], "single_label_classification", ["01", "1"]),
        (["v1.10", "v1.1", "1"], "single_label_classification", ["1", "v1.1", "v1.10"]),
        ([True, False], "single_label_classification", ["False", "True"]),
        ([True, "x", 3], "single_label_classification", ["3", "True", "x"]),
        ([10**40, 1], "single_label_classification", ["1", str(10**40)]),
        ([0.5, 1, 2.0], "regression", None),
        (["0.5", 1], "regression", None),
        ([[0], [1.0, 2], []], "multi_label_classification", ["0", "1", "2"]),
        ([["a"], ["b", "a"]], "multi_label_classification", ["a", "b"]),
    ],
    ids=str,
)
def test_alike(tmp_path: Path, suffix: str, labels: List[Any], problem_type: str, names: List[str]) -> None:
    write(tmp_path, suffix, labels)
    task = make_task("text", tmp_path)
    assert (task.problem_type, task.label_names) == (problem_type, names)
    rows = task.read("train")
    assert len(rows) == len(labels)
    if problem_type == "multi_label_classification":
        assert [sum(row.label) for row in rows] == [len(label) for label in labels]  # type: ignore[arg-type]


@SUFFIXES
@pytest.mark.parametrize("labels", [[1.0, 0.0, 1.0], [1, 0, 1], ["1", "0", "1"]], ids=str)
def test_whole_numbers_as_the_user_wants_them(tmp_path: Path, suffix: str, labels: List[Any]) -> None:
    write(tmp_path, suffix, labels)
    classes = make_task("text", tmp_path, "single_label_classification")
    assert [row.label for row in classes.read("train")] == [1, 0, 1]
    assert [row.label for row in make_task("text", tmp_path, "regression").read("train")] == [1.0, 0.0, 1.0]


@SUFFIXES
def test_what_is_missing_is_an_error(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path, suffix, [1.0, 0.0, None if suffix != ".tsv" else ""])
    with pytest.raises(DataError, match=rf"^{path}:{3 if suffix == '.jsonl' else 4}: label is empty"):
        make_task("text", tmp_path)


def test_a_model_of_before_has_classes_with_a_fraction(tmp_path: Path) -> None:
    """A CSV file's 0.0 and 1.0 were classes of that name."""
    write(tmp_path, ".csv", [1.0, 0.0], "dev")
    task = make_task("text", tmp_path, "single_label_classification", ["0.0", "1.0"])
    assert [row.label for row in task.read("validation")] == [1, 0]
    assert task.label_names == ["0.0", "1.0"]


def said(task: Task) -> str:
    return task.inferred.rpartition("train.csv: ")[2]


def test_what_was_inferred_is_said(tmp_path: Path) -> None:
    write(tmp_path, ".csv", [1.0, 0.0])
    assert said(make_task("text", tmp_path)) == (
        "the labels are whole numbers: 2 classes, in this order: 0, 1; --problem-type regression makes them numbers"
    )
    assert said(make_task("text", tmp_path, "single_label_classification")) == "2 classes, in this order: 0, 1"
    assert make_task("text", tmp_path, "regression").inferred == ""
    write(tmp_path, ".csv", [1, 0.25])
    assert said(make_task("text", tmp_path)) == (
        "the labels are numbers such as 0.25: a regression; "
        "--problem-type single_label_classification makes them classes"
    )
    write(tmp_path, ".csv", [["a"], ["b", "c"]])
    assert said(make_task("text", tmp_path)) == (
        "the labels are lists: 3 classes, of which a row has any number, in this order: a, b, c"
    )
    write(tmp_path, ".csv", ["x", "y" * 1000])
    assert said(make_task("text", tmp_path)).endswith(f"in this order: x, {'y' * 40}")


def test_lists_as_pandas_spells_them(tmp_path: Path) -> None:
    path = write(tmp_path, ".csv", ["['a', \"b's\"]", "[]", "['a']", '["c"]'])
    task = make_task("text", tmp_path)
    assert (task.problem_type, task.label_names) == ("multi_label_classification", ["a", "b's", "c"])
    assert [row.label for row in task.read("train")] == [(1.0, 1.0, 0.0), (0.0,) * 3, (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)]
    for label in ("[sic]", "[1](x)", "[" * 100_000, "[__import__('os').getcwd()]"):  # names like others, and never run
        path.write_text(f"text,label\na,{label}\nb,x\n")
        assert make_task("text", tmp_path).label_names == [label, "x"]
