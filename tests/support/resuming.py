"""What tests of runs that go on share: servers that are replaced, and all that a run leaves."""

from __future__ import annotations

import hashlib
import itertools
import signal
import socket
from pathlib import Path

import torch
from safetensors.torch import load_file
from support.jobs import STEADY, read_json, same_bits, weights_of
from support.servers import start_server

from sft_cloud.server import CloudServer

STEPS = 7
OPTIONS = {**STEADY, "max_steps": STEPS, "save_steps": 2, "reconnect_backoff": "1ms"}
SECONDS = 60


class PowerCut(BaseException):
    """The edge is gone, without a chance to do anything."""


class Clouds:
    """Servers on one port, one after the other, which share a store of checkpoints and nothing else."""

    def __init__(self, directory: Path) -> None:
        self.store = directory / "store"
        self._directory = directory
        self._states = itertools.count()
        # Bound, and never listening: nobody else gets the port between two servers.
        self._held = socket.socket()
        self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._held.bind(("127.0.0.1", 0))
        self.server = self._start(self._held.getsockname()[1])
        self.address = self.server.address

    def _start(self, port: int) -> CloudServer:
        state = self._directory / f"state-{next(self._states)}"
        return start_server(state, 2, port=port, checkpoint_store=str(self.store))

    def replace(self) -> None:
        """Another host takes the place of this one, which had no chance to do anything."""
        self.server.stop(grace_seconds=0)
        self.server = self._start(self.server.port)

    def close(self) -> None:
        self.server.stop(grace_seconds=0)
        self._held.close()


class Outcome:
    """All that a run leaves, but what depends on the time it took."""

    def __init__(self, output_dir: Path, store: Path) -> None:
        self.weights = weights_of(output_dir)
        state = read_json(output_dir / "trainer_state.json")
        timed = ("eval_runtime", "eval_samples_per_second")
        self.history = [{n: v for n, v in entry.items() if n not in timed} for entry in state.pop("log_history")]
        self.state = state
        results = read_json(output_dir / "all_results.json")
        self.results = {name: results[name] for name in ("train_loss", "train_steps", "train_samples", "eval_accuracy")}
        self.link_bytes = results.get("run_link_bytes")
        self.payload = [results[f"wire_payload_bytes_{way}"] for way in ("sent", "received")]
        self.checkpoints: dict[str, torch.Tensor] = {}
        for step in steps_in(output_dir):
            edge = output_dir / f"checkpoint-{step}"
            other_half = read_json(edge / "manifest.json")["other_half"]
            halves = [edge, *(half for half in store.glob(f"*/*/{step}-*") if hash_of(half) == other_half)]
            assert len(halves) == (1 if other_half is None else 2)
            for path in [half / name for half in halves for name in ("net_1", "net_2", "optimizer")]:
                file = path.with_suffix(".safetensors")
                if file.exists():
                    side = "edge" if path.parent.parent == output_dir else "cloud"
                    for name, tensor in load_file(file).items():
                        self.checkpoints[f"{side} {step} {path.stem} {name}"] = tensor

    def check_same(self, other: Outcome) -> None:
        assert self.history == other.history
        assert self.state == other.state
        assert self.results == other.results
        assert self.payload == other.payload
        assert same_bits(self.weights, other.weights)
        assert same_bits(self.checkpoints, other.checkpoints)
        assert self.checkpoints


def hash_of(half: Path) -> str:
    return hashlib.sha256((half / "manifest.json").read_bytes()).hexdigest()


def steps_in(output_dir: Path) -> list[int]:
    return sorted(int(path.name.rpartition("-")[2]) for path in output_dir.glob("checkpoint-*"))


POINTS = ("asked", "cloud saved", "edge saved", "cloud tidied", "edge tidied")
"""Of one save, in order; docs/checkpoints.md has what each leaves behind."""


def terminate() -> None:
    signal.raise_signal(signal.SIGTERM)
