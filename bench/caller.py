"""The child of bench/calls.py: one caller that asks a server for next to nothing, as often as it can.

    python bench/caller.py WAY ADDRESS THREADS TOKEN SESSION MESSAGE

TOKEN and SESSION, an open session of the caller's, may be empty; MESSAGE is a file with what its stream sends. Prints
how often it was answered, and with what, when its standard input ends.
"""

from __future__ import annotations

import itertools
import os
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from half_sent import frame, headers, preface

from sft.v1 import split_training_pb2 as pb
from sft.v1.split_training_pb2_grpc import SplitTrainingStub

WAYS = {
    "burner": "nobody: the clients' core is as busy, and the server is asked nothing",
    "status": "Status",
    "health": "health checks",
    "stranger-health": "health checks without a token",
    "strangers": "Status without a token",
    "connections": "Status without a token, a connection each",
    "method": "a method that there is not",
    "form": "OpenSession with bytes that are no message",
    "unknown": "downloads of a session that there is not",
    "attach": "streams that ask for a session that there is not",
    "cancel": "streams opened and cancelled at once",
    "reset": "streams opened and cancelled by frames of HTTP/2, as fast as a socket takes them",
    "frames": "Status by frames of HTTP/2, sixteen at a time, as fast as a socket takes them",
    "calls": "Status, with as many calls running as may",
    "probes": "one stream of probes",
    "repeats": "one stream that sends a message again and again",
    "large-repeats": "one stream that sends a message of 512 KiB again and again",
    "keeps": "one stream that says which checkpoints are kept, again and again",
    "chunks": "uploads in chunks of a byte",
}
ALONE = ("burner", "calls", "probes", "repeats", "large-repeats", "keeps", "reset", "frames")
"""What one thread does."""
CALLS = 6
"""That may run at a time, with a token for two sessions."""
SECONDS = 30.0
AHEAD = 16
"""Messages of a stream that are under way."""


class Caller:
    """What the ways share."""

    def __init__(self, address: str, token: str) -> None:
        self.address, self.token = address, token
        self.got: Counter[str] = Counter()
        self.over = threading.Event()
        self.metadata = [("authorization", f"Bearer {token}")] if token else []
        self.stub = SplitTrainingStub(self.channel())

    def channel(self) -> grpc.Channel:
        """One of its own."""
        return grpc.insecure_channel(self.address, [("grpc.use_local_subchannel_pool", 1)])

    def ask(self, call: Callable[[], object]) -> None:
        """Once, and counts what it got."""
        try:
            call()
            self.got["OK"] += 1
        except grpc.RpcError as error:
            self.got[f"{error.code().name}: {str(error.details())[:80]}"] += 1

    def again(self, call: Callable[[], object]) -> None:
        """Until it is over."""
        while not self.over.is_set():
            self.ask(call)

    def stream(self, message: Callable[[int], object], first: object) -> None:
        """Messages on one stream, so many ahead of their answers, and another stream when it ends."""
        room = threading.Semaphore(AHEAD)

        def messages() -> Iterator[object]:
            yield first
            for number in itertools.count(1):
                while not room.acquire(timeout=1.0):
                    if self.over.is_set():
                        return
                if self.over.is_set():
                    return
                yield message(number)

        def read() -> None:
            for _ in self.stub.Train(messages(), metadata=self.metadata):
                self.got["answers"] += 1
                room.release()

        while not self.over.is_set():
            self.ask(read)


def main() -> None:
    """Until standard input ends."""
    way, address, threads, token, session, message = sys.argv[1:]
    os.nice(10)  # the good session's edge is on the same core
    caller = Caller(address, token)
    made = _made(way, caller, session, Path(message))
    for _ in range(1 if way in ALONE else int(threads)):
        threading.Thread(target=made, daemon=True).start()
    print("ready", flush=True)
    sys.stdin.read()
    caller.over.set()
    print(dict(caller.got.most_common(3)), flush=True)
    os._exit(0)


