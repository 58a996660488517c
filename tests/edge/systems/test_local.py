"""What one process trains."""

from __future__ import annotations

import copy

import pytest
import torch
from support.tiny import tiny_batch

from sft.batch import Batch
from sft.models import Whole, build_whole
from sft.models.weights import fill, pretrained_tensors
from sft.optim.spec import OptimizerSpec, decay_groups, make_optimizer
from sft_edge.model_files.source import Source
from sft_edge.systems.local import LocalSystem
from sft_edge.systems.system import StepTimer

HEAD = "sequence-classification"


@pytest.fixture
def net(source: Source) -> Whole:
    whole = build_whole(source.config, HEAD)
    fill(whole, pretrained_tensors(whole, source.checkpoint), seed=0)
    return whole


def local(net: Whole, lr: float = 0.1, seed: int = 0) -> LocalSystem:
    spec = OptimizerSpec("SGD", decay_groups(net, {"lr": lr, "weight_decay": 0.0}))
    return LocalSystem(net, make_optimizer(spec, net.whole_parameters()), seed)


def test_micro_batches_add_up_to_their_batch(net: Whole) -> None:
    """Without dropout, whose masks differ."""
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    twin = copy.deepcopy(net)
    whole, parts = local(net), local(twin)
    rows = tiny_batch(6, 6, 6, 6)
    halves = [
        Batch({"input_ids": rows.inputs["input_ids"][at]}, [6, 6], {"labels": rows.labels["labels"][at]})
        for at in (slice(0, 2), slice(2, 4))
    ]
    loss = whole.forward_backward(rows, 0, 0, 1.0)
    losses = [parts.forward_backward(half, 0, index, 0.5) for index, half in enumerate(halves)]
    assert sum(losses) / 2 == pytest.approx(loss, rel=1e-4)
    assert parts.gradient_norm() == pytest.approx(whole.gradient_norm(), rel=1e-4)
    for one, other in zip(net.parameters(), twin.parameters()):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-6)


def test_clipping_is_torch_s(net: Whole) -> None:
    twin = copy.deepcopy(net)
    system = local(net)
    for each in (system, local(twin)):
        each.forward_backward(tiny_batch(5, 3), 0, 0, 1.0)
    norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.01)
    assert system.gradient_norm() == pytest.approx(float(norm), rel=1e-5)
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    clipped = {name: parameter.grad for name, parameter in twin.named_parameters()}
    system.update(0, min(1.0, 0.01 / (system.gradient_norm() + 1e-6)))
    for name, parameter in net.named_parameters():
        expected = before[name] - 0.1 * (0 if clipped[name] is None else clipped[name])
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=1e-8)
        assert parameter.grad is None, "the next step begins anew"


def test_dropout_is_of_the_seed_the_step_and_the_micro_batch_alone(net: Whole) -> None:
    rows = tiny_batch(7, 4)

    def loss(seed: int, step: int, micro_batch: int) -> float:
        system = local(copy.deepcopy(net), seed=seed)
        torch.manual_seed(step)  # what others do with the global generator
        return system.forward_backward(rows, step, micro_batch, 1.0)

    assert loss(0, 3, 1) == loss(0, 3, 1)
    assert len({loss(0, 3, 1), loss(1, 3, 1), loss(0, 4, 1), loss(0, 3, 0)}) == 4


def test_asking_leaves_no_trace(net: Whole) -> None:
    system = local(net)
    state = torch.random.get_rng_state()
    first, again = (list(system.logits([tiny_batch(5, 3), tiny_batch(2)], 0)) for _ in range(2))
    assert [logits.shape for logits in first] == [(2, 2), (1, 2)]
    assert all(one.equal(other) for one, other in zip(first, again))
    assert torch.random.get_rng_state().equal(state)
    assert not any(logits.requires_grad for logits in first)
    assert len(system.ledger) == 0


def test_the_ledger_of_one_process(net: Whole) -> None:
    system = local(net)
    for step in range(2):
        for micro_batch in range(2):
            system.forward_backward(tiny_batch(3, 4, 5), step, micro_batch, 0.5)
        system.update(step, 1.0)
    first, second = system.ledger
    assert (first.step, second.step, first.samples, second.samples) == (0, 1, 6, 6)
    assert min(first.edge_forward, first.edge_backward, second.edge_forward, second.edge_backward) > 0
    assert first.uplink_wait == first.cloud == 0
    assert system.ledger.wire_reduction() is None


def test_a_timer_begins_anew_with_each_record() -> None:
    timer = StepTimer()
    timer.add("cloud", 1.5)
    timer.add("cloud", 0.25)
    timer.samples += 4
    with timer.phase("edge_forward"):
        pass
    record = timer.record(7)
    assert (record.step, record.samples, record.cloud, record.uplink_wait) == (7, 4, 1.75, 0.0)
    assert record.edge_forward > 0
    assert timer.record(8) == type(record)(8, 0)
