"""The paper's Listing 1: two lines in a script, and it trains across edge and cloud as it does on one machine."""

from __future__ import annotations

import difflib
import importlib.util
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.hosting_script import ScriptCloud
from support.script import adamw, batches, one_machine, sgd, tiny_model
from torch import Tensor, nn

from sft import SFTOptimizer
from sft.models import Cut
from sft.models.decompose import decompose
from sft.v1 import split_training_pb2 as pb
from sft_edge.link.grpc_transport import GrpcTransport
from sft_edge.link.transport import Stream, Transport

EXAMPLES = Path(__file__).parents[2] / "examples"
RANK, LAYER = 8, "blocks.2.fc2"
OPTIONS = ["--epochs", "1", "--rows", "256"]


def load_example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


plain = load_example("plain")


class CutBlock(plain.Block):  # type: ignore[misc, name-defined]
    """The block that is cut, on one machine: eq. 3 in the place of its layer, and no residual around it."""

    @classmethod
    def of(cls, block: Any) -> CutBlock:
        block.__class__ = cls
        factors = decompose(block.fc2.weight.T, RANK)
        bias = block.fc2.bias
        block.fc2 = nn.Sequential()
        for name, matrix in zip(("ffn1", "ffn2", "ffn3"), factors, strict=True):
            linear = nn.Linear(*matrix.shape, bias=name == "ffn3")
            linear.weight.data = matrix.T.contiguous()
            block.fc2.add_module(name, linear)
        block.fc2.ffn3.bias = bias
        return block  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_1(x + self.dropout(self.attention(x, x, x, need_weights=False)[0]))
        return self.norm_2(self.dropout(self.fc2(nn.functional.gelu(self.fc1(x)))))


def classifier(dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    return plain.Classifier(dropout)


def one_machine_run(epochs: int = 1, rows: int = 256) -> dict[str, Tensor]:
    """The loop of examples/plain.py on the decomposed model, dropout off."""
    model = classifier()
    CutBlock.of(model.blocks[2])
    optim = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for data, target in plain.make_loader(rows, seed=1, shuffle=True):
            optim.zero_grad()
            nn.functional.cross_entropy(model(data), target).backward()
            optim.step()
    return model.state_dict()  # type: ignore[no-any-return]


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_the_example_is_the_plain_script_plus_two_lines() -> None:
    lines = [(EXAMPLES / name).read_text().splitlines() for name in ("plain.py", "listing1.py")]
    changes = [line for line in difflib.ndiff(*lines) if not line.startswith(" ")]
    added = [line[2:].strip() for line in changes if line.startswith("+ ") and line[2:].strip()]
    assert not [line for line in changes if not line.startswith("+ ")], "lines of the plain script are missing"
    assert [line.partition(" ")[0] for line in added] == ["from", "role,", "optim"]
    assert added[0].startswith("from sft import SFTOptimizer")
    assert added[2].startswith("optim = SFTOptimizer(optim, role=role, model=model, ")


@pytest.mark.slow
def test_two_processes_end_with_the_weights_of_one_machine(tmp_path: Path) -> None:
    """The very files of examples/, but for the port."""
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES), "OMP_NUM_THREADS": "1"}
    cloud_command = [sys.executable, EXAMPLES / "listing1_cloud.py", "--dropout", "0", "--listen", "127.0.0.1:0"]
    with subprocess.Popen(
        [*cloud_command, "--save", tmp_path / "cloud.pt"], env=environment, stdout=subprocess.PIPE, text=True
    ) as cloud:
        assert cloud.stdout is not None
        address = cloud.stdout.readline().split()[-1]
        script = tmp_path / "listing1.py"
        script.write_text((EXAMPLES / "listing1.py").read_text().replace("localhost:50051", address))
        command = [sys.executable, script, "--dropout", "0", *OPTIONS, "--save", tmp_path / "edge.pt"]
        edge = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert edge.returncode == 0, edge.stderr
        assert edge.stderr == ""
        assert cloud.wait(60) == 0
    expected = one_machine_run()
    both = torch.load(tmp_path / "edge.pt")
    assert_close(both, expected)
    upper = torch.load(tmp_path / "cloud.pt")
    assert_close(upper, {name: expected[name] for name in upper})
    assert "head.weight" in upper
    assert "blocks.1.fc2.weight" not in upper


