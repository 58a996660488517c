"""A link that breaks is mended: over real gRPC, with a proxy that cuts and swallows, and without waiting."""

from __future__ import annotations

import hashlib
import socket
import threading
from contextlib import ExitStack, contextmanager
from typing import Any, Iterator, List, Optional, Tuple

import grpc
import pytest
from support.proxy import TcpProxy
from support.scripted_cloud import TIMEOUT_SECONDS, WEIGHTS, ScriptedCloud, serving
from support.waits import ACTIVATION, LABELS, Waits, losses

from sft.errors import AccessError, ServerUnavailableError, SessionLostError, StreamBrokenError
from sft.v1 import split_training_pb2 as pb
from sft_edge.link.grpc_transport import GrpcTransport
from sft_edge.link.link import Blob, Link
from sft_edge.link.retries import RetryPolicy


@pytest.fixture
def cloud() -> ScriptedCloud:
    return ScriptedCloud()


@pytest.fixture
def waits() -> Waits:
    return Waits()


@contextmanager
def through_proxy(cloud: ScriptedCloud, waits: Waits, **values: Any) -> Iterator[Tuple[TcpProxy, Link]]:
    with serving(cloud) as address, TcpProxy(address) as proxy:
        transport = GrpcTransport(proxy.address, connect_timeout_seconds=2.0, stall_timeout_seconds=2.0)
        with Link(transport, pb.OpenSessionRequest(), {}, waits.policy(**values), waits.said.append) as link:
            link.open()
            yield proxy, link


def numbers(cloud: ScriptedCloud) -> List[int]:
    """Of the messages that came."""
    return [message.number for message in cloud.received if message.number]


def test_a_connection_that_is_cut(cloud: ScriptedCloud, waits: Waits) -> None:
    with through_proxy(cloud, waits) as (proxy, link):
        assert losses(link, range(2)) == [0, 0, 1, 1]
        proxy.cut()
        assert losses(link, range(2, 4)) == [2, 2, 3, 3]
        assert link.counts.reconnects == 1
    assert sorted(set(numbers(cloud))) == list(range(1, 9))
    assert waits.delays == [0.5]
    broke, mended = waits.said
    assert broke.startswith(f"the link to {proxy.address} broke (UNAVAILABLE")
    assert broke.endswith("; try 1 in 500ms")
    assert mended == "", "it is over"


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("after", [100, 1_000, 2_500])
def test_a_connection_that_is_cut_somewhere(cloud: ScriptedCloud, waits: Waits, direction: str, after: int) -> None:
    with through_proxy(cloud, waits) as (proxy, link):
        way = getattr(proxy, direction)
        cut = way.cut_after = way.forwarded + after
        waits.meanwhile = lambda: setattr(way, "cut_after", None)
        steps = range(20)
        assert losses(link, steps) == [step for step in steps for _ in range(2)]
        assert way.forwarded > cut, "more than that was needed"
        assert link.counts.reconnects == 1


def test_a_link_that_swallows_everything(cloud: ScriptedCloud, waits: Waits) -> None:
    """As when a cable is pulled: nobody says anything. The reply time-out finds out, keepalive would, too."""
    with through_proxy(cloud, waits, reply_timeout_seconds=0.2) as (proxy, link):
        assert losses(link, range(1)) == [0, 0]
        proxy.up.swallow = True
        waits.meanwhile = lambda: setattr(proxy.up, "swallow", False)
        assert losses(link, range(1, 3)) == [1, 1, 2, 2]
        assert link.counts.reconnects >= 1
    assert waits.said[0] == "the cloud did not answer within 0.2 s; try 1 in 500ms"


def test_what_the_cloud_has_had_is_not_sent_again(cloud: ScriptedCloud, waits: Waits) -> None:
    with through_proxy(cloud, waits) as (proxy, link):
        losses(link, range(1))
        proxy.down.swallow = True
        pending = link.forward(1, 0, ACTIVATION, LABELS, 1)
        proxy.wait_until(lambda: len(numbers(cloud)) == 3)
        waits.meanwhile = lambda: setattr(proxy.down, "swallow", False)
        proxy.cut()
        assert pending.result().message.result.loss == 1
        assert link.counts.sent_again == 0
    assert numbers(cloud) == [1, 2, 3]


