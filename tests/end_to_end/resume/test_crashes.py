"""Edges and clouds that die at any point of a save, and between saves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.jobs import error_line, read_json
from support.resuming import POINTS, Clouds, Outcome, PowerCut, steps_in

from sft_edge.systems.split import SplitSystem


@pytest.mark.first_only
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("limit", [1, pytest.param(None, marks=pytest.mark.slow)])
def test_the_edge_dies_in_the_middle_of_a_save(
    run: Callable[..., int],
    whole: Callable[..., Outcome],
    clouds: Clouds,
    out: Path,
    at_point: Callable[..., list[str]],
    point: str,
    limit: int | None,
) -> None:
    """Wherever it was: a step that both sides have whole is left, and it is the newest that could be."""
    expected = whole(save_total_limit=limit)

    def cut() -> None:
        raise PowerCut

    passed = at_point(2, point, cut)
    with pytest.raises(PowerCut):
        run(save_total_limit=limit)
    assert passed[-1] == point
    assert max(steps_in(out)) == (2 if point in POINTS[:2] else 4)
    clouds.replace()
    assert run(save_total_limit=limit, resume_from_checkpoint=True) == 0
    assert read_json(out / "all_results.json")["recoveries"] == 0
    Outcome(out, clouds.store).check_same(expected)


@pytest.mark.first_only
@pytest.mark.parametrize("point", POINTS)
def test_the_cloud_dies_in_the_middle_of_a_save(
    run: Callable[..., int],
    whole: Callable[..., Outcome],
    clouds: Clouds,
    out: Path,
    at_point: Callable[..., list[str]],
    point: str,
) -> None:
    """The edge notices with its next message, and goes on without being started again."""
    expected = whole(save_total_limit=1)
    passed = at_point(2, point, clouds.replace)
    assert run(save_total_limit=1) == 0
    assert point in passed
    results = read_json(out / "all_results.json")
    assert results["recoveries"] == 1
    # A half of the cloud's that is saved is as good as a server that lives: the edge's can still be added.
    assert results["steps_recomputed"] == (2 if point == "asked" else 0)
    Outcome(out, clouds.store).check_same(expected)


def test_a_cloud_that_dies_again_and_again(
    run: Callable[..., int],
    whole: Callable[..., Outcome],
    clouds: Clouds,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also before there is a checkpoint at all: then the run begins anew."""
    expected = whole()
    dies_after = {1, 3, 4, 6}

    def update(self: SplitSystem, index: int, scale: float, update: Any = SplitSystem.update) -> None:
        update(self, index, scale)
        if index + 1 in dies_after:
            dies_after.remove(index + 1)
            clouds.replace()

    monkeypatch.setattr(SplitSystem, "update", update)
    assert run() == 0
    assert not dies_after
    results = read_json(out / "all_results.json")
    assert (results["recoveries"], results["steps_recomputed"]) == (4, 1 + 1 + 2 + 2)
    told = capsys.readouterr().err
    assert told.count(": going on in another session") == 4
    assert "going on from step 2, as it is in" in told
    Outcome(out, clouds.store).check_same(expected)


def test_without_checkpoints_a_lost_session_ends_the_run(
    run: Callable[..., int], clouds: Clouds, out: Path, at_step: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    at_step(3, clouds.replace)
    assert run(save_steps=None) == 5
    assert "there is no such session on this server" in error_line(capsys.readouterr().err)
    assert steps_in(out) == []


@pytest.mark.slow
def test_a_cloud_of_its_own_that_is_killed(
    run: Callable[..., int],
    whole: Callable[..., Outcome],
    out: Path,
    at_step: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A child of the edge: another is started, with the same store."""
    from sft_edge.systems import open as opening
    from sft_edge.systems.cloud_process import CloudProcess

    expected = whole()
    children: list[CloudProcess] = []

    class Remembered(CloudProcess):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            children.append(self)

    monkeypatch.setattr(opening, "CloudProcess", Remembered)
    at_step(5, lambda: children[0]._child.kill())
    assert run(server=None) == 0
    assert len(children) == 2
    assert "the cloud process was killed by signal 9" in capsys.readouterr().err
    Outcome(out, out / "cloud-checkpoints").check_same(expected)
