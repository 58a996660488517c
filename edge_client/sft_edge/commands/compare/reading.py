"""What is known of a run from what it has left, be it finished, broken off, or still at it.

Where a run has ended there are `all_results.json`, `trainer_state.json`, `ledger.csv` and `options.json`. One that was
killed, or goes on, may have checkpoints alone; one whose link was lost has its history, and no figures.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence

from sft.errors import CheckpointError
from sft.wire.ledger import PHASES
from sft_edge.commands.compare.files import (
    entries,
    number,
    numbers,
    option_text,
    read_if_there,
    read_json,
    read_ledger,
    read_saved_ledger,
    short,
)
from sft_edge.options import OPTIONS_FILE

RESULTS, HISTORY, LEDGER, DESCRIPTION = "all_results.json", "trainer_state.json", "ledger.csv", "sft.json"
STATE, SAVED_LEDGER, MANIFEST, LEFT = "state.json", "ledger.safetensors", "manifest.json", "detached.json"
MAX_OPTIONS = 200

_NO_METRICS = ("loss", "samples", "runtime", "samples_per_second", "steps_per_second")
_NOT_OPTIONS = ("model", "config.json", "the training rows, or their tokens")
"""Of what a checkpoint says that a run must be like: hashes."""


class Point(NamedTuple):
    """Of a curve."""

    step: int
    value: float


@dataclass(frozen=True)
class Run:
    """As far as it has come."""

    directory: Path
    """as it was named"""

    steps: int
    planned_steps: Optional[int]
    status: str
    is_finished: bool
    metric: Optional[str] = None
    """the main one, such as `accuracy`"""

    scores: List[Point] = field(default_factory=list)
    losses: List[Point] = field(default_factory=list)
    figures: Mapping[str, float] = field(default_factory=dict)
    """by name: those of `all_results.json`, and `best` and `last` of the metric"""

    wire_bytes: Sequence[int] = ()
    """up to and with each step, both ways; empty where that is not known"""

    options: Mapping[str, str] = field(default_factory=dict)
    knows_options: bool = True

    @property
    def task(self) -> Optional[str]:
        """What was learnt."""
        return self.options.get("task")

    def bytes_at(self, step: int) -> Optional[int]:
        """What training had moved by then, both ways."""
        return self.wire_bytes[min(step, len(self.wire_bytes)) - 1] if self.wire_bytes and step > 0 else None


class _Found(NamedTuple):
    """What one place in the directory says of the run."""

    steps: int
    state: Mapping[str, Any]
    results: Mapping[str, float]
    wire_bytes: Sequence[int]
    options: Mapping[str, Any]
    where: str


def read_run(directory: Path) -> Run:
    """Raises CheckpointError where there is none, or what there is cannot be read."""
    results, state = read_if_there(directory / RESULTS), read_if_there(directory / HISTORY)
    saved = _newest_checkpoint(directory)
    found = [_ended(directory, results, state)] if results is not None or state is not None else []
    if saved is not None:
        found.append(_saved(saved))
    if not found:
        raise CheckpointError(_no_run(directory))
    # A run that was broken off and goes on has what it left then, and newer checkpoints.
    best = max(found, key=lambda one: (one.steps, bool(one.results)))
    return _run(directory, best, _options(directory, best))


def _ended(directory: Path, results: Optional[Dict[str, Any]], state: Optional[Dict[str, Any]]) -> _Found:
    figures = numbers(results or {})
    steps = max(int(number((state or {}).get("global_step")) or figures.get("train_steps", 0)), 0)
    if figures.get("train_steps", steps) != steps:  # of an attempt before the one whose history this is
        figures = {}
    wire_bytes = read_ledger(directory / LEDGER) if figures and (directory / LEDGER).is_file() else []
    return _Found(steps, state or {}, figures, wire_bytes, {}, "")


def _saved(directory: Path) -> _Found:
    """Of a checkpoint: the figures that the run would have written had it ended there."""
    state = read_json(directory / STATE)
    loop, moved = _mapping(state.get("loop")), numbers(_mapping(state.get("evaluation")))
    trainer = _mapping(loop.get("trainer_state"))
    figures = {f"eval_wire_{name}": count for name, count in moved.items() if name.startswith("bytes_")}
    seconds = number(loop.get("seconds"))
    if seconds is not None:
        figures["train_runtime"] = seconds
    losses = loop.get("all_losses")
    total, count = map(number, losses) if isinstance(losses, list) and len(losses) == 2 else (None, None)
    if total is not None and count:
        figures["train_loss"] = total / count
    columns = read_saved_ledger(directory / SAVED_LEDGER) if (directory / SAVED_LEDGER).is_file() else {}
    figures.update({f"{phase}_seconds": sum(columns[phase]) for phase in PHASES if phase in columns})
    sent, received = columns.get("bytes_sent", []), columns.get("bytes_received", [])
    if columns:
        figures.update({"wire_bytes_sent": sum(sent), "wire_bytes_received": sum(received)})
        figures["train_samples"] = sum(columns.get("samples", []))
    wire_bytes = [int(count) for count in accumulate(map(sum, zip(sent, received)))]
    like = {name.lstrip("-").replace("-", "_"): value for name, value in _mapping(state.get("likeness")).items()}
    options = {name: value for name, value in like.items() if name not in _NOT_OPTIONS}
    figures = numbers(figures)  # sums of such may be none
    return _Found(int(number(trainer.get("global_step")) or 0), trainer, figures, wire_bytes, options, directory.name)


def _run(directory: Path, found: _Found, options: Dict[str, str]) -> Run:
    history = list(entries(found.state.get("log_history")))
    planned = number(found.state.get("max_steps"))
    metric = _main_metric(history, found.results, number(found.state.get("best_metric")))
    scores = _points(history, metric)
    if not scores and metric in found.results:
        scores = [Point(found.steps, found.results[metric])]
    is_finished = bool(found.results) and not found.where and found.steps >= (planned or 0)
    is_finished = is_finished and bool(scores) and scores[-1].step == found.steps
    figures = {**found.results, "steps": found.steps}
    losses, eval_losses = _points(history, "loss"), _points(history, "eval_loss")
    if losses:
        figures["loss"] = losses[-1].value
    if eval_losses:
        figures["eval_loss"] = eval_losses[-1].value
    if scores:
        figures.update(best=max(point.value for point in scores), last=scores[-1].value)
    return Run(
        directory=directory,
        steps=found.steps,
        planned_steps=int(planned) if planned else None,
        status="finished" if is_finished else _how_far(directory, found, planned),
        is_finished=is_finished,
        metric=metric[len("eval_") :] or None,
        scores=scores,
        losses=losses,
        figures=figures,
        wire_bytes=found.wire_bytes,
        options=options,
        knows_options=bool(found.options) or (directory / OPTIONS_FILE).is_file(),
    )


def _how_far(directory: Path, found: _Found, planned: Optional[float]) -> str:
    if (directory / LEFT).is_file():
        return "left to the cloud"
    if found.where:
        return f"unfinished: {found.where}"
    if planned is None or found.steps < planned:
        return "unfinished"
    return "not evaluated" if found.results else f"without {RESULTS}"


def _points(history: Sequence[Mapping[str, float]], name: str) -> List[Point]:
    return [Point(int(entry["step"]), entry[name]) for entry in history if name in entry]


def _main_metric(history: Sequence[Mapping[str, float]], results: Mapping[str, float], best: Optional[float]) -> str:
    """What the task's best value is of, which no file says by name; empty where nothing was evaluated."""
    highest: Dict[str, float] = {}
    for entry in [*history, results]:
        for name, value in entry.items():
            if name.startswith("eval_") and "wire" not in name and name[len("eval_") :] not in _NO_METRICS:
                highest[name] = max(value, highest.get(name, value))
    if "eval_exact_match" in highest:  # of SQuAD, where both may be equal
        return "eval_f1"
    return next((name for name, value in highest.items() if value == best), next(iter(highest), ""))


