from __future__ import annotations

from pathlib import Path
from typing import List

import pytest
import torch
from support.tiny import tiny_tokenizer

from sft.batch import attention_mask
from sft.errors import NonFiniteLossError, UsageError
from sft_edge.tasks import Row, make_task
from sft_edge.tasks.sequence import ROWS_AT_ONCE

SINGLE, PAIR = make_task("sst2"), make_task("mnli")


def test_batches_are_padded_on_the_right_as_the_library_does_it() -> None:
    tokenizer = tiny_tokenizer("bert")
    rows = [Row(("the film",), 1), Row(("a film that was not good at all",), 0)]
    batch = SINGLE.collate(SINGLE.encode(rows, tokenizer, 64))
    expected = tokenizer([row.texts[0] for row in rows], padding=True, return_tensors="pt")
    assert set(batch.inputs) == {"input_ids", "token_type_ids"}
    for name, value_BS in batch.inputs.items():
        assert torch.equal(value_BS, expected[name])
    assert torch.equal(attention_mask(batch.lengths, batch.inputs["input_ids"].shape[1]), expected["attention_mask"])
    assert torch.equal(batch.labels["labels"], torch.tensor([1, 0]))


def test_a_tokenizer_that_pads_on_the_left_does_not_matter() -> None:
    tokenizer = tiny_tokenizer("roberta")
    tokenizer.padding_side = "left"
    batch = SINGLE.collate(SINGLE.encode([Row(("film",)), Row(("the film was good",))], tokenizer, 64))
    assert set(batch.inputs) == {"input_ids"}
    assert batch.lengths == [3, 6]
    pad = tokenizer.pad_token_id
    assert pad == 1
    assert batch.inputs["input_ids"][0, 3:].tolist() == [pad] * 3
    assert (batch.inputs["input_ids"][0, :3] != pad).all()
    assert batch.labels == {}


def test_pairs_have_token_types_and_are_cut_to_the_limit() -> None:
    tokenizer = tiny_tokenizer("bert")
    (feature,) = PAIR.encode([Row(("good " * 40, "film " * 10), 2)], tokenizer, 32)
    assert feature.length == 32
    assert feature.inputs["token_type_ids"].tolist().count(1) == 11  # the longer text was cut, not the shorter
    (short,) = PAIR.encode([Row(("good " * 400, "film " * 400), 2)], tokenizer, 1000)
    assert short.length == tokenizer.model_max_length


def test_rows_keep_their_order_over_several_calls_of_the_tokenizer() -> None:
    rows = [Row((" ".join(["film"] * (1 + index % 7)),), index % 2) for index in range(2 * ROWS_AT_ONCE + 1)]
    features = SINGLE.encode(rows, tiny_tokenizer(), 64)
    assert [feature.row for feature in features] == list(range(len(rows)))
    assert [feature.length for feature in features] == [3 + index % 7 for index in range(len(rows))]
    assert [feature.label for feature in features] == [row.label for row in rows]
    assert SINGLE.encode([], tiny_tokenizer(), 64) == []


def test_too_short_a_sequence_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="--max-seq-length 2 is too short: this task needs 3 tokens"):
        SINGLE.encode([Row(("film",))], tiny_tokenizer(), 2)
    with pytest.raises(UsageError, match="needs 5 tokens"):
        PAIR.encode([Row(("film", "film"))], tiny_tokenizer(), 4)


def test_labels_have_the_types_of_the_librarys_losses() -> None:
    tokenizer = tiny_tokenizer()
    regression = make_task("text", None, "regression")
    labels = regression.collate(regression.encode([Row(("a",), 2.5), Row(("b",), 1.0)], tokenizer, 16)).labels["labels"]
    assert (labels.dtype, labels.tolist()) == (torch.float32, [2.5, 1.0])
    several = make_task("text", None, "multi_label_classification", ["x", "y", "z"])
    labels = several.collate(several.encode([Row(("a",), (1.0, 0.0, 1.0))], tokenizer, 16)).labels["labels"]
    assert (labels.dtype, labels.tolist()) == (torch.float32, [[1.0, 0.0, 1.0]])
    assert SINGLE.collate(SINGLE.encode([Row(("a",), 1)], tokenizer, 16)).labels["labels"].dtype == torch.int64


