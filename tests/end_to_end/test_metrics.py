"""The figures of a real server, as Prometheus reads them, after real runs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from support.calls import Stream, chunks_of, open_session, refusal
from support.jobs import STEADY, Job
from support.servers import start_server
from support.tiny_edge import TinyEdge, attach
from support.tls import make_certificates, make_token
from transformers import AutoConfig

from sft.v1 import split_training_pb2 as pb
from sft.v1.split_training_pb2_grpc import SplitTrainingStub
from sft.wire.protocol import CLIENT_OPTIONS
from sft_cloud.access.protection import make_access
from sft_cloud.observability.metrics_port import MetricsPort
from sft_cloud.observability.observer import Observer
from sft_cloud.observability.prometheus import PrometheusMetrics
from sft_cloud.options import ServerAccess
from sft_cloud.server import CloudServer

CPU = torch.device("cpu")
SECONDS = 60.0


@pytest.fixture
def edge(model: Path) -> TinyEdge:
    config = AutoConfig.from_pretrained(model, num_labels=3, problem_type="single_label_classification")
    return TinyEdge(model, config)


@pytest.fixture
def metrics() -> PrometheusMetrics:
    return PrometheusMetrics(CPU)


@pytest.fixture
def server(metrics: PrometheusMetrics, tmp_path: Path) -> Iterator[CloudServer]:
    made = start_server(tmp_path / "cloud", 1, observer=Observer(metrics))
    yield made
    made.stop(grace_seconds=0)


def scraped(metrics: PrometheusMetrics) -> Callable[..., float | None]:
    """`value(name, **labels)` of one scrape, over HTTP; None where there is no such series."""
    port = MetricsPort("127.0.0.1", 0, metrics.registry)
    try:
        with urllib.request.urlopen(port.url, timeout=SECONDS) as response:
            text = response.read().decode()
    finally:
        port.close()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def value(name: str, **labels: str) -> float | None:
        chosen = [s.value for s in samples if s.name == f"sft_cloud_{name}" and labels.items() <= s.labels.items()]
        return sum(chosen) if chosen else None

    return value


def test_a_run(
    job: Job, model: Path, train: Callable[..., Path], server: CloudServer, metrics: PrometheusMetrics, tmp_path: Path
) -> None:
    train(job, **STEADY | {"max_steps": 3}, model=model, server=server.address)
    value = scraped(metrics)
    anonymous = {"tenant": "anonymous"}
    assert value("sessions_opened_total", **anonymous) == value("sessions_closed_total", **anonymous) == 1
    assert value("sessions") == value("streams") == 0
    assert value("messages_total", kind="commit", **anonymous) > 0
    assert value("sessions_limit") == 1
    assert value("steps_total", **anonymous) == 3
    assert value("messages_total", kind="forward", **anonymous) == 3
    assert value("messages_total", kind="evaluate", **anonymous) > 0
    assert value("repeated_messages_total", **anonymous) == 0
    assert value("uploads_total", **anonymous) == 2
    assert value("upload_bytes_total", **anonymous) == sum(
        path.stat().st_size for path in (tmp_path / "cloud").rglob("*.safetensors")
    )
    assert value("downloads_total", **anonymous) == 1
    assert value("received_bytes_total", **anonymous) > 1000
    assert value("sent_bytes_total", **anonymous) > 1000
    messages = value("messages_total", **anonymous)
    assert value("queue_wait_seconds_count", **anonymous) == value("work_seconds_count", **anonymous) == messages
    assert value("work_seconds_sum", **anonymous) > 0
    assert value("rejects_total") == value("sessions_refused_total") == 0


def test_a_refusal_and_a_repeated_message(server: CloudServer, metrics: PrometheusMetrics, edge: TinyEdge) -> None:
    with grpc.insecure_channel(server.address, options=CLIENT_OPTIONS) as channel:
        stub = SplitTrainingStub(channel)
        session_id = open_session(stub, edge)
        code, said = refusal(lambda: stub.OpenSession(edge.request(), timeout=SECONDS))
        assert (code, "no room" in said) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
        first = Stream(stub, attach(session_id))
        next(first.call)
        message = edge.forward(0)
        message.number = 1
        answer = first.ask(message)
        second = Stream(stub, attach(session_id))  # takes the session, and gets the answer again
        next(second.call)
        assert next(second.call).number == answer.number
        assert second.ask(message) == answer
        value = scraped(metrics)
        assert value("sessions", tenant="anonymous") == value("streams", tenant="anonymous") == 1
        second.end()
    assert value("rejects_total", method="OpenSession", code="RESOURCE_EXHAUSTED", reason="ServerFullError") == 1
    assert value("sessions_refused_total", reason="places") == value("sessions_refused_total") == 1
    assert value("reconnects_total", tenant="anonymous") == 1
    assert value("repeated_messages_total", tenant="anonymous") == 1
    assert value("messages_total", kind="forward", tenant="anonymous") == 2
    assert value("work_seconds_count", tenant="anonymous") == 1  # once


def test_strangers_tenants_and_the_certificate(metrics: PrometheusMetrics, edge: TinyEdge, tmp_path: Path) -> None:
    certificates = make_certificates(tmp_path / "certificates")
    token = make_token(tmp_path / "tokens", "anna")
    files = certificates.server
    access = make_access(ServerAccess(tls_cert=files.cert, tls_key=files.key, tokens=tmp_path / "tokens"), "127.0.0.1")
    state, observer = tmp_path / "cloud", Observer(metrics)
    server = start_server(state, 1, access=access, observer=observer)
    trusted = grpc.ssl_channel_credentials(certificates.ca.read_bytes())
    try:
        with grpc.secure_channel(server.address, trusted, options=CLIENT_OPTIONS) as channel:
            stub = SplitTrainingStub(channel)
            known = (("authorization", f"Bearer {token}"),)
            refusal(lambda: stub.Status(pb.StatusRequest(), timeout=SECONDS))
            refusal(lambda: channel.unary_unary("/made.up/Method")(b"", timeout=SECONDS))
            refusal(lambda: stub.OpenSession(pb.OpenSessionRequest(), timeout=SECONDS, metadata=known))
            missing = stub.OpenSession(edge.request(), timeout=SECONDS, metadata=known).missing_blobs
            for sha256 in missing:
                stub.UploadBlob(chunks_of(sha256, edge.blobs()[sha256]), timeout=SECONDS, metadata=known)
    finally:
        server.stop(grace_seconds=0)
    value = scraped(metrics)
    refused = {"code": "UNAUTHENTICATED", "tenant": "unknown"}
    assert value("rejects_total", method="Status", **refused) == 1
    assert value("rejects_total", method="none such", **refused) == 1
    assert value("rejects_total", method="OpenSession", tenant="anna", reason="PreconditionError") == 1
    assert value("uploads_total", tenant="anna") == len(missing) > 0
    assert value("certificate_expires_unix_seconds") > time.time()


@pytest.mark.slow
def test_the_command_says_where_they_are(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sft_cloud", "serve", "--port", "0", "--device", "cpu", "--metrics-port", "0"]
    command += ["--state-dir", str(tmp_path), "--exit-with-stdin"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        assert child.stdout is not None
        ready = json.loads(child.stdout.readline())
        assert ready["metrics"].startswith("http://127.0.0.1:")
        with urllib.request.urlopen(ready["metrics"], timeout=SECONDS) as response:
            assert b"sft_cloud_sessions_limit 16.0" in response.read()
        assert child.stdin is not None
        child.stdin.close()
        assert child.wait(SECONDS) == 0
