"""Attacks on a server of one's own, and what each of them got.

    python bench/attacks.py
    python bench/attacks.py --only memory,places

Starts `sft-cloud serve` with TLS and tokens, and a second one that asks for client certificates, too; tries what is in
the table below against them, while a good session trains again and again beside it; and prints the table. Exit code 1
when an attack got something else than it should, or when the good session did not end with the bits of its run alone.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from attack_tools import (
    MEMORY_LIMIT,
    SECONDS,
    Held,
    Server,
    Table,
    channel,
    opened,
    serving,
    status,
    trained,
    with_blob,
)
from attacks_on_health import health_checks
from attacks_on_sharing import answers, held_connections, memory, metrics, openings, places, quotas
from fuzz import tiny_edge  # which has added tests/ to the path, as the one before it
from support.fuzzing import SERVICE, good_run
from support.tiny_edge import TinyEdge, attach
from support.tls import Certificates, make_certificates, make_token

from sft.models import Cut
from sft.v1 import split_training_pb2 as pb
from sft.v1.split_training_pb2_grpc import SplitTrainingStub
from sft.wire.parts import parts_of
from sft_cloud.access.tokens import TokenFile

STEPS = 300
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"


def main() -> int:
    """Prints the table, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="of its parts these: identity,health,tenants,sizes,...,memory")
    chosen = [name for name in parser.parse_args().only.split(",") if name]
    with tempfile.TemporaryDirectory() as scratch:
        return attack(Path(scratch), chosen)


def attack(scratch: Path, chosen: list[str]) -> int:
    """The whole of it, or the parts that are chosen, in a directory of its own."""
    edge = tiny_edge(scratch / "tiny")
    certificates = make_certificates(scratch)
    server_flags = [f"--tls-cert={certificates.server.cert}", f"--tls-key={certificates.server.key}"]
    server_flags.append("--session-timeout=10s")  # what attackers leave behind is theirs no longer than that
    mutual_flags = [*server_flags, f"--tls-client-ca={certificates.ca}"]
    with serving(scratch / "tls", server_flags) as tls, serving(scratch / "mutual", mutual_flags) as mutual:
        good_token = make_token(tls.tokens, "good")
        good = SplitTrainingStub(channel(tls, certificates, good_token))
        alone = good_run(good, edge, STEPS)
        beside: list[str] = []
        over = threading.Event()

        def train() -> None:
            while not over.is_set():
                try:
                    beside.append(good_run(good, edge, STEPS))
                except grpc.RpcError as error:
                    beside.append(f"{error.code().name}: {error.details()}")

        thread = threading.Thread(target=train)
        thread.start()
        table = Table()
        parts: dict[str, Callable[[], None]] = {
            "identity": lambda: identity(table, tls, mutual, certificates),
            "health": lambda: health_checks(table, tls, certificates),
            "tenants": lambda: tenants(table, tls, certificates, edge),
            "sizes": lambda: sizes(table, tls, certificates, edge),
            "names": lambda: names(table, tls, certificates, edge),
            "slowness": lambda: slowness(table, tls, certificates, edge),
            "quotas": lambda: quotas(table, tls, certificates, edge),
            "connections": lambda: held_connections(table, tls, certificates),
            "openings": lambda: openings(table, tls, certificates, edge),
            "answers": lambda: answers(table, tls, certificates, edge),
            "places": lambda: places(table, scratch / "places", edge, certificates),
            "metrics": lambda: metrics(table, scratch / "metrics"),
            "memory": lambda: memory(table, tls, certificates, MEMORY_LIMIT),
        }
        print("| attack | what it got |\n|---|---|", flush=True)
        try:
            for name, part in parts.items():
                if name in chosen or not chosen:
                    part()
        finally:
            over.set()
            thread.join()
        lives = tls.child.poll() is None and mutual.child.poll() is None
        tracebacks = sum(server.log.read_text(errors="replace").count("Traceback") for server in (tls, mutual))
    same = sum(one == alone for one in beside)
    expected = sum(is_expected for _, _, is_expected in table.rows)
    print()
    print(f"{expected} of {len(table.rows)} attacks got what they should; both servers {'live' if lives else 'DIED'};")
    print(
        f"tracebacks in their logs: {tracebacks}; the good session beside them ran {len(beside)} times, {same} with the"
    )
    print("bits of its run alone")
    for other in sorted({one for one in beside if one != alone}):
        print(f"instead: {other}")
    return 0 if lives and not tracebacks and beside and same == len(beside) and expected == len(table.rows) else 1


