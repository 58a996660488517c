"""What `sft-edge plan` does to the link and to the server while it measures, by true sessions."""

from __future__ import annotations

import json
import signal
import socket
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
from support.jobs import Job
from support.sent import Sent
from support.servers import start_server
from support.tiny import _WORDS, make_tiny_model

from sft.v1 import split_training_pb2 as pb
from sft_cloud.options import LimitOptions
from sft_cloud.server import CloudServer
from sft_edge.cli import main
from sft_edge.commands.plan import plan as plan_module
from sft_edge.commands.plan import sessions
from sft_edge.link import Pace, Retries
from sft_edge.link.pace import RECEIVED, SENT

pytestmark = pytest.mark.usefixtures("quick_trials")

OPEN = {"split_layer": None, "split_rank": None, "max_seq_length": 32}
WORDS = _WORDS.split()


@pytest.fixture
def plan(job: Job, model: Path) -> Callable[..., int]:
    def run(**options: object) -> int:
        return main(["plan", *job.flags(**{"model": model, **OPEN, **options})])

    return run


def plans(capsys: pytest.CaptureFixture[str]) -> list[dict]:
    return json.loads(capsys.readouterr().out)["plans"]


def test_each_cut_is_asked_for(
    plan: Callable[..., int],
    job: Job,
    model: Path,
    start_cloud: Callable[..., CloudServer],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A cloud that has the half of one cut has not those of others."""
    server = start_cloud()
    given = {"server": server.address, "mode": "sl", "codec": "int8"}
    assert plan(**given, json=True) == 0
    before = {one["split_layer"]: one["run_bytes"] for one in plans(capsys)}
    train = job.flags(**given, model=model, split_layer=3, max_steps=1, output_dir=tmp_path / "out")
    assert main(["train", *train]) == 0
    capsys.readouterr()
    assert plan(**given, json=True) == 0
    after = {one["split_layer"]: one["run_bytes"] for one in plans(capsys)}
    assert {layer for layer in after if after[layer] < before[layer]} == {3}


def test_a_cloud_that_keeps_nothing_is_sent_rows_in_every_epoch(
    plan: Callable[..., int], start_cloud: Callable[..., CloudServer], capsys: pytest.CaptureFixture[str]
) -> None:
    server = start_cloud(limits=LimitOptions(calls_per_second=10_000, max_kept_bytes=0))
    given = {"mode": "frozen", "split_layer": 1, "codec": "int8", "num_train_epochs": 1000}
    assert plan(server=server.address, **given, json=True) == 0
    (one,) = plans(capsys)
    assert one["run_bytes"] > 4000 * one["step_bytes"], "of as many steps"


def test_a_server_that_is_waited_for(
    plan: Callable[..., int], tmp_path: Path, at_call: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    servers: list[CloudServer] = []
    with socket.socket() as held:  # bound, and never listening
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        at_call(1, Retries, "after", lambda: servers.append(start_server(tmp_path / "late", port=port)))
        given = {"server": f"127.0.0.1:{port}", "wait": "60s", "reconnect_backoff": "1ms"}
        try:
            assert plan(**given, mode="sl", split_layer=1, codec="int8") == 0
        finally:
            for server in servers:
                server.stop(grace_seconds=0)
    assert "waiting for it for up to 1m" in capsys.readouterr().err


class Simulated(Pace):
    """Waits by a clock of its own, and keeps count."""

    made: ClassVar[list[Simulated]] = []

    def __init__(self, mbit: float | None) -> None:
        self.now = 0.0
        self.sizes: dict[str, list[int]] = {SENT: [], RECEIVED: []}
        super().__init__(mbit, clock=lambda: self.now, wait=self._pass)
        self.made.append(self)

    def _pass(self, over: threading.Event, seconds: float) -> None:
        self.now += seconds

    def took(self, way: str, size: int) -> None:
        super().took(way, size)
        self.sizes[way].append(size)


def test_measuring_keeps_to_the_rate(
    plan: Callable[..., int],
    start_cloud: Callable[..., CloudServer],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Probes and steps alike; only the last message each way may have gone before its time was over."""
    monkeypatch.setattr(Simulated, "made", [])
    monkeypatch.setattr(plan_module, "Pace", Simulated)
    given = {"server": start_cloud().address, "mode": "sl", "split_layer": 1, "codec": "float32", "max_mbit": 0.8}
    assert plan(**given, json=True) == 0
    content = json.loads(capsys.readouterr().out)
    (pace,) = Simulated.made
    steps = sum(2 * one["sent"] for one in content["measured"])  # two of each length: the first is not looked at
    for sizes in pace.sizes.values():
        assert max(sizes) >= 1 << 16, "a probe, which is larger than any of these steps"
        assert sum(size for size in sizes if size < 1 << 16) > 0.9 * steps
        assert sum(sizes) <= 100_000 * (1 + pace.now) + 1.1 * max(sizes), "a second is saved up at first"


@pytest.mark.usefixtures("default_sigterm")
def test_sigterm_leaves_nothing_behind(
    plan: Callable[..., int],
    start_cloud: Callable[..., CloudServer],
    at_call: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server, temporary = start_cloud(), tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    seen: list[int] = []

    def terminate() -> None:
        seen.extend([len(server.sessions.entries()), len(list(temporary.iterdir()))])
        signal.raise_signal(signal.SIGTERM)

    at_call(2, sessions._Steps, "take", terminate)
    with pytest.raises(SystemExit) as ended:
        plan(server=server.address, mode="frozen", split_layer=1, codec="int8", activations="keep-on-edge")
    assert ended.value.code == 143
    assert seen == [1, 1]
    assert not server.sessions.entries()
    assert not list(temporary.iterdir())


def other_words(text: str) -> str:
    """As many tokens: each of these words is one."""
    other = dict(zip(WORDS, [*WORDS[1:], WORDS[0]]))
    return " ".join(other.get(word, word) for word in text.split(" "))


def test_nothing_of_the_weights_or_of_the_rows_leaves(
    job: Job,
    model: Path,
    start_cloud: Callable[..., CloudServer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of a model with other weights, and rows with other words and labels, as long, the same is sent, to the bit: but
    what is drawn for each session, how many probes the link took, and the hash by which the cloud is asked for the
    weights."""
    other_model = make_tiny_model(tmp_path / "other", layers=3, seed=5)
    for name in ("train", "dev"):
        head, *lines = (job.data_dir / "SST-2" / f"{name}.tsv").read_text().splitlines()
        rows = [line.split("\t") for line in lines]
        theirs = [f"{other_words(text)}\t{1 - int(label)}" for text, label in rows]
        assert not set(theirs) & set(lines)
        to = tmp_path / "data" / "SST-2" / f"{name}.tsv"
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text("\n".join([head, *theirs]) + "\n")
    sent = Sent(monkeypatch)
    told: list[list[bytes]] = []
    for start, data_dir in ((model, job.data_dir), (other_model, tmp_path / "data")):
        sent.messages.clear()
        server = start_cloud()
        for given in ({"mode": "sft", "split_rank": 4, "codec": "int8"}, {"mode": "frozen", "codec": "fitted"}):
            values = {**OPEN, "model": start, "data_dir": data_dir, "split_layer": 1, "server": server.address, **given}
            assert main(["plan", *job.flags(**values)]) == 0
        assert "training rows" not in capsys.readouterr().err, "the code is fitted to made-up ones"
        probes = [one for one in sent.parsed() if isinstance(one, pb.ProbeRequest)]
        assert not any(any(one.data) for one in probes)
        told.append([without_what_is_drawn(one) for one in sent.parsed() if not isinstance(one, pb.ProbeRequest)])
    assert len(told[0]) > 30
    assert len(told[0]) == len(told[1])
    # Messages are long, and pytest would look for what two lists of them have in common.
    assert [number for number, (one, other) in enumerate(zip(*told)) if one != other] == []
    asked = [one for one in sent.parsed() if isinstance(one, pb.OpenSessionRequest)]
    assert [one.only_check for one in asked if one.weights_sha256] == [True, True]
    labels = [
        one.forward.labels for one in sent.parsed() if isinstance(one, pb.EdgeMessage) and one.HasField("forward")
    ]
    assert labels
    assert all(set(one.classes.ids) == {0} for one in labels)


def without_what_is_drawn(message: object) -> bytes:
    if isinstance(message, pb.OpenSessionRequest):
        for field in ("request_id", "keep_key", "weights_sha256"):
            message.ClearField(field)
    if isinstance(message, pb.EdgeMessage) and message.HasField("attach"):
        message.attach.ClearField("session_id")
    return type(message).__name__.encode() + message.SerializeToString(deterministic=True)  # type: ignore[attr-defined]