def _made(way: str, caller: Caller, session: str, message: Path) -> Callable[[], None]:
    """What one thread does."""
    stub, show, nothing = caller.stub, {"metadata": caller.metadata, "timeout": SECONDS}, pb.StatusRequest()
    checks = health_pb2_grpc.HealthStub(caller.channel())
    attach = pb.EdgeMessage(attach=pb.Attach(session_id=session or "x"))

    def burner() -> None:
        while not caller.over.is_set():
            pass

    def connections() -> None:
        def call() -> None:
            with caller.channel() as one:
                SplitTrainingStub(one).Status(nothing, timeout=SECONDS)

        caller.again(call)

    def cancelled() -> None:
        stub.Train(iter(()), **show).cancel()

    def calls() -> None:
        held = [stub.Train(_silent(), metadata=caller.metadata) for _ in range(CALLS)]
        caller.again(lambda: stub.Status(nothing, **show))
        assert held

    def probes() -> None:
        probe = pb.EdgeMessage(probe=pb.ProbeRequest())
        caller.stream(lambda _: probe, probe)

    def repeats() -> None:
        one = pb.EdgeMessage.FromString(message.read_bytes())
        caller.stream(lambda _: one, attach)

    def keeps() -> None:
        def one(number: int) -> pb.EdgeMessage:
            kept = pb.KeepCheckpoints(steps=[1])
            return pb.EdgeMessage(number=number, answered=max(0, number - AHEAD - 1), keep_checkpoints=kept)

        caller.stream(one, attach)

    def chunks() -> None:
        def all_() -> Iterator[pb.UploadBlobRequest]:
            yield pb.UploadBlobRequest(sha256="0" * 64, total_bytes=1 << 20, data=b"x")
            while not caller.over.is_set():
                caller.got["chunks"] += 1
                yield pb.UploadBlobRequest(data=b"x")

        caller.again(lambda: stub.UploadBlob(all_(), **show))

    raw = {name: caller.channel().unary_unary(f"/sft.v1.SplitTraining/{name}") for name in ("OpenSession", "None")}
    ways: dict[str, Callable[[], None]] = {
        "burner": burner,
        "status": lambda: caller.again(lambda: stub.Status(nothing, **show)),
        "health": lambda: caller.again(lambda: checks.Check(health_pb2.HealthCheckRequest(), **show)),
        "method": lambda: caller.again(lambda: raw["None"](b"", **show)),
        "form": lambda: caller.again(lambda: raw["OpenSession"](b"\xff" * 20, **show)),
        "unknown": lambda: caller.again(
            lambda: list(stub.DownloadWeights(pb.DownloadWeightsRequest(session_id="x"), **show))
        ),
        "attach": lambda: caller.again(lambda: list(stub.Train(iter([attach]), **show))),
        "cancel": lambda: caller.again(cancelled),
        "connections": connections,
        "calls": calls,
        "probes": probes,
        "repeats": repeats,
        "keeps": keeps,
        "chunks": chunks,
        "frames": lambda: _frames(caller, resets=False),
        "reset": lambda: _frames(caller, resets=True),
    }
    ways |= {"stranger-health": ways["health"], "strangers": ways["status"], "large-repeats": repeats}
    return ways[way]


def _silent() -> Iterator[pb.EdgeMessage]:
    threading.Event().wait()
    yield from ()


def _frames(caller: Caller, resets: bool) -> None:
    """HTTP/2 by hand."""
    host, port = caller.address.rsplit(":", 1)
    block = headers("/sft.v1.SplitTraining/Status", host, caller.token)
    while not caller.over.is_set():
        try:
            one = socket.create_connection((host, int(port)), SECONDS)
        except OSError:
            continue
        caller.got["connections"] += 1
        one.sendall(preface())
        drain = threading.Thread(target=_drained, args=(one, caller, gone := [0]), daemon=True)
        drain.start()
        try:
            for stream in itertools.count(1, 2):
                if caller.over.is_set() or stream > 1 << 30:
                    return
                while not resets and stream // 2 - gone[0] >= AHEAD and drain.is_alive():
                    pass
                data = frame(1, stream, block, flags=4) + (b"" if resets else frame(0, stream, bytes(5), flags=1))
                one.sendall(data + (frame(3, stream, (8).to_bytes(4, "big")) if resets else b""))
                caller.got["calls"] += 1
        except OSError:
            one.close()


def _drained(one: socket.socket, caller: Caller, gone: list[int]) -> None:
    """Reads what comes; counts the ends of calls."""
    data = b""
    try:
        while part := one.recv(1 << 16):
            data += part
            while len(data) >= 9 and len(data) >= 9 + int.from_bytes(data[:3], "big"):
                size, kind, flags = int.from_bytes(data[:3], "big"), data[3], data[4]
                content, data = data[9 : 9 + size], data[9 + size :]
                if (kind == 1 and flags & 1) or kind == 3:
                    gone[0] += 1
                elif kind == 4 and not flags & 1:
                    one.sendall(frame(4, 0, b"", flags=1))
                elif kind == 6 and not flags & 1:
                    one.sendall(frame(6, 0, content, flags=1))
                elif kind == 0:
                    one.sendall(frame(8, 0, size.to_bytes(4, "big")) if size else b"")
    except OSError:
        pass


if __name__ == "__main__":
    main()
