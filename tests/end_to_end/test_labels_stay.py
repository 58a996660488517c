"""`--labels local`: no message holds a label, and the model learns what it learns elsewhere, dropout on."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.jobs import JOBS, Job, read_json, same_bits, sst2, stsb, weights_of

from sft.v1 import split_training_pb2 as pb
from sft_edge.link.grpc_transport import GrpcTransport

VALUES = [3.1415926, 2.7182818, 1.4142135, 0.5772156]
"""Labels that nothing else is by chance."""


class Capture:
    """Every byte that edges send, wherever they send it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.messages: list[bytes] = []
        """Of training streams."""
        self.others: list[bytes] = []
        stream, upload, open_session = GrpcTransport.stream, GrpcTransport.upload, GrpcTransport.open_session

        def recorded(messages: Iterator[bytes], to: list[bytes]) -> Iterator[bytes]:
            for data in messages:
                to.append(data)
                yield data

        def open_recorded(transport, request):
            self.others.append(request.SerializeToString())
            return open_session(transport, request)

        monkeypatch.setattr(
            GrpcTransport, "stream", lambda transport, messages: stream(transport, recorded(messages, self.messages))
        )
        monkeypatch.setattr(
            GrpcTransport,
            "upload",
            lambda transport, sha256, size, chunks: upload(transport, sha256, size, recorded(chunks, self.others)),
        )
        monkeypatch.setattr(GrpcTransport, "open_session", open_recorded)

    def forwards(self) -> list[pb.Forward]:
        messages = [pb.EdgeMessage.FromString(data) for data in self.messages]
        return [message.forward for message in messages if message.HasField("forward")]

    def finds(self, value: float) -> bool:
        """Whether a number was sent: as a float, a double, or in decimal."""
        traces = [struct.pack("<f", value), struct.pack("<d", value), str(value).encode()]
        return any(trace in data for data in self.messages + self.others for trace in traces)


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Capture:
    return Capture(monkeypatch)


@pytest.fixture
def numbers(tmp_path: Path) -> Job:
    """Regression towards `VALUES`, in training and in validation."""
    for name in ("train", "dev"):
        rows = [{"text": f"the film is story {index}", "label": VALUES[index % 4]} for index in range(16)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return Job("text", tmp_path, 16, 16)


@pytest.mark.first_only
@pytest.mark.parametrize("mode", ["sft", "sl"])
def test_no_byte_that_is_sent_is_of_a_label(
    numbers: Job, model: Path, train: Callable[..., Path], capture: Capture, mode: str
) -> None:
    options = {"model": model, "mode": mode, "problem_type": "regression", "max_steps": 4}
    train(numbers, labels="local", eval_strategy="epoch", **options)
    forwards = capture.forwards()
    assert len(forwards) == 4
    assert not any(forward.HasField("labels") for forward in forwards)
    assert not any(capture.finds(value) for value in VALUES)

    capture.messages.clear()
    train(numbers, labels="cloud", **options)
    assert all(forward.HasField("labels") for forward in capture.forwards())
    assert all(capture.finds(value) for value in VALUES), "what would be found if it were sent"


def test_other_labels_change_neither_a_size_nor_the_first_message(
    model: Path, train: Callable[..., Path], capture: Capture, tmp_path: Path
) -> None:
    """Not even those that are only a bit each: what depends on them is the gradient that goes up, and what follows."""
    sent: list[list[bytes]] = []
    for directory, swap in ((tmp_path / "as-they-are", False), (tmp_path / "swapped", True)):
        job = sst2(directory)
        if swap:
            for path in (directory / "SST-2").glob("*.tsv"):
                header, *rows = path.read_text().splitlines()
                rows = [row[:-1] + "10"[int(row[-1])] for row in rows]
                path.write_text("\n".join([header, *rows]) + "\n")
        train(job, model=model, labels="local", max_steps=2)
        sent.append(capture.messages[1:])  # the first names the session
        capture.messages = []
    one, other = sent
    assert [pb.EdgeMessage.FromString(data).WhichOneof("body") for data in one[:3]] == [
        "forward",
        "backward",
        "forward",
    ]
    assert one[0] == other[0]
    assert one[1] != other[1]
    assert [len(data) for data in one] == [len(data) for data in other]


@pytest.mark.first_only
@pytest.mark.parametrize("task", JOBS)
@pytest.mark.parametrize("mode", ["sft", "sl"])
def test_training_is_the_same_bit_for_bit(
    model: Path, train: Callable[..., Path], tmp_path: Path, task: str, mode: str
) -> None:
    job = JOBS[task](tmp_path)
    options = {"model": model, "mode": mode, "max_steps": 4, "gradient_accumulation_steps": 2}
    there, here = (train(job, labels=labels, **options) for labels in ("cloud", "local"))
    assert same_bits(weights_of(there), weights_of(here))
    one, other = (read_json(directory / "all_results.json") for directory in (there, here))
    assert other["train_loss"] == pytest.approx(one["train_loss"], abs=1e-6)
    # Logits came down, their gradient went up.
    assert other["wire_payload_bytes_sent"] > one["wire_payload_bytes_sent"]
    assert other["wire_payload_bytes_received"] > one["wire_payload_bytes_received"]
    assert other["eval_wire_bytes_sent"] == one["eval_wire_bytes_sent"]


def test_it_survives_sixteen_bits(model: Path, train: Callable[..., Path], tmp_path: Path) -> None:
    job = stsb(tmp_path)
    full, half = (
        read_json(train(job, model=model, labels="local", wire_dtype=dtype, max_steps=3) / "all_results.json")
        for dtype in ("float32", "bfloat16")
    )
    # Activations, and both gradients; logits come as they are.
    logits = 3 * 8 * 4
    assert 2 * half["wire_payload_bytes_sent"] == full["wire_payload_bytes_sent"]
    assert 2 * (half["wire_payload_bytes_received"] - logits) == full["wire_payload_bytes_received"] - logits
    assert half["train_loss"] == pytest.approx(full["train_loss"], abs=0.05)


@pytest.mark.first_only
@pytest.mark.parametrize("labels", ["cloud", "local"])
def test_a_frozen_edge_gets_no_gradient_and_stays_as_it_was(
    job: Job, model: Path, train: Callable[..., Path], capture: Capture, labels: str
) -> None:
    options = {"model": model, "labels": labels, "freeze_edge": True}
    still, trained = (
        weights_of(train(job, **options, learning_rate=rate, weight_decay=0.1, max_steps=3)) for rate in (0, 1e-2)
    )
    on_edge = [name for name in still if "embeddings" in name or ".layer.0." in name or "ffn1" in name]
    assert all(still[name].equal(trained[name]) for name in on_edge)
    assert not still["classifier.weight"].equal(trained["classifier.weight"])
    assert not still["bert.encoder.layer.1.output.dense.ffn2.weight"].equal(
        trained["bert.encoder.layer.1.output.dense.ffn2.weight"]
    )
    assert all(forward.frozen_edge for forward in capture.forwards())
    results = read_json(train(job, **options, max_steps=3) / "all_results.json")
    assert results["wire_payload_bytes_received"] == (3 * 8 * 2 * 4 if labels == "local" else 0)