def test_each_try_waits_longer_until_the_time_is_over(cloud: ScriptedCloud, waits: Waits) -> None:
    with ExitStack() as server:
        address = server.enter_context(serving(cloud))
        policy = waits.policy(reconnect_timeout_seconds=100.0, backoff_max_seconds=30.0)
        with Link(GrpcTransport(address), pb.OpenSessionRequest(), {}, policy, waits.said.append) as link:
            link.open()
            losses(link, range(1))
            server.close()
            with pytest.raises(SessionLostError, match=r"broke .*; 9 tries in 1m40s did not help$") as caught:
                losses(link, range(1, 2))
            with pytest.raises(SessionLostError) as again:
                link.check()
            assert again.value is caught.value
    assert waits.delays == [0.5, 1, 2, 4, 8, 16, 30, 30, 8.5], "the last is what was left"
    assert waits.said[-1].endswith("try 9 in 8s500ms")


def test_pauses_are_drawn_so_that_edges_do_not_come_back_all_at_once() -> None:
    asked: List[Tuple[float, float]] = []
    policy = RetryPolicy(
        backoff_seconds=1.0, backoff_max_seconds=3.0, uniform=lambda low, high: asked.append((low, high)) or low
    )
    delays = policy.delays()
    assert [next(delays) for _ in range(4)] == [0.5, 1.0, 1.5, 1.5]
    assert asked == [(0.5, 1.0), (1.0, 2.0), (1.5, 3.0), (1.5, 3.0)]
    drawn = {next(RetryPolicy().delays()) for _ in range(10)}
    assert len(drawn) == 10
    assert all(0.25 <= delay <= 0.5 for delay in drawn)


def test_success_begins_the_count_anew(cloud: ScriptedCloud, waits: Waits) -> None:
    with through_proxy(cloud, waits, reconnect_timeout_seconds=1.0) as (proxy, link):
        for step in range(5):  # 2.5 s of waiting in all
            losses(link, range(step, step + 1))
            proxy.cut()
        losses(link, range(5, 6))
    assert waits.delays == [0.5] * 5


@pytest.mark.parametrize(
    ("code", "expected"),
    [(grpc.StatusCode.NOT_FOUND, SessionLostError), (grpc.StatusCode.UNAUTHENTICATED, AccessError)],
)
def test_a_session_that_is_gone_is_not_tried_for(
    cloud: ScriptedCloud, waits: Waits, code: grpc.StatusCode, expected: type
) -> None:
    with through_proxy(cloud, waits) as (proxy, link):
        losses(link, range(1))

        def gone(message: pb.EdgeMessage, context: grpc.ServicerContext) -> None:
            if message.HasField("attach"):
                context.abort(code, "the sentence of the server")

        cloud.before_answer = gone
        proxy.cut()
        with pytest.raises(expected, match="the sentence of the server"):
            losses(link, range(1, 2))
    assert len(waits.delays) == 1


@pytest.mark.parametrize("end", ["close", "abandon"])
def test_whoever_closes_a_broken_link_does_not_wait(cloud: ScriptedCloud, end: str) -> None:
    with serving(cloud) as address, TcpProxy(address) as proxy:
        broke = threading.Event()
        policy = RetryPolicy(backoff_seconds=1000.0, backoff_max_seconds=1000.0)
        link = Link(
            GrpcTransport(proxy.address), pb.OpenSessionRequest(), {}, policy, lambda text: text and broke.set()
        )
        link.open()
        losses(link, range(1))
        reader = next(thread for thread in threading.enumerate() if thread.name == "sft-link-reader")
        proxy.cut()
        assert broke.wait(TIMEOUT_SECONDS)
        getattr(link, end)()
        reader.join(TIMEOUT_SECONDS)
        assert not reader.is_alive()
        with pytest.raises(SessionLostError, match="closed"):
            link.forward(5, 0, ACTIVATION, LABELS, 1)
        link.close()


def test_a_download_goes_on_where_it_broke_off(cloud: ScriptedCloud, waits: Waits) -> None:
    chunks = iter([None, grpc.StatusCode.UNAVAILABLE, None])

    def breaks_once(context: grpc.ServicerContext) -> None:
        code: Optional[grpc.StatusCode] = next(chunks)
        if code is not None:
            context.abort(code, "for a moment")

    cloud.before_chunk = breaks_once
    with through_proxy(cloud, waits) as (_, link):
        assert list(link.weights()) == WEIGHTS
    assert next(chunks, "all used") == "all used"
    assert len(waits.delays) == 1


def test_an_upload_that_breaks_begins_again(cloud: ScriptedCloud, waits: Waits) -> None:
    content = b"the weights" * 10_000
    sha256 = hashlib.sha256(content).hexdigest()
    cloud.wanted = [sha256]
    with serving(cloud) as address, TcpProxy(address) as proxy:
        reads = []

        def chunks() -> Iterator[bytes]:
            reads.append(None)
            if len(reads) == 1:
                yield content[:100]
                proxy.cut()
            yield content[100 if len(reads) == 1 else 0 :]

        transport = GrpcTransport(proxy.address)
        blobs = {sha256: Blob(len(content), chunks)}
        with Link(transport, pb.OpenSessionRequest(), blobs, waits.policy(), waits.said.append) as link:
            assert link.open().session_id == "s1"
    assert len(reads) == 2
    assert cloud.blobs == {sha256: content}
    assert len({request.request_id for request in cloud.requests}) == 1, "one session, however often it is asked for"


