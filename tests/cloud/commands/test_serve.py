"""`sft-cloud serve` as a process: how it starts, says so, refuses, and ends."""

import json
import os
import signal
import socket
import subprocess
import sys

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from support.calls import Stream
from support.one_process import run_each
from support.tiny_edge import attach

from sft.errors import UsageError
from sft.v1 import split_training_pb2 as pb
from sft.version import __version__
from sft_cloud.cli import main

SECONDS = 60
SERVICE = "sft.v1.SplitTraining"


class Process:
    """A server of its own; `address` once it has said that it serves."""

    def __init__(self, tmp_path, *flags):
        command = [sys.executable, "-m", "sft_cloud", "serve", "--port", "0", "--device", "cpu", "--threads", "1"]
        command += ["--state-dir", str(tmp_path / "state"), *flags]
        self.log = tmp_path / "server.log"
        with self.log.open("wb") as stderr:
            self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr)
        self.ready = json.loads(self.child.stdout.readline())
        self.address = self.ready["address"]

    def ends_with(self):
        return self.child.wait(SECONDS)


@pytest.fixture
def start(tmp_path):
    processes = []

    def make(*flags):
        processes.append(Process(tmp_path, *flags))
        return processes[-1]

    yield make
    for process in processes:
        process.child.kill()
        process.child.wait()
        process.child.stdin.close()
        process.child.stdout.close()


@pytest.fixture
def channel():
    channels = []

    def make(address):
        channels.append(grpc.insecure_channel(address))
        return channels[-1]

    yield make
    for one in channels:
        one.close()


def sft_cloud(*arguments, **environment):
    command = [sys.executable, "-m", "sft_cloud", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS, env={**os.environ, **environment}, check=False
    )


def health_of(channel, service):
    return (
        health_pb2_grpc.HealthStub(channel)
        .Check(health_pb2.HealthCheckRequest(service=service), timeout=SECONDS)
        .status
    )


def test_it_announces_itself_serves_and_ends_on_sigterm(start, channel, connect, edge):
    process = start("--log-format", "json")
    assert process.ready == {"event": "serving", "address": process.address, "device": "cpu"}
    there = channel(process.address)
    for service in ("", SERVICE):
        assert health_of(there, service) == health_pb2.HealthCheckResponse.SERVING

    request = reflection_pb2.ServerReflectionRequest(list_services="")
    answers = reflection_pb2_grpc.ServerReflectionStub(there).ServerReflectionInfo(iter([request]), timeout=SECONDS)
    names = [service.name for service in next(answers).list_services_response.service]
    assert SERVICE in names
    assert "grpc.health.v1.Health" in names
    answers.cancel()

    stub = connect(process.address)
    for sha256, content in edge.blobs().items():
        stub.UploadBlob(iter([pb.UploadBlobRequest(sha256=sha256, total_bytes=len(content), data=content)]))
    session_id = stub.OpenSession(edge.request()).session_id
    stream = Stream(stub, attach(session_id), edge.forward(0), edge.commit(0))
    assert len(stream.end()) == 3

    process.child.send_signal(signal.SIGTERM)
    assert process.ends_with() == 0
    assert process.child.stdout.read() == b""
    events = {entry["event"]: entry for entry in map(json.loads, process.log.read_text().splitlines())}
    assert events["session opened"]["split_rank"] == 4
    assert events["session closed"]["steps"] == 1
    assert events["session closed"]["bytes_received"] > 15 * 4 * 4
    assert events["session closed"]["session"] == events["session opened"]["session"] == session_id[:8]
    assert session_id not in process.log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_though_an_edge_is_idle(start, connect, edge, number):
    process = start()
    stub = connect(process.address)
    for sha256, content in edge.blobs().items():
        stub.UploadBlob(iter([pb.UploadBlobRequest(sha256=sha256, total_bytes=len(content), data=content)]))
    held = iter(lambda: process.child.wait(SECONDS) and None, None)  # an edge that sends nothing until the end

    def messages():
        yield attach(stub.OpenSession(edge.request()).session_id)
        yield from held

    call = stub.Train(messages())
    assert next(call).HasField("attached")
    process.child.send_signal(number)
    assert process.ends_with() == 0
    with pytest.raises(grpc.RpcError) as caught:
        next(call)
    assert caught.value.code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)


