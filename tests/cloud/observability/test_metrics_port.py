"""The port that Prometheus reads, and what else may come there."""

import socket
import threading
import urllib.error
import urllib.request

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from sft.errors import UsageError
from sft.version import __version__
from sft_cloud.observability.metrics_port import CONNECTIONS, MetricsPort
from sft_cloud.observability.prometheus import PrometheusMetrics

SECONDS = 20.0


@pytest.fixture
def metrics():
    return PrometheusMetrics(torch.device("cpu"))


@pytest.fixture
def serve(metrics):
    """`serve(seconds)`, for a connection."""
    ports = []

    def start(seconds=SECONDS):
        ports.append(MetricsPort("127.0.0.1", 0, metrics.registry, seconds))
        return ports[-1]

    yield start
    for port in ports:
        port.close()


@pytest.fixture
def connect():
    made = []

    def make(port, data=b""):
        host, number = port.url.split("/")[2].split(":")
        made.append(socket.create_connection((host, int(number)), SECONDS))
        made[-1].sendall(data)
        return made[-1]

    yield make
    for one in made:
        one.close()


def scrape(port):
    with urllib.request.urlopen(port.url, timeout=SECONDS) as response:
        return response.read().decode()


def rest(connection):
    """All that comes until the other side ends it."""
    parts = []
    try:
        while part := connection.recv(1 << 16):
            parts.append(part)
    except ConnectionError:
        pass
    return b"".join(parts)


@pytest.fixture
def silent(capfd, caplog):
    """Nothing was written anywhere: `silent()`."""

    def check():
        captured = capfd.readouterr()
        assert captured.out + captured.err + caplog.text == ""

    return check


def test_a_scrape(metrics):
    metrics.uploaded('a "name"\nof two lines', 5)
    port = MetricsPort("127.0.0.1", 0, metrics.registry)
    try:
        text = scrape(port)
    finally:
        port.close()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    (sample,) = [s for s in families["sft_cloud_uploads"].samples if s.name.endswith("_total")]
    assert (sample.labels, sample.value) == ({"tenant": 'a "name"\nof two lines'}, 1)
    (info,) = families["sft_cloud_info"].samples
    assert info.labels["version"] == __version__
    assert "process_resident_memory_bytes" in families
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(port.url, timeout=20)


def test_a_port_in_use_is_one_line(metrics):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UsageError, match="choose another --metrics-port"):
            MetricsPort("127.0.0.1", taken.getsockname()[1], metrics.registry)


@pytest.mark.parametrize(
    "data",
    [
        b"GET /metr",
        b"GET /metrics HTTP/1.1\r\nHost: x\r\nX: ",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(300),  # a TLS ClientHello begins like this
        b"\x00\xff" * 1000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 1000,
        b"GET / HTTP/1.1\r\nx: " + b"y" * 70_000,
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
        b"POST /metrics HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n",
        b"GET /metrics HTTP/9.9\r\n\r\n",
    ],
    ids=["half a request", "half a header", "TLS", "garbage", "headers", "a header", "a path", "a body", "a version"],
)
def test_whatever_comes_there_the_next_scrape_is_answered_and_nothing_is_logged(
    serve, connect, silent, data, monkeypatch
):
    port = serve(seconds=0.2)
    connections = [connect(port, data) for _ in range(3)]
    connections.pop().close()
    for connection in connections:
        rest(connection)  # which the server ends
    monkeypatch.setattr(port._server, "_seconds", SECONDS)  # whatever else this machine does
    assert f'version="{__version__}"' in scrape(port)
    silent()


def test_more_that_hold_on_than_there_are_places_do_not_keep_a_scrape_out(serve, connect, silent):
    port = serve()
    held = [connect(port, b"GET /metr") for _ in range(2 * CONNECTIONS)]
    assert "sft_cloud_info" in scrape(port)
    assert rest(held[0]) == b""  # it was the oldest
    for one in held:
        one.close()
    silent()


def test_who_does_not_read_an_answer_is_let_go(serve, connect, silent, metrics, monkeypatch):
    for number in range(100):
        metrics.known(f"{number} " + "x" * 1000)
    port, ended = serve(seconds=0.2), threading.Event()
    end = port._server._end
    monkeypatch.setattr(port._server, "_end", lambda connection: (end(connection), ended.set()))
    held = connect(port)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    held.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
    assert ended.wait(SECONDS)
    held.close()
    monkeypatch.setattr(port._server, "_seconds", SECONDS)  # whatever else this machine does
    assert "sft_cloud_info" in scrape(port)
    silent()


def test_a_figure_that_cannot_be_read_is_a_line_a_second(serve, connect, metrics, caplog):
    def broken():
        raise ValueError("no such certificate")

    metrics.watch_certificate(broken)
    port = serve()
    for _ in range(5):
        rest(connect(port, b"GET /metrics HTTP/1.1\r\n\r\n"))
    assert [record.fields["reason"] for record in caplog.records][:1] == ["ValueError: no such certificate"]
    assert len(caplog.records) <= 2  # of two seconds, at most
    assert "Traceback" not in caplog.text
