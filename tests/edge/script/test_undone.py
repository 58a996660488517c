"""A step for which the cloud has no memory, in a script and in the command's own loop: neither side takes it."""

from __future__ import annotations

import sys
from typing import Any, List

import pytest
import torch
from support.script import batches, sgd, tiny_model, wrap

from sft.batch import Batch
from sft.errors import CloudMemoryError, UsageError
from sft_edge.training.loop import TrainingLoop


class NoMemory:
    """Some of the cloud's micro-batches find no memory; counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *at: int) -> None:
        if sys.version_info < (3, 10):
            pytest.skip("the cloud, in which the fault is, needs Python 3.10")
        self.calls = self.fired = 0
        self._at = at
        monkeypatch.setattr("sft_cloud.session.session.check_room_for_step", self)

    def __call__(self, optimizer: torch.optim.Optimizer) -> None:
        self.calls += 1
        if self.calls in self._at:
            self.fired += 1
            raise torch.cuda.OutOfMemoryError("for a test")


@pytest.mark.parametrize("travels", [True, False])
def test_a_script_may_catch_it_and_go_on(monkeypatch: pytest.MonkeyPatch, travels: bool) -> None:
    def train(*at: int) -> Any:
        model = tiny_model()
        fault = NoMemory(monkeypatch, *at)
        with wrap(model, sgd(model)) as optimizer:
            skipped = []
            for batch in batches(3, model):
                while True:
                    optimizer.zero_grad()
                    try:
                        loss = model(**batch).loss if travels else model(batch["input_ids"]).logits.square().sum()
                        loss.backward()
                    except CloudMemoryError:
                        assert optimizer.step_was_skipped
                        with pytest.raises(UsageError):
                            optimizer.step()
                        skipped.append(True)
                        continue
                    optimizer.step()
                    assert not optimizer.step_was_skipped
                    break
            assert fault.fired == len(skipped) == len(at)
            return {name: value.clone() for name, value in model.state_dict().items() if name != "cloud_gradients"}

    quiet, disturbed = train(), train(1, 3, 4)
    assert all(disturbed[name].equal(value) for name, value in quiet.items())


def test_what_went_before_in_the_step_cannot_be_gone_back_through(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    NoMemory(monkeypatch, 2)
    (batch,) = batches(1, model)
    with wrap(model, sgd(model)) as optimizer:
        first = model(**batch).loss
        with pytest.raises(CloudMemoryError):
            model(**batch)
        with pytest.raises(UsageError, match="of a step that the cloud has undone"):
            first.backward()
        del first  # and is not taken for the one of the same number that comes now
        model(**batch).loss.backward()
        optimizer.step()


def test_both_halves_forget_what_had_been_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the script does not: or the two would step with gradients of different micro-batches."""
    model = tiny_model()
    NoMemory(monkeypatch, 2)
    first, second = batches(2, model)
    with wrap(model, sgd(model)) as optimizer:
        model(**first).loss.backward()
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        assert any(parameter.grad is not None for parameter in trained)
        with pytest.raises(CloudMemoryError):
            model(**second)
        assert all(parameter.grad is None for parameter in trained)


class System:
    """Finds no memory so many times."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.undone = 0
        self.asked: List[int] = []

    def forward_backward(self, batch: Any, step: int, micro_batch: int, loss_scale: float) -> float:
        self.asked.append(micro_batch)
        if micro_batch == 1 and self.failures:
            self.failures -= 1
            raise CloudMemoryError("the cloud's device is out of memory")
        return float(micro_batch)

    def undo(self) -> None:
        self.undone += 1


def losses(system: System) -> List[float]:
    loop = TrainingLoop.__new__(TrainingLoop)
    loop.system = system  # type: ignore[assignment]
    return loop._losses_of([Batch({}, [], {})] * 2, 0)


def test_the_commands_own_loop_begins_the_step_anew() -> None:
    system = System(failures=2)
    assert losses(system) == [0.0, 1.0]
    assert (system.undone, system.asked) == (2, [0, 1, 0, 1, 0, 1])


def test_the_commands_own_loop_gives_up_after_three_tries() -> None:
    system = System(failures=3)
    with pytest.raises(CloudMemoryError):
        losses(system)
    assert system.undone == 3
