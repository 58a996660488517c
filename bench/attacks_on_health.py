"""The part of bench/attacks.py about grpc.health.v1, one of whose methods is for everybody."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import grpc
from attack_tools import SECONDS, Held, Server, Table, channel, status
from support.tls import Certificates, make_token  # attack_tools has added tests/ to the path


def health_checks(table: Table, tls: Server, certificates: Certificates) -> None:
    """What is for everybody, or for whoever holds a token, and not the project's own."""
    check, watch = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
    token = make_token(tls.tokens, "health")

    def silent() -> object:
        held = [Held() for _ in range(200)]
        for start in range(0, len(held), 10):  # at a time: each of some is waited for a second long
            few, one = held[start : start + 10], channel(tls, certificates, None)
            calls = [one.stream_unary(check).future(messages, timeout=SECONDS) for messages in few]
            for call in calls:
                call.result()
        try:
            return f"all answered; {status(channel(tls, certificates, token))} is served beside them"
        finally:
            for messages in held:
                messages.end()

    table.add("200 health checks without a token that send nothing", "let in: all answered; health", silent)

    unknown = channel(tls, certificates, None).unary_unary(check)
    table.add("the health of a service that there is not", "NOT_FOUND", lambda: unknown(b"\n\x05other", timeout=10))

    def grown() -> object:
        before = _most_memory(tls)
        for _ in range(5):
            with suppress(grpc.RpcError):  # too large to be read
                list(channel(tls, certificates, None).stream_stream(check)(iter([bytes(250 << 20)]), timeout=SECONDS))
        grew = _most_memory(tls) - before
        return f"{'little' if grew < 50 << 20 else 'much'}: {grew >> 20} MiB more memory than before"

    table.add("5 health checks of 250 MiB without a token", "let in: little", grown)

    def watched() -> object:
        call = channel(tls, certificates, token).stream_stream(watch)
        answers = [list(call(iter([b"\n\x04%04d" % number]), timeout=SECONDS)) for number in range(1000)]
        unknown = answers.count([b"\x08\x03"])
        return f"{unknown} times SERVICE_UNKNOWN, and the end of the call"

    table.add("watching the health of 1,000 services that there are not", "let in: 1000 times", watched)


def _most_memory(server: Server) -> int:
    """The most memory that the server's process has ever had."""
    for line in Path(f"/proc/{server.child.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise ValueError("no VmHWM in /proc")
