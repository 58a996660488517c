"""One cloud for all tests, in this process and behind real gRPC; clouds of a test's own; runs of `sft-edge train`."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.jobs import STEADY, Job, error_line, read_json, sst2, weights_of
from support.servers import start_server
from support.tiny import make_tiny_model

from sft_cloud.server import CloudServer
from sft_edge.cli import main
from sft_edge.commands.plan import sessions
from sft_edge.systems.ahead import StepOnItsWay
from sft_edge.systems.local import LocalSystem
from sft_edge.systems.split import SplitSystem


@pytest.fixture(scope="session")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server that all tests share."""
    state = tmp_path_factory.mktemp("cloud")
    server = start_server(state, 8)
    yield server.address
    server.stop(grace_seconds=0)


@pytest.fixture
def start_cloud(tmp_path: Path) -> Iterator[Callable[..., CloudServer]]:
    """Starts servers of the test's own, which end with it."""
    servers: list[CloudServer] = []

    def start(max_sessions: int = 2, model_dir: Path | None = None, **options: object) -> CloudServer:
        state = tmp_path / f"cloud-{len(servers)}"
        servers.append(start_server(state, max_sessions, model_dir=model_dir, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop(grace_seconds=0)


@pytest.fixture
def quick_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of `plan` to which the times themselves are of no interest."""
    monkeypatch.setattr(sessions, "_ENOUGH_SECONDS", 0.0)
    monkeypatch.setattr(sessions, "_FEWEST", 1)
    monkeypatch.setattr(sessions, "FIT_TOKENS", 500)


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


@pytest.fixture
def failing(
    job: Job, model: Path, cloud: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Runs `sft-edge train` into `tmp_path / "out"`; gives the exit code and the line of the error."""

    def run(**options: object) -> tuple[int, str]:
        values = {"model": model, "server": cloud, "output_dir": tmp_path / "out", **STEADY, **options}
        if values.get("mode") == "local":
            values["server"] = None
        code = main(["train", *job.flags(**values)])
        stderr = capsys.readouterr().err
        # An interrupt has no line of an error, and what nobody foresaw has a traceback above it.
        return code, error_line(stderr) if code not in (1, 130) else stderr.splitlines()[-1]

    return run


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """`at_step(3, act)` calls `act` on the edge, once, when its step 3, counted from 1, has been taken, or is sent."""

    def install(step: int, act: Callable[[], object]) -> None:
        left = [act]
        for system in (SplitSystem, LocalSystem):

            def update(self, index, scale, update=system.update):
                update(self, index, scale)
                if index + 1 == step and left:
                    left.pop()()

            monkeypatch.setattr(system, "update", update)

        def sent(self, *arguments, update=StepOnItsWay.update):
            update(self, *arguments)
            if self.number + 1 == step and left:
                left.pop()()

        monkeypatch.setattr(StepOnItsWay, "update", sent)

    return install


@pytest.fixture
def at_call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`at_call(4, module, "function", act)` calls `act` in front of the fourth call of that function."""

    def install(call: int, module: Any, place: str, act: Callable[[], object]) -> None:
        real, calls = getattr(module, place), itertools.count(1)

        def acting(*arguments):
            if next(calls) == call:
                act()
            return real(*arguments)

        monkeypatch.setattr(module, place, acting)

    return install


@pytest.fixture(scope="session")
def undisturbed_weights() -> dict[str, dict[str, torch.Tensor]]:
    """By job, steps and options."""
    return {}


@pytest.fixture
def first_steps(
    train: Callable[..., Path], undisturbed_weights: dict[str, dict[str, torch.Tensor]]
) -> Callable[..., dict[str, torch.Tensor]]:
    """`first_steps(3, job, model=model)`: the weights of a run that is asked for so many steps, and not disturbed.

    The same whichever test asks, and made once; those with a server of the test's own are made for it.
    """

    def run(steps: int, job: Job, **options: object) -> dict[str, torch.Tensor]:
        key = repr((job, steps, sorted(options.items())))
        if "server" in options or key not in undisturbed_weights:
            undisturbed_weights[key] = weights_of(train(job, **{**STEADY, **options, "max_steps": steps}))
        return undisturbed_weights[key]

    return run


@pytest.fixture
def default_sigterm() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    signal.signal(signal.SIGTERM, before)
