"""What is made of the times of sessions, which are made up here; and where the cloud is."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Dict, Sequence, Tuple

import pytest
from support.jobs import run_options
from support.tiny import tiny_config

from sft.plan.equation_4 import Way
from sft.plan.grid import Grid
from sft.plan.plans import Limits, Plan
from sft_edge.commands.doctor.server import Way as Probed
from sft_edge.commands.plan.accuracy import Record
from sft_edge.commands.plan.choose import _flags
from sft_edge.commands.plan.measure import NO_EXTRA, Measured, Times, measure, way_of
from sft_edge.commands.plan.memory import Sizes
from sft_edge.commands.plan.plan import _is_apart, _nothing
from sft_edge.commands.plan.predict import Run, plans_of
from sft_edge.commands.plan.rows import Rows
from sft_edge.commands.plan.sessions import Sample, Taken
from sft_edge.options import CutOptions, LinkOptions

HEAD = "sequence-classification"

TOKENS = 100
"""Of a batch of the longest."""

CODE = {"int8": 0.02, "int4": 0.03, "float32": 0.01}
"""Seconds that the cloud reads such a batch; the edge takes as long to write it."""


class Batches:
    measured = (8, 16)
    in_step = 2

    def tokens_of(self, length: int) -> int:
        return TOKENS * length // 16


class Trial:
    """A cloud whose blocks take a second each, and in its first session a third more; it keeps what it is sent."""

    batches = Batches()

    def __init__(self) -> None:
        self.taken: list = []

    def take(self, cut: CutOptions, lengths: Sequence[int]) -> Taken:
        slow = 1.0 if self.taken else 4 / 3
        self.taken.append((cut.split_layer, cut.codec))
        code = CODE[str(cut.codec)] * self.batches.in_step
        first = {n: self._sample(cut, n, slow, code) for n in lengths}
        later = {n: self._sample(cut, n, slow, 0.0) for n in lengths}
        return Taken(first, later, 1e8, True, cut.mode == "frozen", code, 0.0)

    def _sample(self, cut: CutOptions, length: int, slow: float, code: float) -> Sample:
        blocks, share = 6 - int(cut.split_layer or 0), length / 16
        return Sample(0.5 + code, 0.5, share * (slow * blocks + code), 0.01, 1000.0, 0.0)


def measured_of(mode: str) -> Tuple[Measured, Trial]:
    trial = Trial()
    ways = [CutOptions(mode, layer, codec=codec) for layer in range(1, 7) for codec in CODE]
    return measure(trial, ways)[mode], trial  # type: ignore[arg-type]


def test_what_a_code_takes_is_seen_where_the_cloud_has_the_least_to_do_beside():
    found, trial = measured_of("sl")
    assert trial.taken == [(1, "int8"), (5, "int8"), (5, "int4"), (5, "float32")]
    for code, seconds in CODE.items():
        extra = found.first.extras[code]
        assert extra.edge * TOKENS == pytest.approx(seconds - CODE["int8"])
        assert extra.cloud * TOKENS == pytest.approx(seconds - CODE["int8"])


def test_what_is_kept_is_written_once():
    found, _ = measured_of("frozen")
    assert found.sends_once
    assert found.first.extras["int4"].edge > 0
    assert found.later.extras["int4"] == pytest.approx(NO_EXTRA)


def of_link(samples: Dict[Tuple[int, int], Sample]) -> Measured:
    times = Times(samples, {"int8": NO_EXTRA})
    return Measured(times, times, Grid({(1, 8): 1e8}), False, False, samples, 0.0)


PROBED = Probed(delay_seconds=0.01, up_bytes_per_second=1e6, down_bytes_per_second=1e6)


def test_the_delay_is_what_steps_wait_for_beside_their_bytes():
    step = Sample(edge=1.0, processor=1.0, cloud=1.0, link=0.26, sent=1e5, received=1e5)
    way = way_of(PROBED, [of_link({(1, 8): step})], 2, None, True)
    assert way.delay == pytest.approx(0.03)
    assert (way.up, way.down, way.held_to) == (1e6, 1e6, float("inf"))


def test_steps_that_waited_for_their_turn_say_nothing_of_the_delay():
    """A link that is held to 80,000 bytes a second: of the one step a tenth is its bytes' turn, of the other all."""
    free = Sample(edge=0.5, processor=1.0, cloud=0.5, link=0.03, sent=1e4, received=0.0)
    held = Sample(edge=0.5, processor=1.0, cloud=0.5, link=4.0, sent=4e5, received=0.0)
    way = way_of(PROBED, [of_link({(1, 8): free, (1, 16): held, (2, 16): held})], 1, 0.64, True)
    assert way.delay == pytest.approx(0.02)
    assert way_of(PROBED, [of_link({(1, 16): held})], 1, 0.64, True).delay == PROBED.delay_seconds


