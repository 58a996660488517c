"""A frozen edge whose activations the cloud keeps: each row crosses once, and the bits are those of one that sends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.jobs import read_json
from support.resuming import Clouds, Outcome, PowerCut

from sft.batch import Batch
from sft_cloud.options import LimitOptions
from sft_cloud.storage import KeptRows, KeptStore
from sft_edge.checkpoints import keep_key_of
from sft_edge.link import Link
from sft_edge.systems.kept_on_cloud import KeptOnCloud

KEPT = {"freeze_edge": True, "activations": "keep-on-cloud", "max_train_samples": 7, "per_device_train_batch_size": 3}
"""Three batches an epoch: seven steps are two epochs and a batch."""


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sequences that a frozen net_1 has computed, for each batch."""
    seen: list[int] = []
    right = KeptOnCloud._computed

    def count(self: KeptOnCloud, net_1: object, batch: Batch, indices: list[int]):
        seen.append(len(indices))
        return right(self, net_1, batch, indices)

    monkeypatch.setattr(KeptOnCloud, "_computed", count)
    return seen


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> list[KeptStore]:
    """Of the servers, in order."""
    made: list[KeptStore] = []
    begin = KeptStore.__init__

    def init(self: KeptStore, directory: Path, max_bytes: int) -> None:
        made.append(self)
        begin(self, directory, max_bytes)

    monkeypatch.setattr(KeptStore, "__init__", init)
    return made


@pytest.mark.first_only
@pytest.mark.parametrize(
    "options", [{}, {"mode": "sl", "codec": "fitted"}, {"codec": "int8", "labels": "local"}], ids=str
)
def test_every_row_crosses_once(
    run: Callable[..., int],
    whole: Callable[..., Outcome],
    clouds: Clouds,
    out: Path,
    computed: list[int],
    options: dict,
) -> None:
    options = {**options, "eval_strategy": "epoch"}
    on_edge = whole(**{**KEPT, **options, "activations": "keep-on-edge"})
    assert run(**KEPT, **options) == 0
    on_cloud = Outcome(out, clouds.store)
    assert sum(computed) == 7 + read_json(out / "all_results.json")["eval_samples"]
    assert on_cloud.payload[0] < on_edge.payload[0] / 2
    assert on_cloud.payload[1] == on_edge.payload[1]
    on_cloud.payload = on_edge.payload
    on_cloud.check_same(on_edge)


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(5, marks=pytest.mark.slow)])
def test_a_server_that_is_replaced(
    run: Callable[..., int],
    whole: Callable[..., Outcome],
    clouds: Clouds,
    out: Path,
    at_step: Callable[[int, Callable[[], object]], None],
    computed: list[int],
    step: int,
) -> None:
    """Before the first checkpoint, in the first epoch, and after it: what is in no checkpoint is sent again."""
    expected = whole(**KEPT)
    computed.clear()
    at_step(step, clouds.replace)
    assert run(**KEPT) == 0
    assert read_json(out / "all_results.json")["recoveries"] == 1
    assert sum(computed) == {1: 3 + 3, 3: 1, 5: 0}[step] + 7 + read_json(out / "all_results.json")["eval_samples"]
    Outcome(out, clouds.store).check_same(expected)