@pytest.mark.slow
def test_the_cloud_takes_the_last_step_of_a_script_that_just_ends() -> None:
    """Nothing is asked of the cloud after the last `optim.step()`, not even a `close()` is in Listing 1."""
    model = classifier()
    with ScriptCloud(model, torch.optim.Adam(model.parameters(), lr=1e-3), split_at=LAYER, split_rank=RANK) as cloud:
        program = f"""
import sys
sys.path.insert(0, {str(EXAMPLES)!r})
import torch, plain
from sft import SFTOptimizer
torch.manual_seed(0)
model = plain.Classifier(0.0)
optim = torch.optim.Adam(model.parameters(), lr=1e-3)
optim = SFTOptimizer(optim, role="edge", model=model, server={cloud.address!r}, split_at={LAYER!r}, split_rank={RANK})
for data, target in plain.make_loader(256, seed=1, shuffle=True):
    optim.zero_grad()
    torch.nn.functional.cross_entropy(model(data), target).backward()
    optim.step()
"""
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
    expected = one_machine_run()
    assert_close(model.state_dict(), {name: expected[name] for name in model.state_dict()})


@pytest.mark.one_in(3)
@pytest.mark.parametrize("travels", [True, False], ids=["labels-travel", "labels-stay"])
@pytest.mark.parametrize("residual", ["none", "low-rank"])
def test_a_transformers_model_that_a_script_hosts(travels: bool, residual: str) -> None:
    """`model(**batch)` with labels and without; the cloud's optimizer is its script's own."""
    reference = tiny_model()
    fitted = batches(2, reference, labels=False) if residual == "low-rank" else []
    reference_whole = one_machine(reference, Cut("sft", 2, 4, residual), fitted)

    def train(model: Any, optimizer: Any) -> None:
        for batch in batches(4, model):
            optimizer.zero_grad()
            labels = batch["labels"] if travels else batch.pop("labels")
            output = model(**batch)
            loss = output.loss if travels else nn.functional.cross_entropy(output.logits, labels)
            loss.backward()
            optimizer.step()

    train(reference_whole, adamw(reference_whole))
    expected = {name: parameter.detach() for name, parameter in reference_whole.named_parameters()}
    on_cloud, on_edge = tiny_model(), tiny_model()
    options: dict[str, Any] = {"split_layer": 2, "split_rank": 4, "residual": residual}
    with ScriptCloud(on_cloud, adamw(on_cloud), **options) as cloud:
        edge_options = {"server": cloud.address, "calibration": fitted or None, **options}
        with SFTOptimizer(adamw(on_edge), role="edge", model=on_edge, **edge_options) as optimizer:
            train(on_edge, optimizer)
    upper = on_cloud.state_dict()
    assert_close(upper, {name: expected[name] for name in upper})
    lower = {name: tensor for name, tensor in on_edge.named_parameters() if name != "cloud_gradients"}
    assert_close({**lower, **upper}, expected)


class Recorder(Transport):
    """gRPC, and a copy of all that the edge sends."""

    def __init__(self, address: str) -> None:
        self._inner = GrpcTransport(address)
        self.sent: list[bytes] = []
        self.messages: list[bytes] = []
        """Those of the stream."""

    def open_session(self, request: pb.OpenSessionRequest) -> pb.OpenSessionResponse:
        self.sent.append(request.SerializeToString())
        return self._inner.open_session(request)

    def upload(self, sha256: str, total_bytes: int, chunks: Iterator[bytes]) -> None:
        def recorded() -> Iterator[bytes]:
            for chunk in chunks:
                self.sent.append(chunk)
                yield chunk

        self._inner.upload(sha256, total_bytes, recorded())

    def stream(self, messages: Iterator[bytes]) -> Stream:
        def recorded() -> Iterator[bytes]:
            for message in messages:
                self.sent.append(message)
                self.messages.append(message)
                yield message

        return self._inner.stream(recorded())

    def download(self, session_id: str, optimizer_state: bool = False, offset: int = 0) -> Iterator[bytes]:
        return self._inner.download(session_id, optimizer_state, offset)

    def renew(self) -> None:
        self._inner.renew()

    def close(self) -> None:
        self._inner.close()


