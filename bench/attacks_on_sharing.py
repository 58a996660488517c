"""The parts of bench/attacks.py about what tenants share: memory, places, answers, and the port for Prometheus."""

from __future__ import annotations

import hashlib
import json
import socket
import ssl
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import grpc
from attack_tools import SECONDS, Held, Server, Table, channel, opened, serving, status
from half_sent import HalfSent
from memory_attacks import ATTACKS, Tally, Target, make_models, trains
from support.tiny_edge import TinyEdge, attach  # attack_tools has added tests/ to the path
from support.tls import Certificates, make_token

from sft.v1 import split_training_pb2 as pb
from sft.v1.split_training_pb2_grpc import SplitTrainingStub

MOMENT = 12.0
"""Seconds of each attack on memory, beside another that trains."""
_AT_FIRST = 3.0
"""Of them, before that one comes: attackers have by then what they get."""
_CALM = 40.0
"""In which memory goes back."""
SPARE = 64 << 20
"""Bytes beyond the limit that do not count: pages that the allocator has not given back yet."""


def memory(table: Table, tls: Server, certificates: Certificates, memory_limit: int) -> None:
    """Who wants more memory than there is, each for a moment; what the process has, and what it has afterwards."""
    trusted = ssl.create_default_context(cafile=str(certificates.ca))
    trusted.set_alpn_protocols(["h2"])
    with tempfile.TemporaryDirectory() as scratch:
        models = make_models(Path(scratch))
        another = channel(tls, certificates, make_token(tls.tokens, "another"))
        for name, attack in ATTACKS.items():
            token = make_token(tls.tokens, name.replace(" ", "-"))
            target = Target(
                lambda token=token: channel(tls, certificates, token),  # type: ignore[misc]
                lambda method, token=token: HalfSent(tls.address, method, token, trusted),  # type: ignore[misc]
            )

            def held(attack: Callable[..., None] = attack, target: Target = target) -> object:
                over, most, beside = threading.Event(), _resident(tls), Tally()
                thread = threading.Thread(target=attack, args=(target, models, Tally(), over), daemon=True)
                thread.start()

                def train() -> None:
                    while not over.wait(_AT_FIRST):
                        beside.add(lambda: trains(another, models))

                trainer = threading.Thread(target=train, daemon=True)
                trainer.start()
                deadline = time.monotonic() + MOMENT
                while time.monotonic() < deadline or not beside.counts:
                    most = max(most, _resident(tls))
                    time.sleep(0.1)
                over.set()
                for one in (thread, trainer):
                    one.join(SECONDS)
                kept = "within" if most < memory_limit + SPARE else "BEYOND"
                return f"{', '.join(beside.counts)}; {kept} the limit of {memory_limit >> 20} MiB: {most >> 20} MiB"

            what = " ".join((attack.__doc__ or "").split()).removeprefix(f"{name[:2]}: ")
            table.add(f"{name}: {what}", "let in: another trains soon; within", held)

    def gone() -> object:
        deadline = time.monotonic() + _CALM
        while _resident(tls) > memory_limit // 2 + SPARE and time.monotonic() < deadline:
            time.sleep(0.5)
        left = _resident(tls)
        return (
            f"{'little' if left <= memory_limit // 2 + SPARE else 'MUCH'}: {left >> 20} MiB are left with the process"
        )

    table.add("A12: after all of them", "let in: little", gone)


def places(table: Table, directory: Path, edge: TinyEdge, certificates: Certificates) -> None:
    """Who wants others' places: a server with room for two sessions, where nobody's stream is needed for a moment."""
    flags = [f"--tls-cert={certificates.server.cert}", f"--tls-key={certificates.server.key}", "--max-sessions=2"]
    with serving(directory, flags) as server:
        victim = SplitTrainingStub(channel(server, certificates, make_token(server.tokens, "victim")))
        greedy = SplitTrainingStub(channel(server, certificates, make_token(server.tokens, "greedy", max_sessions=1)))
        session_id, _ = opened(victim, edge), opened(greedy, edge)
        for what, overrides, expected in (
            ("one more than is its own, of a full server", {}, "RESOURCE_EXHAUSTED"),
            ("garbage for a configuration, at a full server", {"config_json": "{"}, ""),
            ("another protocol version, at a full server", {"protocol_version": 99}, ""),
        ):

            def refused(overrides: dict[str, object] = overrides) -> object:
                return greedy.OpenSession(edge.request(**overrides), timeout=SECONDS)

            table.add(f"A7: {what}", expected, refused)
        trained = lambda: len(list(victim.Train(iter([attach(session_id)]), timeout=SECONDS)))  # noqa: E731
        table.add("(and the session of another that waits for its edge)", "let in: 1", trained)


