"""`sft-edge plan`: measures, and says what each way to train would take, and which is best."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

from sft.errors import LinkError, UsageError
from sft.models import build_whole
from sft.plan.equation_4 import Way
from sft.plan.plans import Limits, Plan, best, nearest, strictest
from sft_edge.commands.doctor.server import Way as Probed
from sft_edge.commands.doctor.server import measure as probe
from sft_edge.commands.plan.accuracy import read_record
from sft_edge.commands.plan.measure import Measured, measure, way_of
from sft_edge.commands.plan.memory import Sizes, free_bytes, with_room
from sft_edge.commands.plan.predict import Run, plans_of
from sft_edge.commands.plan.rows import Batches, sample
from sft_edge.commands.plan.sessions import Trial
from sft_edge.commands.plan.shown import FLAGS, as_json, figure, picture_of, print_plans
from sft_edge.commands.plan.ways import MODES, ways
from sft_edge.commands.train.amounts import answers_of
from sft_edge.commands.train.job import check_tokens
from sft_edge.commands.train.start import Start, open_start
from sft_edge.files import json_text, write_file
from sft_edge.link import transport_of
from sft_edge.options import CutOptions, LinkOptions, OptimizerOptions, PlanOptions, RunOptions
from sft_edge.systems import CloudProcess, cut_of, halve, optimizer_spec

_PROBE_SECONDS = 60.0
"""For one answer: a large probe on a slow way takes its time."""


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
    room = free_bytes()
    fitting = with_room(found, sizes, room)
    notes = [f"{len(found) - len(fitting)} more ways need more memory than is free here"] * (len(fitting) < len(found))
    on_status("reading rows")
    train = sample(start.task, "train", start.source, options, options.data.max_train_samples)
    validation = sample(start.task, "validation", start.source, options, options.data.max_eval_samples)
    check_tokens(start.source, train.features, "training")
    batches = Batches(train, start.task, options, int(config.vocab_size))
    crosses = any(way.mode != "local" for way in fitting)
    with ExitStack() as stack:
        address, probed, has_weights = options.link.server or "", None, True
        if crosses and not address:
            on_status("starting a cloud here")
            address = stack.enter_context(CloudProcess()).address
        trial = Trial(start.source, head, options, address, batches, on_status)
        if crosses:
            on_status("measuring the way to the cloud")
            probed, widest = _probed(address, options.link)
            fitting, wider = _taken(fitting, widest, int(config.hidden_size))
            notes += wider
            has_weights = _has_weights(start, options, fitting, address)
        measured = measure(trial, fitting, on_status)
    way = Way(0.0, float("inf"), float("inf"))
    if probed is not None:
        of_link = [one for mode, one in measured.items() if mode != "local"]
        answers = answers_of(options) * options.training.gradient_accumulation_steps
        way = way_of(probed, of_link, answers, options.budget.max_mbit, options.link.server is not None)
    run = Run(options, config, head, train, validation, batches, sizes, way, has_weights, record, price_per_gb)
    return Planned(run, measured, plans_of(run, fitting, measured), [*start.notes, *notes])


def _probed(address: str, link: LinkOptions) -> Tuple[Probed, int]:
    """The way, and how wide an activation the cloud takes of us at most, 0 without a limit. Raises LinkError where the
    way cannot be measured."""
    transport = transport_of(address, link)
    try:
        inquiry = transport.inquiry(_PROBE_SECONDS)
        widest = int(inquiry.status().limits.max_split_rank)
        findings, way = probe(inquiry)
    finally:
        transport.close()
    if way is None:
        raise LinkError(f"{findings[0].found}; `sft-edge doctor --server {address}` finds out why")
    return way, widest


def _taken(ways: Sequence[CutOptions], widest: int, hidden_size: int) -> Tuple[List[CutOptions], List[str]]:
    """Those that the cloud takes of us, and a line where these are fewer. Raises UsageError where there is none."""
    if not widest:
        return list(ways), []
    taken = [
        way
        for way in ways
        if way.mode == "local" or (int(way.split_rank) if way.mode == "sft" else hidden_size) <= widest
    ]
    if not taken:
        raise UsageError(f"the server takes ranks up to {widest} of us, and every way to train here is wider")
    return taken, [f"{len(ways) - len(taken)} more ways are wider than the {widest} that the server takes of us"]


def _has_weights(start: Start, options: RunOptions, ways: Sequence[CutOptions], address: str) -> bool:
    """Whether the cloud has the model's weights: it is asked by their hash, and opens nothing."""
    if start.source.checkpoint is None:
        return True
    highest = max((way for way in ways if way.mode != "local"), key=lambda way: int(way.split_layer or 0))
    cut = cut_of(highest, start.source)
    assert cut is not None  # local alone has none
    whole = build_whole(start.source.config, start.task.head, cut)
    spec = optimizer_spec(OptimizerOptions(), whole)
    request = halve(start.source, start.task.head, cut, spec, options.training.seed).request
    request.only_check = True
    transport = transport_of(address, options.link)
    try:
        return request.weights_sha256 not in transport.open_session(request).missing_blobs
    finally:
        transport.close()


def _nothing(plans: Sequence[Plan], limits: Limits) -> str:
    """Why no plan keeps to the limits, and which is the nearest to do so."""
    name, count = strictest(plans, limits)
    near = nearest(plans, limits)
    misses = ", ".join(
        f"{FLAGS[one]} {figure(one, getattr(limits, one))} (it takes {figure(one, getattr(near, one))})"
        for one in limits.excess(near)
    )
    return (
        f"none of {len(plans)} ways to train keeps to all limits: {FLAGS[name]} {figure(name, getattr(limits, name))} "
        f"rules out {count} of them; the nearest is {near.name}, which breaks {misses}"
    )


def _say(status: str) -> None:
    if status:
        sys.stderr.write(f"{status}\n")
