"""Where the cloud's half comes from: its own copy of the model if that is the edge's, else one upload."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.jobs import Job, same_bits, weights_of
from support.script import wrap
from support.tiny import make_tiny_model
from transformers import AutoModelForSequenceClassification

from sft_cloud.server import CloudServer
from sft_edge.link.grpc_transport import GrpcTransport


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every upload so far."""
    sizes: list[int] = []

    def counting(self, sha256, total_bytes, chunks, upload=GrpcTransport.upload):
        upload(self, sha256, total_bytes, chunks)
        sizes.append(total_bytes)

    monkeypatch.setattr(GrpcTransport, "upload", counting)
    return sizes


@pytest.fixture(autouse=True)
def _told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sft_cloud")


def blobs(caplog: pytest.LogCaptureFixture) -> int:
    """How many blobs the clouds of the test say they stored."""
    return sum(record.getMessage() == "blob stored" for record in caplog.records)


def test_a_cloud_without_the_weights_gets_them_once(
    job: Job,
    model: Path,
    train: Callable[..., Path],
    start_cloud: Callable[..., CloudServer],
    uploads: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    address = start_cloud().address
    first = train(job, model=model, max_steps=2, server=address)
    # Net_2 of the tiny model cut at block 2 of 3: a block, the norm and FFN-2 and FFN-3 of another; the head is drawn.
    block = 4 * (32 * 32 + 32) + 2 * 32 * 64 + 64 + 32 + 4 * 32
    norm, pooler, factors = 2 * 32, 32 * 32 + 32, 4 * 4 + 4 * 32 + 32
    assert [size // 4 for size in sorted(uploads)] == [
        pytest.approx(factors, abs=100),
        pytest.approx(block + norm + pooler, abs=600),  # and the header
    ]
    assert blobs(caplog) == 2
    again = train(job, model=model, max_steps=2, server=address)
    assert len(uploads) == blobs(caplog) == 2
    assert same_bits(weights_of(first), weights_of(again))
    train(job, model=model, max_steps=2, server=address, split_rank=5)  # other factors, but the same pretrained tensors
    assert len(uploads) == blobs(caplog) == 3


@pytest.mark.parametrize(("mode", "expected"), [("sl", 0), ("sft", 1)])
def test_a_cloud_with_the_same_model_is_sent_nothing_but_factors(
    job: Job,
    model: Path,
    train: Callable[..., Path],
    start_cloud: Callable[..., CloudServer],
    uploads: list[int],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    mode: str,
    expected: int,
) -> None:
    shutil.copytree(model, tmp_path / "models" / model.name)
    address = start_cloud(model_dir=tmp_path / "models").address
    ours = train(job, model=model, mode=mode, max_steps=2, server=address)
    assert len(uploads) == blobs(caplog) == expected
    elsewhere = train(job, model=model, mode=mode, max_steps=2)
    assert same_bits(weights_of(ours), weights_of(elsewhere))


def test_a_cloud_with_another_model_of_that_name_asks_for_the_edge_s(
    job: Job,
    model: Path,
    train: Callable[..., Path],
    start_cloud: Callable[..., CloudServer],
    uploads: list[int],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    make_tiny_model(tmp_path / "models" / model.name, layers=3, seed=1)
    address = start_cloud(model_dir=tmp_path / "models").address
    ours = train(job, model=model, model_name=model.name, mode="sl", max_steps=2, server=address)
    assert len(uploads) == blobs(caplog) == 1
    assert "model differs from the edge's" in caplog.messages
    elsewhere = train(job, model=model, mode="sl", max_steps=2)
    assert same_bits(weights_of(ours), weights_of(elsewhere))


@pytest.mark.parametrize("changed", [False, True])
def test_a_script_s_model_is_sent_no_more_of(
    model: Path, start_cloud: Callable[..., CloudServer], uploads: list[int], tmp_path: Path, changed: bool
) -> None:
    """The head that the script has drawn, with the factors; all of net_2 where one number of it is another."""
    shutil.copytree(model, tmp_path / "models" / "as-they-call-it-there")
    theirs = AutoModelForSequenceClassification.from_pretrained(model)
    head = theirs.classifier.weight.detach().clone()
    if changed:
        theirs.bert.encoder.layer[2].output.dense.bias.data[0] += 1
    address = start_cloud(model_dir=tmp_path / "models").address
    with wrap(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1), server=address):
        assert theirs.state_dict()["classifier.weight"].equal(head)
    factors, drawn = 4 * 4 + 4 * 32 + 32, 2 * 32 + 2
    assert len(uploads) == 1 + changed
    if not changed:
        assert uploads[0] // 4 == pytest.approx(factors + drawn, abs=200)  # and the header


def test_a_model_drawn_from_the_seed_is_not_sent(
    job: Job, model: Path, train: Callable[..., Path], start_cloud: Callable[..., CloudServer], uploads: list[int]
) -> None:
    shape = {"from_config": model / "config.json", "tokenizer_name": model}
    train(job, **shape, mode="sl", max_steps=1, server=start_cloud().address)
    assert uploads == []
