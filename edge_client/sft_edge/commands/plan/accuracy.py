"""The record of what cuts lose, which comes with the package: `accuracy.json` beside this file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple

from sft.errors import CheckpointError
from sft.plan.expected import Expected, Recorded, expected
from sft_edge.commands.compare.files import number, read_json
from sft_edge.options import CutOptions

FILE = Path(__file__).with_name("accuracy.json")

_Way = Tuple[str, int, str]
"""Mode, rank (0 where nothing is decomposed) and codec."""

_OTHERS = {"--residual", "--freeze-edge", "--gradient-codec", "--wire-dtype", "--lora-r", "--labels"}
"""Flags of runs that say nothing of those without."""

NOTHING_LOST = Expected(0.0, 0.0)


@dataclass(frozen=True)
class Record:
    """Runs, by the way they were trained."""

    runs: Mapping[_Way, List[Recorded]]

    def expected(self, cut: CutOptions, blocks: int) -> Optional[Expected]:
        """Points against the whole model, of a model of so many blocks; None where the record says nothing."""
        code = cut.written_in
        if cut.residual != "none" or cut.gradient_codec not in (None, code) or _freezes_more(cut):
            return None
        if cut.mode == "local" or (cut.mode == "sl" and code == "float32"):
            return NOTHING_LOST if cut.wire_dtype in (None, "float32") else None
        rank = int(cut.split_rank) if cut.mode == "sft" else 0
        return expected(self.runs.get((cut.mode, rank, code), []), int(cut.split_layer or 0) / blocks)


def _freezes_more(cut: CutOptions) -> bool:
    return cut.freeze_edge and cut.mode != "frozen"


def read_record(path: Optional[Path] = None) -> Record:
    """That of the package, without a path. Raises CheckpointError for a file that is none."""
    path = path or FILE
    runs: Dict[_Way, List[Recorded]] = {}
    # Resolved, as there are installers that make a link of each file.
    entries = read_json(path.resolve()).get("runs")
    if not isinstance(entries, list):
        raise CheckpointError(f"{path} is no record of runs: it has no list of them")
    for index, entry in enumerate(entries):
        try:
            if _OTHERS.intersection(entry.get("flags", {})):
                continue
            way, run = _run(entry)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is no record of runs: run {index + 1} lacks {error}") from error
        runs.setdefault(way, []).append(run)
    return Record(runs)


def _run(entry: Any) -> Tuple[_Way, Recorded]:
    """Raises KeyError, TypeError and ValueError for what is none."""
    numbers = {}
    for name in ("blocks", "split_layer", "split_rank", "score", "local"):
        value = number(entry[name])
        if value is None:
            raise ValueError(f"a number for {name}")
        numbers[name] = value
    if not 1 <= numbers["split_layer"] <= numbers["blocks"]:
        raise ValueError("a split_layer among its blocks")
    way = str(entry["mode"]), int(numbers["split_rank"]), str(entry["codec"])
    depth = numbers["split_layer"] / numbers["blocks"]
    return way, Recorded(str(entry["task"]), depth, numbers["score"] - numbers["local"])
