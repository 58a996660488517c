"""Whether a caller with a token gets in, and an edge back in, while strangers hold on to a server's port.

    python bench/strangers.py
    python bench/strangers.py --ways streams --tls tls --addresses 50

Starts `sft-cloud serve` with tokens, with TLS and without, and for every way that bench/stranger.py knows 2,000
strangers in another process. Beside them, for --seconds: a new connection with a Status call again and again, and an
edge whose connection is cut again and again. Prints the longest that each took. Exit code 1 when a caller took more
than two seconds, or an edge more than five.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import grpc
from attack_tools import Server, opened, serving
from fuzz import tiny_edge  # which has added tests/ to the path, as the one before it
from stranger import WAYS
from support.proxy import TcpProxy
from support.tls import Certificates, make_certificates, make_token

from sft.client.channel import open_channel
from sft.client.credentials import Credentials
from sft.errors import LinkError
from sft.v1 import split_training_pb2 as pb
from sft.v1.split_training_pb2_grpc import SplitTrainingStub
from sft.wire.protocol import CLIENT_OPTIONS
from sft_edge.link.grpc_transport import GrpcTransport
from sft_edge.link.reliable_stream import ReliableStream
from sft_edge.link.retries import RetryPolicy
from sft_edge.options import LinkOptions

CALLER_SECONDS, EDGE_SECONDS = 2.0, 5.0
BETWEEN_SECONDS = 0.5


def main() -> int:
    """Prints a row for each way, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--tls", nargs="*", default=["tls", "plain"], choices=["tls", "plain"])
    parser.add_argument("--count", default=2000, type=int, help="strangers")
    parser.add_argument("--addresses", default=1, type=int, help="how many addresses they come from")
    parser.add_argument("--seconds", default=30.0, type=float, help="of looking, for each way")
    options = parser.parse_args()
    sound = True
    print(f"{'':<6}{'strangers who':<52}{'caller':>8}{'edge':>8}{'failed':>8}{'memory, MiB':>12}")
    with tempfile.TemporaryDirectory() as scratch:
        certificates = make_certificates(Path(scratch))
        for kind in options.tls:
            flags = ["--stall-timeout=1m", "--idle-timeout=30m"]
            if kind == "tls":
                flags += [f"--tls-cert={certificates.server.cert}", f"--tls-key={certificates.server.key}"]
            for way in options.ways:
                with serving(Path(scratch) / f"{kind}-{way}", flags) as server:
                    sound &= tried(server, certificates, way, kind, options)
    return 0 if sound else 1


def tried(server: Server, certificates: Certificates, way: str, kind: str, options: argparse.Namespace) -> bool:
    """One way of holding on; whether callers got in."""
    token = server.tokens.with_name("token")
    token.touch(mode=0o600)
    token.write_text(make_token(server.tokens, "good"))
    ca = certificates.ca if kind == "tls" else None
    credentials = LinkOptions(server.address, tls=kind == "tls", tls_ca=ca, token_file=token, insecure=True).credentials
    host, port = server.address.rsplit(":", 1)
    script = str(Path(__file__).with_name("stranger.py"))
    command = [sys.executable, script, way, host, port, str(options.count), str(options.addresses), kind]
    over, caller, edge, failed = threading.Event(), [0.0], [0.0], [0]
    before = _memory(server)
    with TcpProxy(server.address) as proxy:
        again, end = returning(proxy, credentials, server)
        child = subprocess.Popen(command, stdout=subprocess.PIPE)
        looks = [(lambda: called(server.address, credentials), caller), (again, edge)]
        threads = [threading.Thread(target=_looking, args=(look, took, failed, over)) for look, took in looks]
        try:
            for thread in threads:
                thread.start()
            over.wait(options.seconds)
        finally:
            over.set()
            for thread in threads:
                thread.join()
            memory = _memory(server) - before
            child.kill()
            child.wait()
            end()
    print(f"{kind:<6}{WAYS[way]:<52}{caller[0]:>8.2f}{edge[0]:>8.2f}{failed[0]:>8}{memory >> 20:>12}", flush=True)
    return caller[0] <= CALLER_SECONDS and edge[0] <= EDGE_SECONDS and not failed[0] and server.child.poll() is None


def called(address: str, credentials: Credentials) -> None:
    """A new connection and one call, tried until it is answered, as whoever calls would."""
    end = time.monotonic() + 60
    while True:
        with open_channel(address, credentials, CLIENT_OPTIONS) as channel:
            try:
                SplitTrainingStub(channel).Status(pb.StatusRequest(), timeout=20, metadata=credentials.metadata())
                return
            except grpc.RpcError:
                if time.monotonic() > end:
                    raise
        time.sleep(0.1)


def returning(
    proxy: TcpProxy, credentials: Credentials, server: Server
) -> tuple[Callable[[], None], Callable[[], None]]:
    """An edge in a session: has its connection cut, and comes back; and how it ends."""
    with tempfile.TemporaryDirectory() as directory:
        tiny = tiny_edge(Path(directory))
        transport = GrpcTransport(proxy.address, credentials=credentials)
        with open_channel(server.address, credentials, CLIENT_OPTIONS) as channel:
            first = grpc.intercept_channel(channel, _Token(credentials))
            session_id = opened(SplitTrainingStub(first), tiny)
    stream = ReliableStream(transport, RetryPolicy(reconnect_timeout_seconds=60.0), lambda text: None)
    stream.begin(session_id)
    step = 0

    def again() -> None:
        nonlocal step
        proxy.cut()
        message = tiny.forward(step, commit=tiny.commit_part(step - 1) if step else None)
        stream.send("result", message, 0).result()
        step += 1

    def end() -> None:
        stream.close()
        transport.close()

    return again, end


class _Token(grpc.UnaryUnaryClientInterceptor, grpc.StreamUnaryClientInterceptor):
    """Shows the token with every call of a stub."""

    def __init__(self, credentials: Credentials) -> None:
        self._metadata = credentials.metadata()

    def intercept_unary_unary(self, continuation, details, request):  # type: ignore[no-untyped-def]
        return continuation(details._replace(metadata=self._metadata), request)

    intercept_stream_unary = intercept_unary_unary


def _looking(look: Callable[[], None], took: list[float], failed: list[int], over: threading.Event) -> None:
    while not over.wait(BETWEEN_SECONDS):
        begun = time.monotonic()
        try:
            look()
        except (grpc.RpcError, LinkError) as error:
            print(error, file=sys.stderr)
            failed[0] += 1
            if isinstance(error, LinkError):
                return
        finally:
            took[0] = max(took[0], time.monotonic() - begun)


def _memory(server: Server) -> int:
    for line in Path(f"/proc/{server.child.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return 1024 * int(line.split()[1])
    raise ValueError("no VmRSS in /proc")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
