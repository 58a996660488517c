"""The record of what cuts lose, and what it says of a cut."""

import json
from pathlib import Path
from typing import Any, Dict

import pytest

from sft.errors import CheckpointError
from sft_edge.commands.plan.accuracy import FILE, NOTHING_LOST, read_record
from sft_edge.options import CutOptions

RUN = {"blocks": 6, "task": "sst2", "mode": "frozen", "split_layer": 2, "split_rank": 0, "codec": "int8"}


def record(path: Path, *runs: Dict[str, Any]) -> Path:
    path.write_text(
        json.dumps({"made_with": {}, "runs": [{**RUN, "score": 80.0, "local": 81.0, **run} for run in runs]})
    )
    return path


def test_that_of_the_package_says_something():
    found = read_record()
    frozen = found.expected(CutOptions("frozen", 2, codec="fitted"), 6)
    assert -3.0 < frozen.points < 3.0 < frozen.spread + 3.0
    assert found.expected(CutOptions("frozen", 4, codec="fitted"), 12) == frozen, "it goes by the depth"
    assert found.expected(CutOptions("sft", 2, 8, codec="float32"), 6).points < -2.0
    assert found.expected(CutOptions("sft", 2, 5, codec="float32"), 6) is None


def test_by_mode_rank_codec_and_depth(tmp_path):
    runs = [{}, {"task": "qnli", "score": 78.0}, {"mode": "sft", "split_rank": 8, "score": 71.0}, {"codec": "int4"}]
    found = read_record(record(tmp_path / "record.json", *runs))
    assert found.expected(CutOptions("frozen", 2), 6).points == -2.0
    assert found.expected(CutOptions("sft", 2, 8), 6) == (-10.0, None)
    assert found.expected(CutOptions("sft", 2, 16), 6) is None
    assert found.expected(CutOptions("frozen", 2, codec="int4"), 6) == (-1.0, None)
    assert found.expected(CutOptions("frozen", 3), 6) is None


def test_what_computes_the_same_loses_nothing(tmp_path):
    empty = read_record(record(tmp_path / "record.json"))
    assert empty.expected(CutOptions("local"), 6) == empty.expected(CutOptions("sl", 1), 6) == NOTHING_LOST
    assert empty.expected(CutOptions("sl", 1, wire_dtype="float16"), 6) is None
    assert empty.expected(CutOptions("sl", 1, wire_dtype="float16", codec="float32"), 6) is None, "logits are rounded"
    assert empty.expected(CutOptions("sl", 1, wire_dtype="float32"), 6) == NOTHING_LOST
    assert empty.expected(CutOptions("sl", 1, gradient_codec="int4"), 6) is None
    assert empty.expected(CutOptions("sl", 1, freeze_edge=True), 6) is None


def test_a_code_counts_however_it_was_said(tmp_path):
    found = read_record(record(tmp_path / "record.json", {"mode": "sft", "split_rank": 8, "codec": "float16"}))
    said = [{"codec": "float16"}, {"wire_dtype": "float16"}, {"wire_dtype": "float16", "gradient_codec": "float16"}]
    assert [found.expected(CutOptions("sft", 2, 8, **one), 6) for one in said] == [(-1.0, None)] * 3
    assert found.expected(CutOptions("sft", 2, 8, wire_dtype="float32"), 6) is None


@pytest.mark.parametrize("option", [{"residual": "low-rank"}, {"gradient_codec": "int4"}, {"freeze_edge": True}])
def test_of_what_is_otherwise_it_says_nothing(tmp_path, option):
    found = read_record(record(tmp_path / "record.json", {"mode": "sft", "split_rank": 8}))
    assert found.expected(CutOptions("sft", 2, 8), 6) is not None
    assert found.expected(CutOptions("sft", 2, 8, **option), 6) is None


def test_runs_that_were_trained_otherwise_do_not_count(tmp_path):
    runs = [{}, {"score": 0.0, "flags": {"--residual": "low-rank"}}, {"flags": {"--learning-rate": "1e-4"}}]
    assert read_record(record(tmp_path / "record.json", *runs)).expected(CutOptions("frozen", 2), 6).points == -1.0


@pytest.mark.parametrize(
    ("run", "says"),
    [
        ({"score": "high"}, "run 2 lacks a number for score"),
        ({"local": float("nan")}, "run 2 lacks a number for local"),
        ({"split_layer": 7}, "run 2 lacks a split_layer among its blocks"),
        ({"blocks": True}, "run 2 lacks a number for blocks"),
        ({"flags": "none"}, None),
    ],
)
def test_a_broken_record(tmp_path, run, says):
    path = record(tmp_path / "record.json", {}, run)
    if says is None:
        assert read_record(path)
        return
    with pytest.raises(CheckpointError, match=says):
        read_record(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"runs": 3}', '{"runs": [3]}', '{"runs": [{}]}'])
def test_what_is_no_record(tmp_path, text):
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(CheckpointError):
        read_record(tmp_path / "record.json")


def test_an_installed_file_may_be_a_link(tmp_path):
    (tmp_path / "accuracy.json").symlink_to(FILE)
    assert read_record(tmp_path / "accuracy.json").runs == read_record().runs
