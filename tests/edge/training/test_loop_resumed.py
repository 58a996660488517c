"""A loop that goes on where another one was saved ends as one that was never broken off, bit for bit."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
import torch
from support.jobs import run_options, same_bits, sst2
from support.tiny import tiny_config, tiny_tokenizer

from sft.batch import Batch
from sft.models import build_whole
from sft.models.weights import fill
from sft.optim.spec import OptimizerSpec, decay_groups, make_optimizer
from sft_edge.checkpoints.content import parts_of, restore
from sft_edge.checkpoints.directory import EdgeCheckpoint, write_checkpoint
from sft_edge.systems.local import LocalSystem
from sft_edge.tasks import Task, make_task
from sft_edge.training.loop import TrainingLoop
from sft_edge.training.progress import Progress

ROWS = 10


class Run:
    """A loop over a tiny model; with `save_in` it saves a checkpoint after each step."""

    def __init__(self, directory: Path, save_in: Path, **options: Any) -> None:
        usual = {"per_device_train_batch_size": 2, "num_train_epochs": 2.0, "seed": 3, "logging_steps": 3}
        usual.update(learning_rate=1e-2, warmup_steps=3)
        given = run_options(**{**usual, "mode": "local", "optim": "AdamW", **options})
        task = make_task("sst2", directory)
        features = task.encode(task.read("train"), tiny_tokenizer(), 64)
        net = build_whole(tiny_config(layers=1, **task.config_overrides()), task.head)
        fill(net, [], seed=0)
        spec = OptimizerSpec(given.optimizer.optim, decay_groups(net, given.optimizer.arguments()))
        self.system = LocalSystem(net, make_optimizer(spec, net.whole_parameters()), seed=3)
        self.losses: Dict[Tuple[int, int], float] = {}
        self.rows: Dict[Tuple[int, int], List[List[int]]] = {}
        self.prepared: List[Task] = []
        self.save_in = save_in
        self.checkpoints: List[EdgeCheckpoint] = []
        self._listen(task)
        with open("/dev/null", "w") as nowhere:
            progress = Progress(1000, nowhere)
            progress._line = lambda text: None  # type: ignore[method-assign]
        self.loop = TrainingLoop(
            self.system,
            task,
            features,
            given,
            progress,
            lambda step: {"eval_accuracy": float(self.weight()[:3].sum()), "eval_nothing": float("nan")},
            None,
            self._save,
        )

    def weight(self) -> torch.Tensor:
        return next(self.system.net.parameters()).detach().flatten()

    def _listen(self, task: Task) -> None:
        forward_backward, collate = self.system.forward_backward, task.collate

        def heard(batch: Batch, step: int, micro_batch: int, loss_scale: float) -> float:
            loss = forward_backward(batch, step, micro_batch, loss_scale)
            self.losses[step, micro_batch] = loss
            self.rows[step, micro_batch] = batch.inputs["input_ids"].tolist()
            return loss

        def collated(features: Any) -> Batch:
            self.prepared.append(task)
            return collate(features)

        self.system.forward_backward = heard  # type: ignore[method-assign]
        task.collate = collated  # type: ignore[method-assign]

    def _save(self, loop: TrainingLoop) -> None:
        files = parts_of(self.system, loop, {})
        self.checkpoints.append(write_checkpoint(self.save_in, "0" * 32, loop.state.global_step, None, files))

    def history(self) -> List[Dict[str, Any]]:
        return json.loads(json.dumps(self.loop.state.log_history))

    def state(self) -> Dict[str, torch.Tensor]:
        optimizer = {
            f"{index}/{name}": torch.as_tensor(value)
            for index, state in self.system.optimizer.state_dict()["state"].items()
            for name, value in state.items()
        }
        return {**{name: p.detach() for name, p in self.system.net.whole_parameters().items()}, **optimizer}


OPTIONS = [
    {},
    {"gradient_accumulation_steps": 2},
    {"gradient_accumulation_steps": 4, "logging_steps": 1},
    {"eval_strategy": "epoch"},
    {"eval_strategy": "steps", "eval_steps": 2},
    {"max_steps": 7, "num_train_epochs": 1.0},
    {"optim": "SGD", "optim_args": "momentum=0.9,nesterov=true", "lr_scheduler_type": "cosine"},
    {"optim": "Adagrad"},
    {"optim": "NAdam", "lr_scheduler_type": "polynomial"},
    {"optim": "Rprop"},
    {"optim": "ASGD", "max_grad_norm": 0},
    {"optim": "RAdam", "lr_scheduler_type": "constant_with_warmup"},
    {"dataloader_num_workers": 1, "max_steps": 3},
]


@pytest.mark.first_only
@pytest.mark.parametrize(
    "options",
    [*OPTIONS[:6], *(pytest.param(one, marks=pytest.mark.slow) for one in OPTIONS[6:])],
    ids=str,
)
def test_from_every_step_to_the_end(tmp_path: Path, options: Dict[str, Any]) -> None:
    data = sst2(tmp_path / "data", train_rows=ROWS).data_dir
    whole = Run(data, tmp_path / "whole", **options)
    whole.loop.run()
    assert len(whole.checkpoints) == whole.loop.state.max_steps > 2
    for checkpoint in whole.checkpoints:
        resumed = Run(data, tmp_path / "resumed", **options)
        restore(checkpoint, resumed.system, resumed.loop)
        resumed.loop.run()
        left = [key for key in whole.losses if key[0] >= checkpoint.step]
        assert list(resumed.losses) == left
        for key in left:
            assert resumed.rows[key] == whole.rows[key]
            assert resumed.losses[key] == whole.losses[key]
        assert same_bits(resumed.state(), whole.state())
        assert str(resumed.history()) == str(whole.history())
        assert resumed.loop.train_loss == whole.loop.train_loss
        assert resumed.loop.state.best_metric == whole.loop.state.best_metric
        assert resumed.loop.state.epoch == whole.loop.state.epoch
        assert len(resumed.system.ledger) == len(whole.system.ledger)
        assert resumed.system.ledger.samples == whole.system.ledger.samples
        assert [r.step for r in resumed.system.ledger] == [r.step for r in whole.system.ledger]


def test_it_is_not_the_same_by_itself(tmp_path: Path) -> None:
    """Without the optimizer's state, or the scheduler's, other bits come out: the test above tells one from another."""
    data = sst2(tmp_path / "data", train_rows=ROWS).data_dir
    whole = Run(data, tmp_path / "whole")
    whole.loop.run()
    checkpoint = whole.checkpoints[4]
    for forget in ("optimizer", "scheduler"):
        resumed = Run(data, tmp_path / "resumed")
        before = copy.deepcopy(resumed.loop._scheduler.state_dict())
        restore(checkpoint, resumed.system, resumed.loop)
        if forget == "optimizer":
            resumed.system.optimizer.state.clear()
        else:
            resumed.loop._scheduler.load_state_dict(before)
        resumed.loop.run()
        assert not same_bits(resumed.state(), whole.state()), forget


def test_what_is_skipped_is_not_prepared(tmp_path: Path) -> None:
    data = sst2(tmp_path / "data", train_rows=ROWS).data_dir
    whole = Run(data, tmp_path / "whole", max_steps=5)
    whole.loop.run()
    assert len(whole.prepared) == 5
    resumed = Run(data, tmp_path / "resumed", max_steps=5)
    restore(whole.checkpoints[3], resumed.system, resumed.loop)
    resumed.loop.run()
    assert len(resumed.prepared) == 1
