"""A TCP proxy for tests: counts bytes, delays them, cuts the connection, or swallows everything."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from types import TracebackType
from typing import Callable, List, Optional, Type

_TIMEOUT_SECONDS = 20.0


class Direction:
    """One way through the proxy; its settings may be changed at any time."""

    def __init__(self) -> None:
        self.forwarded = 0
        """TCP payload bytes passed on so far, over all connections."""
        self.delay_seconds = 0.0
        """How much later each piece of at most 64 KiB is passed on."""
        self.cut_after: Optional[int] = None
        """After so many bytes in all every connection is cut."""
        self.swallow = False
        """Bytes are read and thrown away, as when a cable is pulled."""


class TcpProxy:
    """Listens on a free loopback port and passes bytes on to `target`, "HOST:PORT". A context manager."""

    def __init__(self, target: str) -> None:
        host, port = target.rsplit(":", 1)
        self.up, self.down = Direction(), Direction()  # towards the target, and back
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets: List[socket.socket] = []
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Returns as soon as `condition` holds; it is asked whenever bytes passed."""
        with self._changed:
            assert self._changed.wait_for(condition, _TIMEOUT_SECONDS), "what was waited for did not happen"

    def cut(self) -> None:
        """Cuts every connection."""
        with self._changed:
            sockets, self._sockets = self._sockets, []
        for each in sockets:
            with suppress(OSError):  # the other end was faster
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def __enter__(self) -> TcpProxy:
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], traceback: Optional[TracebackType]
    ) -> None:
        self._closed.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join(_TIMEOUT_SECONDS)
        self.cut()
        for thread in self._threads:
            thread.join(_TIMEOUT_SECONDS)
            assert not thread.is_alive()

    def _accept(self) -> None:
        while True:
            try:
                edge, _ = self._listener.accept()
            except OSError:
                return
            try:
                cloud = socket.create_connection(self._target, _TIMEOUT_SECONDS)
            except OSError:
                edge.close()
                continue
            cloud.settimeout(None)
            with self._changed:
                self._sockets += [edge, cloud]
            for source, sink, direction in ((edge, cloud, self.up), (cloud, edge, self.down)):
                with suppress(OSError):  # cut already
                    source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                thread = threading.Thread(target=self._pump, args=(source, sink, direction), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket, direction: Direction) -> None:
        try:
            while True:
                data = source.recv(65536)
                if not data:
                    sink.shutdown(socket.SHUT_WR)
                    return
                if direction.swallow:
                    continue
                if direction.delay_seconds:
                    self._closed.wait(direction.delay_seconds)
                if direction.cut_after is not None:
                    data = data[: max(0, direction.cut_after - direction.forwarded)]
                with self._changed:  # before they are sent: whoever has an answer finds its bytes counted
                    direction.forwarded += len(data)
                    self._changed.notify_all()
                sink.sendall(data)
                if direction.cut_after is not None and direction.forwarded >= direction.cut_after:
                    self.cut()
        except OSError:
            return  # cut, by us or by an end
