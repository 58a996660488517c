"""What a server says of itself, and how `sft-cloud status` shows it."""

import json
import math
import secrets
import socket

import pytest
from support.calls import SECONDS, open_session, refusal
from support.scripted_cloud import ScriptedCloud, serving

from sft.errors import ProtocolError
from sft.v1 import split_training_pb2 as pb
from sft.version import __version__
from sft.wire.protocol import MAX_PROBE_BYTES, PROTOCOL_VERSION
from sft_cloud.cli import main
from sft_cloud.commands.status import as_json, as_text
from sft_cloud.identity import ANONYMOUS, Identity, Limits
from sft_cloud.service.registry import Registry, StreamHandle
from sft_cloud.service.status import Status

ANNA, BEN = Identity("anna"), Identity("ben")


class Clock:
    """Stands still until a test moves it."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def sessions(clock):
    return Registry(8, 600.0, clock=clock)


@pytest.fixture
def status(sessions, clock):
    return Status(sessions, "cpu", clock=clock, unix_clock=lambda: 1_800_000_000.25)


def put(sessions, owner, **fields):
    with sessions.place(pb.OpenSessionRequest(**fields), owner) as add:
        return add(secrets.token_hex(), 7)


def test_the_server(status, clock):
    clock.now += 90
    said = status.status(ANONYMOUS)
    assert (said.package_version, said.protocol_version, said.device) == (__version__, PROTOCOL_VERSION, "cpu")
    assert (said.unix_seconds, said.uptime_seconds) == (1_800_000_000.25, 90.0)
    assert (said.max_sessions, said.open_sessions, said.session_timeout_seconds) == (8, 0, 600.0)
    assert (said.caller, said.token_expires_unix_seconds, said.stopping) == ("anonymous", 0.0, False)
    assert said.limits == pb.CallerLimits()


def test_what_the_server_lacks(status, monkeypatch):
    assert list(status.status(ANONYMOUS).missing_features) == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = status.status(ANONYMOUS)
    assert list(said.missing_features) == ["lora"]
    assert json.loads(as_json(said))["missing_features"] == ["lora"]


def test_a_session(status, sessions, clock):
    entry = put(sessions, ANNA, model_name="bert-base-uncased", cut=pb.Cut(split_rank=8))
    clock.now += 60
    sessions.attach(entry.session_id, ANNA, StreamHandle(lambda: None))
    entry.bytes_received, entry.bytes_sent = 1000, 2000
    clock.now += 2
    (said,) = status.status(ANNA).sessions
    assert (said.label, said.owner, said.model_name) == (entry.session_id[:8], "anna", "bert-base-uncased")
    assert (said.next_step, said.split_rank, said.attached) == (7, 8, True)
    assert (said.age_seconds, said.idle_seconds) == (62.0, 2.0)
    assert (said.bytes_received, said.bytes_sent) == (1000, 2000)


def test_nobody_sees_the_sessions_of_others_but_who_may(status, sessions):
    put(sessions, ANNA, model_name="tiny")
    put(sessions, BEN, model_name="tiny")
    assert [session.owner for session in status.status(ANNA).sessions] == ["anna"]
    assert status.status(ANNA).open_sessions == 2
    assert status.status(Identity("carl")).sessions == []
    seen = status.status(Identity("operator", sees_all=True)).sessions
    assert {session.owner for session in seen} == {"anna", "ben"}


def test_the_caller_s_limits_and_the_end_of_its_token(status):
    limits = Limits(max_sessions=2, models=("bert-*",), steps_per_second=1.5, max_bytes_per_day=10, max_memory=9)
    said = status.status(Identity("anna", limits, expires_unix_seconds=1_900_000_000.0))
    expected = pb.CallerLimits(
        max_sessions=2, models=["bert-*"], steps_per_second=1.5, max_bytes_per_day=10, max_memory=9
    )
    assert said.limits == expected
    assert said.token_expires_unix_seconds == 1_900_000_000.0


def test_a_probe(status):
    said = status.probe(pb.ProbeRequest(data=b"x" * 10, reply_bytes=MAX_PROBE_BYTES))
    assert said.data == bytes(MAX_PROBE_BYTES)
    assert said.unix_seconds == 1_800_000_000.25
    for too_large in (
        pb.ProbeRequest(reply_bytes=MAX_PROBE_BYTES + 1),
        pb.ProbeRequest(data=bytes(MAX_PROBE_BYTES + 1)),
    ):
        with pytest.raises(ProtocolError, match="at most"):
            status.probe(too_large)


def response(**fields):
    values = {
        "package_version": "1.2.3",
        "protocol_version": 4,
        "device": "cuda:0",
        "uptime_seconds": 3723.4,
        "caller": "anna",
        "max_sessions": 16,
        "open_sessions": 2,
        "session_timeout_seconds": 600.0,
    }
    return pb.StatusResponse(**{**values, **fields})


def test_the_text():
    session = pb.SessionStatus(
        label="Xy12ab34",
        owner="anna",
        model_name="bert-base-uncased",
        next_step=1200,
        age_seconds=3723,
        idle_seconds=0.2,
        bytes_received=35_600_000,
        bytes_sent=999_999,
        attached=True,
        split_rank=8,
    )
    other = pb.SessionStatus(label="Zz99zz99", owner="ben", next_step=3)
    assert as_text(response(sessions=[session, other]), "cloud:50051").splitlines() == [
        "cloud:50051: sft-cloud 1.2.3, protocol 4, on cuda:0, up for 1h2m3s",
        "2 of 16 sessions; one outlives its stream for 10m",
        "you are anna",
        "",
        "session   owner  model              rank  step     age  idle  received  sent  stream",
        "Xy12ab34  anna   bert-base-uncased     8  1200  1h2m3s    0s   35.6 MB  1 MB  yes",
        "Zz99zz99  ben    -                     -     3      0s    0s       0 B   0 B  no",
    ]


def test_a_server_that_stops_and_a_token_that_ends():
    said = as_text(response(stopping=True, token_expires_unix_seconds=1_800_000_000.0), "cloud:50051").splitlines()
    assert said[0].endswith(", stopping")
    assert said[2] == "you are anna, until 2027-01-15 08:00 UTC"
    assert len(said) == 3


def test_the_json_has_every_field():
    session = pb.SessionStatus(label="Xy", owner="anna")
    said = json.loads(as_json(response(sessions=[session], limits=pb.CallerLimits(models=["bert-*"]))))
    assert set(said) == set(pb.StatusResponse.DESCRIPTOR.fields_by_name)
    assert set(said["sessions"][0]) == set(pb.SessionStatus.DESCRIPTOR.fields_by_name)
    assert said["limits"]["models"] == ["bert-*"]
    assert said["open_sessions"] == 2


def test_the_command_asks_a_running_server(server, connect, edge, capsys):
    session_id = open_session(connect(server.address), edge)
    assert main(["status", "--server", server.address]) == 0
    said = capsys.readouterr().out
    assert f"{server.address}: sft-cloud {__version__}" in said
    assert "1 of 4 sessions" in said
    assert said.splitlines()[-1].startswith(f"{session_id[:8]}  anonymous  tiny")
    assert session_id not in said


class HostileCloud(ScriptedCloud):
    """Says what would draw on a terminal, and numbers that no calendar has."""

    def Status(self, request, context):
        odd = "\x1b[2J"
        session = pb.SessionStatus(label=odd, owner=odd, model_name=odd, age_seconds=math.inf, idle_seconds=-1e300)
        return response(
            package_version=odd,
            device=odd,
            caller=odd,
            uptime_seconds=math.inf,
            session_timeout_seconds=math.nan,
            token_expires_unix_seconds=1e300,
            sessions=[session],
        )


def test_what_a_hostile_server_says_is_shown_harmlessly(capsys):
    with serving(HostileCloud()) as address:
        assert main(["status", "--server", address]) == 0
        text = capsys.readouterr().out
        assert main(["status", "--server", address, "--json"]) == 0
        document = capsys.readouterr().out
    assert text.count("?[2J") == 6
    assert "\x1b" not in text
    assert "Infinity" not in document
    assert json.loads(document)["caller"] == "?[2J"


def test_the_service_answers_probes_and_refuses_large_ones(server, connect):
    stub = connect(server.address)
    said = stub.Probe(pb.ProbeRequest(data=b"1234", reply_bytes=1000), timeout=SECONDS)
    assert len(said.data) == 1000
    assert said.unix_seconds > 1_700_000_000
    large = pb.ProbeRequest(reply_bytes=MAX_PROBE_BYTES + 1)
    assert "at most" in refusal(lambda: stub.Probe(large, timeout=SECONDS))[1]


def test_where_nobody_answers(capsys):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    assert main(["status", "--server", address, "--timeout", "20s"]) == 5
    said = capsys.readouterr().err
    assert said.startswith(f"sft-cloud status: error: nobody answers at {address}")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("address", ["cloud", "cloud:http", ":50051", "cloud:0"])
def test_an_address_that_is_none(address, capsys):
    assert main(["status", "--server", address]) == 2
    assert "--server must be HOST:PORT" in capsys.readouterr().err