def identity(table: Table, tls: Server, mutual: Server, certificates: Certificates) -> None:
    """Who is let in."""
    table.add("no token", "UNAUTHENTICATED", lambda: status(channel(tls, certificates, None)))
    token = make_token(tls.tokens, "alice")
    guess = token[:-1] + ("A" if token[-1] != "A" else "B")
    table.add("a token with one wrong letter", "UNAUTHENTICATED", lambda: status(channel(tls, certificates, guess)))
    expired = make_token(tls.tokens, "alice", lifetime_seconds=-1.0)
    table.add("an expired token", "UNAUTHENTICATED", lambda: status(channel(tls, certificates, expired)))
    listing = channel(tls, certificates, None).stream_stream(
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    )
    table.add("listing the methods without a token", "UNAUTHENTICATED", lambda: list(listing(iter([b""]), timeout=10)))

    def replayed() -> object:
        outgoing = Held()
        call = SplitTrainingStub(channel(tls, certificates, token)).Train(outgoing, timeout=SECONDS)
        TokenFile(tls.tokens).revoke(lambda one: one.name == "alice")
        outgoing.say(attach("any"))
        return list(call)

    table.add("a token that is revoked while its stream runs", "UNAUTHENTICATED", replayed)
    table.add("a revoked token, replayed", "UNAUTHENTICATED", lambda: status(channel(tls, certificates, token)))

    def plaintext() -> object:
        return status(grpc.insecure_channel(tls.address))

    table.add("plaintext to the TLS port", "UNAVAILABLE", plaintext)
    wrong_ca = {"ca": certificates.other_ca}
    table.add(
        "a client told to trust another CA (somebody in the middle)",
        "UNAVAILABLE",
        lambda: status(channel(tls, certificates, guess, **wrong_ca)),
    )
    stolen = make_token(mutual.tokens, "alice")
    who = {
        "a stolen token without its certificate": (None, "UNAVAILABLE"),
        "a stolen token with another's certificate": (certificates.bob, "UNAUTHENTICATED"),
        "a certificate of the right name by another CA": (certificates.other_alice, "UNAVAILABLE"),
        "an expired certificate": (certificates.expired_alice, "UNAVAILABLE"),
    }
    for name, (client, expected) in who.items():
        table.add(name, expected, lambda client=client: status(channel(mutual, certificates, stolen, client)))
    table.add(
        "(its owner, with both)",
        "let in: alice",
        lambda: status(channel(mutual, certificates, stolen, certificates.alice)),
    )


def tenants(table: Table, tls: Server, certificates: Certificates, edge: TinyEdge) -> None:
    """What is another's."""
    victim = SplitTrainingStub(channel(tls, certificates, make_token(tls.tokens, "victim")))
    thief = SplitTrainingStub(channel(tls, certificates, make_token(tls.tokens, "thief")))
    session_id = opened(victim, edge)
    outgoing = Held(attach(session_id))
    held = victim.Train(outgoing, timeout=SECONDS)
    next(held)
    train = lambda: list(thief.Train(iter([attach(session_id)]), timeout=10))  # noqa: E731
    table.add("training with another tenant's session id", "NOT_FOUND", train)
    request = pb.DownloadWeightsRequest(session_id=session_id)
    table.add(
        "downloading another tenant's weights", "NOT_FOUND", lambda: list(thief.DownloadWeights(request, timeout=10))
    )

    def listed() -> object:
        sessions = thief.Status(pb.StatusRequest(), timeout=10).sessions
        return f"{len(sessions)} sessions of others seen" if sessions else "nothing seen"

    table.add("listing other tenants' sessions", "let in: nothing seen", listed)

    def probed() -> object:
        missing = len(thief.OpenSession(edge.request(), timeout=10).missing_blobs)
        return f"all {missing} named as missing" if missing == len(edge.blobs()) else "known"

    table.add("opening a session with the hashes of another's uploads", f"let in: all {len(edge.blobs())}", probed)
    outgoing.say(pb.EdgeMessage(close=pb.Close()))
    outgoing.end()
    list(held)


