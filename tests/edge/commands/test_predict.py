"""`sft-edge predict` and `sft-edge evaluate`: asking a trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Callable, Dict, List

import pytest
from support.jobs import JOBS, error_line, flags, sst2
from support.tiny import make_tiny_model

from sft_edge.cli import main


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Dict[str, Path]:
    """A trained model for every task, in its directory `model`, beside its data."""
    source = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", layers=1, initializer_range=0.5)
    trained = {}
    for task, write in JOBS.items():
        directory = tmp_path_factory.mktemp(task)
        options = {"mode": "local", "model": source, "split_layer": None, "output_dir": directory / "model"}
        assert main(["train", *write(directory).flags(**options, max_steps=2, learning_rate=1e-4)]) == 0
        trained[task] = directory / "model"
    return trained


@pytest.fixture
def predict(models: Dict[str, Path], capsys: pytest.CaptureFixture[str]) -> Callable[..., List[str]]:
    """Lines that the command prints."""

    def run(task: str, **options: object) -> List[str]:
        capsys.readouterr()
        assert main(["predict", *flags(model=models[task], **options)]) == 0
        return capsys.readouterr().out.splitlines()

    return run


def test_one_text(predict: Callable[..., List[str]]) -> None:
    (line,) = predict("sst2", text="a good film")
    label, score = line.split("\t")
    assert label in ("negative", "positive")
    assert 0.5 <= float(score) <= 1
    (as_json,) = (json.loads(line) for line in predict("sst2", text="a good film", json_lines=True))
    assert as_json["sentence"] == "a good film"
    assert as_json["label"] == label
    assert as_json["score"] == max(as_json["scores"].values())
    assert sum(as_json["scores"].values()) == pytest.approx(1)


def test_answers_stand_beside_the_lines_of_a_text_file(predict: Callable[..., List[str]], tmp_path: Path) -> None:
    """A blank line has an empty one."""
    (tmp_path / "a.txt").write_text("good\n\nbad\n   \nfine\n")
    lines = predict("sst2", file=tmp_path / "a.txt")
    assert [bool(line) for line in lines] == [True, False, True, False, True]
    assert lines[2] == predict("sst2", text="bad")[0]
    objects = [json.loads(line) for line in predict("sst2", file=tmp_path / "a.txt", json_lines=True)]
    assert [one["sentence"].strip() for one in objects] == ["good", "", "bad", "", "fine"]
    assert ["label" in one for one in objects] == [True, False, True, False, True]


def test_pairs(predict: Callable[..., List[str]]) -> None:
    (line,) = predict("stsb", text="a film", text_pair="a plot")
    assert predict("stsb", text="a plot", text_pair="a film") != [line]
    float(line)
    (answer,) = (json.loads(line) for line in predict("squad", text="what", text_pair="a good film", json_lines=True))
    assert answer["context"][answer["start"] : answer["end"]] == answer["answer"]


def test_several_labels(predict: Callable[..., List[str]]) -> None:
    (answer,) = (json.loads(line) for line in predict("text", text="film plot", json_lines=True))
    assert answer["labels"] == [name for name, score in answer["scores"].items() if score > 0.5]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("texts.txt", "a good film\nthe worst plot\n"),
        ("texts.tsv", "id\tsentence\n1\ta good film\n2\tthe worst plot\n"),
        ("texts.csv", 'sentence\n"a good film"\nthe worst plot\n'),
        ("texts.jsonl", '{"sentence": "a good film"}\n{"sentence": "the worst plot"}\n'),
    ],
)
def test_files(predict: Callable[..., List[str]], tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    lines = predict("sst2", file=tmp_path / name, per_device_eval_batch_size=1)
    assert lines == [*predict("sst2", text="a good film"), *predict("sst2", text="the worst plot")]
    rows = [json.loads(line) for line in predict("sst2", file=tmp_path / name, json_lines=True)]
    assert [row["sentence"] for row in rows] == ["a good film", "the worst plot"]


@pytest.mark.parametrize(
    ("task", "options", "code", "says"),
    [
        ("sst2", {"text": " "}, 2, "the text to predict is empty"),
        ("sst2", {}, 2, "exactly one of --text and --file must be given"),
        ("sst2", {"text": "a", "file": "b.txt"}, 2, "exactly one of --text and --file must be given"),
        ("sst2", {"text": "a", "text_pair": "b"}, 2, "task sst2 takes a sentence: 1 text(s), not 2"),
        ("stsb", {"text": "a"}, 2, "task stsb takes a sentence1 and a sentence2: 2 text(s), not 1"),
        ("sst2", {"file": "nowhere.txt"}, 3, "nowhere.txt: cannot be read: No such file or directory"),
    ],
    ids=str,
)
def test_questions_that_make_no_sense(
    models: Dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    task: str,
    options: Dict[str, object],
    code: int,
    says: str,
) -> None:
    assert main(["predict", *flags(model=models[task], **options)]) == code
    assert says in error_line(capsys.readouterr().err)


def test_not_a_trained_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tiny_model(tmp_path / "plain", layers=1)
    for command in (["predict", "--text", "a"], ["evaluate", "--data-dir", str(tmp_path)]):
        for directory in ("plain", "nowhere"):
            assert main([*command, "--model", str(tmp_path / directory)]) == 4
            said = error_line(capsys.readouterr().err)
            assert "not a trained model: it holds no sft.json" in said


def test_evaluation_of_some_rows(models: Dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "deep" / "results.json"
    options = {"data_dir": models["sst2"].parent, "max_eval_samples": 3, "output_file": file, "task": "sst2"}
    assert main(["evaluate", *flags(model=models["sst2"], **options)]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["eval_samples"] == 3
    assert results["eval_accuracy"] in [pytest.approx(100 * right / 3) for right in range(4)]
    assert json.loads(file.read_text()) == results


def test_evaluation_as_another_task(
    models: Dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    job = sst2(tmp_path)
    assert main(["evaluate", *flags(model=models["stsb"], data_dir=job.data_dir, task="sst2")]) == 2
    assert error_line(capsys.readouterr().err) == "--task sst2: this model was trained for stsb"