def test_the_key_is_nowhere_on_the_server(
    run: Callable[..., int],
    clouds: Clouds,
    out: Path,
    tmp_path: Path,
    at_step: Callable[[int, Callable[[], object]], None],
    stores: list[KeptStore],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Nor are the rows: not below its directories, nor in the files that have no name, nor in what it logs."""
    clouds.replace()
    nameless: list[bytes] = []
    sent: list[bytes] = []
    forward = Link.forward

    def recorded(self: Link, step: int, micro_batch: int, activation, *arguments, **more):
        if activation.keep:
            sent.append(activation.packed.data[:64])
        return forward(self, step, micro_batch, activation, *arguments, **more)

    def look() -> None:
        (rows,) = stores[-1]._rows
        nameless.append(b"".join(rows._chunks(0, rows._end)))

    at_step(5, look)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Link, "forward", recorded)
        assert run(**KEPT) == 0
    (secret,) = {bytes(load_file(path)["key"].tolist()) for path in out.glob("checkpoint-*/kept.safetensors")}
    assert len(secret) == 32
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in out.glob("checkpoint-*/kept.safetensors"))
    files = [path.read_bytes() for path in (tmp_path / "clouds").rglob("*") if path.is_file()]
    assert sum(data.startswith(b"sft kept rows") for data in files) == 3
    told = "".join(capfd.readouterr()).encode()
    assert len(nameless) == 1
    assert len(sent) == 3
    for data in [*files, *nameless, told]:
        for form in (secret, secret.hex().encode(), *sent):
            assert form not in data


def test_another_key_is_refused(run: Callable[..., int], clouds: Clouds, out: Path, monkeypatch, capsys) -> None:
    assert run(**{**KEPT, "max_steps": 3}) == 0
    monkeypatch.setattr("sft_edge.commands.train.train.keep_key_of", lambda checkpoint: b"k" * 32)
    assert run(**{**KEPT, "max_steps": 3}, resume_from_checkpoint=True) == 5
    assert "kept with another keep_key" in capsys.readouterr().err


def test_the_key_of_any_checkpoint(run: Callable[..., int], clouds: Clouds, out: Path, monkeypatch) -> None:
    """The newest may be of a session in which nothing was kept; the cloud may go on from an older one."""
    assert run(**{**KEPT, "max_steps": 5}) == 0
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    monkeypatch.setattr(
        "sft_edge.commands.train.train.keep_key_of",
        lambda checkpoint: None if checkpoint.step == 4 else keep_key_of(checkpoint),
    )
    assert run(**{**KEPT, "max_steps": 5}, resume_from_checkpoint=True) == 0


# No room.


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch, clouds: Clouds) -> Callable[[int], None]:
    """A cloud that keeps so many bytes at most."""

    def limit(size: int) -> None:
        defaults = LimitOptions(calls_per_second=10_000, max_kept_bytes=size)
        monkeypatch.setattr("support.servers.LimitOptions", lambda **options: defaults)
        clouds.replace()

    return limit


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"labels": "local"}], ids=str)
def test_a_quota_that_is_full_in_mid_epoch(
    run: Callable[..., int],
    whole: Callable[..., Outcome],
    clouds: Clouds,
    out: Path,
    limited: Callable[[int], None],
    computed: list[int],
    capsys: pytest.CaptureFixture[str],
    at_step: Callable[[int, Callable[[], object]], None],
    options: dict,
) -> None:
    """The run goes on, and says so; what was kept is, and goes on with a checkpoint."""
    sent = whole(**{**KEPT, **options, "activations": "resend"})
    limited(_first_batch(run, **KEPT, **options))
    computed.clear()
    capsys.readouterr()
    assert run(**KEPT, **options, overwrite_output_dir=True) == 0
    told = capsys.readouterr().err
    assert told.count("the cloud has no room for more activations than those of 3 sequences") == 1
    if options:  # otherwise it depends on how many steps are sent before the edge hears of it
        assert (computed[:3], sum(computed[3:6])) == ([3, 3, 1], 4)
    full = Outcome(out, clouds.store)
    assert full.results["train_loss"] == pytest.approx(sent.results["train_loss"], abs=1e-6)
    assert full.payload[0] < sent.payload[0]

    def cut() -> None:
        raise PowerCut

    at_step(5, cut)
    with pytest.raises(PowerCut):
        run(**KEPT, **options, overwrite_output_dir=True)
    clouds.replace()
    assert run(**KEPT, **options, resume_from_checkpoint=True) == 0
    Outcome(out, clouds.store).check_same(full)


@pytest.mark.slow
def test_a_cloud_that_keeps_none(
    run: Callable[..., int],
    whole: Callable[..., Outcome],
    clouds: Clouds,
    out: Path,
    limited: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = whole(**{**KEPT, "activations": "resend"})
    limited(0)
    assert run(**KEPT) == 0
    assert (
        "keeps no activations (an older release, or --max-kept-bytes 0): they are sent again" in capsys.readouterr().err
    )
    Outcome(out, clouds.store).check_same(expected)


def test_rows_that_the_disk_has_lost(
    run: Callable[..., int],
    whole: Callable[..., Outcome],
    clouds: Clouds,
    out: Path,
    at_step: Callable[[int, Callable[[], object]], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The step is begun anew, and those rows are sent again."""
    expected = whole(**{**KEPT, "activations": "resend"})
    read, lost = KeptRows.read, []

    def reads(self: KeptRows, number: int) -> bytes:
        if number == 2 and not lost:
            lost.append(number)
            raise self._is_damaged(number, OSError("gone"))
        return read(self, number)

    monkeypatch.setattr(KeptRows, "read", reads)
    assert run(**KEPT) == 0
    assert lost == [2]
    assert "the cloud has no room for more activations than those of 1 sequences" in capsys.readouterr().err
    assert Outcome(out, clouds.store).results["train_loss"] == pytest.approx(expected.results["train_loss"], abs=1e-6)


def _first_batch(run: Callable[..., int], **options: object) -> int:
    """What it takes of the cloud's disk."""
    sizes: list[int] = []
    add = KeptRows.add

    def added(self: KeptRows, rows: list[bytes]) -> None:
        add(self, rows)
        sizes.append(self.total_bytes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KeptRows, "add", added)
        assert run(**options) == 0
    return sizes[0]
