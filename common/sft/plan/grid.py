"""A figure that was measured at a few cuts and lengths, known for all of them: blocks are alike."""

from __future__ import annotations

from typing import Dict, List, Mapping, Sequence, Tuple


class Grid:
    """Linear between cuts that were measured, and beyond them; what is below the blocks is in it, and what is above.

    Linear between lengths, too: what grows with the square of a length bends in between.
    """

    def __init__(self, measured: Mapping[Tuple[int, int], float]) -> None:
        """By cut and padded length; of each cut at least one length. Of one cut alone, all others are taken for it."""
        self._by_cut: Dict[int, List[Tuple[float, float]]] = {}
        for (cut, length), value in sorted(measured.items()):
            self._by_cut.setdefault(cut, []).append((length, value))

    def at(self, cut: int, length: float) -> float:
        """Never below 0."""
        return max(0.0, between([(known, between(points, length)) for known, points in self._by_cut.items()], cut))

    def mean(self, cut: int, batches: Sequence[Tuple[float, float]]) -> float:
        """Of batches by their padded length and how much of a full batch they are: a half of one counts for half."""
        return sum(share * self.at(cut, length) for length, share in batches) / max(len(batches), 1)


def between(points: Sequence[Tuple[float, float]], x: float) -> float:
    """By the line through the two points next to `x`, or the last two on its side; `points` by growing x."""
    if len(points) == 1:
        return points[0][1]
    right = next((index for index, (at, _) in enumerate(points) if at >= x and index), len(points) - 1)
    (x_0, y_0), (x_1, y_1) = points[right - 1], points[right]
    return y_0 + (y_1 - y_0) * (x - x_0) / (x_1 - x_0)
