"""What `sft-edge doctor` finds out with sockets alone."""

from __future__ import annotations

import socket
import threading
from contextlib import contextmanager
from typing import Iterator, List

import pytest
from support.scripted_cloud import ScriptedCloud, serving

from sft.client.credentials import PLAINTEXT, Credentials
from sft_edge.commands.doctor.finding import Finding
from sft_edge.commands.doctor.path import PathCheck

SECONDS = 20.0
NOW = 1_800_000_000.0


@contextmanager
def answering(answer: bytes) -> Iterator[int]:
    """A server that answers every connection with the same bytes and hangs up; its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield int(listener.getsockname()[1])
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(SECONDS)


def look(
    port: int, credentials: Credentials = PLAINTEXT, host: str = "127.0.0.1", seconds: float = SECONDS
) -> List[Finding]:
    path = PathCheck(host, port, credentials, seconds)
    goes_on = path.run(NOW)
    assert goes_on is all(finding.verdict != "failed" for finding in path.findings)
    return path.findings


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_a_server_of_grpc_is_found() -> None:
    with serving(ScriptedCloud()) as address:
        findings = look(int(address.rpartition(":")[2]))
    assert [(finding.verdict, finding.name) for finding in findings] == [
        ("ok", "address"),
        ("ok", "connection"),
        ("ok", "encryption"),
    ]
    assert findings[0].found == "127.0.0.1 is 127.0.0.1"
    assert findings[2].found == "none; both ends are on this machine"


def test_a_name_that_is_none() -> None:
    (finding,) = look(50051, host="no.such.host.invalid")
    assert (finding.verdict, finding.name) == ("failed", "address")
    assert finding.found.startswith("no.such.host.invalid: ")
    assert "--server" in finding.advice


def test_a_port_where_nobody_listens() -> None:
    port = free_port()
    finding = look(port)[-1]
    assert (finding.verdict, finding.name) == ("failed", "connection")
    assert finding.found == f"nobody listens on port {port}"
    assert "sft-cloud serve" in finding.advice


def test_packets_that_get_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def dial(address: object, timeout: float) -> socket.socket:
        raise socket.timeout("timed out")

    monkeypatch.setattr(socket, "create_connection", dial)
    finding = look(50051, seconds=7.5)[-1]
    assert finding.found == "no answer within 7.5 s"
    assert "firewall" in finding.advice


def test_something_else_that_listens() -> None:
    with answering(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
        finding = look(port)[-1]
    assert (finding.verdict, finding.name) == ("failed", "HTTP/2")
    assert "not a server of gRPC" in finding.found


def test_something_that_hangs_up() -> None:
    with answering(b"") as port:
        assert look(port)[-1].name == "HTTP/2"


def test_tls_where_there_is_none() -> None:
    with serving(ScriptedCloud()) as address:
        finding = look(int(address.rpartition(":")[2]), Credentials(encrypted=True))[-1]
    assert (finding.verdict, finding.name) == ("failed", "encryption")
    assert finding.found == "the server does not speak TLS"
    assert "start it with a certificate" in finding.advice


def test_a_ca_file_that_holds_nothing() -> None:
    with serving(ScriptedCloud()) as address:
        torn = Credentials(encrypted=True, root_certificates=b"no certificate")
        finding = look(int(address.rpartition(":")[2]), torn)[-1]
    assert (finding.verdict, finding.name) == ("failed", "encryption")
    assert "torn" in finding.advice