def _options(directory: Path, found: _Found) -> Dict[str, str]:
    """What the run was trained with: the most that any of its files says."""
    given = read_if_there(directory / OPTIONS_FILE) or {}
    values: Dict[str, Any] = {**(read_if_there(directory / DESCRIPTION) or {}), **found.options, **given}
    values["model"] = values.get("model") or values.get("from_config") or values.pop("base_model", None)
    for name in ("base_model", "from_config", "head", "label_names", "text_fields"):  # other words for what is there
        values.pop(name, None)
    local = values.get("mode") == "local"
    if values.get("wire_dtype") in (None, "None"):
        values["wire_dtype"] = "float32"
    if values.get("codec") in (None, "None"):
        values["codec"] = values["wire_dtype"]
    for name in ("wire_dtype", "codec", "gradient_codec", "activations", "labels", "freeze_edge") if local else ():
        values.pop(name, None)  # of a wire that is not there
    for name in ("split_layer", "split_rank"):  # as they came out, where the run has ended
        if name in found.results:
            values[name] = int(found.results[name])
        elif "train_steps" in found.results:
            values.pop(name, None)
    return {short(name): option_text(value) for name, value in list(values.items())[:MAX_OPTIONS]}


def _newest_checkpoint(directory: Path) -> Optional[Path]:
    """Of those that are whole; what is not has no manifest."""
    whole = [
        path
        for path in directory.glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d{1,18}", path.name)
        and all((path / name).is_file() for name in (STATE, MANIFEST))
    ]
    return max(whole, key=lambda path: int(path.name.partition("-")[2]), default=None)


def _no_run(directory: Path) -> str:
    if not directory.is_dir():
        return f"{directory} is {'not a directory' if directory.exists() else 'not there'}: name what a run left"
    inside = sorted(path.parent.name for path in directory.glob(f"*/{RESULTS}"))
    more = f"; there are runs in it: name {directory / inside[0]}" if inside else ""
    return f"{directory} is no run: it holds neither {RESULTS} nor {HISTORY} nor a checkpoint{more}"


def _mapping(value: object) -> Dict[str, Any]:
    return value if isinstance(value, dict) else {}
