"""The charts of `sft-edge compare`: axes that people can read, and every point where it belongs."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import List

import pytest
from support.left_by_runs import leave_run

from sft.printable import format_bytes
from sft_edge.commands.compare import svg
from sft_edge.commands.compare.charts import charts_of, picture
from sft_edge.commands.compare.columns import columns_of
from sft_edge.commands.compare.comparison import Comparison, compared
from sft_edge.commands.compare.page import page_of


def comparison_of(*directories: Path, group_seeds: bool = False) -> Comparison:
    return compared(*columns_of(directories, None, group_seeds))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (62.5, 75.1, [60, 65, 70, 75, 80]),
        (0.497, 0.702, [0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75]),
        (0, 60, [0, 20, 40, 60]),
        (0, 1234, [0, 250, 500, 750, 1000, 1250]),
        (-3, 4, [-4, -2, 0, 2, 4]),
        (80, 80, [76, 78, 80, 82, 84]),
        (0, 0, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks_are_round_numbers_around_all_values(low: float, high: float, expected: List[float]) -> None:
    assert svg.ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("low", "high", "ends", "expected"),
    [
        (78e3, 5.4e6, ("50 kB", "10 MB"), ["100 kB", "1 MB", "10 MB"]),
        (3e3, 9e3, ("2 kB", "10 kB"), ["2 kB", "5 kB", "10 kB"]),
        (3e3, 3e3, ("2 kB", "5 kB"), ["2 kB", "5 kB"]),
        (1e3, 1e3, ("1 kB", "2 kB"), ["1 kB", "2 kB"]),
        (900, 2e12, ("500 B", "2 TB"), ["1 kB", "100 kB", "10 MB", "1 GB", "100 GB"]),
    ],
)
def test_ticks_of_bytes(low: float, high: float, ends: object, expected: List[str]) -> None:
    begin, end, ticks = svg.log_ticks(low, high)
    assert (format_bytes(begin), format_bytes(end)) == ends
    assert [format_bytes(tick) for tick in ticks] == expected


def test_every_point_says_where_it_is_and_less_is_higher_on_the_picture(tmp_path: Path) -> None:
    comparison = comparison_of(leave_run(tmp_path / "a"), leave_run(tmp_path / "b", mode="local", scores=(75.0,)))
    scores, losses = charts_of(comparison)
    assert [(spot.x, spot.y) for spot in scores.curves[0].spots] == [(3000, 60.0), (6000, 80.0), (9000, 70.0)]
    assert (scores.curves[1].level, list(scores.curves[1].spots)) == (75.0, [])
    assert [spot.x for spot in losses.curves[1].spots] == [1, 2, 3, 4, 5, 6]
    drawn = ElementTree.fromstring(picture([scores]))
    titles = {
        "".join(path.itertext()): tuple(map(float, re.findall(r"[\d.]+", path.get("transform", ""))))
        for path in drawn.iter("{http://www.w3.org/2000/svg}path")
    }
    low, high = titles["a: accuracy 60 at step 2, 3 kB"], titles["a: accuracy 80 at step 4, 6 kB"]
    assert low[0] < high[0]
    assert low[1] > high[1]
    assert titles["b: 75, and no byte on the wire"][1] == pytest.approx((3 * high[1] + low[1]) / 4, abs=0.1)


def test_seeds_are_a_mean_in_a_band(tmp_path: Path) -> None:
    runs = [leave_run(tmp_path / f"s{seed}", seed=seed, scores=(70.0, 80.0 + seed)) for seed in (0, 4)]
    comparison = comparison_of(*runs, group_seeds=True)
    (curve,) = charts_of(comparison)[0].curves
    assert [(spot.low, spot.y, spot.high) for spot in curve.spots] == [(70, 70, 70), (80, 82, 84)]
    assert "<polygon" in picture(charts_of(comparison))


def test_runs_of_one_process_are_drawn_over_steps(tmp_path: Path) -> None:
    chart = charts_of(comparison_of(leave_run(tmp_path / "a", mode="local")))[0]
    assert (chart.title, chart.is_log) == ("accuracy over steps", False)


def test_another_metric_does_not_share_an_axis(tmp_path: Path) -> None:
    other = leave_run(tmp_path / "b", task="cola", metric="matthews_correlation")
    charts = charts_of(comparison_of(leave_run(tmp_path / "a"), other))
    assert [[curve.name for curve in chart.curves] for chart in charts] == [["a"], ["a"]]


def test_forty_curves_are_told_apart(tmp_path: Path) -> None:
    assert len({svg.mark_of(index) for index in range(40)}) == 40


def test_a_long_run_is_a_small_file(tmp_path: Path) -> None:
    run = leave_run(tmp_path / "long", steps=3000, planned=3000, scores=[50.0] * 1000)
    assert len(page_of(comparison_of(run))) < 60_000


def test_the_page_has_all_of_it(tmp_path: Path) -> None:
    runs = [leave_run(tmp_path / "a", learning_rate=1e-3), leave_run(tmp_path / "b", learning_rate=2e-3)]
    page = page_of(comparison_of(*runs))
    assert page.count("<svg xmlns=") == 2
    differ, _, rest = page.partition("<h2>Options that differ</h2>")[2].partition("<h2>Figures</h2>")
    assert re.findall(r'scope="row">([^<]*)<', differ) == ["learning_rate"]
    assert "<td" in rest
    assert 'scope="row">seed</th>' in rest.partition("<details>")[2]
