"""Fuzzed and mutated messages of every type against a live server, with a good session beside them.

    python bench/fuzz.py [--messages 200000] [--seed 0] [--coverage-seconds 60]

Starts `sft-cloud serve` and sends it messages that are almost sound, and bytes that are hardly any, from a few threads;
tests/support/fuzzing.py makes them. Meanwhile a good session trains again and again. In the end the server must live,
every call must have ended, nothing may have got an answer that only a bug explains, the good session's losses,
gradients, weights and optimizer must be those of its run alone, bit for bit, and the server's memory must have stayed
within what its sessions may take. With `atheris` installed, a coverage-guided part follows in a process of its own.

Exit code 1 when something of that does not hold.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
from transformers import AutoConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.fuzzing import Fuzzer, good_run  # noqa: E402
from support.tiny import make_tiny_model  # noqa: E402
from support.tiny_edge import TinyEdge  # noqa: E402

from sft.v1.split_training_pb2_grpc import SplitTrainingStub  # noqa: E402
from sft.wire.protocol import CLIENT_OPTIONS  # noqa: E402

STEPS = 20
THREADS = 3
MEMORY_LIMIT = 640 << 20
MARGIN = 64 << 20
"""For what is too small to be charged, and what the allocators of Python and torch keep."""


class Memory(threading.Thread):
    """What a process has in memory beside pages of files, looked at ten times a second."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._status = Path(f"/proc/{pid}/status")
        self._over = threading.Event()
        self.peak = self.now()

    def now(self) -> int:
        """Bytes."""
        (line,) = (line for line in self._status.read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) << 10

    def run(self) -> None:
        """See Thread."""
        while not self._over.wait(0.1):
            try:
                self.peak = max(self.peak, self.now())
            except (OSError, ValueError):  # the process has ended
                return

    def stop(self) -> None:
        """Ends it."""
        self._over.set()
        self.join()