def answers(table: Table, tls: Server, certificates: Certificates, edge: TinyEdge) -> None:
    """Who says the same again, and means something else."""
    stub = SplitTrainingStub(channel(tls, certificates, make_token(tls.tokens, "again")))
    opened(stub, edge)
    name = "the-very-same-request"
    first = stub.OpenSession(edge.request(request_id=name), timeout=SECONDS).session_id

    def again(**overrides: object) -> Callable[[], object]:
        def call() -> object:
            got = stub.OpenSession(edge.request(request_id=name, **overrides), timeout=SECONDS).session_id
            return "the same session" if got == first else "another session"

        return call

    table.add("(a request again, as it was)", "let in: the same session", again())
    for what, overrides in {
        "with another seed": {"seed": 8},
        "with garbage for a configuration": {"config_json": "{"},
        "with another rank": {"cut": pb.Cut(split_rank=2)},
    }.items():
        table.add(f"A10: a request_id again {what}", "FAILED_PRECONDITION", again(**overrides))

    def renumbered() -> object:
        def messages() -> list[pb.EdgeMessage]:
            forward, other = edge.forward(0), edge.forward(5)
            other.step = 0
            forward.number = other.number = 1
            return [attach(first), forward, other]

        return [answer.WhichOneof("body") for answer in stub.Train(iter(messages()), timeout=SECONDS)]

    table.add("A10: a message's number again, with another content", "", renumbered)


def metrics(table: Table, directory: Path) -> None:
    """Who holds on to the port for Prometheus."""
    with serving(directory, ["--metrics-port=0"]) as server:
        assert server.metrics
        host, port = server.metrics.split("/")[2].split(":")

        def scraped(data: bytes, count: int) -> Callable[[], object]:
            def call() -> object:
                held = [socket.create_connection((host, int(port)), SECONDS) for _ in range(count)]
                for one in held:
                    one.sendall(data)
                begun = time.monotonic()
                with urllib.request.urlopen(server.metrics, timeout=SECONDS) as response:
                    size = len(response.read())
                seconds = time.monotonic() - begun
                for one in held:
                    one.close()
                lines = server.log.read_text(errors="replace").count("\n")
                return f"a scrape of {size} bytes {'soon' if seconds < 2 else 'LATE'}; {lines} line in the log"

            return call

        for what, data in {
            "300 half-sent requests": b"GET /metrics HTTP/1.1\r\nHost:",
            "300 silent connections": b"",
            "300 TLS handshakes": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
            "300 connections with 60 kB of a header": b"GET / HTTP/1.1\r\nx: " + b"y" * 60_000,
        }.items():
            table.add(f"A11: the metrics' port: {what}", "let in: a scrape", scraped(data, 300))
        lines = lambda: f"{server.log.read_text(errors='replace').count('Traceback')} tracebacks"  # noqa: E731
        table.add("(and the log of that server)", "let in: 0 tracebacks", lines)


def held_connections(table: Table, tls: Server, certificates: Certificates) -> None:
    """A6, for a moment; bench/strangers.py has 2,000 of every way."""
    token = make_token(tls.tokens, "beside")
    host, port = tls.address.rsplit(":", 1)
    trusted = ssl.create_default_context(cafile=str(certificates.ca))
    trusted.check_hostname = False
    trusted.set_alpn_protocols(["h2"])

    def beside(encrypted: bool) -> Callable[[], object]:
        def call() -> object:
            held: list[socket.socket] = []
            for _ in range(300):
                try:
                    one = socket.create_connection((host, int(port)), SECONDS)
                    held.append(trusted.wrap_socket(one) if encrypted else one)
                except OSError:
                    break  # which is a refusal
            try:
                begun = time.monotonic()
                who = status(channel(tls, certificates, token))
                return f"{who} {'soon' if time.monotonic() - begun < 2 else 'LATE'}, beside {len(held)} that hold on"
            finally:
                for one in held:
                    one.close()

        return call

    table.add("A6: 300 TLS handshakes without a token, then silence", "let in: beside soon", beside(True))
    table.add("A6: 300 TCP connections, then silence", "let in: beside soon", beside(False))


