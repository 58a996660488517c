"""The connections of this process that came in on one port, as the operating system knows them. Only on Linux.

gRPC lets nobody decide who may hold a connection, so the server looks at its own open files. Looking touches nothing.
What is ended is shut down through a copy of the file that was seen to be the same connection: gRPC may close the file
at any moment, and another may get its number.
"""

from __future__ import annotations

import os
import socket
import stat
from contextlib import closing, suppress
from typing import NamedTuple
from urllib.parse import unquote

_OPEN_FILES = "/proc/self/fd"
_MAPPED = "::ffff:"
"""How an IPv4 address is written where a socket takes both kinds."""

Peer = tuple[str, int]
"""Address and port of the other end."""


class Connection(NamedTuple):
    """One that came in."""

    number: int
    """Of the operating system's, which no other connection has."""
    file: int
    peer: Peer


def are_known() -> bool:
    """Whether the system tells a process its own open files, as Linux does."""
    return bool(_listed(_OPEN_FILES))


class Incoming:
    """Connections to one port of this process. Not for several threads at once."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._known: dict[int, Connection | None] = {}  # None: not one of them

    def all(self) -> list[Connection]:
        """Those that are open now; none where the system does not say."""
        known: dict[int, Connection | None] = {}
        for name in _listed(_OPEN_FILES):
            with suppress(OSError):  # closed meanwhile
                file = int(name)
                number = _number(file)
                if number is not None:
                    seen = self._known.get(number)
                    known[number] = seen if number in self._known else self._seen(file, number)
        self._known = known
        return [connection for connection in known.values() if connection is not None]

    def _seen(self, file: int, number: int) -> Connection | None:
        one = socket.socket(fileno=file)
        try:
            if one.family not in (socket.AF_INET, socket.AF_INET6) or one.type != socket.SOCK_STREAM:
                return None
            if one.getsockname()[1] != self._port:
                return None
            address, port = one.getpeername()[:2]
        except OSError:  # it listens, or the other end has gone
            return None
        finally:
            one.detach()
        return Connection(number, file, (_tidied(address), port))


def end(connection: Connection) -> bool:
    """Whether it was there to be ended. Whoever reads from it finds its end."""
    try:
        copy = os.dup(connection.file)
    except OSError:
        return False
    if _number(copy) != connection.number:
        os.close(copy)
        return False
    with closing(socket.socket(fileno=copy)) as one, suppress(OSError):  # ended by the other side
        one.shutdown(socket.SHUT_RDWR)
    return True


def peer_of(text: str) -> Peer | None:
    """From how gRPC writes it, such as `ipv4:192.0.2.1:50000` or `ipv6:%5B::1%5D:50000`; None for others."""
    kind, _, rest = unquote(text).partition(":")
    address, _, port = rest.rpartition(":")
    if kind not in ("ipv4", "ipv6") or not port.isdigit():
        return None
    return _tidied(address.strip("[]")), int(port)


def _number(file: int) -> int | None:
    status = os.fstat(file)
    return status.st_ino if stat.S_ISSOCK(status.st_mode) else None


def _listed(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def _tidied(address: str) -> str:
    address = address.partition("%")[0]
    return address[len(_MAPPED) :] if address.startswith(_MAPPED) and "." in address else address
