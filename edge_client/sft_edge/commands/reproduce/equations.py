"""Eq. 5 to 12 of the paper: as it prints them, as its own inputs give them, corrected, and with measured times.

All times are milliseconds, all traffic bytes. t(gpu, n) is an iteration of n blocks, forward and backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, Mapping, Optional

from sft_edge.commands.reproduce import paper


@dataclass(frozen=True)
class Estimate:
    """What the equations are computed from."""

    edge_block: float
    """Milliseconds of one block on the edge."""

    cloud_block: float
    blocks: int = paper.BLOCKS
    edge_blocks: int = paper.EDGE_BLOCKS

    sl_bytes: Optional[float] = None
    """That cross in an iteration of split learning, as the paper or the corrected figures count; with those below None
    where no way to a cloud is known."""

    sft_bytes: Optional[float] = None
    sl_comm: Optional[float] = None
    """Milliseconds that these bytes take."""

    sft_comm: Optional[float] = None

    @property
    def naive(self) -> float:
        """Eq. 9: the whole model on the edge."""
        return self.blocks * self.edge_block

    @property
    def computing(self) -> float:
        """Of eq. 10 and 12: both halves, one after the other."""
        return self.edge_blocks * self.edge_block + (self.blocks - self.edge_blocks) * self.cloud_block

    def split(self, comm: Optional[float]) -> Optional[float]:
        """Eq. 10 and 12, as eq. 4 has it."""
        return None if comm is None else self.computing + comm

    def values(self) -> Dict[str, Optional[float]]:
        """By the names of LINES."""
        sft = self.split(self.sft_comm)
        return {
            "t(V100, 12)": self.blocks * self.cloud_block,
            "t(V100, 1)": self.cloud_block,
            "t(XAVIER, 12)": self.naive,
            "t(XAVIER, 1)": self.edge_block,
            "SL traffic": None if self.sl_bytes is None else self.sl_bytes / 1e6,
            "SFT traffic": None if self.sft_bytes is None else self.sft_bytes / 1e6,
            "SL t_comm": self.sl_comm,
            "SFT t_comm": self.sft_comm,
            "t_naive": self.naive,
            "t_sl": self.split(self.sl_comm),
            "t_sft": sft,
            "saved": None if sft is None else 100 * (1 - sft / self.naive),
        }


LINES: Mapping[str, str] = {
    "t(V100, 12)": "(5) cloud, all blocks, ms",
    "t(V100, 1)": "(6) cloud, one block, ms",
    "t(XAVIER, 12)": "(7) edge, all blocks, ms",
    "t(XAVIER, 1)": "(8) edge, one block, ms",
    "SL traffic": "traffic of SL, MB",
    "SFT traffic": "traffic of SFT, MB",
    "SL t_comm": "its time, SL, ms",
    "SFT t_comm": "its time, SFT, ms",
    "t_naive": "(9) t_naive, ms",
    "t_sl": "(10) t_sl, ms",
    "t_sft": "(12) t_sft, ms",
    "saved": "saved by SFT, % of t_naive",
}
"""What is estimated, by the equation that does."""


def printed() -> Dict[str, Optional[float]]:
    """As the paper has it: t_sl and t_sft from what it rounded before."""
    said = paper.PRINTED
    rounded = Estimate(said["t(XAVIER, 1)"], said["t(V100, 1)"], sl_comm=said["SL t_comm"], sft_comm=said["SFT t_comm"])
    values: Dict[str, Optional[float]] = {name: said.get(name) for name in LINES}
    values["t(V100, 12)"] = paper.CLOUD_MS
    values["t(XAVIER, 12)"] = values["t_naive"] = paper.SLOWER * paper.CLOUD_MS
    values["t_sl"], values["t_sft"] = rounded.split(rounded.sl_comm), rounded.split(rounded.sft_comm)
    return values


def from_its_inputs() -> Dict[str, Optional[float]]:
    """From 124 ms, a factor of 6, and B x 3076 x N elements one way, without rounding between."""
    elements = paper.BATCH * paper.PRINTED_ROWS * paper.ELEMENT_BYTES
    return _at_the_papers_speed(elements * paper.WIDTH, elements * paper.RANK)


def corrected() -> Dict[str, Optional[float]]:
    """With what crosses: B x S x N elements up, and as many of the gradient down."""
    return _at_the_papers_speed(step_bytes(paper.WIDTH), step_bytes(paper.RANK))


def step_bytes(width: int) -> int:
    """Both ways, in float32, of the paper's batch."""
    return 2 * paper.BATCH * paper.SEQUENCE * width * paper.ELEMENT_BYTES


def _at_the_papers_speed(sl_bytes: float, sft_bytes: float) -> Dict[str, Optional[float]]:
    cloud_block = paper.CLOUD_MS / paper.BLOCKS
    return Estimate(
        paper.SLOWER * cloud_block,
        cloud_block,
        sl_bytes=sl_bytes,
        sft_bytes=sft_bytes,
        sl_comm=_milliseconds(sl_bytes),
        sft_comm=_milliseconds(sft_bytes),
    ).values()


def _milliseconds(count: float) -> float:
    """Of so many bytes at the paper's bandwidth."""
    return 8 * count / (1e6 * paper.MEGABITS_PER_SECOND) * 1e3


def remarks() -> Dict[str, str]:
    """What is wrong with the numbers, by what they are about."""
    said, block = paper.PRINTED, paper.CLOUD_MS / paper.BLOCKS
    rows, one_way = paper.PRINTED_ROWS, step_bytes(paper.WIDTH) / 2e6
    counted = paper.BATCH * rows * paper.ELEMENT_BYTES * paper.WIDTH / 1e6
    saved = 100 * (1 - said["t_sft"] / said["t_naive"])
    return {
        "(8)": f"6 x 10.3 is {paper.SLOWER * said['t(V100, 1)']:.1f}, and 6 x 124/12 is {paper.SLOWER * block:.1f}; "
        f"the printed {said['t(XAVIER, 1)']} is neither, and (10) and (12) go on with it",
        "traffic": f"{paper.BATCH} x {rows} x {paper.WIDTH} x 4 bytes are {counted:.1f} MB, or "
        f"{counted / 1.048576:.1f} MiB. {rows} is a misprint of the FFN's {paper.FFN_WIDTH}, which does not cross: the "
        f"{paper.SEQUENCE} tokens of the sequence do, {one_way:.2f} MB up and as much down",
        "SFT": f"288/96 is {said['SL traffic'] / (paper.WIDTH / paper.RANK):g}, not the printed "
        f"{said['SFT traffic']:g}: the {said['SFT t_comm']:g} ms of (12) belong to 3 MB",
        "saved": f"647.6 of 744 is {saved:.1f} % less, not 14 %",
        "numbers": "there is no (11)",
    }
