"""Health checks, which strangers may ask for."""

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.callers import Never
from support.calls import SECONDS, refusal

from sft.wire.protocol import SERVICE
from sft_cloud.service import health

CHECK = "/grpc.health.v1.Health/Check"
SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.fixture
def channel(server):
    with grpc.insecure_channel(server.address) as made:
        yield made


@pytest.mark.parametrize("name", ["", SERVICE])
def test_what_is_here_serves(channel, name):
    request = health_pb2.HealthCheckRequest(service=name)
    assert health_pb2_grpc.HealthStub(channel).Check(request, timeout=SECONDS).status == SERVING


@pytest.mark.parametrize("name", ["other", SERVICE + "x", "sft", "x" * 10_000])
def test_what_is_not_here_is_not_found(channel, name):
    request = health_pb2.HealthCheckRequest(service=name)
    code, details = refusal(lambda: health_pb2_grpc.HealthStub(channel).Check(request, timeout=SECONDS))
    assert (code, details) == (grpc.StatusCode.NOT_FOUND, "there is no such service on this server")


def test_garbage_is_no_request(channel):
    code, _ = refusal(lambda: channel.unary_unary(CHECK)(b"\xff\xff", timeout=SECONDS))
    assert code is grpc.StatusCode.INVALID_ARGUMENT


def test_who_sends_nothing_is_answered_soon_and_keeps_nobody_waiting(channel, monkeypatch):
    monkeypatch.setattr(health, "READ_SECONDS", 0.2)
    silent = [Never() for _ in range(3 * health.READERS)]
    calls = [channel.stream_unary(CHECK).future(one, timeout=SECONDS) for one in silent]
    assert {health_pb2.HealthCheckResponse.FromString(call.result(SECONDS)).status for call in calls} == {SERVING}
    for one in silent:
        one.let_go()
    test_what_is_not_here_is_not_found(channel, "other")  # the readers are free again
