"""One cloud for all tests, in this process and behind real gRPC; clouds of a test's own; runs of `sft-edge train`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.jobs import Job, read_json, sst2
from support.tiny import make_tiny_model

from sft_cloud.serve import CloudServer
from sft_edge.cli import main


@pytest.fixture(scope="session")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server that all tests share."""
    state = tmp_path_factory.mktemp("cloud")
    server = CloudServer("127.0.0.1", 0, torch.device("cpu"), state, None, max_sessions=8, threads=1)
    yield server.address
    server.stop(grace_seconds=0)


@pytest.fixture
def start_cloud(tmp_path: Path) -> Iterator[Callable[..., CloudServer]]:
    """Starts servers of the test's own, which end with it."""
    servers: list[CloudServer] = []

    def start(max_sessions: int = 2, model_dir: Path | None = None) -> CloudServer:
        state = tmp_path / f"cloud-{len(servers)}"
        servers.append(CloudServer("127.0.0.1", 0, torch.device("cpu"), state, model_dir, max_sessions, threads=1))
        return servers[-1]

    yield start
    for server in servers:
        server.stop(grace_seconds=0)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in BERT's shape, three blocks, dropout on."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", layers=3)


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Two classes that one word tells apart."""
    return sst2(tmp_path_factory.mktemp("data"))


@pytest.fixture
def train(cloud: str, tmp_path: Path) -> Callable[..., Path]:
    """`train(job, mode="sl", model=model)` runs the command and gives its output directory; it must succeed."""
    count = 0

    def run(job: Job, **options: object) -> Path:
        nonlocal count
        count += 1
        options = {"output_dir": tmp_path / f"out-{count}", "server": cloud, **options}
        if options.get("mode") == "local":
            options.pop("server")
        assert main(["train", *job.flags(**options)]) == 0
        output_dir = Path(str(options["output_dir"]))
        results = read_json(output_dir / "all_results.json")
        assert results["train_steps"] == read_json(output_dir / "trainer_state.json")["global_step"]
        return output_dir

    return run
