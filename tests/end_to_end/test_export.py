"""From training to a machine that has transformers and not this package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.jobs import Job, flags, read_json, sst2
from support.tiny import make_tiny_model

from sft_edge.cli import main

ELSEWHERE = """
import importlib, json, sys
for name in ("sft", "sft_edge", "sft_cloud"):
    sys.modules[name] = None  # as if it were not there
    try:
        importlib.import_module(name)
        raise SystemExit(name + " is there")
    except ImportError:
        pass
from transformers import pipeline
task, directory, questions, options = json.load(sys.stdin)
answer = pipeline(task, directory, device="cpu", **options)
print(json.dumps([answer(question) for question in questions]))
"""
"""A process that cannot import this package, with pipelines of the library's."""

TEXTS = ["a good film", "the worst plot of them all in it", "no", "one of the best of its story and people"]


@pytest.fixture
def elsewhere(tmp_path: Path) -> Callable[..., Any]:
    def ask(task: str, directory: Path, questions: list[Any], **options: object) -> Any:
        done = subprocess.run(
            [sys.executable, "-c", ELSEWHERE],
            input=json.dumps([task, str(directory), questions, options]),
            env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return ask


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Callable[..., list[Any]]:
    """What a command prints, one JSON value a line."""

    def run(*command: str) -> list[Any]:
        capsys.readouterr()
        assert main(list(command)) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


@pytest.fixture(scope="module")
def lively(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights large enough for answers to differ."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "lively", layers=3, initializer_range=0.5)


@pytest.mark.slow
def test_labels_and_scores_are_those_of_predict(
    train: Callable[..., Path],
    lively: Path,
    job: Job,
    elsewhere: Callable[..., Any],
    told: Callable[..., list[Any]],
    tmp_path: Path,
) -> None:
    trained, file = train(job, model=lively, max_steps=6), tmp_path / "texts.txt"
    file.write_text("\n".join(TEXTS))
    predicted = told("predict", *flags(model=trained, file=file, json_lines=True))
    for form in ("dense", "factored"):
        assert main(["export", *flags(model=trained, to=tmp_path / form, **{form: True})]) == 0
        answers = elsewhere("text-classification", tmp_path / form, TEXTS, trust_remote_code=True)
        assert [answer["label"] for (answer,) in answers] == [prediction["label"] for prediction in predicted]
        for (answer,), prediction in zip(answers, predicted, strict=True):
            assert answer["score"] == pytest.approx(prediction["score"], abs=1e-4)
    assert len({prediction["score"] for prediction in predicted}) == len(TEXTS)


@pytest.mark.slow
def test_a_run_that_kept_the_residual_needs_no_code(
    train: Callable[..., Path], lively: Path, elsewhere: Callable[..., Any], tmp_path: Path
) -> None:
    job = sst2(tmp_path / "data")
    trained = train(job, model=lively, mode="local", residual="full", split_layer=2, split_rank=4, max_steps=3)
    to = tmp_path / "export"
    assert main(["export", *flags(model=trained, to=to)]) == 0
    assert read_json(to / "config.json")["model_type"] == "bert"
    ((answer,),) = elsewhere("text-classification", to, TEXTS[:1])
    assert answer["label"] in ("negative", "positive")
