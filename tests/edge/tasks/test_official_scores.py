"""Our metrics beside what the official scripts gave for the same predictions, as bench/official_scores.py noted it."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any, Dict

import pytest
import torch

from sft_edge.tasks import Feature, Row, make_task, spans
from sft_edge.tasks.glue import GLUE

RECORD: Dict[str, Any] = json.loads(Path(__file__).with_name("official_scores.json").read_text(encoding="ascii"))
GLUE_CASES = [pytest.param(case, id=f"{case['task']}, {case['name']}") for case in RECORD["glue"]]


@pytest.mark.parametrize("group", RECORD["squad"], ids=lambda group: group["name"])
def test_squad_to_the_last_digit(group: Dict[str, Any]) -> None:
    predictions, answers = zip(*group["questions"])
    assert json.dumps(spans.scores(predictions, answers)) == group["printed"]


def test_squad_of_real_questions_to_the_last_digit(data_dir: Path) -> None:
    record = RECORD["squad_file"]
    rows = make_task("squad", data_dir).read("validation", len(record["spans"]))
    if zlib.crc32(" ".join(row.id for row in rows).encode()) != record["crc32_of_ids"]:
        pytest.skip("SFT_DATA_DIR has another SQuAD validation file than that which the stored predictions are of")
    predictions = [row.texts[1][start:end] for row, (start, end) in zip(rows, record["spans"])]
    answers = [[answer.text for answer in row.answers] for row in rows]
    assert json.dumps(spans.scores(predictions, answers)) == record["printed"]


def scores(case: Dict[str, Any], order: int = 1) -> Dict[str, float]:
    """Of a model that has its classes in GLUE's order, or, with -1, in the opposite one."""
    names = list(GLUE[case["task"]].labels.values())[::order]
    task = make_task(case["task"], label_names=names or None)
    logits = [torch.tensor(row[::order]) for row in case["logits"]]
    labels = [label if order == 1 else len(names) - 1 - label for label in case["labels"]]
    features = [Feature(row=i, inputs={}, padding={}) for i in range(len(logits))]
    return task.metrics(logits, features, [Row(("",), label) for label in labels])


@pytest.mark.parametrize("case", GLUE_CASES)
def test_glue(case: Dict[str, Any]) -> None:
    """Ours are percentages. Where one side is constant and the official correlation NaN, ours is 0."""
    official = {name: float(value) for name, value in case.get("float64", case["official"]).items()}
    defined = {name: 0.0 if math.isnan(value) else value for name, value in official.items()}
    ours = {name: value / 100 for name, value in scores(case).items()}
    assert ours == pytest.approx(defined, rel=0, abs=1e-11)
    # The digits that transformers' run_glue prints, of numbers that it has rounded to float32.
    printed = {name: f"{float(value):.4f}".replace("nan", "0.0000") for name, value in case["official"].items()}
    assert {name: f"{value:.4f}" for name, value in ours.items()} == printed


@pytest.mark.parametrize("case", [case for case in GLUE_CASES if case.id in ("mrpc, usual", "mnli, usual")])
def test_glue_whatever_order_a_model_has_its_classes_in(case: Dict[str, Any]) -> None:
    """F1 is that of GLUE's class 1."""
    assert scores(case, order=-1) == pytest.approx(scores(case), rel=0, abs=1e-9)
