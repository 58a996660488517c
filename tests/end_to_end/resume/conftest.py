"""Runs that are broken off, and servers that are replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.jobs import Job
from support.resuming import OPTIONS, Clouds, Outcome

from sft_edge.checkpoints import policy as checkpointing_module
from sft_edge.cli import main
from sft_edge.systems.split import SplitSystem


@pytest.fixture
def clouds(tmp_path: Path) -> Iterator[Clouds]:
    made = Clouds(tmp_path / "clouds")
    yield made
    made.close()


def train(job: Job, **values: object) -> int:
    if values.get("mode") == "local":
        values["server"] = None
    return main(["train", *job.flags(**{**OPTIONS, **values})])


@pytest.fixture
def run(job: Job, model: Path, tmp_path: Path, clouds: Clouds) -> Callable[..., int]:
    """`run(**options)` into `tmp_path / "out"`; gives the exit code."""

    def into_out(**options: object) -> int:
        return train(job, **{"model": model, "output_dir": tmp_path / "out", "server": clouds.address, **options})

    return into_out


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture(scope="session")
def undisturbed() -> dict[str, Outcome]:
    """By its options, of runs with a cloud of their own."""
    return {}


@pytest.fixture
def whole(job: Job, model: Path, tmp_path: Path, undisturbed: dict[str, Outcome]) -> Callable[..., Outcome]:
    """What a run leaves that nothing disturbs. It is the same whichever test asks, and made once."""

    def outcome(**options: object) -> Outcome:
        key = repr(sorted(options.items()))
        if key not in undisturbed:
            clouds, to = Clouds(tmp_path / "its-clouds"), tmp_path / "whole"
            try:
                assert train(job, **{"model": model, "server": clouds.address, **options, "output_dir": to}) == 0
                undisturbed[key] = Outcome(to, clouds.store)
            finally:
                clouds.close()
        return undisturbed[key]

    return outcome


@pytest.fixture
def at_point(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, str, Callable[[], object]], list[str]]:
    """`at_point(2, "edge saved", act)` calls `act`, once, when the second save has got there; gives what was passed."""

    def install(save: int, point: str, act: Callable[[], object]) -> list[str]:
        passed: list[str] = []

        def reached(here: str) -> None:
            passed.append(here)
            if here == point and passed.count(point) == save:
                act()

        def around(owner: Any, name: str, before: str, after: str) -> None:
            real = getattr(owner, name)

            def instead(*arguments: Any) -> Any:
                if before:
                    reached(before)
                result = real(*arguments)
                reached(after)
                return result

            monkeypatch.setattr(owner, name, instead)

        around(SplitSystem, "save_other_half", "asked", "cloud saved")
        around(checkpointing_module, "write_checkpoint", "", "edge saved")
        around(SplitSystem, "keep_checkpoints", "", "cloud tidied")
        around(checkpointing_module, "remove_all_but", "", "edge tidied")
        return passed

    return install
