from __future__ import annotations

import re
from pathlib import Path
from typing import Dict, Tuple

import pytest

from sft.errors import DataError, UsageError
from sft_edge.tasks import make_task
from sft_edge.tasks.glue import GLUE

# A header with the columns in an order of our own, one row, its texts, its class id or score.
FILES: Dict[str, Tuple[str, str, Tuple[str, ...], object]] = {
    "sst2": ("label\tsentence", "1\ta fine film", ("a fine film",), 1),
    "cola": ("", "x\t0\t*\tSlept he .", ("Slept he .",), 0),
    "mrpc": ("#1 String\t#2 String\t#1 ID\tQuality\t#2 ID", 'He "ran.\tHe went.\t7\t1\t8', ('He "ran.', "He went."), 1),
    "rte": ("index\tsentence1\tsentence2\tlabel", "0\tIt rains.\tIt is wet.\tnot_entailment", (), 1),
    "stsb": ("score\tsentence2\tsentence1\tgenre", "2.500\tB b\tA a\tnews", ("A a", "B b"), 2.5),
    "qnli": ("index\tquestion\tsentence\tlabel", "3\tWho?\tHe did.\tentailment", ("Who?", "He did."), 0),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t2\t3\tWho?\tWhy?\t0", ("Who?", "Why?"), 0),
    "mnli": ("index\tlabel1\tsentence1\tsentence2\tgold_label", "0\tneutral\tA a\tB b\tcontradiction", (), 2),
}


def write(data_dir: Path, task: str, split: str, content: str) -> Path:
    folder = data_dir / GLUE[task].folder
    folder.mkdir(exist_ok=True)
    path = folder / ("train.tsv" if split == "train" else GLUE[task].validation)
    path.write_bytes(content.encode())
    return path


@pytest.mark.parametrize("name", sorted(GLUE))
def test_columns_are_found_by_name(name: str, tmp_path: Path) -> None:
    header, row, texts, label = FILES[name]
    for split in ("train", "validation"):
        write(tmp_path, name, split, f"\ufeff{header}\n{row}\n" if header else f"{row}\n")
        rows = make_task(name, tmp_path).read(split)
        assert [one.label for one in rows] == [label]
        assert len(rows[0].texts) == len(make_task(name).text_fields)
        if texts:
            assert rows[0].texts == texts


def test_every_task_tells_what_the_configuration_needs() -> None:
    assert make_task("mnli").config_overrides() == {
        "num_labels": 3,
        "problem_type": "single_label_classification",
        "id2label": {0: "entailment", 1: "neutral", 2: "contradiction"},
        "label2id": {"entailment": 0, "neutral": 1, "contradiction": 2},
    }
    assert make_task("stsb").config_overrides() == {"num_labels": 1, "problem_type": "regression"}
    assert make_task("squad").config_overrides() == {"num_labels": 2}


def test_main_metrics_are_those_of_the_paper() -> None:
    assert {name: make_task(name).main_metric for name in [*GLUE, "squad"]} == {
        "sst2": "accuracy",
        "cola": "matthews_correlation",
        "mrpc": "accuracy",
        "rte": "accuracy",
        "stsb": "pearson",
        "qnli": "accuracy",
        "qqp": "accuracy",
        "mnli": "accuracy",
        "squad": "f1",
    }


def test_limit_takes_the_first_rows_and_does_not_look_further(tmp_path: Path) -> None:
    write(tmp_path, "sst2", "train", "sentence\tlabel\none\t1\ntwo\t0\nthree\tbroken\n")
    task = make_task("sst2", tmp_path)
    assert [row.texts[0] for row in task.read("train", limit=2)] == ["one", "two"]
    with pytest.raises(DataError, match=":4:"):
        task.read("train", limit=3)


@pytest.mark.parametrize(
    ("task", "content", "line", "what"),
    [
        ("sst2", "sentence\tlabel\ngood\t2\n", 2, "label '2' is not one of 0, 1"),
        ("sst2", "sentence\tlabel\ngood\t\n", 2, "label is empty"),
        ("sst2", "sentence\tlabel\n  \t1\n", 2, "sentence is empty"),
        ("sst2", "text\tlabel\ngood\t1\n", 2, "no column sentence"),
        ("sst2", "sentence\tx\ngood\t1\n", 2, "no column label"),
        ("cola", "a\t1\t\n", 1, "3 fields, but the table has 4 columns"),
        (
            "rte",
            "sentence1\tsentence2\tlabel\na\tb\tneutral\n",
            2,
            "'neutral' is not one of entailment, not_entailment",
        ),
        ("mnli", "sentence1\tsentence2\tgold_label\na\tb\t-\n", 2, "label '-'"),
        ("stsb", "sentence1\tsentence2\tscore\na\tb\thigh\n", 2, "score 'high' is not a finite number"),
        ("stsb", "sentence1\tsentence2\tscore\na\tb\tnan\n", 2, "score 'nan' is not a finite number"),
        ("stsb", "sentence1\tsentence2\tscore\na\tb\t1e999\n", 2, "is not a finite number"),
        ("stsb", "sentence1\tsentence2\tscore\na\tb\t1e39\n", 2, "or more than float32 holds"),
    ],
)
def test_bad_rows(tmp_path: Path, task: str, content: str, line: int, what: str) -> None:
    path = write(tmp_path, task, "validation", content)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}:{line}: .*{re.escape(what)}"):
        make_task(task, tmp_path).read("validation")