def test_who_is_patient_waits_for_a_server_to_come(cloud: ScriptedCloud, waits: Waits) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        with pytest.raises(ServerUnavailableError), Link(GrpcTransport(address), pb.OpenSessionRequest(), {}) as link:
            link.open()
        policy = waits.policy(wait_seconds=10.0)
        link = Link(GrpcTransport(address), pb.OpenSessionRequest(), {}, policy, waits.said.append)
        with pytest.raises(ServerUnavailableError, match="5 tries in 10s did not help"), link:
            link.open()
    assert waits.delays == [0.5, 1, 2, 4, 2.5]
    (said,) = waits.said
    assert said.endswith("; waiting for it for up to 10s")


def test_who_waits_gets_the_place_that_becomes_free(cloud: ScriptedCloud, waits: Waits) -> None:
    cloud.open_error = (grpc.StatusCode.RESOURCE_EXHAUSTED, "all in use")
    waits.meanwhile = lambda: len(waits.delays) == 3 and setattr(cloud, "open_error", None)
    with through_proxy(cloud, waits, wait_seconds=60.0) as (_, link):
        assert losses(link, range(1)) == [0, 0]
    assert waits.delays == [0.5, 1, 2]
    assert [bool(text) for text in waits.said] == [True, False], "once what is waited for, and that it is over"


def test_an_idle_link_may_break_again_and_again(cloud: ScriptedCloud, waits: Waits) -> None:
    """Each break counts for itself, although no answer comes in between."""
    mended = threading.Semaphore(0)
    policy = waits.policy(reconnect_timeout_seconds=1.0)
    with serving(cloud) as address, TcpProxy(address) as proxy, Link(
        GrpcTransport(proxy.address), pb.OpenSessionRequest(), {}, policy, lambda text: text or mended.release()
    ) as link:
        link.open()
        losses(link, range(1))
        link.flush()
        for _ in range(4):
            proxy.cut()
            assert mended.acquire(timeout=TIMEOUT_SECONDS)
        assert losses(link, range(1, 2)) == [1, 1]
    assert waits.delays == [0.5] * 4


def test_a_terminal_that_has_gone_is_no_reason_to_lose_a_session(cloud: ScriptedCloud, waits: Waits) -> None:
    def gone(text: str) -> None:
        waits.said.append(text)
        raise OSError("no terminal")

    policy = waits.policy()
    with serving(cloud) as address, TcpProxy(address) as proxy, Link(
        GrpcTransport(proxy.address), pb.OpenSessionRequest(), {}, policy, gone
    ) as link:
        link.open()
        losses(link, range(1))
        proxy.cut()
        assert losses(link, range(1, 2)) == [1, 1]
    assert len(waits.said) == 2


def test_who_is_in_a_hurry_gives_a_broken_link_up(cloud: ScriptedCloud) -> None:
    with serving(cloud) as address, TcpProxy(address) as proxy:
        broke = threading.Event()
        policy = RetryPolicy(backoff_seconds=1000.0, backoff_max_seconds=1000.0)
        with Link(GrpcTransport(proxy.address), pb.OpenSessionRequest(), {}, policy, lambda _: broke.set()) as link:
            link.open()
            losses(link, range(1))
            proxy.cut()
            assert broke.wait(TIMEOUT_SECONDS)
            link.hurry()
            with pytest.raises(SessionLostError):
                link.flush()


def test_another_thread_may_make_a_call_while_the_way_is_renewed(cloud: ScriptedCloud) -> None:
    with serving(cloud) as address:
        transport = GrpcTransport(address)
        before = transport._stub
        transport.renew()
        assert transport._stub is not before
        transport._stub = before
        with pytest.raises(StreamBrokenError):
            list(transport.download("s1"))
        transport.close()


def test_a_server_that_takes_a_connection_and_says_nothing(cloud: ScriptedCloud, waits: Waits) -> None:
    def silent(message: pb.EdgeMessage, context: grpc.ServicerContext) -> None:
        if message.HasField("attach") and not waits.delays:
            cloud.released.wait(TIMEOUT_SECONDS)

    cloud.before_answer = silent
    with through_proxy(cloud, waits, attach_timeout_seconds=0.2) as (_, link):
        assert losses(link, range(2)) == [0, 0, 1, 1]
        cloud.released.set()
    assert waits.said == ["the cloud took the connection, and said nothing for 0.2 s; try 1 in 500ms", ""]