@pytest.mark.slow
def test_it_ends_with_its_standard_input(start):
    process = start("--exit-with-stdin")
    process.child.stdin.write(b"anything")
    process.child.stdin.flush()
    process.child.stdin.close()
    assert process.ends_with() == 0


@pytest.mark.slow
def test_what_it_cannot_use_is_one_line(tmp_path):
    """A port that is taken, and a state directory that is a file."""
    (tmp_path / "file").write_text("")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        commands = [
            ["serve", "--port", str(taken.getsockname()[1]), "--device", "cpu", "--state-dir", str(tmp_path / "state")],
            ["serve", "--port", "0", "--device", "cpu", "--state-dir", str(tmp_path / "file")],
        ]
        told = run_each("sft_cloud.cli", [(command, {}) for command in commands], tmp_path / "told", SECONDS)
    says = ["Address already in use; choose another --port", "choose another --state-dir"]
    assert [each.code for each in told] == [1, 7]
    assert [each.stdout for each in told] == ["", ""]
    for each, words in zip(told, says, strict=True):
        assert words in each.stderr
        assert len(each.stderr.splitlines()) == 1


@pytest.fixture
def without_torch(tmp_path):
    """For `PYTHONPATH`: importing torch, which takes seconds, is an error."""
    (tmp_path / "hides").mkdir()
    (tmp_path / "hides" / "torch.py").write_text("raise ImportError('torch was imported')")
    return os.pathsep.join([str(tmp_path / "hides"), *sys.path])


def test_who_has_no_home_is_asked_for_a_directory(monkeypatch, capsys):
    """A container that is started with a bare user number."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # KeyError, as for a number without a name
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["serve", "--help"])
    assert main(["serve"]) == UsageError.exit_code
    assert "no home directory here to keep uploads in: give --state-dir" in capsys.readouterr().err


@pytest.mark.one_in(5)
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--port", "70000"], "--port must be from 0 to 65535"),
        (["--port", "http"], "'http' is not a whole number"),
        (["--max-sessions", "0"], "--max-sessions must be from 1"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--device", "tpu"], "--device must be auto"),
        (["--model-dir", "/nowhere/at/all"], "--model-dir /nowhere/at/all: no such directory"),
        (["--log-format", "xml"], "'xml' is none of text, json"),
        (["--host", "no.such.host.invalid", "--device", "cpu"], "--host no.such.host.invalid"),
        (["--host", "0.0.0.0"], "other machines can reach host 0.0.0.0: give --tls-cert and --tls-key"),
        (["--tls-key", "key.pem"], "--tls-cert and --tls-key belong together"),
        (["--tls-client-ca", "ca.pem"], "--tls-client-ca needs --tls-cert and --tls-key"),
        (["--tokens", "/nowhere/at/all"], "token file /nowhere/at/all: No such file or directory"),
        (["--token", "sft_x"], "unrecognized arguments: --token sft_x"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
    ids=str,
)
def test_bad_flags_are_one_line_and_at_once(flags, says, tmp_path, without_torch):
    done = sft_cloud("serve", "--state-dir", str(tmp_path), *flags, PYTHONPATH=without_torch)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_help_and_version_do_without_torch(without_torch):
    done = sft_cloud("serve", "--help", PYTHONPATH=without_torch)
    assert done.returncode == 0
    for flag in (
        "--host",
        "--port",
        "--device",
        "--model-dir",
        "--state-dir",
        "--max-sessions",
        "--log-level",
        "--tokens",
    ):
        assert flag in done.stdout
    done = sft_cloud("--version", PYTHONPATH=without_torch)
    assert (done.returncode, done.stdout) == (0, f"sft-cloud {__version__}\n")


def test_uploads_go_to_the_user_s_cache_unless_told_otherwise(tmp_path):
    assert str(tmp_path / "sft-cloud") in " ".join(
        sft_cloud("serve", "--help", XDG_CACHE_HOME=str(tmp_path), COLUMNS="1000").stdout.split()
    )
