"""Judging a model: in batches of any size, with the loss that training minimizes, computed from logits."""

from __future__ import annotations

from pathlib import Path
from typing import List, Sequence

import pytest
import torch
from support.jobs import JOBS
from support.tiny import tiny_config, tiny_tokenizer
from torch import Tensor

from sft.models import Whole, build_whole
from sft.models.weights import fill
from sft.optim.spec import OptimizerSpec, decay_groups, make_optimizer
from sft_edge.systems.local import LocalSystem
from sft_edge.tasks import Feature, Task, make_task
from sft_edge.tasks.base import batches_of
from sft_edge.training.evaluation import EvaluationSet, evaluate, evaluate_with, mean_loss


class Setting:
    """A task with its validation rows, and a model with random weights for it."""

    def __init__(self, name: str, directory: Path) -> None:
        self.task: Task = make_task(name, JOBS[name](directory).data_dir)
        rows = self.task.read("validation")
        self.data = EvaluationSet(rows, self.task.encode(rows, tiny_tokenizer(), 64))
        config = tiny_config(layers=1, initializer_range=0.5, **self.task.config_overrides())
        self.net: Whole = build_whole(config, self.task.head)
        fill(self.net, [], seed=0)
        self.net.eval()

    def ask(self, features: Sequence[Feature], batch_size: int = 4) -> List[Tensor]:
        batches = batches_of(self.task, features, batch_size)
        with torch.no_grad():
            return [row for batch in batches for row in self.net(batch.inputs, batch.lengths, {}).logits]


@pytest.fixture(params=list(JOBS))
def setting(request: pytest.FixtureRequest, tmp_path: Path) -> Setting:
    return Setting(request.param, tmp_path)


def test_the_loss_is_the_one_of_training(setting: Setting) -> None:
    """The mean over all features, however they fall into batches: the library's own loss of all at once."""
    task, features = setting.task, setting.data.features
    whole = task.collate(features)
    with torch.no_grad():
        expected = setting.net(*whole).loss
    assert expected is not None
    for batch_size in (1, 4, 100):
        loss = mean_loss(task, setting.ask(features, batch_size), batches_of(task, features, batch_size))
        assert loss == pytest.approx(float(expected), rel=1e-5)


def test_figures(setting: Setting) -> None:
    task, data = setting.task, setting.data
    logits = setting.ask(data.features)
    results = evaluate_with(setting.ask, task, data, batch_size=4)
    for name, value in task.metrics(logits, data.features, data.rows).items():
        assert results[f"eval_{name}"] == value
    assert f"eval_{task.main_metric}" in results
    assert results["eval_samples"] == len(data.rows)
    assert results["eval_runtime"] > 0
    assert results["eval_samples_per_second"] == pytest.approx(len(data.rows) / results["eval_runtime"])


def test_a_model_in_training_is_judged_like_a_saved_one(setting: Setting) -> None:
    spec = OptimizerSpec("SGD", decay_groups(setting.net, {"lr": 0.1, "weight_decay": 0.0}))
    system = LocalSystem(setting.net, make_optimizer(spec, setting.net.whole_parameters()), seed=0)
    setting.net.train()
    ours = evaluate(system, setting.task, setting.data, batch_size=4, step=3)
    saved = evaluate_with(setting.ask, setting.task, setting.data, batch_size=4)
    for results in (ours, saved):
        results.pop("eval_runtime")
        results.pop("eval_samples_per_second")
    assert ours == saved


def test_without_labels_there_is_no_loss(setting: Setting) -> None:
    unlabelled = [feature._replace(label=None, span=None) for feature in setting.data.features]
    assert mean_loss(setting.task, setting.ask(unlabelled), batches_of(setting.task, unlabelled, 4)) is None


def test_batches_come_in_order_the_last_one_smaller(tmp_path: Path) -> None:
    setting = Setting("sst2", tmp_path)
    features = setting.data.features
    batches = list(batches_of(setting.task, features, 5))
    assert [len(batch.lengths) for batch in batches] == [5, 5, 3]
    assert [length for batch in batches for length in batch.lengths] == [feature.length for feature in features]
    assert [batch.inputs["input_ids"].shape[1] for batch in batches] == [max(batch.lengths) for batch in batches]
    assert list(batches_of(setting.task, [], 5)) == []
