"""Ways to train, each with what it will take; which of them are within limits, and which is best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple


@dataclass(frozen=True)
class Plan:
    """A way to train."""

    mode: str
    """As `--mode` spells it."""

    split_layer: int
    """The paper's l; 0 where nothing is cut."""

    split_rank: int
    """The paper's R; 0 where nothing is decomposed."""

    codec: str
    """Of activations; empty where nothing crosses."""

    step_seconds: float
    """Of a step, on average, of the first epoch."""

    later_step_seconds: float
    """The same from the second epoch on."""

    run_seconds: float
    """Of all steps, and of what the link carries before and after them."""

    step_bytes: float
    """On the link, both ways, of a step of the first epoch, on average."""

    run_bytes: float
    """On the link, both ways, of all steps, evaluations, weights that the cloud lacks, and the result."""

    edge_memory_bytes: float
    """Of the edge's process at its largest."""

    edge_processor_seconds: float
    """Of the edge in all steps."""

    points: Optional[float] = None
    """Score to expect, less that of the whole model in one process, in points; None where no record says."""

    spread: Optional[float] = None
    """Nine of ten tasks are expected within so many points of that; None where no record says."""

    price: Optional[float] = None
    """Of `run_bytes`."""

    @property
    def name(self) -> str:
        """For people: `sft l=5 R=8 int8`."""
        words = [self.mode]
        words += [f"l={self.split_layer}"] if self.split_layer else []
        words += [f"R={self.split_rank}"] if self.split_rank else []
        return " ".join([*words, *([self.codec] if self.codec else [])])


class Limits(NamedTuple):
    """What a plan may take at most; None is no limit."""

    step_bytes: Optional[float] = None
    run_bytes: Optional[float] = None
    edge_memory_bytes: Optional[float] = None
    run_seconds: Optional[float] = None
    points: Optional[float] = None
    """At least so many; a plan that no record says any of does not keep to it."""

    def excess(self, plan: Plan) -> Dict[str, float]:
        """By name the limits that it does not keep to, and how far it is from each: 0.5 for half as much again.

        Of points the number that is missing, infinite where none are known.
        """
        found = {}
        for name in ("step_bytes", "run_bytes", "edge_memory_bytes", "run_seconds"):
            limit, value = getattr(self, name), getattr(plan, name)
            if limit is not None and value > limit:
                found[name] = value / limit - 1
        if self.points is not None and (plan.points is None or plan.points < self.points):
            found["points"] = float("inf") if plan.points is None else self.points - plan.points
        return found


def by_time(plans: Sequence[Plan]) -> List[Plan]:
    """The fastest run first; of two that are as fast, that which moves less."""
    return sorted(plans, key=lambda plan: (plan.run_seconds, plan.run_bytes))


def best(plans: Sequence[Plan], limits: Limits) -> Optional[Plan]:
    """The fastest that keeps to all limits; None where none does."""
    return next((plan for plan in by_time(plans) if not limits.excess(plan)), None)


def nearest(plans: Sequence[Plan], limits: Limits) -> Plan:
    """Of plans of which none keeps to all limits: that which breaks the fewest, and of these the least."""

    def distance(plan: Plan) -> Tuple[int, float]:
        excess = limits.excess(plan)
        return len(excess), max(excess.values(), default=0.0)

    return min(by_time(plans), key=distance)


def strictest(plans: Sequence[Plan], limits: Limits) -> Tuple[str, int]:
    """The limit that rules out the most plans, by name, and how many."""
    counts = dict.fromkeys(Limits._fields, 0)
    for plan in plans:
        for name in limits.excess(plan):
            counts[name] += 1
    name = max(counts, key=lambda one: counts[one])
    return name, counts[name]
