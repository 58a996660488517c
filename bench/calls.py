"""What one caller that asks for next to nothing, as often as it can, leaves of another's training.

    python bench/calls.py [--ways status repeats] [--seconds 4] [--rounds 3]

Starts `sft-cloud serve` on one core, and on another an edge in a session and, in a process that yields to it, each of
the ways of bench/caller.py. The flood's own work is not the server's: an edge's rate beside it is compared with the
rate beside a process that keeps the same core as busy and asks the server nothing, in turns. Prints the two rates,
what is left, and what is left of the server's processor time, which other work on the machine does not change. Exit
code 1 where both are less than half.
"""

from __future__ import annotations

import argparse
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median

import torch
from attack_tools import Server, opened, serving
from caller import CALLS, WAYS
from fuzz import tiny_edge
from openers import LEAST_RATIO, Training, stub
from support.tiny_edge import TinyEdge
from support.tls import make_token

from sft.v1 import split_training_pb2 as pb
from sft.wire.codec.messages import encode_activation
from sft.wire.codec.packing import pack

SESSIONS = ("repeats", "large-repeats", "keeps")
"""What the flood does in a session of its own."""
LARGE_BYTES = 512 << 10


def main() -> int:
    """Prints a row for each way, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = [way for way in WAYS if way != "burner"]
    parser.add_argument("--ways", nargs="*", default=[way for way in ways if way != "reset"], choices=ways)
    parser.add_argument("--seconds", default=4.0, type=float, help="of each look")
    parser.add_argument("--rounds", default=3, type=int, help="looks at each, in turns")
    parser.add_argument("--threads", default=16, type=int, help="of the flood")
    options = parser.parse_args()
    servers, clients = sorted(os.sched_getaffinity(0))[:2]
    sound = True
    heads = f"{'quiet':>7}{'beside':>8}{'ratio':>7}{'share':>7}"
    print(f"{'what the other asks for':<80}{heads}   what it got last", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        edge = tiny_edge(root / "tiny")
        os.sched_setaffinity(0, [servers])
        flags = ["--insecure", "--idle-timeout=1m", "--stall-timeout=1m", "--session-timeout=1s"]
        with serving(root / "server", flags) as server:
            os.sched_setaffinity(0, [clients])
            training = Training(stub(server.address, make_token(server.tokens, "good")), edge)
            training.rate(2.0)
            for way in options.ways:
                sound &= tried(way, server, training, edge, options)
    return 0 if sound else 1


def tried(way: str, server: Server, training: Training, edge: TinyEdge, options: argparse.Namespace) -> bool:
    """One way of asking; whether half of the rate was left."""
    message = server.log.with_name("message")
    message.write_bytes(_repeated(edge, way == "large-repeats").SerializeToString())
    named = "stranger" not in way and way != "connections"
    token = make_token(server.tokens, way, max_sessions=CALLS - 4) if named else ""
    quiet, beside, got = [], [], ""
    look = partial(_looked, server, training, options.seconds)
    for _ in range(options.rounds):
        with flooding("burner", server, options.threads):
            quiet.append(look())
        session = _opened(server, token, edge) if way in SESSIONS else ""
        with flooding(way, server, options.threads, token, session, message) as said:
            beside.append(look())
        got = said[0]
    alone, of_alone = (median(rates) for rates in zip(*quiet, strict=True))
    left, of_left = (median(rates) for rates in zip(*beside, strict=True))
    ratio, share = left / alone, of_left / of_alone
    print(f"{WAYS[way]:<80}{alone:>7.1f}{left:>8.1f}{ratio:>7.2f}{share:>7.2f}   {got}", flush=True)
    return max(ratio, share) >= LEAST_RATIO


def _looked(server: Server, training: Training, seconds: float) -> tuple[float, float]:
    """Steps a second, and for each second of the processor that the server had."""
    before, began = _processor_seconds(server), time.monotonic()
    rate = training.rate(seconds)
    return rate, rate * (time.monotonic() - began) / (_processor_seconds(server) - before)


def _processor_seconds(server: Server) -> float:
    fields = Path(f"/proc/{server.child.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _opened(server: Server, token: str, edge: TinyEdge) -> str:
    """A session of the caller that floods."""
    one = stub(server.address, token)
    opened(one, edge)
    return str(one.OpenSession(edge.request(run_id=secrets.token_hex(16)), timeout=60).session_id)


def _repeated(edge: TinyEdge, is_large: bool) -> pb.EdgeMessage:
    """A message that a stream sends again and again, and that a session answers once."""
    message = edge.evaluate()
    if is_large:
        a_BSR = torch.zeros(LARGE_BYTES // (4 * edge.width * 60), 60, edge.width)
        packed = pack(a_BSR, [60] * len(a_BSR))
        message.evaluate.activation.CopyFrom(encode_activation(packed, pb.DATA_TYPE_FLOAT32, [60] * len(a_BSR), 60))
    message.number = 1
    return message


@contextmanager
def flooding(
    way: str, server: Server, threads: int, token: str = "", session: str = "", message: Path = Path()
) -> Iterator[list[str]]:
    """A process that floods; what it got is there afterwards."""
    script = str(Path(__file__).with_name("caller.py"))
    command = [sys.executable, script, way, server.address, str(threads), token, session, str(message)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    said: list[str] = []
    try:
        assert child.stdout is not None
        child.stdout.readline()
        yield said
        out, _ = child.communicate(timeout=60)
        said.append(out.strip())
    finally:
        child.kill()
        child.wait()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
