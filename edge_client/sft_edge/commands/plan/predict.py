"""From what was measured to plans: every cut, by eq. 4, with bytes, memory and the accuracy to expect."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple

from sft.plan.equation_4 import Step, Way, moving_seconds, of_run, unbroken_step_seconds
from sft.plan.grid import Grid
from sft.plan.plans import Plan
from sft_edge.commands.plan.accuracy import Record
from sft_edge.commands.plan.cloud import Lacking, cut_key
from sft_edge.commands.plan.measure import NO_EXTRA, Measured, Times
from sft_edge.commands.plan.memory import Sizes
from sft_edge.commands.plan.rows import Batches, Rows
from sft_edge.commands.train.amounts import Amounts, answers_of
from sft_edge.link import on_link
from sft_edge.options import CutOptions, RunOptions
from sft_edge.training import most_ahead

_NUMBER_BYTES = 4
_PIECE_BYTES = 1 << 20

_OPENING_BYTES = 20_000
"""On the link: for connecting, for the request that opens a session, and what else is no step's."""


@dataclass(frozen=True)
class Run:
    """What is planned, and what is known of it beside its steps."""

    options: RunOptions
    config: Any
    head: str
    train: Rows
    validation: Rows
    batches: Batches
    sizes: Sizes
    way: Way
    lacking: Lacking
    """Cuts of which the cloud lacks the weights."""
    record: Record
    price_per_gb: Optional[float] = None

    @property
    def blocks(self) -> int:
        """Of the model."""
        return int(self.config.num_hidden_layers)

    @property
    def steps_in_epoch(self) -> int:
        """About."""
        return math.ceil(self.batches.in_epoch / self.options.training.gradient_accumulation_steps)

    @property
    def micro_batches(self) -> float:
        """Of a step, on average: the last one of an epoch may have fewer."""
        return self.batches.in_epoch / self.steps_in_epoch

    @property
    def steps(self) -> int:
        """Of the run."""
        training = self.options.training
        if training.max_steps > 0:
            return training.max_steps
        return math.ceil(training.num_train_epochs * self.steps_in_epoch)

    @property
    def evaluates_every(self) -> float:
        """So many steps, before which all on their way are settled; infinity where none does."""
        training = self.options.training
        if training.eval_strategy == "no":
            return math.inf
        every = training.eval_steps or self.options.logging.logging_steps
        return every if training.eval_strategy == "steps" else self.steps_in_epoch

    @property
    def evaluations(self) -> int:
        """Of the run, that at its end included."""
        return 1 + int((self.steps - 1) // self.evaluates_every)


def plans_of(run: Run, ways: Sequence[CutOptions], measured: Dict[str, Measured]) -> List[Plan]:
    """One for each way."""
    return [_plan(run, cut, measured[cut.mode]) for cut in ways]


def _plan(run: Run, cut: CutOptions, measured: Measured) -> Plan:
    layer = int(cut.split_layer or 0) if cut.mode != "local" else 0
    first, later, moved = _Moved(), _Moved(), _Moved()
    if layer:
        amounts = Amounts(run.options._replace(cut=cut), run.config, run.head)
        first, later = _of_step(run, amounts, False), _of_step(run, amounts, measured.sends_once)
        moved = _beside(run, cut, amounts, measured)
    first_step, processor = _step(run, cut, layer, measured.first, first)
    later_step, later_processor = _step(run, cut, layer, measured.later, later)
    ahead = [most_ahead(one.cloud, one.sent) if measured.is_ahead else 0 for one in (first_step, later_step)]
    unbroken = min(run.steps, run.steps_in_epoch, run.evaluates_every)
    first_seconds = unbroken_step_seconds(first_step, run.way, unbroken, ahead[0])
    later_seconds = unbroken_step_seconds(later_step, run.way, run.evaluates_every, ahead[1])
    training = of_run(run.steps, first_seconds, run.steps_in_epoch, later_seconds)
    run_bytes = of_run(run.steps, first.on_link, run.steps_in_epoch, later.on_link, moved.on_link)
    # Of adapters nothing is on record.
    expected = None if run.options.lora.lora_r else run.record.expected(cut, run.blocks)
    return Plan(
        mode=cut.mode,
        split_layer=layer,
        split_rank=int(cut.split_rank) if cut.mode == "sft" else 0,
        codec=cut.written_in if layer else "",
        step_seconds=first_seconds,
        later_step_seconds=later_seconds,
        run_seconds=training + moving_seconds(moved.sent, moved.received, run.way),
        step_bytes=first.on_link,
        run_bytes=run_bytes,
        edge_memory_bytes=measured.memory.at(layer, max(run.batches.measured)),
        edge_processor_seconds=of_run(run.steps, processor, run.steps_in_epoch, later_processor),
        points=None if expected is None else expected.points,
        spread=None if expected is None else expected.spread,
        price=None if run.price_per_gb is None else run.price_per_gb * run_bytes / 1e9,
    )


@dataclass(frozen=True)
class _Moved:
    """Bytes: of messages, by direction; and on the link, both ways, with all that is wrapped around them."""

    sent: float = 0.0
    received: float = 0.0
    on_link: float = 0.0


def _of_step(run: Run, amounts: Amounts, kept: bool) -> _Moved:
    lengths, steps = run.train.lengths, run.steps_in_epoch / run.train.times
    sent, received = amounts.crossing(lengths, kept)
    return _Moved(sent / steps, received / steps, amounts.epoch(lengths, kept) / steps)


def _beside(run: Run, cut: CutOptions, amounts: Amounts, measured: Measured) -> _Moved:
    """Before and after training, and of evaluations; these take no time here, as they are in no run's."""
    result = _NUMBER_BYTES * run.sizes.cloud(int(cut.split_layer or 0))
    sent = result if cut_key(cut) in run.lacking else 0.0
    sent += measured.tables_bytes if cut.codec == "fitted" else 0.0
    evaluation = amounts.evaluation(run.validation.lengths) * run.validation.times
    times = 1 if measured.sends_once else run.evaluations
    moved = _OPENING_BYTES + on_link(sent + result, (sent + result) / _PIECE_BYTES)
    return _Moved(sent, result, moved + times * evaluation)


def _step(run: Run, cut: CutOptions, layer: int, times: Times, moved: _Moved) -> Tuple[Step, float]:
    """And seconds of the edge's processor in it."""
    tokens = run.batches.tokens * run.micro_batches
    extra = times.extras.get(cut.written_in, NO_EXTRA)

    def seconds(measured: Grid, more: float) -> float:
        mean = measured.mean(layer, run.batches.shapes) * run.micro_batches / run.batches.in_step
        return max(0.0, mean + more * tokens)

    edge, cloud = seconds(times.edge, extra.edge), seconds(times.cloud, extra.cloud)
    answers = run.micro_batches * answers_of(run.options) if layer else 0.0
    return Step(edge, cloud, moved.sent, moved.received, answers), seconds(times.processor, extra.edge)