def values_as_bytes(value: float) -> set[bytes]:
    """How one number may be written."""
    half, brain = (torch.tensor(value).to(dtype).view(torch.int16).item() for dtype in (torch.float16, torch.bfloat16))
    packed = {struct.pack(order + kind, value) for order in "<>" for kind in "fd"}
    return (
        packed | {struct.pack(order + "h", bits) for order in "<>" for bits in (half, brain)} | {repr(value).encode()}
    )


def ids_as_bytes(ids: list[int]) -> set[bytes]:
    """How a batch of class ids may be written, one after the other."""
    messages = {
        pb.Labels.Classes(ids=ids).SerializeToString()[2:],
        pb.Labels.Spans(starts=ids).SerializeToString()[2:],
    }
    fixed = {struct.pack(f"{order}{len(ids)}{kind}", *ids) for order in "<>" for kind in "bhiqfd"}
    texts = {separator.join(map(str, ids)).encode() for separator in (",", ", ", " ", "\n", "")}
    return messages | fixed | texts


CLASSES, TARGETS = [101, 7, 64, 29], [123.45678, -0.0076543214, 98.765434, 0.0031415927]
PATTERNS = {
    "classes": ids_as_bytes(CLASSES),
    # Two bytes alone are in any message of some length by chance.
    "targets": {one for value in TARGETS for one in values_as_bytes(value) if len(one) > 2},
}


@pytest.mark.parametrize("travels", [True, False], ids=["labels-travel", "labels-stay"])
@pytest.mark.parametrize("kind", ["classes", "targets"])
def test_no_message_holds_a_label_that_stays(kind: str, travels: bool) -> None:
    """Labels like no others, searched for in every byte that the edge sends; those that travel are found."""

    def make() -> Any:
        return tiny_model(num_labels=128 if kind == "classes" else 1)

    y = torch.tensor(CLASSES if kind == "classes" else TARGETS)
    on_cloud, on_edge = make(), make()
    on_edge.classifier.bias.data.add_(1.0)  # so that the cloud wants all of its half uploaded
    criterion = nn.functional.cross_entropy if kind == "classes" else nn.functional.smooth_l1_loss
    options: dict[str, Any] = {"split_layer": 2, "split_rank": 4}
    with ScriptCloud(on_cloud, sgd(on_cloud), **options) as cloud:
        recorder = Recorder(cloud.address)
        with SFTOptimizer(sgd(on_edge), role="edge", model=on_edge, transport=recorder, **options) as optimizer:
            for batch in batches(3, on_edge, labels=False):
                optimizer.zero_grad()
                output = on_edge(**batch, labels=y) if travels else on_edge(**batch)
                loss = output.loss if travels else criterion(output.logits.squeeze(-1), y)
                loss.backward()
                optimizer.step()
            on_edge.eval()
            with torch.no_grad():
                on_edge(**batch, labels=y)
            on_edge.state_dict()
    found = [pattern for pattern in PATTERNS[kind] if any(pattern in message for message in recorder.sent)]
    assert bool(found) is travels
    assert sum(map(len, recorder.sent)) > 10_000, "the messages were not recorded"


def test_no_message_of_a_scripts_module_holds_a_label() -> None:
    on_cloud, on_edge = classifier(), classifier()
    data = torch.randint(0, plain.VOCABULARY, (len(TARGETS), plain.LENGTH), generator=torch.Generator().manual_seed(5))
    y = torch.tensor(TARGETS)
    with ScriptCloud(on_cloud, sgd(on_cloud), split_at=LAYER, split_rank=RANK) as cloud:
        recorder = Recorder(cloud.address)
        with SFTOptimizer(
            sgd(on_edge), role="edge", model=on_edge, transport=recorder, split_at=LAYER, split_rank=RANK
        ) as optimizer:
            for _ in range(3):
                optimizer.zero_grad()
                nn.functional.mse_loss(on_edge(data)[:, 0], y).backward()
                nn.utils.clip_grad_norm_(on_edge.parameters(), 1.0)
                optimizer.step()
    bodies = [pb.EdgeMessage.FromString(data).WhichOneof("body") for data in recorder.messages]
    assert bodies == ["attach", *["forward", "backward"] * 3, None, "close"]
    assert not [pattern for pattern in PATTERNS["targets"] if any(pattern in message for message in recorder.sent)]
