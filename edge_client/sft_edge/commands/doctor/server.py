"""What a cloud says of itself, and what the way to it carries."""

from __future__ import annotations

import statistics
import time
from typing import Callable, List, NamedTuple, Optional, Tuple

import sft
from sft.cli.durations import Duration
from sft.client.inquiry import Inquiry
from sft.errors import AccessError, LinkError, ProtocolError
from sft.printable import format_bytes
from sft.v1 import split_training_pb2 as pb
from sft.wire.protocol import MAX_PROBE_BYTES, PROTOCOL_VERSION
from sft_edge.commands.doctor.finding import Finding, failed, ok, skipped, warning

CLOCK_SECONDS = 30.0
"""Clocks that are further apart are worth a warning: certificates and tokens have dates."""

TOKEN_DAYS = 7.0
"""A token that ends sooner is worth a warning."""

_PINGS = 7
_FIRST_BYTES = 64 << 10
_STREAM_BYTES = (1 << 20) + (128 << 10)
"""More than nginx lets through of one call where nobody has told it otherwise."""

_STREAM_SECONDS = 10.0
"""So long a stream may take to carry that; on a slower way it carries less."""

_LONG_ENOUGH_SECONDS = 0.5
"""A transfer that takes so long is measured well enough; shorter ones are tried again with more bytes."""

_SECONDS_A_DAY = 86400.0


class Way(NamedTuple):
    """What was measured of the way to a cloud."""

    delay_seconds: float
    """There and back."""
    up_bytes_per_second: float
    down_bytes_per_second: float


def look_at_server(inquiry: Inquiry, now: float) -> Tuple[List[Finding], Optional[pb.StatusResponse]]:
    """Who it takes us for, what it is, and whether it has room; no status where it does not answer as one of ours."""
    try:
        status = inquiry.status()
    except AccessError as error:
        return [
            failed("access", str(error), "ask the server's operator for a token, or a certificate, that is good")
        ], None
    except LinkError as error:
        return [failed("server", str(error), "see the server's log")], None
    findings = [_access(status, now), _versions(status), *_features(status), *_clock(inquiry), room_of(status)]
    return findings, status


def _access(status: pb.StatusResponse, now: float) -> Finding:
    found, expires = f"the server knows us as {status.caller}", status.token_expires_unix_seconds
    limits = _limits(status.limits)
    if limits:
        found += f", who may use {limits}"
    if not expires:
        return ok("access", found)
    days = (expires - now) / _SECONDS_A_DAY
    found += f"; the token is good until {time.strftime('%Y-%m-%d', time.gmtime(expires))}"
    if days < TOKEN_DAYS:
        return warning(
            "access", f"{found}, {max(days, 0.0):.1f} days from now", "ask the server's operator for a new one"
        )
    return ok("access", found)


def _limits(limits: pb.CallerLimits) -> str:
    told = []
    if limits.max_sessions:
        told.append(f"{limits.max_sessions} sessions")
    if limits.max_split_rank:
        told.append(f"ranks up to {limits.max_split_rank}")
    if limits.models:
        told.append("models like " + " or ".join(limits.models))
    if limits.steps_per_second:
        told.append(f"{limits.steps_per_second:g} steps a second")
    if limits.max_bytes_per_day:
        told.append(f"{format_bytes(limits.max_bytes_per_day)} a day")
    if limits.max_upload_bytes:
        told.append(f"{format_bytes(limits.max_upload_bytes)} of uploads")
    if limits.max_memory:
        told.append(f"{format_bytes(limits.max_memory)} of memory")
    return ", ".join(told)


def _versions(status: pb.StatusResponse) -> Finding:
    here = f"{sft.__version__} here, {status.package_version} there"
    if status.protocol_version != PROTOCOL_VERSION:
        return failed(
            "versions",
            f"the server speaks protocol {status.protocol_version}, we speak {PROTOCOL_VERSION} ({here})",
            "install the same release of split-fine-tuning on both sides",
        )
    if status.package_version != sft.__version__:
        return warning("versions", f"{here}; both speak protocol {PROTOCOL_VERSION}", "the same release is safer")
    return ok("versions", f"{sft.__version__} on both sides, protocol {PROTOCOL_VERSION}")


def _features(status: pb.StatusResponse) -> List[Finding]:
    if not status.missing_features:
        return []
    lacks = ", ".join(status.missing_features)
    advice = "do without, as by leaving out --lora-r, or ask the server's operator to install 'split-fine-tuning[peft]'"
    return [warning("features", f"the server lacks what these need: {lacks}", advice)]


def _clock(inquiry: Inquiry) -> List[Finding]:
    try:
        ahead = inquiry.probe().clock_ahead_seconds
    except LinkError as error:
        return [failed("clock", str(error), "see the server's log")]
    found = f"the server's is {abs(ahead):.1f} s {'ahead of' if ahead >= 0 else 'behind'} ours"
    if abs(ahead) <= CLOCK_SECONDS:
        return [ok("clock", found)]
    advice = "set both by NTP (`timedatectl`): certificates and tokens begin and end by them"
    return [warning("clock", found, advice)]