def openings(table: Table, tls: Server, certificates: Certificates, edge: TinyEdge) -> None:
    """A8, for a moment; bench/openers.py measures what it leaves of another's training."""
    stub = SplitTrainingStub(channel(tls, certificates, make_token(tls.tokens, "builder")))
    victim = SplitTrainingStub(channel(tls, certificates, make_token(tls.tokens, "patient")))
    config = {**json.loads(edge.request().config_json), "num_hidden_layers": 256}
    request = edge.request(config_json=json.dumps(config), only_check=True)

    def beside() -> object:
        calls = [stub.OpenSession.future(request, timeout=SECONDS) for _ in range(4)]
        begun = time.monotonic()
        opened(victim, edge)
        seconds = time.monotonic() - begun
        for call in calls:
            call.cancel()
        return f"another opens {'soon' if seconds < 30 else 'LATE'}"

    table.add("A8: four models of 256 blocks to be built at once", "let in: another opens soon", beside)


def quotas(table: Table, tls: Server, certificates: Certificates, edge: TinyEdge) -> None:
    """Who takes more than is for it."""

    def caller(name: str, **limits: object) -> SplitTrainingStub:
        return SplitTrainingStub(channel(tls, certificates, make_token(tls.tokens, name, **limits)))

    greedy = caller("greedy", max_sessions=2)
    table.add("a third session of two", "RESOURCE_EXHAUSTED", lambda: [opened(greedy, edge) for _ in range(3)])
    opening = caller("opening")

    def hurried() -> None:
        for _ in range(
            300
        ):  # which cost the server next to nothing: models are built a few a second while others train
            try:
                opening.OpenSession(edge.request(protocol_version=1), timeout=10)
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.FAILED_PRECONDITION:
                    raise

    table.add("300 requests to open a session at once, of 200 a minute", "RESOURCE_EXHAUSTED", hurried)
    probing = caller("probing", max_bytes_per_day=1 << 20)
    probe = pb.ProbeRequest(data=bytes(300_000))
    table.add("2 MB of 1 MiB a day", "RESOURCE_EXHAUSTED", lambda: [probing.Probe(probe, timeout=10) for _ in range(7)])
    uploading = caller("uploading", max_upload_bytes=100_000)

    def upload() -> object:
        for number in range(3):
            content = bytes([number]) * 50_000
            first = pb.UploadBlobRequest(sha256=hashlib.sha256(content).hexdigest(), total_bytes=50_000, data=content)
            uploading.UploadBlob(iter([first]), timeout=10)
        return "150 kB"

    table.add("150 kB of uploads, of 100", "RESOURCE_EXHAUSTED", upload)
    calling = caller("calling", max_sessions=1)
    holds = [Held() for _ in range(6)]

    def calls() -> object:
        ends = []
        for call in [calling.Train(held, timeout=SECONDS) for held in holds]:
            try:
                list(call)
            except grpc.RpcError as error:
                ends.append(error)
        raise next((end for end in ends if end.code() is not grpc.StatusCode.CANCELLED), ends[0])

    table.add("six calls at a time, of five", "RESOURCE_EXHAUSTED", calls)
    for held in holds:
        held.end()
    small = caller("small", max_memory=100_000)
    table.add("a session of 230 kB, of 100 kB of memory", "RESOURCE_EXHAUSTED", lambda: opened(small, edge))
    ranked = caller("ranked", max_split_rank=2)
    table.add("rank 4, of at most 2", "PERMISSION_DENIED", lambda: ranked.OpenSession(edge.request(), timeout=10))
    picky = caller("picky", models=("bert-*",))
    table.add(
        "another model than those of the token",
        "PERMISSION_DENIED",
        lambda: picky.OpenSession(edge.request(), timeout=10),
    )


def _resident(server: Server) -> int:
    for line in Path(f"/proc/{server.child.pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):  # what the limit is of
            return 1024 * int(line.split()[1])
    raise grpc.RpcError("the server has died")
