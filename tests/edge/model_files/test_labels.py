"""What a checkpoint says of its classes: kept where they are the task's, said where they are others."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Dict, List, Optional

import pytest
from safetensors.torch import load_file, save_file
from support.jobs import run_options, sst2
from support.tiny import make_tiny_model

from sft_edge.commands.train.start import Start, open_start
from sft_edge.commands.train.train import TrainingRun
from sft_edge.model_files.labels import Head, head_of_values, order_of
from sft_edge.options.train import DataOptions, ModelOptions

SEQUENCES = "sequence-classification"
MNLI = ["entailment", "neutral", "contradiction"]
SST2 = {"0": "negative", "1": "positive"}


@pytest.mark.parametrize(
    ("theirs", "own", "order"),
    [
        (["contradiction", "entailment", "neutral"], MNLI, ["contradiction", "entailment", "neutral"]),
        (["CONTRADICTION", "Neutral", "entailment "], MNLI, ["contradiction", "neutral", "entailment"]),
        (["not-entailment", "Entailment"], ["entailment", "not_entailment"], ["not_entailment", "entailment"]),
        (["LABEL_0", "LABEL_1", "LABEL_2"], MNLI, MNLI),
        (["1", "0"], ["negative", "positive"], ["positive", "negative"]),
        (["LABEL_1", "LABEL_0"], ["negative", "positive"], ["positive", "negative"]),
        (["NEG", "POS"], ["negative", "positive"], None),
        (["entailment", "neutral"], MNLI, None),
        (["b", "a"], ["a", "b"], ["b", "a"]),
        (["A", "a"], ["a", "A"], ["A", "a"]),
        (["a", "a"], ["a", "b"], None),
        ([f"LABEL_{i}" for i in range(11)], sorted(map(str, range(11))), [str(i) for i in range(11)]),
        ([f"LABEL_{i}" for i in range(11)], sorted(f"LABEL_{i}" for i in range(11)), [f"LABEL_{i}" for i in range(11)]),
    ],
)
def test_the_models_order(theirs: List[str], own: List[str], order: Optional[List[str]]) -> None:
    spellings = SST2 if "negative" in own else {}
    assert order_of(Head(theirs, None), own, spellings) == order


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"id2label": {"1": "b", "0": "a"}}, ["a", "b"]),
        ({"label2id": {"b": 1, "a": 0}}, ["a", "b"]),
        ({"id2label": {"0": "a", "2": "b"}}, []),
        ({"id2label": ["a", "b"]}, []),
        ({"id2label": {"x": "a"}, "problem_type": 3}, []),
        ({}, []),
    ],
)
def test_names_out_of_a_file(values: Dict[str, Any], names: List[str]) -> None:
    assert head_of_values(values) == Head(names, None)


def named(model: Path, names: List[str], **changes: Any) -> Path:
    path = model / "config.json"
    content = {**json.loads(path.read_text()), **changes}
    content["id2label"] = {str(i): name for i, name in enumerate(names)}
    content["label2id"] = {name: i for i, name in enumerate(names)}
    path.write_text(json.dumps(content))
    return model


def start(model: Path, data_dir: Path, max_seq_length: int = 64) -> Start:
    return open_start(DataOptions("sst2", data_dir), ModelOptions(model=str(model), max_seq_length=max_seq_length))


@pytest.mark.parametrize(
    ("names", "changes", "said"),
    [
        (["negative", "positive"], {}, None),
        (["positive", "negative"], {}, "classes are in the order that the model has them: positive, negative"),
        (["LABEL_0", "LABEL_1"], {}, None),
        (["toxic", "fine"], {}, r"trained for other labels \(toxic, fine\): it goes on as one for negative, positive"),
        (["a", "b", "c"], {}, r"head has 3 outputs \(a, b, c\), the task 2: its last layer is drawn anew"),
        (["negative", "positive"], {"problem_type": "multi_label_classification"}, "was trained for multi_label"),
    ],
)
def test_what_is_said(tmp_path: Path, names: List[str], changes: Dict[str, Any], said: Optional[str]) -> None:
    model = named(make_tiny_model(tmp_path / "tiny", layers=1, head=SEQUENCES, num_labels=len(names)), names, **changes)
    notes = start(model, tmp_path).notes
    assert len(notes) == (0 if said is None else 1)
    assert said is None or re.search(said, notes[0])


def test_a_tokenizer_that_reads_less_is_said(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "tiny", layers=1)
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 16}))
    assert start(model, tmp_path, max_seq_length=16).notes == []
    (note,) = start(model, tmp_path, max_seq_length=64).notes
    assert note.startswith("texts are cut to 16 tokens")


def test_a_model_with_its_classes_the_other_way_round_is_the_same_model(tmp_path: Path) -> None:
    job = sst2(tmp_path / "data", train_rows=8)
    scores = []
    for names in (["negative", "positive"], ["POSITIVE", "NEGATIVE"]):
        model = named(make_tiny_model(tmp_path / names[0], layers=1, head=SEQUENCES, num_labels=2), names)
        if names[0] == "POSITIVE":
            tensors = load_file(str(model / "model.safetensors"))
            for name in ("classifier.weight", "classifier.bias"):
                tensors[name] = tensors[name].flip(0).contiguous()
            save_file(tensors, str(model / "model.safetensors"))
        options = {"model": str(model), "mode": "local", "split_layer": None, "max_steps": 1, "learning_rate": 0.0}
        where = {"data_dir": job.data_dir, "output_dir": tmp_path / f"out-{names[0]}", "disable_tqdm": True}
        scores.append(TrainingRun(run_options(**options, **where)).run())
    assert scores[0]["eval_accuracy"] == scores[1]["eval_accuracy"]
    assert scores[0]["eval_loss"] == pytest.approx(scores[1]["eval_loss"])
    assert scores[0]["eval_loss"] != pytest.approx(0.6931, abs=1e-4)  # which is the same either way
    saved = json.loads((tmp_path / "out-POSITIVE" / "sft.json").read_text())
    assert saved["label_names"] == ["positive", "negative"]
