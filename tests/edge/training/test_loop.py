"""The training loop over a model in one process: how many steps, which rows, which rate, what is noted."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
import torch
from support.jobs import run_options, sst2
from support.tiny import tiny_config, tiny_tokenizer

from sft.batch import Batch
from sft.errors import NonFiniteLossError
from sft.models import build_whole
from sft.models.weights import fill
from sft.optim.spec import OptimizerSpec, decay_groups, make_optimizer
from sft_edge.systems.local import LocalSystem
from sft_edge.tasks import make_task
from sft_edge.training.loop import TrainingLoop
from sft_edge.training.progress import Progress

ROWS = 10


class Rig:
    """A loop and all that it did."""

    def __init__(self, directory: Path, logging_steps: int = 1, **options: Any) -> None:
        usual = {"per_device_train_batch_size": 4, "num_train_epochs": 1.0, "seed": 3, "learning_rate": 1e-2}
        given = run_options(**{**usual, "mode": "local", "logging_steps": logging_steps, **options})
        task = make_task("sst2", sst2(directory, train_rows=ROWS).data_dir)
        features = task.encode(task.read("train"), tiny_tokenizer(), 64)
        net = build_whole(tiny_config(layers=1, **task.config_overrides()), task.head)
        fill(net, [], seed=0)
        spec = OptimizerSpec("SGD", decay_groups(net, {"lr": given.optimizer.learning_rate}))
        self.system = LocalSystem(net, make_optimizer(spec, net.whole_parameters()), seed=3)
        self.seen: List[Tuple[int, int, float, Batch]] = []
        self.rates: List[float] = []
        self.evaluated: List[int] = []
        self.reported: List[Tuple[int, Dict[str, Any]]] = []
        self._listen()
        self.screen = io.StringIO()
        self.loop = TrainingLoop(
            self.system,
            task,
            features,
            given,
            Progress(logging_steps, self.screen),
            self._evaluate,
            lambda step, entry: self.reported.append((step, entry)),
        )

    def _listen(self) -> None:
        forward_backward, update = self.system.forward_backward, self.system.update

        def heard(batch: Batch, step: int, micro_batch: int, loss_scale: float) -> float:
            self.seen.append((step, micro_batch, loss_scale, batch))
            return forward_backward(batch, step, micro_batch, loss_scale)

        def updated(step: int, clip_scale: float) -> None:
            self.rates.append(float(self.system.optimizer.param_groups[0]["lr"]))
            update(step, clip_scale)

        self.system.forward_backward, self.system.update = heard, updated  # type: ignore[method-assign]

    def _evaluate(self, step: int) -> Dict[str, float]:
        self.evaluated.append(step)
        return {"eval_accuracy": float(50 - step)}

    def run(self) -> Rig:
        self.loop.run()
        return self

    def rows(self) -> List[List[int]]:
        """Token ids of every row, in the order they were trained on."""
        return [
            ids[:length]
            for _, _, _, batch in self.seen
            for ids, length in zip(batch.inputs["input_ids"].tolist(), batch.lengths)
        ]


def test_an_epoch_is_every_row_once(tmp_path: Path) -> None:
    rig = Rig(tmp_path, num_train_epochs=2.0).run()
    assert [len(batch.lengths) for _, _, _, batch in rig.seen] == [4, 4, 2] * 2
    first, second = rig.rows()[:ROWS], rig.rows()[ROWS:]
    assert sorted(first) == sorted(second)
    assert first != second
    assert rig.loop.state.global_step == rig.loop.state.max_steps == 6
    assert rig.loop.state.epoch == rig.loop.state.num_train_epochs == 2.0


def test_the_order_is_of_the_seed_alone(tmp_path: Path) -> None:
    def order(seed: int) -> List[List[int]]:
        torch.manual_seed(len(str(tmp_path)) + seed)
        return Rig(tmp_path, seed=seed).run().rows()

    assert order(1) == order(1)
    assert order(1) != order(2)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"num_train_epochs": 0.5}, 2),
        ({"num_train_epochs": 0.01}, 1),
        ({"num_train_epochs": 1.5}, 5),
        ({"max_steps": 2}, 2),
        ({"max_steps": 7, "num_train_epochs": 1.0}, 7),
        ({"gradient_accumulation_steps": 2}, 2),
        ({"gradient_accumulation_steps": 100}, 1),
    ],
    ids=str,
)
def test_how_many_steps(tmp_path: Path, options: Dict[str, Any], steps: int) -> None:
    rig = Rig(tmp_path, **options).run()
    assert rig.loop.state.max_steps == rig.loop.state.global_step == len(rig.rates) == steps
    assert [step for step, _, _, _ in rig.seen] == sorted(step for step, _, _, _ in rig.seen)


def test_micro_batches_count_alike(tmp_path: Path) -> None:
    """The last step of an epoch has fewer of them, and none of them counts less for it."""
    rig = Rig(tmp_path, gradient_accumulation_steps=2).run()
    assert [(step, micro_batch, scale) for step, micro_batch, scale, _ in rig.seen] == [
        (0, 0, 0.5),
        (0, 1, 0.5),
        (1, 0, 1.0),
    ]


def test_rates_follow_the_schedule(tmp_path: Path) -> None:
    rig = Rig(tmp_path, max_steps=5, warmup_steps=2).run()
    assert rig.rates == pytest.approx([0.0, 0.5e-2, 1e-2, 2e-2 / 3, 1e-2 / 3])
    history = [entry["learning_rate"] for entry in rig.loop.state.log_history]
    assert history == rig.rates, "what is noted is what was stepped with"


def test_what_is_noted(tmp_path: Path) -> None:
    rig = Rig(tmp_path, logging_steps=2, max_steps=5).run()
    history = rig.loop.state.log_history
    assert [entry["step"] for entry in history] == [2, 4, 5]
    assert [entry["epoch"] for entry in history] == [0.6667, 1.3333, 1.6667]
    assert rig.reported == [(entry["step"], entry) for entry in history]
    losses = [entry["loss"] for entry in history]
    assert rig.loop.train_loss == pytest.approx((2 * losses[0] + 2 * losses[1] + losses[2]) / 5)
    assert all(entry["grad_norm"] > 0 for entry in history)
    assert rig.loop.seconds > 0
    assert rig.screen.getvalue().splitlines()[-1].startswith("step 5/5  loss ")


def test_without_clipping_a_gradient_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    rig = Rig(tmp_path, max_grad_norm=0)
    rig.system.gradient_norm = lambda: float("nan")  # type: ignore[method-assign]
    with pytest.raises(NonFiniteLossError, match="norm of the gradient is nan at step 1"):
        rig.run()


@pytest.mark.parametrize(
    ("options", "evaluated"),
    [
        ({}, []),
        ({"eval_strategy": "epoch", "num_train_epochs": 3.0}, [3, 6]),
        ({"eval_strategy": "steps", "eval_steps": 2, "max_steps": 5}, [2, 4]),
        ({"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}, [2]),
        ({"eval_strategy": "steps", "max_steps": 7, "logging_steps": 3}, [3, 6]),
    ],
    ids=str,
)
def test_when_it_is_evaluated(tmp_path: Path, options: Dict[str, Any], evaluated: List[int]) -> None:
    """The end is not among them: whoever runs the loop evaluates there."""
    rig = Rig(tmp_path, **options).run()
    assert rig.evaluated == evaluated
    assert rig.loop.state.best_metric == (50 - evaluated[0] if evaluated else None)
    entries = [entry for entry in rig.loop.state.log_history if "eval_accuracy" in entry]
    assert [(entry["step"], entry["eval_accuracy"]) for entry in entries] == [(step, 50 - step) for step in evaluated]


@pytest.mark.parametrize(("bad", "what"), [("loss", "loss is nan"), ("gradient", "norm of the gradient is inf")])
def test_a_step_that_is_not_finite_is_not_taken(tmp_path: Path, bad: str, what: str) -> None:
    rig = Rig(tmp_path)
    right = rig.system.forward_backward

    def forward_backward(batch: Batch, step: int, micro_batch: int, loss_scale: float) -> float:
        loss = right(batch, step, micro_batch, loss_scale)
        if step == 1 and bad == "gradient":
            for parameter in rig.system.net.parameters():
                parameter.grad = torch.full_like(parameter, math.inf)
        return math.nan if step == 1 and bad == "loss" else loss

    rig.system.forward_backward = forward_backward  # type: ignore[method-assign]
    with pytest.raises(NonFiniteLossError, match=f"the {what} at step 2; a lower --learning-rate"):
        rig.run()
    assert rig.loop.state.global_step == len(rig.system.ledger) == len(rig.rates) == 1


def test_without_anybody_to_evaluate(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.loop._evaluate = None
    assert rig.loop.evaluate() == {}
    assert rig.loop.state.log_history == []
