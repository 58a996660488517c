"""What accuracy to expect of a task that was not tried, from runs of tasks that were."""

from __future__ import annotations

import math
import statistics
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

from sft.plan.grid import between

_SAME_DEPTH = 0.01
"""Relative: of two cuts that are one, of models with another number of blocks."""

_T_95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833)
"""Student's t of 95%, by degrees of freedom from 1 on."""

_Z_95 = 1.645


class Recorded(NamedTuple):
    """A run that was made, and what it lost."""

    task: str
    depth: float
    """Of the cut: the block, counted from 1, by the number of blocks."""
    points: float
    """Its score, less that of the whole model with the same seed and settings."""


class Expected(NamedTuple):
    """Of a task that is not in the record."""

    points: float
    spread: Optional[float]
    """Half of a 90% prediction interval for one run of it; None where one task alone is in the record."""


def expected(runs: Sequence[Recorded], depth: float) -> Optional[Expected]:
    """Of a cut at that depth, by runs of one way to train; None where no task has runs at it, or on both sides.

    Each task counts once, by the mean of its seeds. Between two depths of a task its loss is taken to be linear. With
    T tasks whose means have the variance s^2, and seeds of a task the variance w^2, m of them, a run of another task is
    within t(T - 1) sqrt(s^2 (1 + 1/T) + w^2 (1 - 1/m)) of their mean.
    """
    means, groups = _by_task(runs, depth)
    if not means:
        return None
    points, tasks = statistics.fmean(means), len(means)
    if tasks == 1:
        return Expected(points, None)
    between_tasks, seeds = statistics.variance(means), statistics.fmean(map(len, groups))
    freedom = sum(len(group) - 1 for group in groups)
    of_seeds = sum(statistics.pvariance(group) * len(group) for group in groups) / freedom if freedom else 0.0
    variance = between_tasks * (1 + 1 / tasks) + of_seeds * (1 - 1 / seeds)
    return Expected(points, student_t(tasks - 1) * math.sqrt(variance))


def student_t(freedom: int) -> float:
    """Its 95% quantile: 5% of numbers are above."""
    if freedom <= len(_T_95):
        return _T_95[freedom - 1]
    return _Z_95 + (_Z_95**3 + _Z_95) / (4 * freedom)  # the first term of Fisher's expansion


def _by_task(runs: Sequence[Recorded], depth: float) -> Tuple[List[float], List[List[float]]]:
    """The mean of each task at that depth, and the runs, by seed, that these are of."""
    means: List[float] = []
    groups: List[List[float]] = []
    for task in dict.fromkeys(run.task for run in runs):
        at: Dict[float, List[float]] = {}
        for run in runs:
            if run.task == task:
                at.setdefault(round(run.depth, 9), []).append(run.points)
        same = [known for known in at if abs(known - depth) <= _SAME_DEPTH]
        sides = [max((d for d in at if d < depth), default=None), min((d for d in at if d > depth), default=None)]
        used = same[:1] or [side for side in sides if side is not None]
        if len(used) < 2 - bool(same):
            continue
        means.append(between([(known, statistics.fmean(at[known])) for known in used], depth))
        groups += [at[known] for known in used]
    return means, groups
