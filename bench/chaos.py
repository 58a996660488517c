"""Kills edge and cloud at random points of a run, and compares what comes out with a run that nobody disturbed.

    python bench/chaos.py --kills 20
    python bench/chaos.py --kills 20 --freeze-edge --activations keep-on-cloud

Real processes: `sft-cloud serve` and `sft-edge train --save-steps 10`, of which one after the other gets `kill -9` and
is started again, the edge with --resume-from-checkpoint. Prints for each kill how many steps had to be taken again and
how long it took until the next step was done, and compares the losses of all steps, the parameters, and the states of
both optimizers, bit for bit. Other options are those of `sft-edge train`. The exit code is 1 where they differ. A tiny
model; each side has a core of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import queue
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.jobs import Job, same_bits, sst2, weights_of
from support.tiny import make_tiny_model

SAVE_STEPS = 10
STEPS_PER_KILL = 20
SECONDS = 120.0
"""Longer than anything here takes."""


class Kill(NamedTuple):
    """What it came to."""

    victim: str
    at_step: int
    gone_on_from: int
    seconds: float

    @property
    def recomputed(self) -> int:
        return self.at_step - self.gone_on_from


class Process:
    """A side of the run, on a core of its own. Its lines come with the time they were read."""

    def __init__(self, core: int, stream: str, arguments: Sequence[str]) -> None:
        command = [sys.executable, "-m", *arguments]
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) > core:
            command = ["taskset", "-c", str(cores[core]), *command]
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE if stream == "stdout" else subprocess.DEVNULL,
            stderr=subprocess.PIPE if stream == "stderr" else None,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            text=True,
        )
        self.lines: queue.SimpleQueue[tuple[float, str] | None] = queue.SimpleQueue()
        pipe: Any = self._process.stdout if stream == "stdout" else self._process.stderr
        self._reader = threading.Thread(target=self._read, args=(pipe,), daemon=True)
        self._reader.start()

    def next_line(self) -> tuple[float, str] | None:
        """None when it has ended."""
        return self.lines.get(timeout=SECONDS)

    def kill(self) -> None:
        """As the kernel does when memory is short. Lines that were not read yet are dropped."""
        self._process.send_signal(signal.SIGKILL)
        self.wait()

    def stop(self) -> None:
        self._process.terminate()
        self.wait()

    def wait(self) -> int:
        code = self._process.wait(SECONDS)
        self._reader.join(SECONDS)
        return code

    def _read(self, pipe: Iterator[str]) -> None:
        for line in pipe:
            self.lines.put((time.monotonic(), line.rstrip("\n")))
        self.lines.put(None)


class Cloud:
    """A server that is always at the same address."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._port = 0
        self.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    @property
    def store(self) -> Path:
        return self._directory / "checkpoints"

    def start(self) -> None:
        flags = f"--port {self._port} --device cpu --threads 1 --log-level error --state-dir {self._directory}"
        self.process = Process(1, "stdout", ["sft_cloud", "serve", *flags.split()])
        line = self.process.next_line()
        if line is None:
            raise SystemExit("the cloud did not start")
        self._port = int(json.loads(line[1])["address"].rpartition(":")[2])


class Outcome:
    """Everything that could differ."""

    def __init__(self, output_dir: Path, store: Path) -> None:
        state = json.loads((output_dir / "trainer_state.json").read_text())
        self.losses = {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}
        self.grad_norms = {entry["step"]: entry["grad_norm"] for entry in state["log_history"] if "loss" in entry}
        self.model = weights_of(output_dir)
        self.results = json.loads((output_dir / "all_results.json").read_text())
        edge = output_dir / f"checkpoint-{state['max_steps']}"
        other_half = json.loads((edge / "manifest.json").read_text())["other_half"]
        manifests = store.glob(f"*/*/{state['max_steps']}-*/manifest.json")
        (cloud,) = [path.parent for path in manifests if hashlib.sha256(path.read_bytes()).hexdigest() == other_half]
        self.halves: dict[str, Tensor] = {}
        for side, directory, net in (("edge", edge, "net_1"), ("cloud", cloud, "net_2")):
            for file in (net, "optimizer"):
                for name, tensor in load_file(directory / f"{file}.safetensors").items():
                    self.halves[f"{side} {file} {name}"] = tensor

    def differences(self, other: Outcome) -> list[str]:
        """What is not the same, bit for bit."""
        found = []
        if self.losses != other.losses or self.grad_norms != other.grad_norms:
            steps = [step for step in self.losses if self.losses[step] != other.losses.get(step)]
            found.append(f"losses, first of step {min(steps, default=0)}")
        if not same_bits(self.model, other.model):
            found.append("the saved model")
        if self.halves.keys() != other.halves.keys():
            found.append("which tensors the checkpoints hold")
        found += [name for name in self.halves if not self.halves[name].equal(other.halves.get(name))]
        return found


class Edge:
    """The command that is started again and again."""

    def __init__(self, job: Job, model: Path, output_dir: Path, address: str, steps: int, more: Sequence[str]) -> None:
        self._flags = job.flags(
            model=model,
            output_dir=output_dir,
            server=address,
            max_steps=steps,
            save_steps=SAVE_STEPS,
            save_total_limit=2,
            logging_steps=1,
            resume_from_checkpoint=True,
            reconnect_backoff="100ms",
            reconnect_backoff_max="500ms",
            disable_tqdm=True,
        )
        self._flags += more

    def start(self) -> Process:
        return Process(0, "stderr", ["sft_edge", "train", *self._flags])


