"""How fast bytes cross a link: `receive HOST` prints a free port, then bits per second; `send HOST PORT SECONDS`."""

from __future__ import annotations

import socket
import sys
import time

CHUNK_BYTES = 1 << 14
SKIPPED_BYTES = 1 << 14
"""A token bucket lets its fill through at once; counting starts behind it."""


def receive(host: str) -> None:
    """Takes one connection; counts all but its beginning."""
    with socket.create_server((host, 0)) as server:
        print(server.getsockname()[1], flush=True)
        connection, _ = server.accept()
    with connection:
        count = -SKIPPED_BYTES
        while count < 0:
            count += len(connection.recv(min(CHUNK_BYTES, -count)))
        start = time.monotonic()
        while chunk := connection.recv(CHUNK_BYTES):
            count += len(chunk)
        print(8 * count / (time.monotonic() - start), flush=True)


def send(host: str, port: int, seconds: float) -> None:
    """Sends zeros for so long."""
    with socket.create_connection((host, port)) as connection:
        # What a slow link would take long to drain at the end.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        chunk, end = bytes(CHUNK_BYTES), time.monotonic() + seconds
        while time.monotonic() < end:
            connection.sendall(chunk)


if __name__ == "__main__":
    if sys.argv[1] == "receive":
        receive(sys.argv[2])
    else:
        send(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
