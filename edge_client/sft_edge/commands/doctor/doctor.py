"""`sft-edge doctor`: looks at everything that a run needs of a cloud and of the way to it, and says what to do."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from typing import Iterator

from sft.client.address import split_address
from sft.errors import LinkError, UsageError
from sft_edge.commands.doctor.finding import Finding, text_of
from sft_edge.commands.doctor.model import look_at_model, step_bytes
from sft_edge.commands.doctor.path import PathCheck
from sft_edge.commands.doctor.server import estimate, look_at_instances, look_at_server, look_at_stream, measure
from sft_edge.commands.doctor.wait import wait_for_room
from sft_edge.files import json_text
from sft_edge.link import transport_of
from sft_edge.options import DoctorOptions, LinkOptions

ANSWER_SECONDS = 60.0
"""For one answer: a large probe on a slow way takes its time."""


def doctor(options: DoctorOptions, link: LinkOptions) -> int:
    """Prints what is found, as it is found; returns the exit code, that of a LinkError where a run would stop."""
    findings = []
    for finding in diagnose(options, link):
        findings.append(finding)
        if not options.json:
            sys.stdout.write(text_of(finding))
            sys.stdout.flush()
    stops = [finding.name for finding in findings if finding.verdict == "failed"]
    if options.json:
        sys.stdout.write(json_text({"passed": not stops, "findings": [asdict(finding) for finding in findings]}))
    else:
        sys.stdout.write(f"a run would stop: {', '.join(stops)}\n" if stops else "nothing here would stop a run\n")
    return LinkError.exit_code if stops else 0


def diagnose(options: DoctorOptions, link: LinkOptions) -> Iterator[Finding]:
    """What is found, in the order of a run; after what would stop one, nothing that stands on it is looked at.

    Raises UsageError without a server.
    """
    if link.server is None:
        raise UsageError("--server HOST:PORT must be given: it is what is looked at")
    if link.wait:
        wait_for_room(link.server, link)
    path = PathCheck(*split_address(link.server, "--server"), link.credentials, link.connect_timeout)
    reachable = path.run(time.time())
    yield from path.findings
    if not reachable:
        return
    transport = transport_of(link.server, link)
    try:
        inquiry = transport.inquiry(ANSWER_SECONDS)
        findings, status = look_at_server(inquiry, time.time())
        yield from findings
        if status is None or any(finding.name == "versions" and finding.verdict == "failed" for finding in findings):
            return
        measured, way = measure(inquiry)
        yield from measured
        yield from look_at_instances(inquiry)
        yield from look_at_model(options, transport, way)
        size = step_bytes(options)
        if way is not None and size is not None:
            yield estimate(way, *size)
        yield look_at_stream(inquiry, options.idle, way)
    finally:
        transport.close()
