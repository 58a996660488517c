"""The messages of a session that the cloud has not answered yet, kept to be sent again."""

from __future__ import annotations

from typing import Dict, List, NamedTuple

from sft.errors import LinkError, ProtocolError
from sft.ledger import Traffic
from sft.v1 import split_training_pb2 as pb
from sft_edge.replies import PendingReply


class Sent(NamedTuple):
    """A message on its way."""

    kind: str
    """Of the answer it wants: the name of a body of CloudMessage."""
    step: int
    micro_batch: int
    data: bytes
    pending: PendingReply


class Unanswered:
    """By number, the oldest first. Not for several threads at once."""

    def __init__(self) -> None:
        self.next_number = 1
        """Of the message that is sent next."""
        self._sent: Dict[int, Sent] = {}

    def __len__(self) -> int:
        return len(self._sent)

    @property
    def answered(self) -> int:
        """The answers to all messages up to this number are here."""
        return min(self._sent, default=self.next_number) - 1

    def add(self, sent: Sent) -> None:
        """The message of number `next_number`."""
        self._sent[self.next_number] = sent
        self.next_number += 1

    def oldest(self) -> PendingReply:
        """The answer that is due first; there is one."""
        return next(iter(self._sent.values())).pending

    def after(self, number: int) -> List[bytes]:
        """What the cloud has not had yet, when it has had all up to `number`. Raises ProtocolError for a number of no
        message."""
        if number >= self.next_number or number < self.answered:
            raise ProtocolError(
                f"the cloud has had {number} messages of this session, and answered {self.answered} of "
                f"{self.next_number - 1}: it is not the one that it was"
            )
        return [sent.data for own, sent in self._sent.items() if own > number]

    def resolve(self, answer: pb.CloudMessage, received: Traffic) -> bool:
        """Hands an answer to who waits for it; False for one that came before.

        Raises ProtocolError for an answer to what was never asked, or of another kind.
        """
        sent = self._sent.get(answer.number)
        if sent is None:
            if 1 <= answer.number < self.next_number:
                return False
            raise ProtocolError(f"the cloud answered message {answer.number}, which was never sent")
        kind = answer.WhichOneof("body")
        if kind not in (sent.kind, "step_skipped") or (answer.step, answer.micro_batch) != sent[1:3]:
            raise ProtocolError(
                f"the cloud answered what was not asked: {kind} for step {answer.step}, micro-batch "
                f"{answer.micro_batch}, to message {answer.number}"
            )
        del self._sent[answer.number]
        sent.pending.resolve(answer, received)
        return True

    def fail(self, error: LinkError) -> None:
        """No answer will come any more."""
        sent, self._sent = list(self._sent.values()), {}
        for each in sent:
            each.pending.fail(error)