def sizes(table: Table, tls: Server, certificates: Certificates, edge: TinyEdge) -> None:
    """A little that stands for much."""
    token = make_token(tls.tokens, "sizes")

    def raw(method: str, *messages: bytes, **options: Any) -> Callable[[], object]:
        one = channel(tls, certificates, token, **options)
        return lambda: list(one.stream_stream(SERVICE + method)(iter(messages), timeout=SECONDS))

    table.add("a message of 300 MiB", "RESOURCE_EXHAUSTED", raw("Train", bytes(300 << 20)))
    table.add("a request to open a session of 5 MiB", "RESOURCE_EXHAUSTED", raw("OpenSession", bytes(5 << 20)))
    first = pb.EdgeMessage(part=pb.Part(data=bytes(1 << 20), total_bytes=1 << 40)).SerializeToString()
    table.add("a message in parts that is said to have 1 TiB", "INVALID_ARGUMENT", raw("Train", first))
    bomb = raw("Train", bytes(250 << 20), compression=grpc.Compression.Gzip)
    table.add("a decompression bomb: 250 MiB of zeros in 250 kB of gzip", "UNIMPLEMENTED", bomb)
    table.add(
        "a protobuf bomb: 4 million empty messages in 8 MiB",
        "INVALID_ARGUMENT",
        raw("Train", *parts_of(b"\x1a\x00" * (4 << 20))),
    )
    metadata = [("x-filler", "x" * 100_000)]
    stub = SplitTrainingStub(channel(tls, certificates, token))
    table.add(
        "100 kB of headers",
        "RESOURCE_EXHAUSTED",
        lambda: stub.Status(pb.StatusRequest(), metadata=metadata, timeout=10),
    )

    def batch() -> object:
        B, S = 8192, 128
        packed = pb.Tensor(data_type=1, shape=[B, edge.width], data=bytes(4 * B * edge.width))
        activation = pb.Activation(packed=packed, lengths=[1] * B, padded_length=S)
        return trained(stub, edge, edge.forward(0, activation=activation, labels=None, loss_scale=0.0))

    table.add("a batch of 8,192 tokens padded to 1,048,576", "let in: ['attached', 'step_skipped']", batch)

    def shape() -> object:
        packed = pb.Tensor(data_type=1, shape=[2**32 - 1] * 100_000)
        return trained(
            stub, edge, edge.forward(0, activation=pb.Activation(packed=packed, lengths=[1], padded_length=4))
        )

    table.add("a tensor of 100,000 dimensions", "INVALID_ARGUMENT", shape)

    def header() -> object:
        entry = '"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
        text = ("{" + ",".join(entry % number for number in range(200_000)) + "}").encode()
        return with_blob(stub, edge, len(text).to_bytes(8, "little") + text)

    table.add("weights whose header names 200,000 tensors", "INVALID_ARGUMENT", header)
    table.add(
        "a pickle in the place of weights", "INVALID_ARGUMENT", lambda: with_blob(stub, edge, b"\x80\x04\x95posix")
    )
    config = json.loads(edge.request().config_json)
    for what, changes in {
        "a configuration with 1,000,000 blocks": {"num_hidden_layers": 10**6},
        "a configuration of 100 TB": {"hidden_size": 1 << 20, "intermediate_size": 1 << 22},
    }.items():
        expected = "INVALID_ARGUMENT" if "blocks" in what else "RESOURCE_EXHAUSTED"
        text = json.dumps({**config, **changes})
        table.add(what, expected, lambda text=text: stub.OpenSession(edge.request(config_json=text), timeout=SECONDS))
    deep = edge.request(config_json="[" * 1_000_000)
    table.add("JSON a million levels deep", "INVALID_ARGUMENT", lambda: stub.OpenSession(deep, timeout=SECONDS))


