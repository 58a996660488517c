"""A session that trains as it should, at an edge's pace: what bench/shared_server.py looks at."""

from __future__ import annotations

import hashlib
import itertools
import queue
import statistics
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.calls import download, open_session
from support.tiny_edge import TinyEdge, attach

from sft.v1 import split_training_pb2 as pb
from sft.v1.split_training_pb2_grpc import SplitTrainingStub

EDGE_SECONDS = 0.02
"""What the edge computes for between two of its messages: it is not the server that is measured then."""


@dataclass
class Ran:
    """What came of it."""

    bits: str = ""
    """A hash of all losses and gradients, and of weights and optimizer at the end."""
    seconds: list[float] = field(default_factory=list)
    """Of each step, from its message to its answer, skipped ones included."""
    skipped: int = 0
    """Steps that the cloud had no memory for, and that were taken later."""

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.seconds)


def train(stub: SplitTrainingStub, edge: TinyEdge, over: threading.Event, steps: int | None = None) -> Ran:
    """So many steps, or until it is `over`. Raises grpc.RpcError."""
    ran, digest, numbers = Ran(), hashlib.sha256(), itertools.count(1)
    session_id = open_session(stub, edge)
    outgoing: queue.SimpleQueue[pb.EdgeMessage | None] = queue.SimpleQueue()
    outgoing.put(attach(session_id))
    answers = stub.Train(iter(outgoing.get, None))
    next(answers)

    def ask(message: pb.EdgeMessage) -> pb.CloudMessage:
        message.number = next(numbers)
        message.answered = message.number - 1
        outgoing.put(message)
        return next(answers)

    for step in itertools.count() if steps is None else range(steps):
        if steps is None and over.is_set():
            break
        message = edge.forward(step, commit=edge.commit_part(step - 1) if step else None)
        begun = time.monotonic()
        while (answer := ask(message)).HasField("step_skipped"):
            ran.skipped += 1
            time.sleep(EDGE_SECONDS)
            message = edge.forward(step)  # what rode along was done
        ran.seconds.append(time.monotonic() - begun)
        digest.update(answer.result.SerializeToString(deterministic=True))
        time.sleep(EDGE_SECONDS)
    digest.update(download(stub, session_id) + download(stub, session_id, optimizer_state=True))
    outgoing.put(pb.EdgeMessage(close=pb.Close()))
    outgoing.put(None)
    list(answers)
    ran.bits = digest.hexdigest()
    return ran
