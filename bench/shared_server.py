"""A server that tenants share, in the memory of a small container, while six of them want all of it.

    python bench/shared_server.py                  # five minutes; needs root, for a control group
    python bench/shared_server.py --seconds 30 --only A2,A5

Starts `sft-cloud serve --memory-limit` of 600 MiB in a control group of 1 GiB, trains a good session on it, first alone
and then beside the attacks of bench/memory_attacks.py, which come from processes of their own at a low priority: their
computing is done elsewhere in truth. Prints what each attack got. Exit code 1 where the server died, where the good
session did not end with the bits of a run alone, or where its median step took more than twice as long.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
from fuzz import tiny_edge
from good_session import Ran, train
from half_sent import HalfSent
from memory_attacks import ATTACKS, Models, Tally, Target, make_models
from memory_group import MemoryGroup, memory_group
from support.tls import make_token  # fuzz has added tests/ to the path

from sft.v1.split_training_pb2_grpc import SplitTrainingStub
from sft.wire.protocol import CLIENT_OPTIONS

QUIET_STEPS = 300
_PATIENCE_SECONDS = 5.0
SLOWEST = 2.0
"""Times the quiet step."""


def main() -> int:
    """Prints it all, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300.0, help="of attacks")
    parser.add_argument("--only", help="of the attacks those that begin so: A1,A4")
    parser.add_argument("--memory-limit", type=int, default=600 << 20, help="bytes: the server's option")
    parser.add_argument("--group", type=int, default=1 << 30, help="bytes: the control group's limit")
    parser.add_argument("--log", type=Path, help="where to keep the server's log")
    parser.add_argument("--as-attacker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_attacker:
        return _attack(*options.as_attacker)
    names = [name for name in ATTACKS if not options.only or name.startswith(tuple(options.only.split(",")))]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # with the server's end, and the group's
    try:
        with tempfile.TemporaryDirectory() as scratch, memory_group(options.group) as group:
            try:
                return _run(Path(scratch), group, options.seconds, options.memory_limit, names)
            finally:
                if options.log:
                    shutil.copy(Path(scratch) / "log", options.log)
    except PermissionError as error:
        print(f"{error.filename}: {error.strerror}; a control group needs root", file=sys.stderr)
        return 2


def _run(scratch: Path, group: MemoryGroup, seconds: float, memory_limit: int, names: list[str]) -> int:
    edge, tokens = tiny_edge(scratch / "tiny"), scratch / "tokens.json"
    make_models(scratch)
    good_token = make_token(tokens, "good")
    secrets = {name: make_token(tokens, name.replace(" ", "-")) for name in names}
    with _serving(scratch, group, memory_limit, tokens) as (server, address):
        stub = SplitTrainingStub(_channel(address, good_token))
        quiet = train(stub, edge, threading.Event(), QUIET_STEPS)
        over, beside = threading.Event(), Ran()
        failed: list[str] = []

        def good() -> None:
            nonlocal beside
            try:
                beside = train(stub, edge, over)
            except grpc.RpcError as error:
                failed.append(f"{error.code().name}: {error.details()}")

        thread = threading.Thread(target=good)
        attackers = [_attacker(scratch, address, name, secrets[name]) for name in names]
        for attacker in attackers:
            assert attacker.stdin is not None
            assert attacker.stdout is not None
            attacker.stdout.readline()  # it is there
        thread.start()
        for attacker in attackers:
            print("go", file=attacker.stdin, flush=True)
        over.wait(seconds)
        got = {name: _stopped(attacker) for name, attacker in zip(names, attackers, strict=True)}
        over.set()
        thread.join()
        lives = server.poll() is None
        peak, resident = group.peak_bytes(), _most_resident(server) if lives else 0
    for name, counts in got.items():
        print(f"{name}: " + (" ".join((ATTACKS[name].__doc__ or "").split())))
        for what, count in sorted(counts.items(), key=lambda item: -item[1]):
            print(f"  {count:>6} x {what}")
    tracebacks = (scratch / "log").read_text(errors="replace").count("Traceback")
    print(f"\nserver: {'lives' if lives else 'DIED'}; processes ended for want of memory: {group.kills()};")
    print(
        f"tracebacks in its log: {tracebacks}; the most memory of its process: {resident >> 20} MiB; of the group, with"
    )
    print(f"pages of files: {'unknown' if peak is None else f'{peak >> 20} MiB'}")
    if failed or not beside.seconds:
        print(f"good session: ended with {failed or 'nothing'}")
        return 1
    # On another server: what attackers have opened is theirs for a while yet.
    with _serving(scratch, group, memory_limit, tokens) as (_, address):
        alone = train(SplitTrainingStub(_channel(address, good_token)), edge, threading.Event(), len(beside.seconds))
    ratio = beside.median / quiet.median
    same = beside.bits == alone.bits
    print(f"good session: {len(beside.seconds)} steps, {beside.skipped} times one was begun anew for want of memory;")
    print(f"its bits are {'those' if same else 'NOT those'} of a run alone;")
    print(
        f"a step took {1e3 * beside.median:.1f} ms, alone {1e3 * quiet.median:.1f} ms: {ratio:.2f} times, of {SLOWEST};"
    )
    print(f"the longest {max(beside.seconds):.1f} s")
    return 0 if lives and same and ratio <= SLOWEST and not tracebacks else 1


@contextmanager
def _serving(
    scratch: Path, group: MemoryGroup, memory_limit: int, tokens: Path
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    command = [sys.executable, "-m", "sft_cloud", "serve", "--port=0", "--device=cpu", "--threads=1"]
    command += [f"--state-dir={scratch / 'state'}", f"--tokens={tokens}", f"--memory-limit={memory_limit}"]
    with (scratch / "log").open("ab") as log:
        child = subprocess.Popen(group.command(command), stdout=subprocess.PIPE, stderr=log)
    try:
        assert child.stdout is not None
        line = child.stdout.readline()
        if not line:
            raise SystemExit((scratch / "log").read_text())
        yield child, json.loads(line)["address"]
    finally:
        child.kill()
        child.wait()


def _channel(address: str, token: str) -> grpc.Channel:
    credentials = grpc.composite_channel_credentials(
        grpc.local_channel_credentials(), grpc.access_token_call_credentials(token)
    )
    options = [*CLIENT_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
    return grpc.secure_channel(address, credentials, options=options)


def _attacker(scratch: Path, address: str, name: str, token: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--as-attacker", str(scratch), address, name, token]
    return subprocess.Popen(["nice", "-n", "10", *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _stopped(attacker: subprocess.Popen[str]) -> dict[str, int]:
    output, _ = attacker.communicate()  # the end of its input is the end of its attack
    counts: dict[str, int] = json.loads(output) if output.strip() else {"the attacker broke": 1}
    return counts


def _attack(scratch: str, address: str, name: str, token: str) -> int:
    """The attacker's process: until its standard input ends."""
    models: Models = make_models(Path(scratch))
    over, tally = threading.Event(), Tally()
    target = Target(lambda: _channel(address, token), lambda method: HalfSent(address, method, token))
    print("ready", flush=True)
    sys.stdin.readline()

    def attack() -> None:
        while not over.is_set():
            try:
                ATTACKS[name](target, models, tally, over)
            except Exception as error:  # the server has ended a call that was not looked at: on with it
                tally.counts[f"{type(error).__name__}: {' '.join(str(error).split())[:70]}"] += 1
                over.wait(1.0)

    thread = threading.Thread(target=attack, daemon=True)
    thread.start()
    sys.stdin.read()
    over.set()
    thread.join(_PATIENCE_SECONDS)
    print(json.dumps(dict(tally.counts)), flush=True)
    os._exit(0)  # whatever still waits


def _most_resident(server: subprocess.Popen[bytes]) -> int:
    for line in Path(f"/proc/{server.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
