"""`auto`: chosen once, before the run, and the same for whoever goes on with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.jobs import error_line, read_json, same_bits, weights_of
from support.resuming import Outcome

from sft_edge.commands.plan import accuracy

pytestmark = pytest.mark.usefixtures("quick_trials")

AUTO = {"split_layer": "auto", "split_rank": "auto", "codec": "auto"}


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`record(split_layer=1, codec="int8", score=80.0)`: of all ways to train this one alone is on record."""

    def write(**run: object) -> None:
        values = {"blocks": 3, "task": "sst2", "mode": "sft", "split_rank": 8, "codec": "int8", "local": 80.0, **run}
        (tmp_path / "record.json").write_text(json.dumps({"runs": [values]}))
        monkeypatch.setattr(accuracy, "FILE", tmp_path / "record.json")

    return write


def test_a_run_goes_on_as_it_was_chosen(
    run: Callable[..., int],
    whole: Callable[..., Outcome],
    record: Callable[..., None],
    out: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    record(split_layer=1, score=79.5)
    assert run(**AUTO, max_steps=5) == 0
    assert "auto: --mode sft --split-layer 1 --split-rank 8 --codec int8: about " in (told := capsys.readouterr().err)
    assert "-0.5 points to expect; the fastest of 1 ways, out of 27, that are to lose no more than 1" in told
    chosen = {"split_layer": 1, "split_rank": 8, "codec": "int8"}
    options = read_json(out / "options.json")
    assert {name: options[name] for name in chosen} == chosen

    newest = out / "checkpoint-4" / "state.json"
    newest.write_bytes(bytes(newest.stat().st_size))  # torn: the run goes on from an older one, and with its cut
    record(split_layer=2, codec="float32", score=80.0)
    assert run(**AUTO, resume_from_checkpoint=True) == 0
    assert "auto: --mode sft --split-layer 1 --split-rank 8 --codec int8, as the run began" in capsys.readouterr().err
    assert same_bits(weights_of(out), whole(**chosen).weights)


def test_each_alone_and_the_mode(
    run: Callable[..., int], record: Callable[..., None], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(mode="frozen", split_rank=0, split_layer=2, codec="int4", score=80.5)
    assert run(mode="auto", split_layer=2, codec="auto", max_steps=1) == 0
    told = capsys.readouterr().err
    assert "auto: --mode sl --split-layer 2 --codec float32: " in told or "auto: --mode frozen --split-layer 2" in told
    assert read_json(out / "options.json")["split_layer"] == 2


def test_nothing_that_is_good_enough(
    run: Callable[..., int], record: Callable[..., None], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(split_layer=1, score=75.0)
    assert run(**AUTO) == 2
    line = error_line(capsys.readouterr().err)
    assert line.startswith(
        "auto: of all these ways to train the best on record, sft l=1 R=8 int8, is to lose 5.0 points"
    )
    assert run(**{**AUTO, "split_rank": 4}) == 2
    assert error_line(capsys.readouterr().err).startswith("auto: no record says what accuracy any of these ways")
    assert not out.exists()


def test_measuring_keeps_to_no_cap(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(**AUTO, data_cap="1GB") == 2
    assert error_line(capsys.readouterr().err).startswith("auto does not go with --data-cap 1 GB")


def test_a_run_that_was_not_cut_goes_on_so(
    run: Callable[..., int], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(mode="local", split_layer=None, max_steps=2) == 0
    capsys.readouterr()
    goes_on = {"max_steps": 3, "resume_from_checkpoint": True}
    assert run(**AUTO, **goes_on) == 2
    assert error_line(capsys.readouterr().err).startswith("the run was trained with --mode local, now it is sft")
    assert run(mode="auto", **AUTO, **goes_on, server=None) == 0
    assert "auto: --mode local, as the run began" in capsys.readouterr().err
    assert read_json(out / "trainer_state.json")["global_step"] == 3


def test_a_run_that_has_left_is_found_before_anything_is_measured(
    run: Callable[..., int], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out.mkdir()
    (out / "detached.json").write_text("{}")
    assert run(**AUTO, resume_from_checkpoint=True) == 2
    told = capsys.readouterr().err
    assert "is of a run that has left its session" in error_line(told)
    assert "measuring" not in told
