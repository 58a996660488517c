"""Options of an edge on a metered or a narrow link: how much a run may move, and how fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from sft.cli.options import above_zero, at_least
from sft.cli.sizes import Size

SLOWEST_MBIT = 0.3
"""A cloud takes a large message that comes more slowly for one that will never be whole."""


@dataclass
class BudgetOptions:
    """What the run may take of the link."""

    data_cap: Optional[Size] = None
    """most bytes that the whole run may move, both ways, such as 2GB: everything counts, also what a run that goes on
    had moved before, and what is wrapped around it; training ends early enough to bring the model home, with a
    checkpoint to go on from and exit code 9"""

    max_mbit: Optional[float] = None
    """most megabits a second that are sent, and as many that are received, as a mean over a few seconds; from 0.3 on"""

    def __post_init__(self) -> None:
        above_zero(self, "data_cap")
        at_least(self, SLOWEST_MBIT, "max_mbit")
