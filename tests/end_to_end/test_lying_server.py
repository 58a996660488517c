"""A server that lies, in whole runs: one line, the exit code of the link, and what was computed here is not lost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.jobs import Job, error_line
from support.script import batches, tiny_model, wrap
from support.servers import start_server

from sft.errors import ProtocolError, SFTError
from sft.v1 import split_training_pb2 as pb
from sft_cloud.options import LimitOptions
from sft_edge.cli import main
from sft_edge.link.grpc_transport import GrpcTransport
from sft_edge.link.transport import Stream

Lie = Callable[[pb.CloudMessage], None]
NAN, MANY = math.nan, (1 << 32) - 1


class _Lying(Stream):
    """Every answer as `lie` changes it."""

    def __init__(self, inner: Stream, lie: Lie) -> None:
        self._inner, self._lie = inner, lie

    def __next__(self) -> bytes:
        answer = pb.CloudMessage.FromString(next(self._inner))
        self._lie(answer)
        return answer.SerializeToString()

    def cancel(self) -> None:
        self._inner.cancel()


@pytest.fixture
def lying(monkeypatch: pytest.MonkeyPatch) -> Callable[[Lie], None]:
    stream = GrpcTransport.stream

    def install(lie: Lie) -> None:
        monkeypatch.setattr(GrpcTransport, "stream", lambda way, messages: _Lying(stream(way, messages), lie))

    return install


def _tensors(answer: pb.CloudMessage) -> Iterator[pb.Tensor]:
    for message, field in ((answer.result, "packed_gradient"), (answer.result, "logits")):
        if message.HasField(field):
            yield getattr(message, field)
    for body in ("outputs", "evaluation"):
        if answer.HasField(body):
            yield getattr(answer, body).logits


def number(path: str, value: float) -> Lie:
    """`result.loss`: set in the answers that have such a body."""

    def lie(answer: pb.CloudMessage) -> None:
        body, _, field = path.rpartition(".")
        if not body:
            setattr(answer, field, value)
        elif answer.HasField(body):
            setattr(getattr(answer, body), field, value)

    return lie


def tensor(**fields: object) -> Lie:
    def lie(answer: pb.CloudMessage) -> None:
        for one in _tensors(answer):
            changed = pb.Tensor(**fields)
            for name in fields:
                one.ClearField(name)
            one.MergeFrom(changed)

    return lie


def other_body(answer: pb.CloudMessage) -> None:
    if not answer.HasField("attached"):
        answer.committed.next_step = MANY


def skipped(answer: pb.CloudMessage) -> None:
    if answer.HasField("result"):
        answer.step_skipped.reason = "\x1b[2J" + "x\n" * 100_000


LIES: dict[str, Lie] = {
    **{f"{path} {value}": number(path, value) for path in ("cloud_seconds",) for value in (NAN, math.inf, -1.0)},
    **{
        f"result.{field} {value}": number(f"result.{field}", value)
        for field in ("loss", "squared_gradient_norm")
        for value in (NAN, math.inf, -1.0)
    },
    **{f"{path}": number(path, MANY) for path in ("step", "micro_batch", "number", "attached.last_number")},
    "attached.next_step": number("attached.next_step", MANY),
    "committed.next_step": number("committed.next_step", MANY),
    "committed.squared_gradient_norm": number("committed.squared_gradient_norm", NAN),
    "a type": tensor(data_type=99),
    "another type": tensor(data_type=pb.DATA_TYPE_FLOAT16),
    "no type": tensor(data_type=0),
    "a shape": tensor(shape=[MANY] * 64),
    "a shape of nothing": tensor(shape=[0, MANY], data=b""),
    "no shape": tensor(shape=[]),
    "no data": tensor(data=b""),
    "other data": tensor(shape=[1, 1], data=b"\xff\xff\xff\x7f"),
    "another body": other_body,
    "skipped": skipped,
}


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One that has room for sessions whose edges have gone."""
    server = start_server(tmp_path_factory.mktemp("cloud"), 500, LimitOptions(opens_per_minute=100_000))
    yield server.address
    server.stop(grace_seconds=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", LIES)
def test_a_run(
    lying: Callable[[Lie], None],
    job: Job,
    model: Path,
    cloud: str,
    tmp_path: Path,
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lying(LIES[name])
    for labels in ("cloud", "local"):
        options = {"labels": labels, "max_steps": 3, "max_grad_norm": 1.0, "reconnect_timeout": "0s"}
        code = main(["train", *job.flags(**options, model=model, server=cloud, output_dir=tmp_path / labels)])
        stderr = capsys.readouterr().err
        assert code in (0, 5, 6), stderr
        assert "Traceback" not in stderr
        if code:
            line = error_line(stderr)
            assert len(line) < 1500
            assert line.isprintable()


@pytest.mark.slow
@pytest.mark.parametrize("name", LIES)
def test_a_script(lying: Callable[[Lie], None], cloud: str, name: str) -> None:
    lying(LIES[name])
    for travels in (True, False):
        model = tiny_model()
        said = ""
        try:
            with wrap(model, _sgd(model), server=cloud, reconnect_timeout_seconds=0.0) as optimizer:
                for batch in batches(2, model):
                    optimizer.zero_grad()
                    labels = batch.pop("labels")
                    output = model(**batch, labels=labels) if travels else model(**batch)
                    (output.loss if travels else output.logits.logsumexp(-1).sum()).backward()
                    optimizer.step()
                model.state_dict()
        except SFTError as error:
            said = str(error)
        assert said.isprintable()
        assert len(said) < 1500


def _sgd(model):  # type: ignore[no-untyped-def]
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("lie", ["nine bytes", "too much"])
def test_a_download_that_is_not_the_run_s(
    failing: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lie: str
) -> None:
    taken = 0

    def download(self, session_id, optimizer_state=False, offset=0, download=GrpcTransport.download):
        nonlocal taken
        if lie == "nine bytes":
            yield b"nine byte"
            return
        yield from download(self, session_id, optimizer_state, offset)
        while True:
            taken += 1
            yield b"x" * (1 << 20)

    monkeypatch.setattr(GrpcTransport, "download", download)
    code, line = failing(max_steps=2)
    assert code == 5
    assert "the file that the cloud sends " in line
    out = tmp_path / "out"
    assert line.endswith(f"; the edge's half of the model is in {out / 'net_1.safetensors'}")
    assert "bert.encoder.layer.1.output.dense.ffn1.weight" in load_file(out / "net_1.safetensors")
    assert not list(out.glob("decomposed*"))
    assert taken <= 1


def test_a_script_s_state_that_is_not_its_own(cloud: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    with wrap(model, _sgd(model), server=cloud) as optimizer:
        model(**batches(1, model)[0]).loss.backward()
        optimizer.step()
        monkeypatch.setattr(GrpcTransport, "download", lambda *arguments: iter([b"nine byte"]))
        for ask in (model.state_dict, optimizer.state_dict):
            with pytest.raises(ProtocolError, match="the file that the cloud sends begins with a header of"):
                ask()
