"""Who may hold a connection: real ones, looked at by a clock that stands until it is moved."""

import os
import socket
import time

import pytest

from sft.v1 import split_training_pb2 as pb
from sft_cloud.admission.connections import MAX_REFUSED, STRANGER_SECONDS, ConnectionGuard, Room
from sft_cloud.admission.sockets import Connection, Incoming, end, peer_of

SECONDS = 10.0


class Port:
    """Connections to a port of this process, from an address of this machine."""

    def __init__(self, host="127.0.0.1"):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family)
        self._ends = []
        self.number = self._listener.getsockname()[1]

    def come(self, source="127.0.0.1"):
        host = self._listener.getsockname()[0]
        near = socket.create_connection((host, self.number), SECONDS, (source, 0) if ":" not in host else None)
        self._ends += [near, self._listener.accept()[0]]
        return near

    def close(self):
        for one in [*self._ends, self._listener]:
            one.close()


@pytest.fixture
def port():
    port = Port()
    yield port
    port.close()


@pytest.fixture
def now():
    return [100.0]


@pytest.fixture
def guard(port, now):
    guard = ConnectionGuard(Room(100, 6, 4), lambda: now[0])
    guard.watch(port.number)
    return guard


def called(near):
    """As gRPC writes who is at the other end."""
    return "ipv4:{}:{}".format(*near.getsockname())


def is_open(near):
    near.setblocking(False)
    try:
        return near.recv(1) != b""
    except BlockingIOError:
        return True


def test_a_stranger_has_the_time_of_a_handshake(guard, port, now):
    stranger = port.come()
    guard.look()
    now[0] += STRANGER_SECONDS - 0.1
    guard.look()
    assert is_open(stranger)
    assert guard.held == 1
    now[0] += 0.2
    guard.look()
    assert not is_open(stranger)
    assert (guard.held, guard.ended) == (0, 1)


def test_who_was_let_in_stays(guard, port, now):
    running, idle, stranger = port.come(), port.come(), port.come()
    guard.admitted(called(running), "alice")
    guard.admitted(called(idle), "alice")()
    for _ in range(3):
        guard.look()
        now[0] += STRANGER_SECONDS
    assert [is_open(one) for one in (running, idle, stranger)] == [True, True, False]


def test_a_few_refused_calls_are_all_that_a_stranger_gets(guard, port):
    stranger, caller = port.come(), port.come()
    guard.admitted(called(caller), "alice")
    guard.look()
    for _ in range(MAX_REFUSED):
        guard.refused(called(stranger))
        guard.refused(called(caller))
    assert is_open(stranger)
    guard.refused(called(stranger))
    guard.refused(called(caller))
    assert [is_open(one) for one in (stranger, caller)] == [False, True]


def test_nobody_hangs_up_on_a_proxy_for_one_of_those_behind_it(guard, port):
    own, proxy, mine = port.come(), port.come(), port.come()
    for near, name in [(own, "alice"), (proxy, "alice"), (proxy, "bob"), (mine, "bob")]:
        guard.admitted(called(near), name)
    guard.look()
    for near in (own, proxy):
        guard.hang_up(called(near), "alice")
    guard.hang_up(called(mine), ("127.0.0.1",))  # for a stranger's health checks
    assert [is_open(one) for one in (own, proxy, mine)] == [False, True, True]


def test_who_is_refused_before_anybody_has_looked_is_ended_at_the_next_look(guard, port):
    stranger = port.come()
    for _ in range(MAX_REFUSED + 1):
        guard.refused(called(stranger))
    guard.look()
    assert not is_open(stranger)


def test_of_too_many_strangers_those_of_the_address_with_the_most_go_the_oldest_first(guard, port, now):
    many = []
    for _ in range(5):
        many.append(port.come("127.0.0.2"))
        guard.look()
        now[0] += 0.1
    few = [port.come("127.0.0.3")]
    guard.look()
    assert [is_open(one) for one in many] == [False, False, True, True, True]
    assert is_open(few[0])


def test_idle_callers_go_when_there_is_no_room_and_never_who_has_a_call_running(guard, port, now):
    running = [port.come() for _ in range(5)]
    for one in running:
        guard.admitted(called(one), "alice")
    idle = []
    for _ in range(3):
        idle.append(port.come())
        guard.admitted(called(idle[-1]), "bob")()
        now[0] += 0.1
    guard.look()
    assert [is_open(one) for one in running] == [True] * 5
    assert [is_open(one) for one in idle] == [False, False, True]


def test_a_file_that_has_become_another_is_left_alone(port):
    one = port.come()
    seen = Incoming(port.number).all()[0]
    other = os.open(os.devnull, os.O_RDONLY)
    try:
        assert not end(Connection(seen.number, other, seen.peer))
        assert not end(Connection(seen.number + 1, seen.file, seen.peer))
        assert is_open(one)
        assert end(seen)
        assert not is_open(one)
    finally:
        os.close(other)


def test_only_what_came_in_on_the_port_is_seen(port):
    other = Port()
    one, _ = port.come(), other.come()
    try:
        assert [seen.peer for seen in Incoming(port.number).all()] == [one.getsockname()]
    finally:
        other.close()


@pytest.mark.parametrize(
    ("text", "peer"),
    [
        ("ipv4:192.0.2.1:50000", ("192.0.2.1", 50000)),
        ("ipv6:%5B2001:db8::1%5D:50000", ("2001:db8::1", 50000)),
        ("ipv6:[::ffff:192.0.2.1]:50000", ("192.0.2.1", 50000)),
        ("unix:/tmp/socket", None),
        ("", None),
    ],
)
def test_as_grpc_writes_a_peer(text, peer):
    assert peer_of(text) == peer


def test_a_server_knows_its_callers_connections_from_those_of_strangers(server, stub):
    stub.Status(pb.StatusRequest(), timeout=SECONDS)
    with socket.create_connection(("127.0.0.1", server.port), SECONDS) as stranger:
        assert stranger.recv(1)  # gRPC's settings: it has the connection
        server.connections.look()
        assert server.connections.held == 2
        server.connections._clock = lambda: time.monotonic() + STRANGER_SECONDS
        server.connections.look()
        while stranger.recv(4096):
            pass
    assert (server.connections.held, server.connections.ended) == (1, 1)


def test_a_system_that_shows_no_connections_is_told_of(guard, port, monkeypatch, caplog):
    guard.watch(port.number)
    assert not caplog.records
    monkeypatch.setattr("sft_cloud.admission.sockets._OPEN_FILES", "/proc/of/nobody")
    guard.watch(port.number)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    guard.look()  # and finds nobody
    assert guard.held == 0
