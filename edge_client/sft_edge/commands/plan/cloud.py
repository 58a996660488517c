"""What a cloud says before a session of it is opened: how far away it is, what it takes of us, and what it has."""

from __future__ import annotations

import threading
from typing import Dict, FrozenSet, List, Optional, Sequence, Tuple

from sft.errors import LinkError, UsageError
from sft.models import Cut, build_net_2, build_whole
from sft.models.weights import pretrained_tensors
from sft.wire.codec.elements import IN_FULL
from sft.wire.protocol import MAX_PROBE_BYTES
from sft_edge.commands.doctor.server import Way, measure
from sft_edge.link import Meter, model_fields, session_request, transport_of
from sft_edge.model_files import Source
from sft_edge.options import CutOptions, LinkOptions, OptimizerOptions
from sft_edge.systems import cut_of, optimizer_spec

_PROBE_SECONDS = 60.0
"""For one answer: a large probe on a slow way takes its time."""

_NO_BLOB = "0" * 64
"""What no blob has for its hash: factors are of no account where only weights are asked for, and never had."""

Lacking = FrozenSet[Tuple[str, int]]
"""Cuts, by `cut_key`, of whose upper half a cloud lacks the weights."""


def probed(address: str, link: LinkOptions, meter: Meter, max_mbit: Optional[float]) -> Tuple[Way, int]:
    """The way, and how wide an activation the cloud takes of us at most, 0 without a limit. Probes are counted by
    `meter`, which holds them to `max_mbit`, and are no larger than what a second of that carries. Raises LinkError
    where the way cannot be measured."""
    transport, never = transport_of(address, link), threading.Event()
    most = MAX_PROBE_BYTES if max_mbit is None else min(MAX_PROBE_BYTES, int(max_mbit * 1e6 / 8))

    def turn(sent_bytes: int, received_bytes: int) -> None:
        meter.send(sent_bytes, never)
        meter.wait_to_receive(never, lambda: None)
        meter.receive(received_bytes)

    try:
        inquiry = transport.inquiry(_PROBE_SECONDS)
        widest = int(inquiry.status().limits.max_split_rank)
        findings, way = measure(inquiry, most, turn)
    finally:
        transport.close()
    if way is None:
        raise LinkError(f"{findings[0].found}; `sft-edge doctor --server {address}` finds out why")
    return way, widest


def taken(ways: Sequence[CutOptions], widest: int, hidden_size: int) -> Tuple[List[CutOptions], List[str]]:
    """Those that the cloud takes of us, and a line where these are fewer. Raises UsageError where there is none."""
    if not widest:
        return list(ways), []
    fitting = [
        way
        for way in ways
        if way.mode == "local" or (int(way.split_rank) if way.mode == "sft" else hidden_size) <= widest
    ]
    if not fitting:
        raise UsageError(f"the server takes ranks up to {widest} of us, and every way to train here is wider")
    fewer = len(ways) - len(fitting)
    return fitting, [f"{fewer} more ways are wider than the {widest} that the server takes of us"] * bool(fewer)


def cut_key(way: CutOptions) -> Tuple[str, int]:
    """Of ways that have one the cloud has the same weights, whatever the rank and the code."""
    return "sl" if way.cuts_between_blocks else way.mode, int(way.split_layer or 0)


def lacking(
    source: Source, head: str, ways: Sequence[CutOptions], address: str, link: LinkOptions, seed: int
) -> Lacking:
    """Of each cut the cloud is asked by the hash of its weights, as it may have one half of an earlier run and not
    another; nothing is opened. Raises LinkError."""
    if source.checkpoint is None:
        return frozenset()
    cuts: Dict[Tuple[str, int], Cut] = {}
    for way in ways:
        cut = cut_of(way, source) if way.mode != "local" else None
        if cut is not None:
            cuts.setdefault(cut_key(way), cut)
    transport = transport_of(address, link)
    try:
        found = set()
        for key, cut in cuts.items():
            net_2 = build_net_2(source.config, head, cut)
            spec = optimizer_spec(OptimizerOptions(), build_whole(source.config, head, cut))
            request, _ = session_request(
                model_fields(source.told_name, source.config, head, cut),
                spec.restricted_to(net_2.whole_names.values()),
                seed,
                IN_FULL,
                pretrained_tensors(net_2, source.checkpoint),
                [],
            )
            request.only_check, request.factors_sha256 = True, _NO_BLOB if cut.mode == "sft" else ""
            if request.weights_sha256 in transport.open_session(request).missing_blobs:
                found.add(key)
        return frozenset(found)
    finally:
        transport.close()
