"""Runs over a link that loses, repeats, swaps and delays messages, and is cut: the bits are those of a quiet run.

Without sockets, and without waiting: see support/faults.py.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from support.faults import KINDS, Fault, FaultyTransport, random_faults
from support.in_memory import InMemoryTransport
from support.tiny import make_tiny_model
from support.tiny_edge import TinyEdge
from transformers import AutoConfig

from sft.tensors.stream import safetensors_chunks
from sft.v1 import split_training_pb2 as pb
from sft_edge.link.link import Link
from sft_edge.link.retries import RetryPolicy

MICRO_BATCHES = 2


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> TinyEdge:
    directory = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", "bert", layers=2)
    config = AutoConfig.from_pretrained(directory, num_labels=3, problem_type="single_label_classification")
    return TinyEdge(directory, config, lengths=(3, 2))


class Lower(torch.nn.Module):
    """Stands for net_1: what it sends depends on every gradient that came so far."""

    def __init__(self, edge: TinyEdge) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = torch.nn.Parameter(torch.randn(edge.width, edge.width, generator=generator))


class Run:
    """A run of an edge and a cloud, both real but for net_1, and all that can be compared of it."""

    def __init__(self, edge: TinyEdge, steps: int, faults: list[Fault], cuts: list[int] = []) -> None:  # noqa: B006
        cloud = InMemoryTransport([*edge.weights, *edge.factors])
        self.faulty = FaultyTransport(cloud, faults, cuts)
        self.losses: list[float] = []
        self.steps_applied: Counter[int] = Counter()
        lower = Lower(edge)
        optimizer = torch.optim.AdamW(lower.parameters(), lr=1e-3)
        waits: list[float] = []
        policy = RetryPolicy(wait=lambda wake, seconds: bool(waits.append(seconds)))
        with Link(self.faulty, edge.request(), {}, policy) as link:
            link.open()
            session = cloud.session
            assert session is not None
            commit = session._commit

            def counted(message: pb.Commit) -> None:
                self.steps_applied[message.step] += 1
                commit(message)

            session._commit = counted
            for step in range(steps):
                self._step(edge, link, lower, step)
                optimizer.step()
                optimizer.zero_grad()
                link.commit(step, edge.commit_part(step).learning_rates, 0.75)
            self.net_2 = b"".join(link.weights())
            self.optimizer_2 = b"".join(link.weights(optimizer_state=True))
            assert self.optimizer_2 == b"".join(safetensors_chunks(session.stored_optimizer_state()))
            self.counts, self.traffic = link.counts, link.total
        self.net_1 = lower.state_dict()
        self.optimizer_1 = optimizer.state_dict()["state"]
        assert len(waits) == self.counts.reconnects

    def _step(self, edge: TinyEdge, link: Link, lower: Lower, step: int) -> None:
        pending, outputs = [], []
        for micro_batch in range(MICRO_BATCHES):
            message = edge.activation(step % 7, micro_batch)
            x = torch.frombuffer(bytearray(message.packed.data), dtype=torch.float32).reshape(-1, edge.width)
            a = torch.tanh(x @ lower.weight)
            message.packed.data = a.detach().numpy().tobytes()
            outputs.append(a)
            pending.append(link.forward(step, micro_batch, message, edge.labels(), 1 / MICRO_BATCHES))
        for a, each in zip(outputs, pending, strict=True):
            result = each.result().message.result
            self.losses.append(result.loss)
            a.backward(torch.frombuffer(bytearray(result.packed_gradient.data), dtype=torch.float32).reshape(a.shape))


def assert_same(run: Run, quiet: Run) -> None:
    assert run.losses == quiet.losses
    assert run.net_2 == quiet.net_2
    assert run.optimizer_2 == quiet.optimizer_2
    assert all(run.net_1[name].equal(value) for name, value in quiet.net_1.items())
    for index, state in quiet.optimizer_1.items():
        assert all(run.optimizer_1[index][key].equal(value) for key, value in state.items())


@pytest.fixture(scope="module")
def quiet(edge: TinyEdge) -> Run:
    run = Run(edge, 4, [])
    assert (run.counts.reconnects, run.counts.sent_again, run.counts.came_twice) == (0, 0, 0)
    return run


PLACES = [
    (kind, direction, micro_batch)
    for kind in KINDS
    for direction in ("up", "down")
    for micro_batch in range(MICRO_BATCHES)
    if not (kind == "late" and direction == "down") and not (kind == "swap" and micro_batch == MICRO_BATCHES - 1)
]


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("kind", "direction", "micro_batch"), PLACES)
@pytest.mark.parametrize("step", [0, 2])
def test_one_fault(edge: TinyEdge, quiet: Run, kind: str, direction: str, micro_batch: int, step: int) -> None:
    fault = Fault(kind, direction, step, micro_batch)
    run = Run(edge, 4, [fault])
    assert fault.fired == 1
    assert run.steps_applied == Counter(range(4))
    assert_same(run, quiet)
    mended = kind in ("lose", "late") or (kind, direction) == ("swap", "up")
    assert run.counts.reconnects == mended
    assert (run.counts.came_twice > 0) == (kind in ("twice", "late"))
    if direction == "down":
        # But for the other micro-batch, if it was on its way by then.
        assert run.counts.sent_again <= (kind == "lose" and micro_batch == 0), "the cloud had had it"


@pytest.mark.one_in(3)
@pytest.mark.parametrize("sixteenth", range(16))
def test_one_cut(edge: TinyEdge, quiet: Run, sixteenth: int) -> None:
    all_bytes = quiet.traffic.bytes_sent + quiet.traffic.bytes_received
    run = Run(edge, 4, [], [all_bytes * (2 * sixteenth + 1) // 36])
    assert run.faulty.fired == {"cut": 1}
    assert run.counts.reconnects == 1
    assert run.steps_applied == Counter(range(4))
    assert_same(run, quiet)


def test_every_step_twice_and_lost(edge: TinyEdge, quiet: Run) -> None:
    """One fault after the other at the same step: an answer that was lost is sent again, and lost again with a cut."""
    faults = [Fault("lose", direction, step, 1) for direction in ("up", "down") for step in range(4)]
    run = Run(edge, 4, faults, [1000, 1100, 1200, 2000, 2001])
    assert run.faulty.fired["lose up"] == run.faulty.fired["lose down"] == 4
    assert run.faulty.fired["cut"] == 5
    assert_same(run, quiet)


@pytest.mark.parametrize("steps", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_bad_link(edge: TinyEdge, steps: int) -> None:
    """5% of messages lost in each direction, 2% twice, 20 cuts; `pytest -s` prints the figures."""
    quiet = Run(edge, steps, [])
    faults = random_faults(steps, MICRO_BATCHES, lost=0.05, twice=0.02, seed=4)
    all_bytes = quiet.traffic.bytes_sent + quiet.traffic.bytes_received
    run = Run(edge, steps, faults, [all_bytes * (2 * index + 1) // 42 for index in range(20)])
    assert all(fault.fired == 1 for fault in faults)
    assert run.faulty.fired["cut"] == 20
    assert sum(run.faulty.fired.values()) == len(faults) + 20
    assert run.steps_applied == Counter(range(steps))
    assert_same(run, quiet)
    print(  # noqa: T201
        f"\n{steps} steps of {MICRO_BATCHES} micro-batches: {dict(run.faulty.fired)} fired; "
        f"{run.steps_applied.total()} steps applied, each once; {run.counts.reconnects} streams mended, "
        f"{run.counts.sent_again} messages sent again, {run.counts.came_twice} answers came twice; same bits"
    )
