"""`sft-edge doctor` against clouds that answer by a script: what it finds, what it advises, how it ends."""

from __future__ import annotations

import json
import math
import threading
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List

import grpc
import pytest
from support.examined_cloud import ExaminedCloud
from support.proxy import TcpProxy
from support.scripted_cloud import ScriptedCloud, serving

import sft
from sft.cli.durations import Duration
from sft.client.inquiry import Inquiry
from sft.v1 import split_training_pb2 as pb
from sft.wire.protocol import CLIENT_OPTIONS, MAX_PROBE_BYTES, PROTOCOL_VERSION
from sft_edge.cli import main
from sft_edge.commands.doctor.finding import Finding, text_of
from sft_edge.commands.doctor.server import (
    Way,
    estimate,
    look_at_instances,
    look_at_server,
    look_at_stream,
    measure,
)

NOW = 1_800_000_000.0
DAY = 86400.0
SECONDS = 20.0


@contextmanager
def asking(address: str, timeout_seconds: float = SECONDS) -> Iterator[Inquiry]:
    with grpc.insecure_channel(address, options=CLIENT_OPTIONS) as channel:
        yield Inquiry(channel, address, timeout_seconds)


def found_of(cloud: ExaminedCloud) -> Dict[str, Finding]:
    """What is found of the server, by name."""
    with serving(cloud) as address, asking(address) as inquiry:
        findings, _ = look_at_server(inquiry, NOW)
    return {finding.name: finding for finding in findings}


def test_a_cloud_in_good_health() -> None:
    found = found_of(ExaminedCloud())
    assert [finding.verdict for finding in found.values()] == ["ok"] * 4
    assert found["access"].found == "the server knows us as anna"
    assert found["versions"].found == f"{sft.__version__} on both sides, protocol {PROTOCOL_VERSION}"
    assert found["room"].found == "1 of 4 sessions on cuda:0, up for 1m30s; a session outlives its stream for 10m"


def test_what_a_token_allows() -> None:
    limits = pb.CallerLimits(
        max_split_rank=16, models=["bert-*", "x"], max_bytes_per_day=5 * 10**9, max_memory=9 * 10**6
    )
    assert found_of(ExaminedCloud(limits=limits))["access"].found == (
        "the server knows us as anna, who may use ranks up to 16, models like bert-* or x, 5 GB a day, 9 MB of memory"
    )


@pytest.mark.parametrize(("days", "verdict"), [(100.0, "ok"), (3.0, "warning")])
def test_the_date_of_a_token(days: float, verdict: str) -> None:
    found = found_of(ExaminedCloud(token_expires_unix_seconds=NOW + days * DAY))["access"]
    assert found.verdict == verdict
    assert "the token is good until 2027-" in found.found
    assert ("3.0 days from now" in found.found) is (verdict == "warning")


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED])
def test_a_caller_that_is_not_let_in(code: grpc.StatusCode) -> None:
    cloud = ExaminedCloud()
    cloud.refuses["Status"] = code
    (found,) = found_of(cloud).values()
    assert (found.verdict, found.name) == ("failed", "access")
    assert "the token is not known" in found.found
    assert "ask the server's operator" in found.advice


class HostileCloud(ExaminedCloud):
    """Says what would draw on a terminal, and numbers that no calendar has."""

    def __init__(self) -> None:
        odd = "\x1b[2J"
        session = pb.SessionStatus(label=odd, owner=odd, model_name=odd, age_seconds=math.inf, idle_seconds=-1e300)
        super().__init__(
            package_version=odd,
            device=odd,
            caller=odd,
            uptime_seconds=math.inf,
            session_timeout_seconds=math.nan,
            token_expires_unix_seconds=1e300,
            limits=pb.CallerLimits(models=[odd], steps_per_second=math.inf),
            sessions=[session],
        )
        self.ahead_seconds = -math.inf

    def Probe(self, request: pb.ProbeRequest, context: grpc.ServicerContext) -> pb.ProbeResponse:
        answer = super().Probe(request, context)
        answer.cloud_seconds = math.nan
        return answer


def test_what_a_hostile_cloud_says_is_shown_harmlessly() -> None:
    with serving(HostileCloud()) as address, asking(address) as inquiry:
        findings, status = look_at_server(inquiry, NOW)
        measured, _ = measure(inquiry)
    assert status is not None
    said = "".join(map(text_of, [*findings, *measured]))
    assert said.count("?[2J") == 4
    assert "\x1b" not in said


def test_a_hostile_refusal_is_shown_harmlessly() -> None:
    class Refusing(ScriptedCloud):
        def Status(self, request: pb.StatusRequest, context: grpc.ServicerContext) -> pb.StatusResponse:
            context.abort(grpc.StatusCode.INTERNAL, "\x1b[2J\nall is well")

    with serving(Refusing()) as address, asking(address) as inquiry:
        (found,), _ = look_at_server(inquiry, NOW)
    assert "?[2J all is well" in found.found