def names(table: Table, tls: Server, certificates: Certificates, edge: TinyEdge) -> None:
    """Names that lead elsewhere."""
    stub = SplitTrainingStub(channel(tls, certificates, make_token(tls.tokens, "names")))
    for what, overrides in {
        "model_name ../../etc": {"model_name": "../../etc"},
        "model_name /etc/passwd": {"model_name": "/etc/passwd"},
        "weights_sha256 ../../tokens.json": {"weights_sha256": "../../tokens.json"},
        "run_id ../../../tmp/x": {"run_id": "../../../tmp/x"},
    }.items():
        request = edge.request(**overrides)
        table.add(f"path traversal: {what}", "INVALID_ARGUMENT", lambda one=request: stub.OpenSession(one, timeout=10))
    first = pb.UploadBlobRequest(sha256="../../../../tmp/x", total_bytes=1, data=b"x")
    table.add("path traversal: upload to ../../../../tmp/x", "INVALID_ARGUMENT", lambda: stub.UploadBlob(iter([first])))


def slowness(table: Table, tls: Server, certificates: Certificates, edge: TinyEdge) -> None:
    """Who holds a place and does nothing with it."""
    token = make_token(tls.tokens, "slow")
    stub = SplitTrainingStub(channel(tls, certificates, token))
    host, port = tls.address.rsplit(":", 1)

    def silent(data: bytes, count: int) -> Callable[[], object]:
        def call() -> object:
            sockets = [socket.create_connection((host, int(port)), SECONDS) for _ in range(count)]
            for one in sockets:
                one.settimeout(SECONDS)
                one.sendall(data)
            for one in sockets:
                while one.recv(4096):
                    pass
            raise ConnectionError(f"all {count} connections were closed")

        return call

    table.add("slow loris: 100 TCP connections that say nothing", "ConnectionError", silent(b"", 100))
    table.add("slow loris: 100 that begin without TLS", "ConnectionError", silent(PREFACE, 100))
    half = channel(tls, certificates, token)
    for method in ("OpenSession", "Train", "UploadBlob"):
        held = Held()
        one = half.stream_stream(SERVICE + method)
        table.add(
            f"slow loris: {method} without its message",
            "CANCELLED",
            lambda one=one, held=held: list(one(held, timeout=SECONDS)),
        )
        held.end()
    parts = Held(*list(parts_of(bytes(20 << 20)))[:-1])
    one = half.stream_stream(SERVICE + "Train")
    table.add("slow loris: 19 of 20 MiB of a message", "CANCELLED", lambda: list(one(parts, timeout=SECONDS)))
    parts.end()
    sha256, content = next(iter(edge.blobs().items()))
    upload = Held(pb.UploadBlobRequest(sha256=sha256, total_bytes=len(content), data=content[:100]))
    table.add(
        "slow loris: an upload that stops half-way", "CANCELLED", lambda: stub.UploadBlob(upload, timeout=SECONDS)
    )
    upload.end()

    def idle() -> object:
        outgoing = Held(attach(opened(stub, edge)))
        try:
            return list(stub.Train(outgoing, timeout=SECONDS))
        finally:
            outgoing.end()

    table.add("a stream on which nothing comes after its attach", "CANCELLED", idle)

    def unread() -> object:
        wide = TinyEdge(edge.directory, edge.config, cut=Cut("sl", 1), lengths=(128,) * 16)
        messages = [attach(opened(stub, wide))]
        for number in range(1, 31):  # each is answered with a quarter of a megabyte
            messages.append(wide.forward(0, number - 1))
            messages[-1].number = number
        call = stub.Train(iter(messages), timeout=2 * SECONDS)
        next(call)  # and nothing more
        label = messages[0].attach.session_id[:8]
        for _ in range(2 * int(SECONDS)):
            sessions = stub.Status(pb.StatusRequest(), timeout=10).sessions
            if not any(session.label == label and session.attached for session in sessions):
                raise ConnectionError("the stream was ended")
            time.sleep(0.5)
        return "still there"

    table.add("answers of 8 MB that are not read", "ConnectionError", unread)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
