"""`sft-edge plan`: measures, and says what each way to train would take, and which is best."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence

from sft.client.address import split_address
from sft.client.credentials import is_loopback
from sft.errors import UsageError
from sft.plan.equation_4 import Way
from sft.plan.plans import Limits, Plan, best, nearest, strictest
from sft_edge.commands.doctor.wait import wait_for_room
from sft_edge.commands.plan.accuracy import read_record
from sft_edge.commands.plan.cloud import Lacking, lacking, probed, taken
from sft_edge.commands.plan.measure import Measured, measure, way_of
from sft_edge.commands.plan.memory import Sizes, free_bytes, with_room
from sft_edge.commands.plan.predict import Run, plans_of
from sft_edge.commands.plan.rows import Batches, sample
from sft_edge.commands.plan.sessions import Trial
from sft_edge.commands.plan.shown import FLAGS, as_json, figure, picture_of, print_plans
from sft_edge.commands.plan.ways import MODES, ways
from sft_edge.commands.train.amounts import answers_of
from sft_edge.commands.train.job import check_tokens
from sft_edge.commands.train.start import open_start
from sft_edge.files import json_text, write_file
from sft_edge.link import Meter, Pace
from sft_edge.options import LinkOptions, PlanOptions, RunOptions
from sft_edge.signals import terminations_raised
from sft_edge.systems import CloudProcess


class Planned(NamedTuple):
    """All plans, and what they are made of."""

    run: Run
    measured: Dict[str, Measured]
    plans: List[Plan]
    notes: List[str]


def plan(asked: PlanOptions, options: RunOptions) -> int:
    """Prints the plans; returns the exit code. Raises UsageError where none keeps to the limits, and any SFTError."""
    planned = make_plans(options, price_per_gb=asked.price_per_gb, on_status=_say)
    limits = Limits(
        asked.max_bytes_per_step,
        options.budget.data_cap,
        asked.max_edge_memory,
        asked.max_run_time,
        asked.min_accuracy,
    )
    chosen = best(planned.plans, limits)
    if asked.svg is not None:
        write_file(asked.svg, [picture_of(planned.plans, planned.run.blocks).encode("utf-8")])
    if asked.json:
        sys.stdout.write(json_text(as_json(planned.run, planned.measured, planned.plans, limits, chosen)))
    else:
        print_plans(planned.run, planned.plans, limits, chosen, asked.all)
        for note in planned.notes:
            sys.stdout.write(f"{note}\n")
    if chosen is None:
        raise UsageError(_nothing(planned.plans, limits))
    return 0


def make_plans(
    options: RunOptions,
    modes: Sequence[str] = MODES,
    price_per_gb: Optional[float] = None,
    on_status: Callable[[str], None] = lambda text: None,
) -> Planned:
    """Measures what the options leave open; `modes`: those to choose from. Starts a cloud where no server is named.

    Raises UsageError where nothing is left to choose from, and any SFTError of a run that begins.
    """
    record = read_record()  # now, and not after all the measuring
    start = open_start(options.data, options.model)
    head, config = start.task.head, start.source.config
    found = ways(options, start.source, head, modes)
    sizes = Sizes(config, head, [int(way.split_layer) for way in found if way.split_layer])
    fitting = with_room(found, sizes, free_bytes(), options.lora.on_edge)
    notes = [f"{len(found) - len(fitting)} more ways need more memory than is free here"] * (len(fitting) < len(found))
    on_status("reading rows")
    train = sample(start.task, "train", start.source, options, options.data.max_train_samples)
    validation = sample(start.task, "validation", start.source, options, options.data.max_eval_samples)
    check_tokens(start.source, train.features, "training")
    batches = Batches(train, start.task, options, int(config.vocab_size))
    crosses = any(way.mode != "local" for way in fitting)
    max_mbit, link = options.budget.max_mbit, None
    lacks: Lacking = frozenset()
    with terminations_raised(), ExitStack() as stack:
        address, meter = options.link.server or "", Meter(pace=Pace(max_mbit))
        if crosses and not address:
            on_status("starting a cloud here")
            address = stack.enter_context(CloudProcess()).address
        elif crosses and options.link.wait:
            wait_for_room(address, options.link)
        trial = Trial(start.source, head, options, address, batches, on_status, meter)
        if crosses:
            on_status("measuring the way to the cloud")
            link, widest = probed(address, options.link, meter, max_mbit)
            fitting, wider = taken(fitting, widest, int(config.hidden_size))
            notes += wider
            on_status("hashing the weights of every cut, to ask the cloud which it lacks")
            lacks = lacking(start.source, head, fitting, address, options.link, options.training.seed)
        measured = measure(trial, fitting, on_status)
    way = Way(0.0, float("inf"), float("inf"))
    if link is not None:
        of_link = [one for mode, one in measured.items() if mode != "local"]
        way = way_of(link, of_link, answers_of(options) * batches.in_step, max_mbit, _is_apart(options.link))
    run = Run(options, config, head, train, validation, batches, sizes, way, lacks, record, price_per_gb)
    return Planned(run, measured, plans_of(run, fitting, measured), [*start.notes, *notes])


def _is_apart(link: LinkOptions) -> bool:
    """Whether the cloud computes on another machine, as far as its address tells."""
    return link.server is not None and not is_loopback(split_address(link.server, "--server").host)


def _nothing(plans: Sequence[Plan], limits: Limits) -> str:
    """Why no plan keeps to the limits, and which is the nearest to do so."""
    name, count = strictest(plans, limits)
    near = nearest(plans, limits)
    misses = ", ".join(
        f"{FLAGS[one]} {figure(one, getattr(limits, one))} ({_has(near, one)})" for one in limits.excess(near)
    )
    return (
        f"none of {len(plans)} ways to train keeps to all limits: {FLAGS[name]} {figure(name, getattr(limits, name))} "
        f"rules out {count} of them; the nearest is {near.name}, which breaks {misses}"
    )


def _has(plan: Plan, name: str) -> str:
    """What it has where a limit is not kept."""
    if name != "points":
        return f"it takes {figure(name, getattr(plan, name))}"
    return "no record says what it loses" if plan.points is None else f"{figure(name, plan.points)} are to be expected"


def _say(status: str) -> None:
    if status:
        sys.stderr.write(f"{status}\n")