def test_a_server_of_grpc_that_is_not_ours() -> None:
    with serving(ScriptedCloud()) as address, asking(address) as inquiry:
        (found,), status = look_at_server(inquiry, NOW)
    assert status is None
    assert (found.verdict, found.name) == ("failed", "server")
    assert "not an sft-cloud server" in found.found


def test_versions() -> None:
    other = found_of(ExaminedCloud(package_version="0.0.1"))["versions"]
    assert other.verdict == "warning"
    assert "0.0.1 there" in other.found
    stranger = found_of(ExaminedCloud(protocol_version=1))["versions"]
    assert stranger.verdict == "failed"
    assert "the server speaks protocol 1" in stranger.found


@pytest.mark.parametrize(
    ("ahead", "verdict", "said"),
    [(0.0, "ok", "ours"), (3600.0, "warning", "3600.0 s ahead of"), (-40.0, "warning", "40.0 s behind")],
)
def test_clocks(ahead: float, verdict: str, said: str) -> None:
    cloud = ExaminedCloud()
    cloud.ahead_seconds = ahead
    found = found_of(cloud)["clock"]
    assert found.verdict == verdict
    assert said in found.found


@pytest.mark.parametrize(
    ("status", "says"),
    [
        ({"stopping": True}, "takes no new session"),
        ({"open_sessions": 4}, "4 of 4 sessions"),
        (
            {"limits": pb.CallerLimits(max_sessions=1), "sessions": [pb.SessionStatus(owner="anna")]},
            "we have 1 open",
        ),
    ],
    ids=["stopping", "full", "limit"],
)
def test_a_cloud_without_room(status: Dict[str, Any], says: str) -> None:
    found = found_of(ExaminedCloud(**status))["room"]
    assert found.verdict == "failed"
    assert says in found.found


def test_a_cloud_that_lacks_a_package() -> None:
    assert "features" not in found_of(ExaminedCloud())
    found = found_of(ExaminedCloud(missing_features=["lora"]))["features"]
    assert found.verdict == "warning"
    assert "lora" in found.found
    assert "operator" in str(found.advice)


def test_what_the_way_carries() -> None:
    cloud = ExaminedCloud()
    with serving(cloud) as address, asking(address) as inquiry:
        findings, way = measure(inquiry)
    assert [finding.name for finding in findings] == ["delay", "bandwidth"]
    assert way is not None
    assert 0 < way.delay_seconds < SECONDS
    assert way.up_bytes_per_second > 1e6
    assert way.down_bytes_per_second > 1e6
    assert max(cloud.probed) > 1 << 20  # a fast way gets enough to be measured


@pytest.mark.parametrize(("most_bytes", "probed"), [(MAX_PROBE_BYTES, 65536), (37_500, 37_500)])
def test_a_slow_way_is_not_filled(monkeypatch: pytest.MonkeyPatch, most_bytes: int, probed: int) -> None:
    """10 kB/s each way and 100 ms: as many bytes as say so, and no more, nor more than are allowed, as with 0.3 Mbit
    in a second."""
    sent: List[int] = []

    def probe(self: Inquiry, sent_bytes: int = 0, received_bytes: int = 0) -> object:
        sent.append(sent_bytes + received_bytes)
        return type("Probed", (), {"seconds": 0.1 + sent[-1] / 10_000, "clock_ahead_seconds": 0.0})

    monkeypatch.setattr(Inquiry, "probe", probe)
    with asking("127.0.0.1:1") as inquiry:
        _, way = measure(inquiry, most_bytes)
    assert way == pytest.approx(Way(0.1, 10_000, 10_000))
    assert sum(sent) == 2 * probed


def test_a_way_that_does_not_carry() -> None:
    cloud = ExaminedCloud()
    cloud.refuses["Probe"] = grpc.StatusCode.RESOURCE_EXHAUSTED
    with serving(cloud) as address, asking(address) as inquiry:
        (found,), way = measure(inquiry)
    assert way is None
    assert (found.verdict, found.name) == ("failed", "bandwidth")


FAST = Way(0.001, 1e9, 1e9)


def test_calls_that_reach_different_servers() -> None:
    cloud = ExaminedCloud()
    with serving(cloud) as address, asking(address) as inquiry:
        measure(inquiry)
        assert look_at_instances(inquiry) == []
        cloud.instances = ["one", "another"]
        measure(inquiry)
        (found,) = look_at_instances(inquiry)
    assert (found.verdict, found.name) == ("failed", "one server")
    assert found.found == "calls reach 3 different servers"


def test_a_stream_that_carries_and_stays() -> None:
    cloud = ExaminedCloud()
    with serving(cloud) as address, asking(address) as inquiry:
        found = look_at_stream(inquiry, Duration("200ms"), FAST)
    assert cloud.carried > 1 << 20
    assert found.verdict == "ok"
    assert found.found == "a stream that was idle for 200ms could be used again"


