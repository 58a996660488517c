"""Every interleaving of one session's messages with faults of its link, explored to the last one.

The rules checked are the real ones, `sft_edge.link.replies` on one side and `sft_cloud.service.exactly_once` on the
other; what trains is replaced by a list of what was applied. The invariants have the names that docs/protocol.md gives
them.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from sft.v1 import split_training_pb2 as pb
from sft.wire.ledger import Traffic
from sft_cloud.errors import GapError
from sft_cloud.service.exactly_once import ExactlyOnce
from sft_edge.link.replies import Sent, Unanswered

STEPS = 3
NO_TRAFFIC = Traffic()


class Pending:
    """Where the edge finds an answer."""

    def __init__(self) -> None:
        self.answer: pb.CloudMessage | None = None

    def resolve(self, answer: pb.CloudMessage, received: Traffic) -> None:
        assert self.answer is None, "an answer was handed over twice"
        self.answer = answer


@dataclass
class World:
    """Both sides, and what is between them."""

    micro_batches: int
    faults_left: int
    skips: frozenset[tuple[int, int]]
    """(step, micro-batch) for which the cloud has no memory the first time."""

    # The edge.
    unanswered: Unanswered = field(default_factory=Unanswered)
    step: int = 0
    sent: list[Pending] = field(default_factory=list)  # of this step
    edge_steps: list[int] = field(default_factory=list)
    owes_commit: int | None = None
    flows: bool = True

    # The network: serialized messages of the stream that is open, and what an older one may still bring to the cloud.
    up: list[bytes] = field(default_factory=list)
    down: list[bytes] = field(default_factory=list)
    stale: list[bytes] = field(default_factory=list)
    open: bool = True

    # The cloud.
    numbered: ExactlyOnce = field(default_factory=ExactlyOnce)
    applied: list[int] = field(default_factory=list)
    answers: dict[int, bytes] = field(default_factory=dict)
    cloud_steps: list[int] = field(default_factory=list)
    skipped: set[tuple[int, int]] = field(default_factory=set)

    @property
    def done(self) -> bool:
        return self.step == STEPS and not len(self.unanswered)

    def key(self) -> Any:
        """Worlds with the same key have the same future."""
        remembered = tuple(answer.number for answer in self.numbered.answers_after(0))
        return (
            (self.unanswered.next_number, tuple(self.unanswered._sent), self.step, len(self.sent)),
            tuple(pending.answer is not None for pending in self.sent),
            (self.owes_commit, self.flows, self.open, self.faults_left),
            (tuple(self.up), tuple(self.down), tuple(self.stale)),
            (self.numbered.last_number, remembered, tuple(self.cloud_steps), frozenset(self.skipped)),
        )

    # What may happen.

    def actions(self) -> Iterator[str]:
        if self.step < STEPS and len(self.sent) < self.micro_batches:
            yield "send"
        if self.open and self.up:
            yield "arrives"
        if self.open and self.down:
            yield "is answered"
        if not self.open:
            yield "reopen"
        if self.stale:
            yield "a stale one arrives"
        if self.faults_left and self.open:
            yield "break"
            if self.up:
                yield "lose up"
                yield "twice up"
            if len(self.up) > 1:
                yield "swap up"
            if self.down:
                yield "lose down"
                yield "twice down"

    def do(self, action: str) -> None:
        if action in ("break", "lose up", "twice up", "swap up", "lose down", "twice down"):
            self.faults_left -= 1
        if action == "send":
            self._send()
        elif action == "arrives":
            self._arrives(self.up.pop(0))
        elif action == "is answered":
            self._is_answered(self.down.pop(0))
        elif action == "reopen":
            self._reopen()
        elif action == "a stale one arrives":
            self._apply(pb.EdgeMessage.FromString(self.stale.pop(0)))
        elif action == "break":
            self._break()
        elif action == "lose up":
            self.up.pop(0)
        elif action == "lose down":  # the edge's time-out for an answer breaks the stream
            self.down.pop(0)
            self._break()
        elif action == "twice up":
            self.up.insert(0, self.up[0])
        elif action == "twice down":
            self.down.insert(0, self.down[0])
        else:
            self.up[:2] = reversed(self.up[:2])
        self.check()

    def _send(self) -> None:
        message = pb.EdgeMessage(step=self.step, micro_batch=len(self.sent))
        message.forward.loss_scale = 1.0
        if self.owes_commit is not None:
            message.commit.step = self.owes_commit
            self.owes_commit = None
        message.number, message.answered = self.unanswered.next_number, self.unanswered.answered
        data, pending = message.SerializeToString(), Pending()
        self.unanswered.add(Sent("result", message.step, message.micro_batch, data, pending))
        self.sent.append(pending)
        if self.flows:
            self.up.append(data)

    def _arrives(self, data: bytes) -> None:
        message = pb.EdgeMessage.FromString(data)
        if message.HasField("attach"):
            self.down.append(
                pb.CloudMessage(attached=pb.Attached(last_number=self.numbered.last_number)).SerializeToString()
            )
            self.down += [answer.SerializeToString() for answer in self.numbered.answers_after(message.answered)]
        else:
            answer = self._apply(message)
            if answer is None:
                self._break()
            else:
                self.down.append(answer)

    def _apply(self, message: pb.EdgeMessage) -> bytes | None:
        """None where there is a gap. An old stream's message may come too late for anything."""
        if message.number <= self.numbered.last_number and message.number not in self.numbered._answers:
            assert message.number <= self.unanswered.answered, "an answer was forgotten that the edge waits for"
            return b""

        def work() -> pb.CloudMessage:
            self.applied.append(message.number)
            if message.HasField("commit"):
                self.cloud_steps.append(message.commit.step)
            answer = pb.CloudMessage(step=message.step, micro_batch=message.micro_batch)
            place = message.step, message.micro_batch
            if place in self.skips and place not in self.skipped:
                self.skipped.add(place)
                answer.step_skipped.reason = "no memory"
            else:
                answer.result.loss = float(len(self.applied))
            return answer

        try:
            answer, _ = self.numbered.apply(message, work)
        except GapError:
            return None
        data = answer.SerializeToString()
        assert self.answers.setdefault(message.number, data) == data, "a repeated message was answered differently"
        return data

    def _is_answered(self, data: bytes) -> None:
        if not data:
            return
        answer = pb.CloudMessage.FromString(data)
        if answer.HasField("attached"):
            missing = self.unanswered.after(answer.attached.last_number)
            if not self.flows:
                self.up += missing
                self.flows = True
            return
        self.unanswered.resolve(answer, NO_TRAFFIC)
        if any(pending.answer is None for pending in self.sent):
            return
        if any(pending.answer.HasField("step_skipped") for pending in self.sent):
            self.sent = []  # neither side takes it; it is begun anew
        elif len(self.sent) == self.micro_batches:
            self.edge_steps.append(self.step)
            self.owes_commit, self.step, self.sent = self.step, self.step + 1, []

    def _break(self) -> None:
        self.stale += [data for data in self.up if not pb.EdgeMessage.FromString(data).HasField("attach")]
        self.up, self.down, self.open, self.flows = [], [], False, False

    def _reopen(self) -> None:
        self.open = True
        self.up.append(pb.EdgeMessage(attach=pb.Attach(), answered=self.unanswered.answered).SerializeToString())

    # What must hold, always.

    def check(self) -> None:
        assert self.applied == list(range(1, len(self.applied) + 1)), "once: each is applied once, in order"
        for number in self.unanswered._sent:
            if number <= self.numbered.last_number:
                assert number in self.numbered._answers, "memory: what the edge waits for is remembered"
        assert self.cloud_steps == list(range(len(self.cloud_steps))), "steps: each is taken once, in order"
        assert self.edge_steps == list(range(len(self.edge_steps)))
        assert len(self.cloud_steps) <= len(self.edge_steps) <= len(self.cloud_steps) + 1, "steps: never one without"
        for pending in self.sent:
            if pending.answer is not None:
                assert pending.answer.SerializeToString() == self.answers[pending.answer.number], "answers: as made"

    def settle(self) -> None:
        """Without further faults everything gets through, whatever has happened before."""
        self.faults_left = 0
        for _ in range(200):
            if self.done:
                break
            ready = [action for action in self.actions() if action != "a stale one arrives"]
            if not ready:  # something was lost: the edge's time-out for an answer
                self._break()
            else:
                self.do(ready[0])
        assert self.done, "progress: the run ends"
        assert self.edge_steps == list(range(STEPS))
        assert len(self.cloud_steps) == STEPS - 1, "the last commit waits for the next message"


@pytest.mark.parametrize(
    ("micro_batches", "faults", "skips"),
    [(1, 2, ()), (1, 1, ((1, 0),)), (2, 1, ()), (2, 1, ((1, 1),)), pytest.param(1, 3, (), marks=pytest.mark.slow)],
)
def test_every_interleaving(micro_batches: int, faults: int, skips: tuple[tuple[int, int], ...]) -> None:
    first = World(micro_batches, faults, frozenset(skips))
    seen, queue, transitions = {first.key()}, deque([first]), 0
    while queue:
        world = queue.popleft()
        copy.deepcopy(world).settle()
        for action in world.actions():
            after = copy.deepcopy(world)
            after.do(action)
            transitions += 1
            if after.key() not in seen:
                seen.add(after.key())
                queue.append(after)
    print(f"\n{len(seen)} states, {transitions} transitions")  # noqa: T201
    assert len(seen) > 100


def test_the_exploration_finds_a_rule_that_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cloud that forgets its answers too soon, which is what makes people's optimizers step twice, does not pass."""
    monkeypatch.setattr(ExactlyOnce, "_forget", lambda self, answered: self._answers.clear())
    with pytest.raises(AssertionError):
        test_every_interleaving(1, 2, ())