def test_predictions_of_every_problem_type() -> None:
    logits = [torch.tensor([0.0, 1.0986123])]
    (single,) = SINGLE.predictions(logits, [], [])
    assert single["label"] == "positive"
    assert single["score"] == pytest.approx(0.75)
    assert single["scores"] == pytest.approx({"negative": 0.25, "positive": 0.75})
    several = make_task("text", None, "multi_label_classification", ["x", "y", "z"])
    (many,) = several.predictions([torch.tensor([1.0986123, -1.0986123, 0.1])], [], [])
    assert many["labels"] == ["x", "z"]
    assert many["scores"] == pytest.approx({"x": 0.75, "y": 0.25, "z": 0.525}, abs=1e-3)
    regression = make_task("stsb")
    assert regression.predictions([torch.tensor([2.5])], [], []) == [{"score": 2.5}]


def test_metrics_of_every_problem_type() -> None:
    tokenizer = tiny_tokenizer()

    def judge(name: str, labels: List[object], logits: List[List[float]], **known: object) -> object:
        task = make_task(name, **known)
        texts = ("a",) * len(task.text_fields)
        rows = [Row(texts, label) for label in labels]
        return task.metrics([torch.tensor(one) for one in logits], task.encode(rows, tokenizer, 16), rows)

    votes = [[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]
    assert judge("sst2", [1, 0, 0, 0], votes) == {"accuracy": 75.0}
    assert judge("mrpc", [1, 0, 0, 0], votes) == {"accuracy": 75.0, "f1": pytest.approx(200 / 3)}
    assert judge("cola", [1, 0, 0, 0], votes) == {"matthews_correlation": pytest.approx(57.735, abs=1e-3)}
    numbers = [[1.0], [2.0], [4.0]]
    assert judge("stsb", [1.0, 2.0, 3.0], numbers) == {
        "pearson": pytest.approx(98.198, abs=1e-3),
        "spearmanr": pytest.approx(100.0),
    }
    assert judge("text", [1.0, 2.0, 3.0], numbers, problem_type="regression") == {
        "pearson": pytest.approx(98.198, abs=1e-3),
        "spearmanr": pytest.approx(100.0),
        "mse": pytest.approx(1 / 3),
    }
    several = {"problem_type": "multi_label_classification", "label_names": ["x", "y"]}
    assert judge("text", [(1.0, 0.0), (1.0, 1.0)], [[1.0, -1.0], [-1.0, 1.0]], **several) == {
        "accuracy": 50.0,
        "f1": pytest.approx(80.0),
    }
    assert judge("text", [0, 1, 2], [[1, 0, 0], [1, 0, 0], [0, 0, 1]], label_names=["x", "y", "z"]) == {
        "accuracy": pytest.approx(200 / 3),
        "f1_macro": pytest.approx((200 / 3 + 0 + 100) / 3),
    }


def test_main_metric_is_among_the_metrics() -> None:
    for name in ("sst2", "cola", "mrpc", "stsb"):
        task = make_task(name)
        rows = [Row(("a",) * len(task.text_fields), label) for label in (0, 1)]
        logits = [torch.zeros(task.num_labels) for _ in rows]
        assert task.main_metric in task.metrics(logits, task.encode(rows, tiny_tokenizer(), 16), rows)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_not_judged(broken: float) -> None:
    with pytest.raises(NonFiniteLossError, match="NaN or infinite"):
        SINGLE.predictions([torch.tensor([0.0, broken])], [], [])
    with pytest.raises(NonFiniteLossError, match="NaN or infinite"):
        SINGLE.metrics([torch.tensor([0.0, broken])], [], [])


def test_text_files_to_batches(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("text\tlabel\ngood\tx\nbad film\ty\n")
    task = make_task("text", tmp_path)
    batch = task.collate(task.encode(task.read("train"), tiny_tokenizer("distilbert"), 16))
    assert set(batch.inputs) == {"input_ids"}
    assert batch.labels["labels"].tolist() == [0, 1]
