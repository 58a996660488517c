"""What TLS, client certificates, tokens and the memory of answers cost: the same steps without, with each, with all.

    python bench/protection.py
    python bench/protection.py --mode sl --steps 30

Trains MiniLM on synthetic data against `sft-cloud serve` on this machine, through a relay that counts the bytes of its
connections, TLS's own included. Variants take turns, so that what else the machine does falls on all of them alike.
Bytes of a step are the difference of a long and a short run, over the difference of their steps.
"""

from __future__ import annotations

import argparse
import csv
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import NamedTuple

from runs import BIN, train

from sft.v1 import split_training_pb2 as pb
from sft_edge.systems.cloud_process import CloudProcess
from sft_edge.tasks.synthetic import write_synthetic

SHORT = 3
CORES = sorted(os.sched_getaffinity(0))  # the first for the edge, the others for the cloud
NO_MEMORY = "nothing, and no memory of answers"
FORGETFUL = [sys.executable, str(Path(__file__).with_name("forgetful_cloud.py")), "serve"]
FORGETFUL += ["--host=127.0.0.1", "--port=0", "--exit-with-stdin", "--log-level=warning"]
FLAGS = ["--task=sst2", "--model=minilm", "--split-layer=5", "--split-rank=8", "--per-device-train-batch-size=32"]
FLAGS += ["--max-eval-samples=32", "--seed=0"]


class Step(NamedTuple):
    """Seconds of a step, and how many of them the link took."""

    whole: float
    link: float


class Relay:
    """Passes TCP connections on to a port of this machine and counts what crosses, both ways."""

    def __init__(self, port: int) -> None:
        self.bytes = 0
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near = self._listener.accept()[0]
            far = socket.create_connection(("127.0.0.1", self._port))
            for pair in ((near, far), (far, near)):
                for end in pair:
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                self.bytes += len(data)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            sink.close()


def main() -> None:
    """Prints a row for each variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", default="sft", choices=("sft", "sl"))
    parser.add_argument("--steps", default=30, type=int)
    parser.add_argument("--rounds", default=3, type=int, help="how often each variant has its turn")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        write_synthetic(scratch / "data")
        variants = make_variants(scratch)
        steps_of: dict[str, list[Step]] = {variant: [] for variant in variants}
        step_bytes = {}
        for _ in range(options.rounds):
            for variant, (serve, edge) in variants.items():
                serving = [*serve, "--threads", "1"]
                command = [*FORGETFUL, f"--state-dir={scratch / 'state'}", *serving] if variant == NO_MEMORY else None
                with CloudProcess(serving, command=command) as cloud:
                    if len(CORES) > 1:
                        os.sched_setaffinity(cloud.pid, CORES[1:])
                    relay = Relay(int(cloud.address.rpartition(":")[2]))
                    flags = [*FLAGS, f"--data-dir={scratch / 'data'}", f"--mode={options.mode}", *edge]
                    flags.append(f"--server={relay.address}")
                    counts = []
                    for steps in (SHORT, options.steps):
                        before = relay.bytes
                        train([*flags, f"--max-steps={steps}"], scratch / "out", ["taskset", "-c", str(CORES[0])])
                        counts.append(relay.bytes - before)
                    step_bytes[variant] = (counts[1] - counts[0]) / (options.steps - SHORT)
                    steps_of[variant] += read_steps(scratch / "out")
    print(f"{'medians of a step':<38}{'seconds':>10}{'of them, link, ms':>20}{'bytes':>12}")
    for variant, steps in steps_of.items():
        whole, link = (statistics.median(values) for values in zip(*steps, strict=True))
        print(f"{variant:<38}{whole:>10.3f}{1000 * link:>20.2f}{step_bytes[variant]:>12,.0f}")
    numbers = pb.EdgeMessage(number=1000, answered=999).ByteSize() + pb.CloudMessage(number=1000).ByteSize()
    print(f"of these bytes, numbers of messages: {numbers}, in all variants")


def make_variants(scratch: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Flags of the server and of the edge, by what they protect."""
    certs, tokens, token = scratch / "certs", scratch / "tokens.json", scratch / "token"
    sft_cloud(["certs", "init", "--dir", str(certs), "--client", "edge"])
    token.touch(mode=0o600)
    token.write_text(sft_cloud(["token", "create", "--tokens", str(tokens), "--name", "edge"]))
    tls = [f"--tls-cert={certs / 'server.pem'}", f"--tls-key={certs / 'server-key.pem'}"]
    client = [f"--tls-cert={certs / 'edge.pem'}", f"--tls-key={certs / 'edge-key.pem'}"]
    ca, shows = f"--tls-ca={certs / 'ca.pem'}", f"--token-file={token}"
    return {
        NO_MEMORY: ([], []),
        "nothing": ([], []),
        "tokens": ([f"--tokens={tokens}"], [shows]),
        "TLS": (tls, [ca]),
        "TLS, client certificates and tokens": (
            [*tls, f"--tls-client-ca={certs / 'ca.pem'}", f"--tokens={tokens}"],
            [ca, *client, shows],
        ),
    }


def sft_cloud(arguments: list[str]) -> str:
    """Its standard output."""
    command = [str(BIN / "sft-cloud"), *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True).stdout


def read_steps(output_dir: Path) -> list[Step]:
    """All but the first few, which warm up."""
    with (output_dir / "ledger.csv").open() as file:
        rows = list(csv.DictReader(file))
    phases = ("edge_forward", "uplink_wait", "cloud", "edge_backward")
    return [Step(sum(float(row[phase]) for phase in phases), float(row["uplink_wait"])) for row in rows[SHORT:]]


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