def test_a_file_that_is_missing_or_empty(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"SST-2/dev\.tsv: no such file; --data-dir"):
        make_task("sst2", tmp_path).read("validation")
    write(tmp_path, "sst2", "validation", "sentence\tlabel\n")
    with pytest.raises(DataError, match="holds no rows"):
        make_task("sst2", tmp_path).read("validation")
    with pytest.raises(UsageError, match="pass --data-dir"):
        make_task("sst2").read("validation")


def test_official_qqp_has_torn_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    header = FILES["qqp"][0]
    write(
        tmp_path, "qqp", "train", f'{header}\n1\t2\t3\tWho?\tWhy?\t0\n4\t5\t6\t"How\n"\tWhen?\t1\n7\t8\t9\tA?\tB?\t1\n'
    )
    assert [row.texts for row in make_task("qqp", tmp_path).read("train")] == [("Who?", "Why?"), ("A?", "B?")]
    assert "passed over torn lines 3, 4" in caplog.text


def test_label_order_of_a_trained_model_is_kept(tmp_path: Path) -> None:
    header, row, _, _ = FILES["mnli"]
    write(tmp_path, "mnli", "validation", f"{header}\n{row}\n")
    order = ["contradiction", "neutral", "entailment"]
    task = make_task("mnli", tmp_path, "single_label_classification", order)
    assert task.label_names == order
    assert task.read("validation")[0].label == 0
    placeholders = ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert make_task("mnli", label_names=placeholders).label_names == ["entailment", "neutral", "contradiction"]
    with pytest.raises(UsageError, match="has the labels entailment, neutral, contradiction; the model's are a, b"):
        make_task("mnli", label_names=["a", "b"])


def test_names_that_make_no_task() -> None:
    with pytest.raises(
        UsageError, match="no task 'sst3'; there are sst2, cola, mrpc, rte, stsb, qnli, qqp, mnli, squad"
    ):
        make_task("sst3")
    with pytest.raises(UsageError, match="task sst2 is single_label_classification"):
        make_task("sst2", problem_type="regression")
    with pytest.raises(UsageError, match="task squad is question-answering"):
        make_task("squad", problem_type="regression")


def test_typed_texts_and_files_to_predict(tmp_path: Path) -> None:
    rte = make_task("rte")
    assert rte.row("one", "two").texts == ("one", "two")
    with pytest.raises(UsageError, match="takes a sentence1 and a sentence2: 2 text"):
        rte.row("one")
    with pytest.raises(UsageError, match="is empty"):
        rte.row("one", " ")
    sst2 = make_task("sst2")
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert [(row.texts, row.label) for row in sst2.read_inputs(tmp_path / "a.txt")] == [
        (("one",), None),
        (("",), None),
        (("two",), None),
    ]
    (tmp_path / "a.jsonl").write_text('{"text": "one", "other": 1}\n')
    assert [row.texts for row in sst2.read_inputs(tmp_path / "a.jsonl")] == [("one",)]
    (tmp_path / "a.tsv").write_text("question\tsentence\nwho?\the\n")
    assert [row.texts for row in make_task("qnli").read_inputs(tmp_path / "a.tsv")] == [("who?", "he")]
    with pytest.raises(DataError, match=r"a\.tsv:2: no column sentence1 and sentence2"):
        rte.read_inputs(tmp_path / "a.tsv")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="holds no rows"):
        sst2.read_inputs(tmp_path / "empty.txt")


def test_a_file_to_predict_without_the_header_that_the_official_one_lacks(tmp_path: Path) -> None:
    """CoLA's dev.tsv is one; with a header of its own, as its test.tsv, the names count."""
    (tmp_path / "dev.tsv").write_text("gj04\t1\t\tthe film is good\nbc01\t0\t*\tfilm the\n")
    assert [row.texts[0] for row in make_task("cola").read_inputs(tmp_path / "dev.tsv")] == [
        "the film is good",
        "film the",
    ]
    (tmp_path / "test.tsv").write_text("index\tsentence\n0\tthe film\n")
    assert [row.texts[0] for row in make_task("cola").read_inputs(tmp_path / "test.tsv")] == ["the film"]
    (tmp_path / "odd.tsv").write_text("a\tb\n0\tthe film\n")
    with pytest.raises(DataError, match="no column sentence or text; there are: a, b"):
        make_task("cola").read_inputs(tmp_path / "odd.tsv")
