"""Four edges, processes as in life, train at once against one cloud."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from support.jobs import Job, read_json, same_bits, weights_of

from sft_cloud.server import CloudServer
from sft_cloud.service.registry import Registry
from sft_edge.cli import main

SECONDS = 300

RUNS = [
    {"mode": "sft", "seed": 1},
    {"mode": "sft", "seed": 2, "split_layer": 1, "split_rank": 8},
    {"mode": "sl", "seed": 3, "eval_strategy": "steps", "eval_steps": 5},
    {"mode": "sft", "seed": 1, "split_layer": 3, "optim": "SGD", "optim_args": "momentum=0.9"},
]
"""They differ in all that they may, and share two seeds and the pretrained weights."""


@pytest.mark.slow
def test_each_ends_with_the_bits_of_its_solo_run(
    job: Job,
    model: Path,
    start_cloud: Callable[..., CloudServer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cloud = start_cloud(max_sessions=len(RUNS))
    every = {"model": model, "server": cloud.address, "max_steps": 40, "logging_steps": 1}
    solo = [tmp_path / f"solo-{index}" for index in range(len(RUNS))]
    for output_dir, options in zip(solo, RUNS, strict=True):
        assert main(["train", *job.flags(**every, **options, output_dir=output_dir)]) == 0
    at_once = threading.Barrier(len(RUNS))  # nobody begins before all have a session

    def attach(registry, *arguments, attach=Registry.attach):
        entry = attach(registry, *arguments)
        at_once.wait(SECONDS)
        return entry

    monkeypatch.setattr(Registry, "attach", attach)
    together = [tmp_path / f"together-{index}" for index in range(len(RUNS))]
    edges = [
        subprocess.Popen(
            [sys.executable, "-m", "sft_edge", "train", *job.flags(**every, **options, output_dir=output_dir)],
            stdout=subprocess.DEVNULL,
        )
        for output_dir, options in zip(together, RUNS, strict=True)
    ]
    assert [edge.wait(SECONDS) for edge in edges] == [0] * len(edges)
    for alone, beside in zip(solo, together, strict=True):
        assert same_bits(weights_of(alone), weights_of(beside))
        losses = [
            [entry.get("loss") for entry in read_json(output_dir / "trainer_state.json")["log_history"]]
            for output_dir in (alone, beside)
        ]
        assert losses[0] == losses[1]
    assert len(cloud.service.sessions) == 0