def main() -> int:
    """Prints the figures, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--messages", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--coverage-seconds", type=int, default=60)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        sound = against_a_server(options.messages, options.seed, Path(scratch))
        sound &= coverage_guided(options.coverage_seconds, options.seed, Path(scratch))
    print("sound" if sound else "BROKEN")
    return 0 if sound else 1


def against_a_server(messages: int, seed: int, scratch: Path) -> bool:
    """Whether all went well."""
    edge = tiny_edge(scratch / "tiny")
    log = scratch / "server.log"
    command = [sys.executable, "-m", "sft_cloud", "serve", "--port=0", "--device=cpu", "--threads=1"]
    command += [f"--state-dir={scratch / 'state'}", "--max-sessions=32", "--session-timeout=5s", "--stall-timeout=10s"]
    command += [f"--memory-limit={MEMORY_LIMIT}", "--opens-per-minute=1000000"]
    command += ["--calls-per-second=1000000", "--log-level=warning"]
    command += [f"--max-upload-bytes={64 << 20}", f"--audit-log={scratch / 'audit.jsonl'}"]
    with log.open("wb") as stderr:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr)
    try:
        assert server.stdout is not None
        address = json.loads(server.stdout.readline())["address"]
        return report(server, address, edge, messages, seed, log)
    finally:
        server.kill()
        server.wait()


def tiny_edge(directory: Path) -> TinyEdge:
    """Knows a model that a server opens and trains in milliseconds."""
    make_tiny_model(directory, "bert", layers=2)
    config = AutoConfig.from_pretrained(
        directory,
        num_labels=3,
        problem_type="single_label_classification",
        trust_remote_code=False,
        local_files_only=True,
    )
    return TinyEdge(directory, config)


def report(server: subprocess.Popen[bytes], address: str, edge: TinyEdge, messages: int, seed: int, log: Path) -> bool:
    """Runs it, prints what came of it, and returns whether all is well."""

    def channel() -> grpc.Channel:
        return grpc.insecure_channel(address, options=CLIENT_OPTIONS)

    alone = good_run(SplitTrainingStub(channel()), edge, STEPS)
    fuzzers = [Fuzzer(channel(), edge, seed * THREADS + number) for number in range(THREADS)]
    shoot(fuzzers, 500)  # everything that is imported or cached at the first use
    memory = Memory(server.pid)
    before = memory.peak
    memory.start()
    beside: list[str] = []
    over, begun = threading.Event(), time.monotonic()

    def train() -> None:
        stub = SplitTrainingStub(channel())
        while not over.is_set():
            try:
                beside.append(good_run(stub, edge, STEPS))
            except grpc.RpcError as error:
                beside.append(f"{error.code().name}: {error.details()}")

    good = threading.Thread(target=train)
    good.start()
    shoot(fuzzers, messages)
    over.set()
    good.join()
    seconds = time.monotonic() - begun
    lives = server.poll() is None
    after = memory.now() if lives else 0
    memory.stop()
    again = good_run(SplitTrainingStub(channel()), edge, STEPS) if lives else ""
    counts: Counter[tuple[str, str]] = sum((fuzzer.counts for fuzzer in fuzzers), Counter())
    failures = [failure for fuzzer in fuzzers for failure in fuzzer.failures]
    tracebacks = log.read_text(errors="replace").count("Traceback")

    kinds = sorted({kind for kind, _ in counts})
    for kind in kinds:
        got = ", ".join(f"{count} {what}" for (of, what), count in sorted(counts.items()) if of == kind)
        print(f"{kind:<32} {got}")
    mutated = sum(fuzzer.mutated for fuzzer in fuzzers)
    print(f"{mutated} mutated messages and {counts.total() - mutated} sound ones in {seconds:.0f} s, seed {seed};")
    print(f"{len(failures)} of them answered as only by a bug")
    print(f"server {'lives' if lives else 'DIED'}; tracebacks in its log: {tracebacks}")
    same = sum(one == alone for one in beside)
    print(
        f"good session of {STEPS} steps: {same} of {len(beside)} runs beside it, and {again == alone:d} of 1 after it,"
    )
    print("  have the bits of its run alone")
    for other in {one for one in beside if one != alone}:
        print(f"  instead: {other}")
    before_, after_, peak, limit = (size >> 20 for size in (before, after, memory.peak, MEMORY_LIMIT))
    print(f"memory: {before_} MiB before, {after_} after, {peak} at most; the limit is {limit}")
    for failure in failures[:10]:
        print("  " + failure)
    within = memory.peak <= MEMORY_LIMIT + MARGIN
    return (
        lives and not failures and not tracebacks and bool(beside) and same == len(beside) and again == alone and within
    )


def shoot(fuzzers: list[Fuzzer], messages: int) -> None:
    """Has all of them send until they have sent so many more that are mutated together."""
    target = sum(fuzzer.mutated for fuzzer in fuzzers) + messages

    def run(fuzzer: Fuzzer) -> None:
        while sum(one.mutated for one in fuzzers) < target and len(fuzzer.failures) < 100:
            fuzzer.shoot()

    with ThreadPoolExecutor(len(fuzzers)) as threads:
        list(threads.map(run, fuzzers))


def coverage_guided(seconds: int, seed: int, scratch: Path) -> bool:
    """Whether atheris finds nothing in that time; True without it."""
    if not seconds or importlib.util.find_spec("atheris") is None:
        print("coverage-guided part: left out (pip install atheris)")
        return True
    program = Path(__file__).with_name("fuzz_coverage.py")
    command = [sys.executable, str(program), str(scratch), f"-max_total_time={seconds}", f"-seed={seed + 1}"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    for line in done.stderr.splitlines()[-3:] if done.returncode == 0 else done.stderr.splitlines()[-40:]:
        print("  " + line[:300])
    print(f"coverage-guided part: {'sound' if done.returncode == 0 else 'BROKEN'}")
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
