"""What lies between cuts and lengths that were measured."""

import pytest

from sft.plan.grid import Grid

MEASURED = {(1, 10): 2.0, (1, 30): 4.0, (5, 10): 6.0, (5, 30): 16.0}


@pytest.mark.parametrize(
    ("cut", "length", "value"),
    [(1, 10, 2.0), (5, 30, 16.0), (1, 20, 3.0), (3, 10, 4.0), (3, 20, 7.0), (6, 10, 7.0), (1, 40, 5.0), (1, 5, 1.5)],
)
def test_it_is_linear_in_both(cut, length, value):
    assert Grid(MEASURED).at(cut, length) == pytest.approx(value)


def test_three_lengths_bend():
    grid = Grid({(1, 10): 1.0, (1, 20): 2.0, (1, 40): 8.0})
    assert [grid.at(1, length) for length in (15, 30, 50)] == pytest.approx([1.5, 5.0, 11.0])


def test_one_cut_stands_for_all_and_nothing_is_below_zero():
    grid = Grid({(0, 10): 1.0, (0, 20): 3.0})
    assert grid.at(7, 15) == grid.at(0, 15) == 2.0
    assert grid.at(0, 1) == 0.0


def test_the_mean_is_that_of_the_times_and_not_the_time_of_the_mean():
    grid = Grid({(1, 10): 1.0, (1, 20): 2.0, (1, 40): 8.0})
    assert grid.mean(1, [(10, 1.0), (40, 1.0)]) == pytest.approx(4.5)
    assert grid.at(1, 25) == pytest.approx(3.5)
    assert grid.mean(1, [(10, 1.0), (40, 0.5)]) == pytest.approx(2.5)
