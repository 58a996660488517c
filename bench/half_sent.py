"""Most of a message, and then nothing: HTTP/2 spoken by hand, as no library of gRPC's sends half of one."""

from __future__ import annotations

import socket
import ssl
import time

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _GOAWAY, _WINDOW = 0, 1, 3, 4, 6, 7, 8
_ACK = 1
_PART = 16384
"""Bytes of a frame that every server takes."""


class HalfSent:
    """One call of `method`, on a connection of its own."""

    def __init__(self, address: str, method: str, token: str | None, tls: ssl.SSLContext | None = None) -> None:
        """Begins the call."""
        host, port = address.rsplit(":", 1)
        self._socket = socket.create_connection((host, int(port)), 30)
        if tls is not None:
            self._socket = tls.wrap_socket(self._socket, server_hostname="localhost")
        self._windows = {0: 65535, 1: 65535}
        self._received = b""
        self.ended = ""
        """Why the call has ended, as far as a look at frames tells."""
        self._socket.sendall(preface())
        block = headers(method, host, token, tls is not None)
        self._socket.sendall(frame(_HEADERS, 1, block, flags=4))

    def message(self, content: bytes, seconds: float = 30.0) -> int:
        """A whole one; how much of it was taken within that time."""
        self.begin(len(content))
        return self.send(content, seconds)

    def begin(self, size: int) -> None:
        """Says that a message of so many bytes comes."""
        self.send(b"\0" + size.to_bytes(4, "big"))

    def send(self, content: bytes, seconds: float = 30.0) -> int:
        """As much of it as the server takes within that time; how much it was."""
        sent, deadline = 0, time.monotonic() + seconds
        while sent < len(content) and not self.ended and time.monotonic() < deadline:
            room = min(_PART, len(content) - sent, *self._windows.values())
            if room <= 0:
                self.look(1.0)
                continue
            try:
                self._socket.settimeout(seconds)
                self._socket.sendall(frame(_DATA, 1, content[sent : sent + room]))
            except OSError as error:
                self.ended = type(error).__name__
                break
            sent += room
            for stream in self._windows:
                self._windows[stream] -= room
            if sent % (64 * _PART) < room:
                self.look(0.0)
        return sent

    def look(self, seconds: float) -> str:
        """What came, or comes within that time; returns `ended`."""
        self._socket.settimeout(max(seconds, 1e-4))
        try:
            while not self.ended:
                part = self._socket.recv(1 << 16)
                if not part:
                    self.ended = "closed"
                self._received += part
                self._take_frames()
                self._socket.settimeout(1e-4)
        except TimeoutError:
            pass
        except OSError as error:
            self.ended = type(error).__name__
        return self.ended

    def close(self) -> None:
        """Both ways."""
        self._socket.close()

    def _take_frames(self) -> None:
        while len(self._received) >= 9:
            size = int.from_bytes(self._received[:3], "big")
            if len(self._received) < 9 + size:
                return
            kind, flags = self._received[3], self._received[4]
            stream = int.from_bytes(self._received[5:9], "big") & 0x7FFFFFFF
            payload, self._received = self._received[9 : 9 + size], self._received[9 + size :]
            if kind == _SETTINGS and not flags & _ACK:
                for start in range(0, size, 6):
                    if int.from_bytes(payload[start : start + 2], "big") == 4:  # SETTINGS_INITIAL_WINDOW_SIZE
                        self._windows[1] += int.from_bytes(payload[start + 2 : start + 6], "big") - 65535
                self._socket.sendall(frame(_SETTINGS, 0, b"", flags=_ACK))
            elif kind == _PING and not flags & _ACK:
                self._socket.sendall(frame(_PING, 0, payload, flags=_ACK))
            elif kind == _WINDOW and stream in self._windows:
                self._windows[stream] += int.from_bytes(payload, "big") & 0x7FFFFFFF
            elif kind == _RESET or (kind == _HEADERS and flags & 1):
                self.ended = "the call was ended"
            elif kind == _GOAWAY:
                self.ended = "the connection was ended"


def preface() -> bytes:
    """How a client begins a connection."""
    return _PREFACE + frame(_SETTINGS, 0, b"")


def headers(method: str, host: str, token: str | None, encrypted: bool = False) -> bytes:
    """Those of a call, as a block for a frame."""
    pairs = {
        ":method": "POST",
        ":scheme": "https" if encrypted else "http",
        ":path": method,
        ":authority": host,
        "content-type": "application/grpc",
        "te": "trailers",
    }
    if token is not None:
        pairs["authorization"] = f"Bearer {token}"
    return b"".join(b"\0" + _text(name) + _text(value) for name, value in pairs.items())


def frame(kind: int, stream: int, payload: bytes, flags: int = 0) -> bytes:
    """One, of HTTP/2."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def _text(text: str) -> bytes:
    # HPACK: a length of seven bits, as none here is longer, and no compression.
    data = text.encode()
    assert len(data) < 127
    return bytes([len(data)]) + data