def main() -> int:
    """Prints the table and the verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the points at which is killed")
    options, more = parser.parse_known_args()
    steps = STEPS_PER_KILL * (options.kills + 1)
    with tempfile.TemporaryDirectory() as scratch, started(Cloud(Path(scratch) / "cloud")) as cloud:
        place = Path(scratch)
        job, model = sst2(place / "data", train_rows=400), make_tiny_model(place / "model", layers=3)
        clean = Edge(job, model, place / "clean", cloud.address, steps, more)
        began = time.monotonic()
        follow_to_the_end(clean.start())
        clean_seconds = time.monotonic() - began
        print(f"clean run: {steps} steps in {clean_seconds:.1f} s, a checkpoint every {SAVE_STEPS}", flush=True)
        disturbed = Edge(job, model, place / "disturbed", cloud.address, steps, more)
        began = time.monotonic()
        kills = disturb(disturbed, cloud, options.kills, steps, random.Random(options.seed))
        seconds = time.monotonic() - began
        expected, actual = (Outcome(place / name, cloud.store) for name in ("clean", "disturbed"))
        return report(kills, seconds, expected, actual, options.kills)


def disturb(edge: Edge, cloud: Cloud, count: int, steps: int, draw: random.Random) -> list[Kill]:
    """The run with kills, each somewhere in its own share of the steps, alternating between the sides."""
    process = edge.start()
    kills: list[Kill] = []
    share = steps / (count + 1)
    for index in range(count):
        target = int(share * index + draw.uniform(1, share))
        delay, victim = draw.uniform(0, 0.2), "edge" if index % 2 == 0 else "cloud"
        step, _, _ = follow(process, target)
        time.sleep(delay)  # into the middle of a step, of a save, of whatever comes next
        killed_at = time.monotonic()
        if victim == "edge":
            process.kill()
            step = max(step, *steps_told(process))
            process = edge.start()
        else:
            cloud.process.kill()
            cloud.start()
        begun_at, gone_on_from, done_at = follow_recovery(process, killed_at)
        kills.append(Kill(victim, max(step, begun_at), gone_on_from, done_at - killed_at))
        print(f"{index + 1:>3}  {row(kills[-1])}", flush=True)
    follow_to_the_end(process)
    return kills


STEP, GOING_ON, BEGINNING = (
    re.compile(pattern) for pattern in (r"step (\d+)/", r"going on from step (\d+)", r"no checkpoint in .* beginning")
)


def follow(process: Process, target: int) -> tuple[int, float, str]:
    """Until step `target` is done."""
    while True:
        when, line = told(process)
        match = STEP.match(line)
        if match and int(match[1]) >= target:
            return int(match[1]), when, line


def follow_recovery(process: Process, killed_at: float) -> tuple[int, int, float]:
    """The last step before the run noticed, the step it went on from, and when the first step after that was done."""
    last, gone_on_from = 0, -1
    while True:
        when, line = told(process)
        going_on, step = GOING_ON.match(line), STEP.match(line)
        if going_on:
            gone_on_from = int(going_on[1])
        elif BEGINNING.match(line) or line.startswith("beginning anew"):
            gone_on_from = 0
        elif step and gone_on_from < 0:
            last = int(step[1])
        elif step and when > killed_at:
            return last, gone_on_from, when


def steps_told(process: Process) -> list[int]:
    """By a process that has ended, since what was read of it."""
    steps = [0]
    while (line := process.next_line()) is not None:
        match = STEP.match(line[1])
        if match:
            steps.append(int(match[1]))
    return steps


def follow_to_the_end(process: Process) -> None:
    """Raises SystemExit when it does not end well."""
    last = ""
    while (line := process.next_line()) is not None:
        last = line[1]
    if process.wait() != 0:
        raise SystemExit(f"the edge failed: {last}")


def told(process: Process) -> tuple[float, str]:
    """The next line. Raises SystemExit where there should be one and is none."""
    line = process.next_line()
    if line is None:
        raise SystemExit(f"the edge ended with exit code {process.wait()}")
    return line


def row(kill: Kill) -> str:
    """Of the table."""
    return (
        f"{kill.victim:<6} after step {kill.at_step:>4}, on from {kill.gone_on_from:>4}: {kill.recomputed:>3} steps "
        f"again, {kill.seconds:5.1f} s until the next step was done"
    )


def report(kills: list[Kill], seconds: float, expected: Outcome, actual: Outcome, wanted: int) -> int:
    """Prints what the kills cost, and the verdict; returns the exit code."""
    for victim in ("edge", "cloud"):
        of_it = [kill for kill in kills if kill.victim == victim]
        if of_it:
            mean = sum(kill.seconds for kill in of_it) / len(of_it)
            again = sum(kill.recomputed for kill in of_it)
            print(f"{victim:<6} {len(of_it)} kills, {again} steps taken again, {mean:.1f} s to recover in the mean")
    everything = sum(kill.recomputed for kill in kills)
    print(f"disturbed run: {seconds:.1f} s, {len(kills)} kills, {everything} steps taken again")
    differences = expected.differences(actual)
    if differences or len(kills) != wanted:
        print(f"DIFFERENT: {', '.join(differences[:10]) or 'not all kills happened'}")
        return 1
    print(
        f"the same, bit for bit: {len(expected.losses)} losses, {len(expected.model)} tensors of the model, "
        f"{len(expected.halves)} of parameters and optimizer states of both halves"
    )
    return 0


@contextmanager
def started(cloud: Cloud) -> Iterator[Cloud]:
    """It ends with the block."""
    try:
        yield cloud
    finally:
        cloud.process.stop()


if __name__ == "__main__":
    sys.exit(main())