@pytest.mark.parametrize(
    ("server", "is_apart"),
    [(None, False), ("127.0.0.1:1", False), ("[::1]:1", False), ("localhost:1", False), ("cloud.example:1", True)],
)
def test_a_cloud_on_this_machine_computes_when_the_edge_does_not(server, is_apart):
    assert _is_apart(LinkOptions(server=server)) is is_apart


def test_what_is_chosen_is_told_as_one_would_type_it():
    assert _flags(CutOptions("sl", 2, wire_dtype="float16")) == "--mode sl --split-layer 2 --codec float16"
    assert _flags(CutOptions("sft", 2, 8)) == "--mode sft --split-layer 2 --split-rank 8 --codec int8"


@pytest.mark.parametrize(("accumulation", "steps", "seconds"), [(1, 5, 0.3), (4, 2, 0.75), (100, 1, 1.5)])
def test_a_step_has_as_many_micro_batches_as_an_epoch_leaves_it(accumulation, steps, seconds):
    """An epoch of five, of which each takes 0.1 s here and 0.2 s there: all of it takes 1.5 s however it is parted."""
    options = run_options(gradient_accumulation_steps=accumulation, num_train_epochs=1)
    rows = Rows([], [8] * 160, 1.0)
    batches = SimpleNamespace(
        in_epoch=5, in_step=min(accumulation, 5), shapes=[(8, 1.0)] * 5, tokens=256.0, measured=[8]
    )
    in_step = 0.1 * batches.in_step
    found = of_link({(1, 8): Sample(in_step, in_step, 2 * in_step, 0.0, 0.0, 0.0)})
    config, way = tiny_config(layers=3), Way(0.0, float("inf"), float("inf"))
    sizes = Sizes(config, HEAD, [1])
    run = Run(options, config, HEAD, rows, rows, batches, sizes, way, frozenset(), Record({}))  # type: ignore[arg-type]
    (plan,) = plans_of(run, [CutOptions("sl", 1, codec="int8")], {"sl": found})
    assert (run.steps_in_epoch, run.steps) == (steps, steps)
    assert plan.step_seconds == pytest.approx(seconds)
    assert plan.run_seconds == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("training", "evaluations", "seconds"),
    [
        ({}, 1, (0.3 + 4 * 0.2, 5 * 0.2)),
        ({"eval_strategy": "epoch"}, 2, (0.3 + 4 * 0.2, 0.3 + 4 * 0.2)),
        ({"eval_strategy": "steps", "eval_steps": 2}, 5, (5 * 0.25, 5 * 0.25)),
    ],
)
def test_after_an_evaluation_nothing_is_on_its_way(training, evaluations, seconds):
    """Two epochs of five steps of 0.1 s here and 0.2 s there, which are sent ahead."""
    options = run_options(num_train_epochs=2, **training)
    rows = Rows([], [8] * 160, 1.0)
    batches = SimpleNamespace(in_epoch=5, in_step=1, shapes=[(8, 1.0)] * 5, tokens=256.0, measured=[8])
    found = replace(of_link({(1, 8): Sample(0.1, 0.1, 0.2, 0.0, 0.0, 0.0)}), is_ahead=True)
    config, way = tiny_config(layers=3), Way(0.0, float("inf"), float("inf"))
    sizes = Sizes(config, HEAD, [1])
    run = Run(options, config, HEAD, rows, rows, batches, sizes, way, frozenset(), Record({}))  # type: ignore[arg-type]
    (plan,) = plans_of(run, [CutOptions("frozen", 1, codec="int8")], {"frozen": found})
    assert run.evaluations == evaluations
    assert (5 * plan.step_seconds, 5 * plan.later_step_seconds) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("points", "says"), [(None, "(no record says what it loses)"), (-3.2, "(-3.2 are to be expected)")]
)
def test_what_is_missing_in_points_is_said_in_words(points, says):
    plan = Plan("sft", 1, 8, "int8", 1.0, 1.0, 10.0, 100.0, 1000.0, 1e8, 10.0, points)
    assert _nothing([plan], Limits(points=-1.0)).endswith(
        f"is sft l=1 R=8 int8, which breaks --min-accuracy -1.0 {says}"
    )
