"""The child of bench/strangers.py: so many connections to a server by somebody who holds no token.

    python bench/stranger.py WAY HOST PORT COUNT ADDRESSES tls|plain

Prints a line once they all have been there, and then goes on until it is killed. What is closed comes again at once.
"""

from __future__ import annotations

import asyncio
import ssl
import sys
from collections.abc import AsyncIterator

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
PING = b"\0\0\x08\x06\0\0\0\0\0" + b"stranger"
ANSWERS = {4: b"\0\0\0\4\1\0\0\0\0"}  # SETTINGS: ACK
TLS_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(32)  # the beginning of one

WAYS = {
    "silent": "connect, and say nothing",
    "half": "send half of a TLS hello, or of HTTP/2's preface",
    "settings": "agree on TLS and HTTP/2, and then say nothing",
    "pings": "send pings all the time",
    "calls": "make calls that are refused, one after the other",
    "streams": "begin a hundred calls at once, and end none",
}


def headers(stream: int) -> bytes:
    """A HEADERS frame that begins a Train without a token."""
    pairs = [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", b"/sft.v1.SplitTraining/Train"),
        (b":authority", b"x"),
        (b"content-type", b"application/grpc"),
        (b"te", b"trailers"),
    ]
    block = b"".join(b"\0" + bytes([len(k)]) + k + bytes([len(v)]) + v for k, v in pairs)  # HPACK, plain literals
    return len(block).to_bytes(3, "big") + b"\1\4" + stream.to_bytes(4, "big") + block


async def said(way: str, encrypted: bool) -> AsyncIterator[bytes]:
    """What a stranger sends, bit by bit."""
    if way == "half":
        yield TLS_HELLO if encrypted else PREFACE[:12]
    if way in ("settings", "pings", "calls", "streams"):
        yield PREFACE
    if way == "streams":
        yield b"".join(headers(1 + 2 * number) for number in range(100))
    stream = 1
    while way in ("pings", "calls"):
        await asyncio.sleep(1 if way == "calls" else 11)
        yield PING if way == "pings" else headers(stream)
        stream += 2


async def stranger(way: str, host: str, port: int, source: str, tls: ssl.SSLContext | None, been: list[None]) -> None:
    """One, for ever."""
    new = True
    while True:
        try:
            context = None if way in ("silent", "half") else tls
            reader, writer = await asyncio.open_connection(host, port, ssl=context, local_addr=(source, 0))
        except OSError:
            await asyncio.sleep(0.05)
            continue
        if new:
            been.append(None)
            new = False
        talks = asyncio.create_task(talk(way, writer, tls is not None))
        try:
            while await reader.read(65536):
                writer.write(ANSWERS[4])
        except OSError:
            pass
        finally:
            talks.cancel()
            writer.transport.abort()


async def talk(way: str, writer: asyncio.StreamWriter, encrypted: bool) -> None:
    """What it says, for as long as it is let."""
    async for data in said(way, encrypted):
        writer.write(data)


async def main() -> None:
    """All of them."""
    way, host, port, count, addresses, kind = sys.argv[1:]
    tls = None
    if kind == "tls":
        tls = ssl.create_default_context()
        tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
        tls.set_alpn_protocols(["h2"])
    been: list[None] = []
    tasks = [
        asyncio.create_task(stranger(way, host, int(port), f"127.0.0.{2 + number % int(addresses)}", tls, been))
        for number in range(int(count))
    ]
    told = False
    while True:
        await asyncio.wait(tasks, timeout=0.1)
        if len(been) >= int(count) and not told:
            print("all have been there", flush=True)
            told = True


if __name__ == "__main__":
    asyncio.run(main())
