"""A step is one trace, across both sides."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.jobs import STEADY, Job, same_bits, weights_of
from support.recorded_spans import RecordedSpans
from support.servers import start_server

from sft_cloud.observability.observer import Observer
from sft_cloud.server import CloudServer

CPU = torch.device("cpu")


@pytest.fixture
def recorded() -> RecordedSpans:
    return RecordedSpans()


@pytest.fixture
def traced_cloud(recorded: RecordedSpans, tmp_path: Path) -> Iterator[CloudServer]:
    made = start_server(tmp_path / "traced", 1, observer=Observer(None, recorded.tracer))
    yield made
    made.stop(grace_seconds=0)


@pytest.fixture
def trace_the_edge(recorded: RecordedSpans, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def install() -> None:
        for module in ("sft_edge.link.tracing", "sft_edge.link.link", "sft_edge.link.grpc_transport"):
            monkeypatch.setattr(f"{module}.edge_tracer", lambda: recorded.tracer)

    return install


def test_a_step_and_what_the_cloud_does_for_it(
    job: Job,
    model: Path,
    train: Callable[..., Path],
    traced_cloud: CloudServer,
    recorded: RecordedSpans,
    trace_the_edge: Callable[[], None],
) -> None:
    options = STEADY | {"max_steps": 2, "labels": "local", "model": model}
    plain = train(job, **options, server=traced_cloud.address)
    assert recorded.all() == []  # an edge that does not trace is not traced
    trace_the_edge()
    traced = train(job, **options, server=traced_cloud.address)
    assert same_bits(weights_of(plain), weights_of(traced))
    steps = {span.context.trace_id: span for span in recorded.named("step")}
    assert sorted(span.attributes["sft.step"] for span in steps.values()) == [0, 1]
    for trace_id, step in steps.items():
        of_step = [span for span in recorded.all() if span.context.trace_id == trace_id]
        by_id = {span.context.span_id: span for span in of_step}
        tree = sorted((by_id[span.parent.span_id].name, span.name) for span in of_step if span.parent is not None)
        below = ["backward", "wait for the device", "work on the device"]
        assert tree == sorted(
            [("step", "forward"), ("step", "backward")]
            + [("backward", name) for name in below]
            + [("forward", name) for name in ["forward", *below[1:]]]
        )
        for span in of_step:
            assert step.start_time <= span.start_time
            assert span.attributes.get("sft.step", step.attributes["sft.step"]) == step.attributes["sft.step"]
    for method in ("OpenSession", "DownloadWeights"):
        kinds = {span.kind.name: span for span in recorded.named(method)}
        assert kinds["SERVER"].parent.span_id == kinds["CLIENT"].context.span_id


@pytest.mark.slow
def test_both_commands_trace_where_the_environment_says_so(job: Job, model: Path, tmp_path: Path) -> None:
    """They write them to standard error."""
    environment = {**os.environ, "OTEL_TRACES_EXPORTER": "console"}
    serve = [sys.executable, "-m", "sft_cloud", "serve", "--port", "0", "--device", "cpu", "--exit-with-stdin"]
    serve += ["--state-dir", str(tmp_path / "cloud")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with (tmp_path / "cloud.log").open("wb") as log, subprocess.Popen(
        serve, env=environment, stderr=log, **pipes
    ) as cloud:
        address = json.loads(cloud.stdout.readline())["address"]
        flags = job.flags(**STEADY | {"max_steps": 2}, model=model, server=address, output_dir=tmp_path / "out")
        train = [sys.executable, "-m", "sft_edge", "train", *flags]
        done = subprocess.run(train, env=environment, capture_output=True, text=True, check=True)
        cloud.stdin.close()
    here = spans_in(done.stderr)
    there = spans_in((tmp_path / "cloud.log").read_text())
    steps = [span for span in here if span["name"] == "step"]
    assert len(steps) == 2
    assert {span["resource"]["attributes"]["service.name"] for span in there} == {"sft-cloud"}
    assert {span["resource"]["attributes"]["service.name"] for span in here} == {"sft-edge"}
    assert {span["context"]["trace_id"] for span in steps} <= {span["context"]["trace_id"] for span in there}


def spans_in(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines() if line.startswith('{"name"')]
