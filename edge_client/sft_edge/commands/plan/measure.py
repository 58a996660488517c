"""What the steps of every cut take, here and on the cloud, by sessions at two of them; and what the link does."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from sft.plan.equation_4 import Way
from sft.plan.grid import Grid
from sft_edge.commands.doctor.server import Way as Probed
from sft_edge.commands.plan.sessions import Sample, Taken, Trial
from sft_edge.commands.plan.ways import ends
from sft_edge.link import on_link
from sft_edge.options import CutOptions


class Extra(NamedTuple):
    """What a code takes more than that which the blocks were measured with, in seconds a token."""

    edge: float = 0.0
    processor: float = 0.0
    cloud: float = 0.0


NO_EXTRA = Extra()


class Times:
    """Seconds of a step of one epoch, by cut and length."""

    def __init__(self, samples: Mapping[Tuple[int, int], Sample], extras: Mapping[str, Extra]) -> None:
        """`extras`: by code."""
        self.edge = Grid({at: sample.edge for at, sample in samples.items()})
        self.processor = Grid({at: sample.processor for at, sample in samples.items()})
        self.cloud = Grid({at: sample.cloud for at, sample in samples.items()})
        self.extras = extras


@dataclass(frozen=True)
class Measured:
    """Of one mode."""

    first: Times
    later: Times
    """From the second epoch on."""

    memory: Grid
    """Bytes of the edge's process at its largest, on the longest batches; by cut."""

    is_ahead: bool
    samples: Mapping[Tuple[int, int], Sample]
    """Of the first epoch, by cut and length."""

    tables_bytes: float
    """Of a codec that is fitted."""


def measure(
    trial: Trial, ways: Sequence[CutOptions], on_status: Callable[[str], None] = lambda text: None
) -> Dict[str, Measured]:
    """By mode. Raises any SFTError."""
    modes = dict.fromkeys(way.mode for way in ways)
    return {mode: _of_mode(trial, [way for way in ways if way.mode == mode], on_status) for mode in modes}


def _of_mode(trial: Trial, ways: Sequence[CutOptions], on_status: Callable[[str], None]) -> Measured:
    low, high = ends([_layer(way) for way in ways])
    lengths, longest = trial.batches.measured, trial.batches.measured[-1]
    of_cut = {_layer(way): way for way in reversed(ways)}  # of each cut the first
    taken: Dict[int, Taken] = {}
    for layer in dict.fromkeys((low, high)):
        on_status(f"measuring {_said(of_cut[layer])}")
        taken[layer] = trial.take(of_cut[layer], lengths)
    first, later, tables = {of_cut[low].codec: NO_EXTRA}, {of_cut[low].codec: NO_EXTRA}, taken[low].tables_bytes
    for way in ways:
        # At the width of a rank what a code takes is not to be seen.
        if way.mode != "sft" and _layer(way) == low and way.codec not in first:
            on_status(f"measuring {_said(way)}")
            other, tokens = trial.take(way, [longest]), trial.batches.tokens_of(longest)
            first[way.codec] = _extra(taken[low].first[longest], other.first[longest], tokens)
            later[way.codec] = _extra(taken[low].later[longest], other.later[longest], tokens)
            tables = max(tables, other.tables_bytes)
    at = [(layer, length) for layer in taken for length in lengths]
    samples = {(layer, length): taken[layer].first[length] for layer, length in at}
    return Measured(
        Times(samples, {str(codec): extra for codec, extra in first.items()}),
        Times(
            {(layer, length): taken[layer].later[length] for layer, length in at},
            {str(codec): extra for codec, extra in later.items()},
        ),
        Grid({(layer, longest): one.memory for layer, one in taken.items()}),
        taken[low].is_ahead,
        samples,
        tables,
    )


def _layer(way: CutOptions) -> int:
    """0 where nothing is cut."""
    return int(way.split_layer or 0)


def _extra(base: Sample, other: Sample, tokens: int) -> Extra:
    differences = (other.edge - base.edge, other.processor - base.processor, other.cloud - base.cloud)
    return Extra(*(difference / tokens for difference in differences))


def _said(way: CutOptions) -> str:
    words: List[str] = [way.mode]
    words += [f"l={way.split_layer}"] if way.split_layer else []
    words += [f"R={way.split_rank}"] if way.mode == "sft" else []
    return " ".join([*words, *([way.codec] if way.codec else [])])


def way_of(
    probed: Probed, measured: Sequence[Measured], answers: int, max_mbit: Optional[float], is_apart: bool
) -> Way:
    """The link: its rates as probes have them, and its delay as steps have it, each of which waits for so many answers:
    what it takes to write a message, and to read it, is in that."""
    delays: List[float] = []
    for of_mode in measured:
        for sample in of_mode.samples.values():
            if sample.sent:
                moving = sample.sent / probed.up_bytes_per_second + sample.received / probed.down_bytes_per_second
                delays.append((sample.link - moving) / answers)
    delay = sorted(delays)[len(delays) // 2] if delays else probed.delay_seconds
    held_to = math.inf if max_mbit is None else max_mbit * 1e6 / 8 / on_link(1.0, 0.0)
    return Way(max(delay, 0.0), probed.up_bytes_per_second, probed.down_bytes_per_second, held_to, is_apart)
