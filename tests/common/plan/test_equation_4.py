"""The estimate of a step, by numbers that are worked out by hand."""

import math

import pytest

from sft.plan.equation_4 import Step, Way, moving_seconds, of_run, step_seconds, unbroken_step_seconds

WAY = Way(delay=0.02, up=1e6, down=2e6)
STEP = Step(edge=0.5, cloud=0.3, sent=100_000, received=40_000, answers=1)


def test_each_waits_for_the_other():
    assert step_seconds(STEP, WAY) == pytest.approx(0.5 + 0.3 + 0.02 + 0.1 + 0.02)


def test_the_papers_own_numbers():
    """Eq. 9 and 12: eleven blocks on the edge, one on the cloud, 24 ms for 3 MB; one process is the edge alone."""
    way = Way(delay=0.0, up=math.inf, down=3e6 / 0.024)
    sft = step_seconds(Step(edge=11 * 0.0568, cloud=0.0103 - 0.0115, received=3e6, answers=1), way)
    assert sft == pytest.approx(0.6476, abs=1e-6)
    assert step_seconds(Step(edge=0.744), way) == 0.744


def test_every_micro_batch_waits_for_its_answers():
    one, four = (step_seconds(STEP._replace(answers=answers), WAY) for answers in (1, 4))
    assert four - one == pytest.approx(3 * 0.02)


@pytest.mark.parametrize(
    ("step", "seconds"),
    [
        (STEP, 0.5),
        (STEP._replace(cloud=0.7), 0.7),
        (STEP._replace(sent=900_000), 0.9),
        (STEP._replace(received=1_700_000), 0.85),
    ],
)
def test_sent_ahead_the_slowest_sets_the_pace(step, seconds):
    assert step_seconds(step, WAY, ahead=16) == pytest.approx(seconds)


def test_sent_ahead_by_few_steps_on_a_long_way():
    far = WAY._replace(delay=3.0)
    assert step_seconds(STEP, far, ahead=2) == pytest.approx(step_seconds(STEP, far) / 2)


def test_on_one_machine_edge_and_cloud_take_turns():
    assert step_seconds(STEP, WAY._replace(is_apart=False), ahead=16) == pytest.approx(0.8)


def test_the_first_of_few_steps_finds_nothing_on_its_way():
    """By hand: 0.5 s of the edge each, and after the last one of ten 0.44 s until its answer is here."""
    assert unbroken_step_seconds(STEP, WAY, 10, ahead=16) == pytest.approx((10 * 0.5 + 0.44) / 10)
    assert unbroken_step_seconds(STEP, WAY, 1, ahead=16) == pytest.approx(step_seconds(STEP, WAY))
    assert unbroken_step_seconds(STEP, WAY, 10) == step_seconds(STEP, WAY), "each waits for the other in any case"


@pytest.mark.parametrize("ahead", [0, 8])
def test_a_link_that_is_held_to_a_rate(ahead):
    held = WAY._replace(held_to=50_000.0)
    assert step_seconds(STEP, held, ahead) == pytest.approx(2.0)
    assert step_seconds(STEP, WAY._replace(held_to=1e9), ahead) == step_seconds(STEP, WAY, ahead)


@pytest.mark.parametrize("ahead", [0, 4])
@pytest.mark.parametrize("name", ["edge", "cloud", "sent", "received", "answers"])
def test_more_of_anything_never_takes_less(name, ahead):
    times = [step_seconds(STEP._replace(**{name: getattr(STEP, name) * factor}), WAY, ahead) for factor in (1, 2, 500)]
    assert times == sorted(times)
    assert times[0] < times[2]


@pytest.mark.parametrize(("steps", "seconds"), [(10, 20.0), (100, 200.0), (300, 200.0 + 200 * 0.5)])
def test_later_epochs_may_be_shorter(steps, seconds):
    assert of_run(steps, first=2.0, in_first_epoch=100, later=0.5, beside=7.0) == pytest.approx(seconds + 7.0)


def test_what_nothing_waits_for():
    assert moving_seconds(3e6, 4e6, WAY) == pytest.approx(3.0 + 2.0)
    assert moving_seconds(3e6, 4e6, WAY._replace(held_to=1e6)) == pytest.approx(3.0 + 4.0)