def test_a_slow_way_is_not_filled_by_a_stream() -> None:
    cloud = ExaminedCloud()
    with serving(cloud) as address, asking(address) as inquiry:
        assert look_at_stream(inquiry, Duration("1ms"), Way(0.1, 10_000, 10_000)).verdict == "ok"
    assert cloud.carried <= 100_000


def test_a_stream_that_something_on_the_way_cuts_after_so_many_bytes() -> None:
    cloud = ExaminedCloud()
    with serving(cloud) as address, TcpProxy(address) as proxy, asking(proxy.address) as inquiry:
        cloud.cuts_after, cloud.cuts = 1 << 20, proxy.cut
        found = look_at_stream(inquiry, Duration("20s"), FAST)
    assert (found.verdict, found.name) == ("failed", "stream")
    assert "client_max_body_size 0" in found.advice


def test_an_idle_stream_that_something_on_the_way_cuts() -> None:
    cloud = ExaminedCloud()
    with serving(cloud) as address, TcpProxy(address) as proxy, asking(proxy.address) as inquiry:
        cutter = threading.Thread(target=lambda: cloud.asked.wait(SECONDS) and inquiry.status() and proxy.cut())
        cutter.start()
        found = look_at_stream(inquiry, Duration("20s"), None)  # which would fail the test if it passed
        cutter.join(SECONDS)
    assert (found.verdict, found.name) == ("failed", "idle")
    assert "did not stay open for 20s (UNAVAILABLE" in found.found
    assert "NAT" in found.advice


def test_a_way_that_forgets_the_connection_without_a_word() -> None:
    cloud = ExaminedCloud()
    with serving(cloud) as address, TcpProxy(address) as proxy, asking(proxy.address, 1.0) as inquiry:
        inquiry.status()  # connects

        def swallow() -> None:
            cloud.asked.wait(SECONDS)
            inquiry.status()  # comes back by the same connection after the stream's answer
            proxy.up.swallow = proxy.down.swallow = True

        swallower = threading.Thread(target=swallow)
        swallower.start()
        found = look_at_stream(inquiry, Duration("300ms"), None)
        swallower.join(SECONDS)
    assert (found.verdict, found.name) == ("failed", "idle")
    assert "could not be used again" in found.found


@pytest.mark.parametrize("code", ["FAILED_PRECONDITION", "INVALID_ARGUMENT", "UNIMPLEMENTED"])
def test_a_cloud_that_knows_no_such_stream(code: str) -> None:
    cloud = ExaminedCloud()
    cloud.refuses["Train"] = grpc.StatusCode[code]
    with serving(cloud) as address, asking(address) as inquiry:
        assert look_at_stream(inquiry, Duration("10s"), FAST).verdict == "skipped"
        assert look_at_stream(inquiry, Duration("0s"), FAST).verdict == "skipped"


def test_what_the_way_takes_of_a_step() -> None:
    found = estimate(Way(0.05, 1e6, 2e6), up_bytes=100_000, down_bytes=100_000)
    assert "takes 0.200 s of each step (100 kB up and 100 kB down)" in found.found


@pytest.fixture
def examine(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs the command; gives its exit code and what it wrote."""

    def run(*arguments: str) -> Any:
        code = main(["doctor", "--idle", "0s", *arguments])
        return code, capsys.readouterr()

    return run


def test_the_command_says_that_nothing_stops_a_run(examine: Callable[..., Any]) -> None:
    with serving(ExaminedCloud()) as address:
        code, told = examine("--server", address)
    assert (code, told.err) == (0, "")
    lines = told.out.splitlines()
    assert lines[0] == "ok       address     127.0.0.1 is 127.0.0.1"
    looked_at = "address connection encryption access versions clock room delay bandwidth model step idle"
    assert [line.split()[1] for line in lines[:-1]] == looked_at.split()
    assert lines[-1] == "nothing here would stop a run"


def test_the_command_says_what_stops_a_run(examine: Callable[..., Any]) -> None:
    with serving(ExaminedCloud(stopping=True, open_sessions=4)) as address:
        code, told = examine("--server", address)
    assert code == 5
    assert told.out.splitlines()[-1] == "a run would stop: room"
    assert "           -> wait until it is back" in told.out


def test_what_stands_on_what_fails_is_not_looked_at(examine: Callable[..., Any]) -> None:
    with serving(ExaminedCloud(protocol_version=1)) as address:
        code, told = examine("--server", address, "--json")
    report = json.loads(told.out)
    assert (code, report["passed"]) == (5, False)
    assert {finding["name"] for finding in report["findings"]}.isdisjoint({"bandwidth", "model", "idle"})
    (failed,) = [finding for finding in report["findings"] if finding["verdict"] == "failed"]
    assert failed["name"] == "versions"
    assert "install the same release" in failed["advice"]


def test_a_server_must_be_named(examine: Callable[..., Any]) -> None:
    code, told = examine()
    assert code == 2
    assert "--server HOST:PORT must be given" in told.err