def room_of(status: pb.StatusResponse) -> Finding:
    """Whether it takes another session of ours."""
    uptime, timeout = Duration(round(status.uptime_seconds)), Duration(status.session_timeout_seconds)
    found = (
        f"{status.open_sessions} of {status.max_sessions} sessions on {status.device}, up for {uptime}; "
        f"a session outlives its stream for {timeout}"
    )
    if status.stopping:
        return failed(
            "room", "the server is stopping and takes no new session", "wait until it is back, or use another"
        )
    if status.open_sessions >= status.max_sessions:
        return failed("room", found, "wait for one to end, or start the server with more --max-sessions")
    mine = sum(session.owner == status.caller for session in status.sessions)
    if status.limits.max_sessions and mine >= status.limits.max_sessions:
        return failed("room", f"we have {mine} open, which is all that we may have", "end one of our other runs")
    return ok("room", found)


def measure(
    inquiry: Inquiry, most_bytes: int = MAX_PROBE_BYTES, turn: Callable[[int, int], None] = lambda sent, received: None
) -> Tuple[List[Finding], Optional[Way]]:
    """Delay and bandwidth, both ways; it sends and gets up to some 5 MB each, less on a slow way.

    `most_bytes` of one probe; `turn` is called before each, with the bytes that it sends and gets, and may wait.
    """

    def transfer(sent: int, received: int) -> float:
        turn(sent, received)
        return inquiry.probe(sent, received).seconds

    try:
        delay = statistics.median(inquiry.probe().seconds for _ in range(_PINGS))
        up = _rate(lambda size: transfer(size, 0), delay, most_bytes)
        down = _rate(lambda size: transfer(0, size), delay, most_bytes)
    except LinkError as error:
        return [failed("bandwidth", str(error), "does something on the way limit the size of requests?")], None
    findings = [
        ok("delay", f"{1000 * delay:.1f} ms there and back"),
        ok("bandwidth", f"{format_bytes(up)}/s up, {format_bytes(down)}/s down"),
    ]
    return findings, Way(delay, up, down)


def _rate(transfer: Callable[[int], float], delay: float, most_bytes: int) -> float:
    """Bytes a second of the largest transfer that was tried."""
    size = min(_FIRST_BYTES, most_bytes)
    while True:
        seconds = transfer(size)
        moving = max(seconds - delay, seconds / 10, 1e-6)  # on a fast way the delay is most of it, and varies
        if seconds >= _LONG_ENOUGH_SECONDS or size >= most_bytes:
            return size / moving
        size = min(4 * size, most_bytes)


def look_at_instances(inquiry: Inquiry) -> List[Finding]:
    """Whether one server has answered all that was asked so far; nothing to find where it has."""
    if len(inquiry.instances) < 2:
        return []
    found = f"calls reach {len(inquiry.instances)} different servers"
    advice = "a session lives in one: give each server an address of its own, or have the proxy keep an edge on one"
    return [failed("one server", found, advice)]


def look_at_stream(inquiry: Inquiry, seconds: Duration, way: Optional[Way]) -> Finding:
    """Whether a stream carries more than the 1 MiB that some proxies let through, and can be used after a while in
    which nothing happens on it."""
    advice = "something on the way (a NAT, a firewall, a proxy) forgets quiet connections; let it keep them for longer"
    if not seconds:
        return skipped("idle", "not tried: --idle is 0s")
    affordable = 0 if way is None else int(way.up_bytes_per_second * _STREAM_SECONDS)
    size = min(_STREAM_BYTES, affordable)
    try:
        ended = inquiry.keep_stream(size, seconds)
    except ProtocolError as error:
        return skipped("idle", f"not tried: {error}")
    if ended is None:
        return ok("idle", f"a stream that was idle for {seconds} could be used again")
    where, said = ended
    if where == "carried":
        advice = (
            "a proxy on the way limits the size of a call: with nginx, set `client_max_body_size 0;` (docs/proxies.md)"
        )
        return failed("stream", f"a stream ended before it had carried {format_bytes(size)} ({said})", advice)
    if where == "kept":
        return failed("idle", f"a stream did not stay open for {seconds} ({said})", advice)
    return failed("idle", f"a stream that was idle for {seconds} could not be used again ({said})", advice)


def estimate(way: Way, up_bytes: int, down_bytes: int) -> Finding:
    """What the way alone takes of a step."""
    seconds = way.delay_seconds + up_bytes / way.up_bytes_per_second + down_bytes / way.down_bytes_per_second
    moved = f"{format_bytes(up_bytes)} up and {format_bytes(down_bytes)} down"
    return ok("step", f"the way takes {seconds:.3f} s of each step ({moved}); computing comes on top")
