"""What to expect of a task that is not on record."""

import random
from typing import List

import pytest

from sft.plan.expected import Recorded, expected, student_t


def runs(depth: float, **tasks: List[float]) -> List[Recorded]:
    return [Recorded(task, depth, points) for task, all_points in tasks.items() for points in all_points]


def test_tasks_count_alike_and_the_interval_is_students():
    found = expected(runs(0.5, a=[-1.0], b=[-2.0], c=[-6.0]), 0.5)
    assert found.points == pytest.approx(-3.0)
    assert found.spread == pytest.approx(2.920 * (7.0 * 4 / 3) ** 0.5)  # s^2 is 7, and t of 2


def test_seeds_are_no_tasks():
    """A task of many seeds counts once; that seeds differ is in the spread of a single run."""
    found = expected(runs(0.5, a=[-1.0, -3.0], b=[-4.0, -6.0]), 0.5)
    assert found.points == pytest.approx(-3.5)
    assert found.spread == pytest.approx(6.314 * (4.5 * 1.5 + 2.0 * 0.5) ** 0.5)


def test_a_single_task_has_no_spread_and_none_nothing():
    assert expected(runs(0.5, a=[-1.0, -2.0]), 0.5) == (-1.5, None)
    assert expected([], 0.5) is None


def test_between_two_depths_it_is_linear_and_beyond_them_nothing_is_known():
    some = runs(1 / 3, a=[-6.0]) + runs(5 / 6, a=[-1.0])
    assert expected(some, 2 / 3).points == pytest.approx(-6.0 + 5.0 * 2 / 3)
    assert expected(some, 4 / 12).points == pytest.approx(-6.0)
    assert expected(some, 1 / 6) is None
    assert expected(some, 1.0) is None


def test_a_task_with_runs_on_one_side_alone_is_left_out():
    some = runs(1 / 3, a=[-6.0], b=[-50.0]) + runs(2 / 3, a=[-2.0])
    assert expected(some, 0.5) == (pytest.approx(-4.0), None)


def test_nine_of_ten_other_tasks_are_within_the_spread():
    draw, within, tries = random.Random(0), 0, 500
    for _ in range(tries):
        effects = [draw.gauss(-2.0, 1.0) for _ in range(5)]
        known = {f"t{task}": [draw.gauss(effect, 0.5) for _ in range(3)] for task, effect in enumerate(effects)}
        found = expected(runs(0.5, **known), 0.5)
        another = draw.gauss(draw.gauss(-2.0, 1.0), 0.5)
        within += abs(another - found.points) <= found.spread
    assert within / tries == pytest.approx(0.9, abs=0.03)


@pytest.mark.parametrize(("freedom", "t"), [(1, 6.314), (9, 1.833), (10, 1.812), (20, 1.725), (1000, 1.646)])
def test_students_t(freedom, t):
    assert student_t(freedom) == pytest.approx(t, rel=0.01)
