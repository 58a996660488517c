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
    cloud: float = 0.0


NO_EXTRA = Extra()

_HELD = 0.5
"""Of the time that a step took: one whose bytes took more of it at the rate that the link is held to may have waited
for its turn."""


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
    sends_once: bool
    """As the system says: a cloud may keep nothing of what it is asked to keep."""
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
    base = taken[high]
    code, tables = of_cut[high].written_in, base.tables_bytes
    first, later = {code: NO_EXTRA}, {code: NO_EXTRA}
    for way in ways:
        # At the width of a rank what a code takes is not to be seen. Elsewhere it is little beside what blocks take, of
        # which the cloud has the fewest where the cut is high.
        if way.mode != "sft" and _layer(way) == high and way.written_in not in first:
            on_status(f"measuring {_said(way)}")
            other, tokens = trial.take(way, [longest]), trial.batches.tokens_of(longest) * trial.batches.in_step
            longer = other.coding - base.coding
            first[way.written_in] = _extra(base.first[longest], other.first[longest], longer, tokens)
            longer = 0.0 if base.sends_once or way.activations == "keep-on-edge" else longer  # written once
            later[way.written_in] = _extra(base.later[longest], other.later[longest], longer, tokens)
            tables = max(tables, other.tables_bytes)
    at = [(layer, length) for layer in taken for length in lengths]
    samples = {(layer, length): taken[layer].first[length] for layer, length in at}
    return Measured(
        Times(samples, first),
        Times({(layer, length): taken[layer].later[length] for layer, length in at}, later),
        Grid({(layer, longest): one.memory for layer, one in taken.items()}),
        base.is_ahead,
        base.sends_once,
        samples,
        tables,
    )


def _layer(way: CutOptions) -> int:
    """0 where nothing is cut."""
    return int(way.split_layer or 0)


def _extra(base: Sample, other: Sample, coding: float, tokens: int) -> Extra:
    """`coding`: seconds that the edge writes and reads longer in so many tokens."""
    return Extra(coding / tokens, (other.cloud - base.cloud) / tokens)


def _said(way: CutOptions) -> str:
    words: List[str] = [way.mode]
    words += [f"l={way.split_layer}"] if way.split_layer else []
    words += [f"R={way.split_rank}"] if way.mode == "sft" else []
    return " ".join([*words, *([way.codec] if way.codec else [])])


def way_of(
    probed: Probed, measured: Sequence[Measured], answers: int, max_mbit: Optional[float], is_apart: bool
) -> Way:
    """The link: its rates as probes have them, and its delay as steps have it, each of which waits for so many answers:
    what it takes to write a message, and to read it, is in that. Steps that `max_mbit` held back say nothing of it."""
    held_to = math.inf if max_mbit is None else max_mbit * 1e6 / 8 / on_link(1.0, 0.0)
    delays: List[float] = []
    for of_mode in measured:
        for sample in of_mode.samples.values():
            held_seconds = max(sample.sent, sample.received) / held_to
            if sample.sent and held_seconds < _HELD * sample.seconds:
                moving = sample.sent / probed.up_bytes_per_second + sample.received / probed.down_bytes_per_second
                delays.append((sample.link - moving) / answers)
    delay = sorted(delays)[len(delays) // 2] if delays else probed.delay_seconds
    return Way(max(delay, 0.0), probed.up_bytes_per_second, probed.down_bytes_per_second, held_to, is_apart)
