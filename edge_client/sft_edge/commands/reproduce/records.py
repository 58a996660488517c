"""What is kept of each run: OUTPUT_DIR/RUN/run.json, and beside it what the run itself told.

    run.json             the flags it was begun with, with which versions and where; once it has ended, in which time
    log.txt              all that it said, of every attempt
    all_results.json     and the like: what `sft-edge train` leaves, without the model; `sft-edge compare` reads it
    model/               its --output-dir: there while it is on, and with --keep-models after that

What has another run.json, or none, was not written by a run of these flags.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

from sft.errors import CheckpointError, UsageError
from sft_edge.commands.compare.files import number, numbers, read_json, short
from sft_edge.commands.reproduce.grid import Run
from sft_edge.commands.reproduce.made_with import joined
from sft_edge.files import storage_errors, write_file, write_json
from sft_edge.tasks import make_task

RECORD, LOG, MODEL = "run.json", "log.txt", "model"
_RESULTS = "all_results.json"
_TOLD = ("trainer_state.json", "ledger.csv", "options.json", _RESULTS)
"""Of what a run leaves: what stays without its model. The last one is what shows that it has ended."""


@dataclass(frozen=True)
class Finished:
    """A run that has ended well."""

    run: Run
    metric: str
    score: float
    results: Mapping[str, float]
    """The numbers of its all_results.json."""

    seconds: float
    """Of all its processes, from start to end: importing, reading and evaluating are in it."""

    made_with: Mapping[str, Any]
    """Versions and devices of all its processes, and how many runs were side by side: `made_with.made_with`."""

    @property
    def wire_bytes(self) -> int:
        """Of training, both ways, framing included."""
        return int(self.results["wire_bytes_sent"] + self.results["wire_bytes_received"])

    def as_json(self) -> Dict[str, Any]:
        """All of it."""
        system = self.run.system
        return {
            "run": self.run.name,
            "task": self.run.task,
            "system": system.title,
            "mode": system.mode,
            "split_layer": system.split_layer or None,
            "split_rank": system.split_rank or None,
            "residual": system.residual,
            "seed": self.run.seed,
            "metric": self.metric,
            "score": self.score,
            "seconds": self.seconds,
            "wire_bytes": self.wire_bytes,
            "flags": dict(self.run.flags),
            "made_with": dict(self.made_with),
            "results": dict(self.results),
        }


class Directory:
    """The directory of one run."""

    def __init__(self, output_dir: Path, run: Run) -> None:
        self.path = output_dir / run.name
        self.model = self.path / MODEL
        self.log = self.path / LOG
        self._run = run
        self._told_before = 0

    def finished(self) -> Optional[Finished]:
        """The run, if it has ended with these flags, and what it left is whole."""
        record, results = self._record(), numbers(_json_in(self.path / _RESULTS))
        if record.get("flags") != self._run.flags or record.get("ended") is not True:
            return None
        metric = make_task(self._run.task).main_metric
        needed = (f"eval_{metric}", "wire_bytes_sent", "wire_bytes_received", "train_steps")
        seconds = number(record.get("seconds"))
        if seconds is None or any(name not in results for name in needed):
            return None
        return Finished(self._run, metric, results[needed[0]], results, seconds, _made_with(record.get("made_with")))

    def begin(self, made_with: Mapping[str, Any]) -> bool:
        """Makes the directory ready; whether a run of the same flags was broken off there, which may go on.

        What is left of other flags is deleted. Raises UsageError where something is there that no run of ours left,
        and StorageError.
        """
        record = self._record()
        self._told_before = self.log.stat().st_size if self.log.is_file() else 0
        goes_on = record.get("flags") == self._run.flags and record.get("ended") is False
        if not goes_on:
            if not record and self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise UsageError(f"{self.path} holds what no run of this command left; name another --output-dir")
            with storage_errors(self.path):
                if self.path.exists():
                    shutil.rmtree(str(self.path))
            self._told_before = 0
        before = _made_with(record.get("made_with")) if goes_on else {}
        self._write(ended=False, seconds=self._seconds(), made_with=joined(before, made_with))
        return goes_on

    def took(self, seconds: float) -> None:
        """Notes the time of an attempt that has not got to the end. Raises StorageError."""
        self._write(ended=False, seconds=seconds + self._seconds())

    def end(self, seconds: float, keep_model: bool) -> Optional[Finished]:
        """Keeps what the run left; None where that is not a whole run's. Raises StorageError."""
        for name in _TOLD:
            path = self.model / name
            if path.is_file():
                write_file(self.path / name, [path.read_bytes()])
        self._write(ended=True, seconds=seconds + self._seconds())
        finished = self.finished()
        if finished is None:
            self._write(ended=False, seconds=self._seconds())
        elif not keep_model:
            with storage_errors(self.model):
                shutil.rmtree(str(self.model))
        return finished

    def last_line(self) -> str:
        """Of what the attempt said that has begun here; empty where it said nothing."""
        with self.log.open("rb") as log:
            log.seek(self._told_before)
            lines = log.read().decode("utf-8", errors="replace").splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def _seconds(self) -> float:
        return number(self._record().get("seconds")) or 0.0

    def _record(self) -> Dict[str, Any]:
        """Of a run of this command; empty where none is: another program's run.json is no leave to delete."""
        record = _json_in(self.path / RECORD)
        return record if isinstance(record.get("flags"), dict) and "ended" in record else {}

    def _write(self, **content: object) -> None:
        """Of what it was made with what is there stays."""
        kept = {"made_with": self._record().get("made_with"), **content}
        write_json(self.path / RECORD, {"flags": dict(self._run.flags), **kept})


def finished_in(output_dir: Path, runs: List[Run]) -> List[Finished]:
    """Those of the runs that have ended well there, in their order."""
    found = (Directory(output_dir, run).finished() for run in runs)
    return [finished for finished in found if finished is not None]


def _json_in(path: Path) -> Dict[str, Any]:
    """The object in the file; an empty one where there is none."""
    try:
        return read_json(path)
    except CheckpointError:
        return {}


def _made_with(value: object) -> Dict[str, Any]:
    """Versions and devices as short texts, whoever wrote them."""
    told = value if isinstance(value, dict) else {}
    versions, devices, jobs = told.get("versions"), told.get("devices"), number(told.get("side_by_side"))
    return {
        "versions": {short(name): short(one) for name, one in versions.items()} if isinstance(versions, dict) else {},
        "devices": [short(one) for one in devices] if isinstance(devices, list) else [],
        "side_by_side": 1 if jobs is None else int(jobs),
    }
