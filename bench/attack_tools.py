"""What bench/attacks.py attacks, and with what: servers, callers, and the table of what each attack got."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.tiny_edge import TinyEdge, attach  # noqa: E402
from support.tls import Certificates, make_token  # noqa: E402

from sft.v1 import split_training_pb2 as pb  # noqa: E402
from sft.v1.split_training_pb2_grpc import SplitTrainingStub  # noqa: E402

SECONDS = 60.0
MEMORY_LIMIT = 640 << 20


@dataclass
class Server:
    """A process."""

    address: str
    tokens: Path
    child: subprocess.Popen[bytes]
    log: Path
    metrics: str = ""
    """Where Prometheus would read, with --metrics-port."""


@dataclass
class Table:
    """What was tried, what it got, and whether that is what it should get."""

    rows: list[tuple[str, str, bool]] = field(default_factory=list)

    def add(self, attack: str, expected: str, call: Callable[[], object]) -> None:
        """`expected`: how what it gets begins."""
        begun = time.monotonic()
        try:
            got = f"let in: {call()}"
        except grpc.RpcError as error:
            got = f"{error.code().name}: {' '.join(str(error.details()).split())}"
        except (OSError, TimeoutError) as error:
            got = f"{type(error).__name__}: {error}"
        seconds = time.monotonic() - begun
        got += f" (after {seconds:.0f} s)" if seconds > 1 else ""
        self.rows.append((attack, got, got.startswith(expected)))
        print(
            f"| {attack} | {got[:160]} |" + ("" if got.startswith(expected) else f" **expected {expected}**"),
            flush=True,
        )


@contextmanager
def serving(directory: Path, flags: list[str]) -> Iterator[Server]:
    """A server with a token file of its own."""
    directory.mkdir()
    tokens, log = directory / "tokens.json", directory / "log"
    make_token(tokens, "first")
    command = [sys.executable, "-m", "sft_cloud", "serve", "--port=0", "--device=cpu", "--threads=1"]
    command += [f"--state-dir={directory / 'state'}", f"--tokens={tokens}", "--stall-timeout=2s", "--idle-timeout=2s"]
    command += [
        "--opens-per-minute=200",
        f"--memory-limit={MEMORY_LIMIT}",
        f"--audit-log={directory / 'audit.jsonl'}",
        *flags,
    ]
    with log.open("wb") as stderr:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr)
    try:
        assert child.stdout is not None
        ready = json.loads(child.stdout.readline())
        yield Server(ready["address"], tokens, child, log, ready.get("metrics", ""))
    finally:
        child.kill()
        child.wait()


def channel(
    server: Server,
    certificates: Certificates,
    token: str | None,
    client: Any = None,
    ca: Path | None = None,
    **options: Any,
) -> grpc.Channel:
    """To a server, as who holds the token and the client certificate."""
    files = (
        {}
        if client is None
        else {"private_key": client.key.read_bytes(), "certificate_chain": client.cert.read_bytes()}
    )
    credentials = grpc.ssl_channel_credentials((ca or certificates.ca).read_bytes(), **files)
    if token is not None:
        credentials = grpc.composite_channel_credentials(credentials, grpc.access_token_call_credentials(token))
    settings = [("grpc.max_send_message_length", -1), ("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
    return grpc.secure_channel(server.address, credentials, options=settings, **options)


def status(one: grpc.Channel) -> str:
    """What Status says of the caller."""
    return SplitTrainingStub(one).Status(pb.StatusRequest(), timeout=10).caller


class Held:
    """Messages for a call that go on only when they are told."""

    def __init__(self, *messages: Any) -> None:
        self._messages = list(messages)
        self._changed = threading.Condition()
        self._ended = False

    def __iter__(self) -> Held:
        return self

    def __next__(self) -> Any:
        with self._changed:
            self._changed.wait_for(lambda: self._messages or self._ended)
            if not self._messages:
                raise StopIteration
            return self._messages.pop(0)

    def say(self, message: Any) -> None:
        """One more."""
        with self._changed:
            self._messages.append(message)
            self._changed.notify_all()

    def end(self) -> None:
        """No more."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()


def opened(stub: SplitTrainingStub, edge: TinyEdge) -> str:
    """A session, with what has to be uploaded for it."""
    response = stub.OpenSession(edge.request(), timeout=SECONDS)
    for sha256 in response.missing_blobs:
        content = edge.blobs()[sha256]
        first = pb.UploadBlobRequest(sha256=sha256, total_bytes=len(content), data=content)
        stub.UploadBlob(iter([first]), timeout=SECONDS)
    if response.missing_blobs:
        response = stub.OpenSession(edge.request(), timeout=SECONDS)
    return str(response.session_id)


def trained(stub: SplitTrainingStub, edge: TinyEdge, message: pb.EdgeMessage) -> object:
    """What a session answers to a message."""
    message.number = 1
    messages = [attach(opened(stub, edge)), message, pb.EdgeMessage(close=pb.Close())]
    return [answer.WhichOneof("body") for answer in stub.Train(iter(messages), timeout=SECONDS)]


def with_blob(stub: SplitTrainingStub, edge: TinyEdge, content: bytes) -> object:
    """Opens a session whose weights are these bytes."""
    sha256 = hashlib.sha256(content).hexdigest()

    def chunks() -> Iterator[pb.UploadBlobRequest]:
        for start in range(0, len(content), 1 << 20):
            part = content[start : start + (1 << 20)]
            yield pb.UploadBlobRequest(
                sha256="" if start else sha256, total_bytes=0 if start else len(content), data=part
            )

    stub.UploadBlob(chunks(), timeout=SECONDS)
    opened(stub, edge)
    return stub.OpenSession(edge.request(weights_sha256=sha256), timeout=SECONDS)
