"""The model card."""

from __future__ import annotations

from typing import Any, Dict, Optional

import pytest
import yaml

from sft.wire.ledger import Ledger, StepRecord, Traffic
from sft_edge.model_files.card import model_card
from sft_edge.model_files.description import Description
from sft_edge.training.report import all_results


def card(mode: str, task: str = "sst2", head: str = "sequence-classification", **metrics: Any) -> str:
    cut: Dict[str, Optional[int]] = {"split_layer": 5, "split_rank": 8}
    cut = {
        "sft": cut,
        "sl": {**cut, "split_rank": None},
        "frozen": {**cut, "split_rank": None},
        "local": dict.fromkeys(cut),
    }[mode]
    ledger = Ledger()
    traffic = Traffic(60_000, 60_000, 61_000, 60_500) if mode != "local" else Traffic()
    for step in range(4):
        ledger.add(StepRecord(step, 32, traffic, 5_760_000))
    evaluation = {**metrics, "eval_samples": 872, "eval_runtime": 3.25}
    results = all_results(
        mode=mode,
        ledger=ledger,
        train_loss=0.51239,
        train_runtime=8.0,
        evaluation=evaluation,
        edge_peak_memory_bytes=10**9,
        **cut,
    )
    return model_card(Description(task, head, None, None, 128, "minilm", mode, **cut), results)


def test_task_cut_rank_metric_and_bytes() -> None:
    text = card("sft", eval_accuracy=82.456, eval_loss=0.4)
    assert "# minilm, fine-tuned on sst2\n" in text
    for row in (
        "| split layer | block 5, counted from 1 |",
        "| split rank | 8 |",
        "| residual at the split layer | removed |",
        "| steps | 4 |",
        "| training loss | 0.5124 |",
        "| accuracy | 82.46 |",
        "| loss | 0.40 |",
        "| sent by the edge in training | 244 kB, of which 240 kB are payload |",
        "| received by the edge in training | 242 kB, of which 240 kB are payload |",
        "| less payload than plain split learning, padded, float32 | 48.0 times |",
    ):
        assert row + "\n" in text
    assert "872" not in text
    assert "runtime" not in text


@pytest.mark.parametrize(
    ("residual", "says"), [("low-rank", "kept as far as the split rank holds it"), ("full", "kept")]
)
def test_the_residual_is_told(residual: str, says: str) -> None:
    description = Description(
        "sst2", "sequence-classification", None, None, 128, "minilm", "local", None, 5, 8, residual=residual
    )
    results = {"train_steps": 4, "train_loss": 0.5, "wire_bytes_sent": 0}
    assert f"| residual at the split layer | {says} |\n" in model_card(description, results)


def test_a_run_whose_rows_were_all_kept_already() -> None:
    results = {
        "train_steps": 4,
        "train_loss": 0.5,
        "wire_reduction": None,
        "mode": "frozen",
        **{f"wire_{what}_{way}": 9 for what in ("bytes", "payload_bytes") for way in ("sent", "received")},
    }
    description = Description("sst2", "sequence-classification", None, None, 128, "minilm", "frozen", 2)
    assert "less payload" not in model_card(description, results)


def test_what_a_system_does_not_have_is_left_out() -> None:
    text = card("local", eval_accuracy=82.5)
    assert "wire" not in text
    assert "split" not in text.replace("library_name: split-fine-tuning", "")
    for mode in ("sl", "frozen"):
        text = card(mode, eval_accuracy=82.5)
        assert "block 5" in text
        assert "split rank" not in text
        assert "On the wire" in text
        assert "| the text, from what was sent | more readily than from a rank-R activation" in text
    assert "the text, from what was sent" not in card("sft")
    assert "Validation" not in card("sft")  # a run that was broken off was not judged


@pytest.mark.parametrize("head", ["sequence-classification", "question-answering"])
def test_the_metadata_is_yaml(head: str) -> None:
    _, metadata, _ = card("sft", head=head).split("---\n", 2)
    kind = {"sequence-classification": "text-classification"}.get(head, head)
    assert yaml.safe_load(metadata) == {
        "library_name": "split-fine-tuning",
        "pipeline_tag": kind,
        "base_model": "minilm",
    }
