"""Which plan is best within limits, and what is said where none is."""

from dataclasses import replace

import pytest

from sft.plan.plans import Limits, Plan, best, nearest, strictest

FAST = Plan("sft", 2, 8, "int8", 0.1, 0.1, 100.0, 2000.0, 9e6, 5e8, 40.0, points=-8.0, spread=4.0)
SMALL = replace(FAST, split_layer=5, run_seconds=200.0, edge_memory_bytes=9e8, points=-0.4)
FROZEN = replace(FAST, mode="frozen", split_rank=0, codec="fitted", run_seconds=150.0, run_bytes=4e6, points=None)
PLANS = [SMALL, FAST, FROZEN]


@pytest.mark.parametrize(
    ("limits", "plan"),
    [
        (Limits(), FAST),
        (Limits(run_bytes=5e6), FROZEN),
        (Limits(points=-1.0), SMALL),
        (Limits(points=-10.0), FAST),
        (Limits(points=-10.0, run_bytes=5e6), None),
        (Limits(run_seconds=99.0), None),
        (Limits(run_seconds=100.0, edge_memory_bytes=5e8, step_bytes=2000.0), FAST),
    ],
)
def test_the_fastest_within_limits(limits, plan):
    assert best(PLANS, limits) == plan


def test_of_two_as_fast_the_one_that_moves_less():
    less = replace(FAST, codec="int4", run_bytes=5e6)
    assert best([FAST, less], Limits()) == less


def test_what_no_record_speaks_of_is_not_chosen_for_its_accuracy():
    assert best([FROZEN], Limits(points=-100.0)) is None
    assert Limits(points=-100.0).excess(FROZEN) == {"points": float("inf")}


def test_how_far_a_plan_is_from_its_limits():
    found = Limits(run_seconds=50.0, run_bytes=9e6, points=-1.0).excess(FAST)
    assert found == {"run_seconds": pytest.approx(1.0), "points": pytest.approx(7.0)}


def test_the_nearest_and_the_limit_that_is_the_strictest():
    limits = Limits(run_seconds=90.0, points=-1.0)
    assert strictest(PLANS, limits) == ("run_seconds", 3)
    assert nearest(PLANS, limits) == SMALL, "it breaks one limit"
    assert nearest(PLANS, Limits(run_seconds=90.0)) == FAST, "it breaks it by the least"


def test_names():
    whole = replace(FAST, mode="local", split_layer=0, split_rank=0, codec="")
    assert [plan.name for plan in (FAST, FROZEN, whole)] == ["sft l=2 R=8 int8", "frozen l=2 fitted", "local"]
