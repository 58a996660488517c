"""Who may hold a connection: strangers not for long, and not so many that callers find no room.

A stranger is a connection on which no caller was let in yet. It has the time of a handshake for that, and a few refused
calls. Where there are too many, those of the address that has the most go first, the oldest before the others: a caller
who comes now is let in before it is old, also from behind an address that it shares with strangers. Whoever was let in
keeps its connection while a call runs, and afterwards while there is room.
"""

from __future__ import annotations

import ipaddress
import logging
import resource
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

from sft_cloud.admission.sockets import Connection, Incoming, Peer, are_known, end, peer_of

STRANGER_SECONDS = 20.0
"""How long a connection may go without a caller: gRPC gives a handshake as long."""

MAX_REFUSED = 4
"""Calls without a known caller on a connection that has never had one."""

LOOK_SECONDS = 0.5
_HURRY_SECONDS = 0.05

_WANTED_FILES = 1 << 16

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Room:
    """For connections."""

    most: int
    """That gRPC is to take; the guard keeps so far below that all who come between two looks find room."""

    held: int
    """That may stay: idle ones of callers go when there are more."""

    strangers: int
    """Among them. Few, as each may have calls under way that are refused before a caller's turn comes."""


def room(files: int) -> Room:
    """Of a process that may have so many files open."""
    most = min(16_384, files * 3 // 4)
    return Room(most, most // 4, min(512, most // 8))


def open_files_limit() -> int:
    """How many files this process may have open; raised as far as the system lets it, and as is of use."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED_FILES if hard == resource.RLIM_INFINITY else min(hard, _WANTED_FILES)
    if soft == resource.RLIM_INFINITY:
        return _WANTED_FILES
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(soft, wanted)


@dataclass
class _Caller:
    name: str
    running: int = 0
    since: float = 0.0
    """The last call began or ended."""
    is_alone: bool = True
    """Nobody else was let in on the connection, as where a proxy has one for all."""


class ConnectionGuard:
    """Knows who was let in, and ends connections of others. Safe to use from several threads, but for `look`."""

    def __init__(self, room: Room, clock: Callable[[], float] = time.monotonic) -> None:
        self.room = room
        self.held = 0
        """Connections at the last look."""
        self.ended = 0
        """Connections of strangers that were."""
        self._clock = clock
        self._incoming: Incoming | None = None
        self._lock = threading.Lock()
        self._callers: dict[Peer, _Caller] = {}
        self._refused: Counter[Peer] = Counter()
        self._hung_up: set[Peer] = set()
        self._came: dict[int, float] = {}
        self._seen: dict[Peer, Connection] = {}
        self._hurry = threading.Event()

    def watch(self, port: int) -> None:
        """From now on `look` looks at the connections to this port."""
        self._incoming = Incoming(port)
        if not are_known():
            _log.warning(
                "strangers may hold connections as long as they like: this system does not show them to the server "
                "as Linux does; let a firewall, or a proxy, limit connections"
            )

    def admitted(self, peer: str, name: str) -> Callable[[], None]:
        """A call of a known caller begins on a connection; what is returned ends it."""
        at = peer_of(peer)
        if at is None:
            return lambda: None
        with self._lock:
            caller = self._callers.setdefault(at, _Caller(name))
            caller.is_alone &= caller.name == name
            caller.running += 1
            caller.since = self._clock()
            self._refused.pop(at, None)

        def over() -> None:
            with self._lock:
                caller.running -= 1
                caller.since = self._clock()

        return over

    def refused(self, peer: str) -> None:
        """A call of a stranger was refused on a connection."""
        at = peer_of(peer)
        with self._lock:
            if at is None or at in self._callers:
                return
            self._refused[at] += 1
            if self._refused[at] <= MAX_REFUSED:
                return
            seen = self._seen.get(at)
            if seen is None:  # it has come since the last look
                self.hurry()
            else:
                self.ended += end(seen)

    def hang_up(self, peer: str, who: Hashable) -> None:
        """On a caller who asks far more often than it may, whatever else it has running there; not where others have
        something running on the same connection."""
        at = peer_of(peer)
        with self._lock:
            caller = self._callers.get(at) if at is not None else None
            if at is None or (caller is not None and not (caller.is_alone and caller.name == who)):
                return
            seen = self._seen.get(at)
            if seen is None:  # it has come since the last look
                self._hung_up.add(at)
                self.hurry()
            else:
                end(seen)

    def run(self, stop: threading.Event) -> None:
        """Looks again and again until `stop`, which is noticed after `hurry`, in a thread of the caller's."""
        while not stop.wait(_HURRY_SECONDS):
            self._hurry.wait(LOOK_SECONDS - _HURRY_SECONDS)
            self._hurry.clear()
            if stop.is_set():
                return
            try:
                self.look()
            except Exception:
                _log.exception("connections could not be looked at; it is tried again")

    def hurry(self) -> None:
        """The next look is due."""
        self._hurry.set()

    def look(self) -> None:
        """Ends what has been held for too long, and what is too much."""
        if self._incoming is None:
            return
        now = self._clock()
        with self._lock:  # first, or who has just come would not be found
            hung_up, self._hung_up = self._hung_up, set()
        connections = self._incoming.all()
        self._came = {one.number: self._came.get(one.number, now) for one in connections}
        self._seen = {one.peer: one for one in connections}
        with self._lock:
            callers = dict(self._callers)
            refused = dict(self._refused)
        for one in connections:
            if one.peer in hung_up:
                end(one)
        strangers = [one for one in connections if one.peer not in callers]
        overdue = {
            one
            for one in strangers
            if now - self._came[one.number] >= STRANGER_SECONDS or refused.get(one.peer, 0) > MAX_REFUSED
        }
        left = [one for one in strangers if one not in overdue]
        overdue.update(
            _too_many(
                left,
                len(left) - self.room.strangers,
                lambda one: network(one.peer[0]),
                lambda one: self._came[one.number],
            )
        )
        idle = [one for one in connections if one.peer in callers and not callers[one.peer].running]
        spare = len(connections) - len(overdue) - self.room.held
        overdue.update(_too_many(idle, spare, lambda one: callers[one.peer].name, lambda one: callers[one.peer].since))
        ended = sum(self._end(one) for one in overdue)
        self.held = len(connections) - ended
        self._forget(connections, now)

    def _end(self, connection: Connection) -> bool:
        with self._lock:  # nobody is let in meanwhile
            caller = self._callers.get(connection.peer)
            if caller is not None and caller.running:
                return False
            is_ended = end(connection)
            self.ended += is_ended and caller is None
        return is_ended

    def _forget(self, connections: list[Connection], before: float) -> None:
        """Whoever has gone."""
        here = {one.peer for one in connections}
        with self._lock:
            gone = [
                peer
                for peer, caller in self._callers.items()
                if peer not in here and not caller.running and caller.since < before
            ]
            for peer in gone:
                del self._callers[peer]
            for peer in [peer for peer in self._refused if peer not in here]:
                del self._refused[peer]


def _too_many(
    connections: Iterable[Connection],
    too_many: int,
    whose: Callable[[Connection], str],
    since: Callable[[Connection], float],
) -> list[Connection]:
    """So many of them: of whoever has the most, the oldest first."""
    if too_many <= 0:
        return []
    seen: Counter[str] = Counter()
    ranked = []
    for one in sorted(connections, key=since, reverse=True):
        seen[whose(one)] += 1
        ranked.append((seen[whose(one)], -since(one), one))
    return [one for *_, one in sorted(ranked)[-too_many:]]


def network(address: str) -> str:
    """Whose it counts as: an IPv6 address is one of many of its owner's."""
    return str(ipaddress.ip_network(f"{address}/64", strict=False)) if ":" in address else address
