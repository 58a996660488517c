"""A script's model on the cloud: what edges it takes, and how serving begins and ends."""

from __future__ import annotations

import copy
import hashlib
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.hosting_script import ScriptCloud
from support.script import adamw, tiny_model
from torch import Tensor, nn

from sft import SFTOptimizer
from sft.errors import CutError, LinkError, ProtocolError, ServerFullError, SFTError, UsageError
from sft.tensors.stream import in_memory, safetensors_chunks
from sft.v1 import split_training_pb2 as pb
from sft.wire.protocol import PROTOCOL_VERSION
from sft_cloud.engine.worker import at_once
from sft_cloud.identity import ANONYMOUS
from sft_cloud.script.graph_host import GraphHost
from sft_cloud.script.opener import ScriptOpener
from sft_cloud.server import CloudServer
from sft_cloud.session.session import Session
from sft_cloud.storage.blobs import BlobStore

RANK, AT = 4, "3"


def make_model(seed: int = 0, width: int = 16) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU(),
        nn.Linear(width, 3),
    )  # fmt: skip


def host(model: nn.Module | None = None, make: Callable[[Any], Any] = adamw, **options: Any) -> ScriptCloud:
    model = make_model() if model is None else model
    return ScriptCloud(model, make(model), **{"split_at": AT, "split_rank": RANK, **options})


def wrap(model: nn.Module, cloud: ScriptCloud, make: Callable[[Any], Any] = adamw, **options: Any) -> SFTOptimizer:
    values = {"split_at": AT, "split_rank": RANK, "server": cloud.address, **options}
    return SFTOptimizer(make(model), role="edge", model=model, **values)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    draw = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        x, y = torch.randn(7, 6, generator=draw), torch.randint(0, 3, (7,), generator=draw)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def test_the_scripts_model_is_net_2_when_the_edge_is_done() -> None:
    with host() as cloud:
        edge = make_model()
        before = edge.state_dict()
        with wrap(edge, cloud) as optimizer:
            train(edge, optimizer)
            both = edge.state_dict()
            edge.eval()
            x = torch.randn(2, 6)
            with torch.no_grad():
                output = edge(x)
    upper = cloud.model.state_dict()
    assert upper.keys() < both.keys()
    assert {"3.ffn2.weight", "4.running_var", "6.bias"} <= upper.keys()
    for name, tensor in upper.items():
        assert tensor.equal(both[name]), name
    assert not upper["6.bias"].equal(before["6.bias"])
    assert int(upper["4.num_batches_tracked"]) == 3
    lower = make_model()[:3]
    lower.load_state_dict({name: tensor for name, tensor in both.items() if int(name[0]) < 3})
    activation = lower.eval()(x) @ both["3.ffn1.weight"].T
    cloud.model.eval()
    torch.testing.assert_close(cloud.model(activation), output)


@pytest.mark.parametrize("same", [True, False])
def test_weights_travel_where_they_differ(same: bool) -> None:
    """Either way both halves begin with the edge's."""
    with host(make_model(seed=0)) as cloud:
        edge = make_model(seed=0 if same else 1)
        whole = {name: tensor.clone() for name, tensor in edge.state_dict().items()}
        with wrap(edge, cloud):
            begun = edge.state_dict()
    assert begun["6.weight"].equal(whole["6.weight"])
    assert cloud.model.get_submodule("6").weight.equal(whole["6.weight"])


def test_states_go_back_to_the_cloud() -> None:
    with host() as cloud:
        edge = make_model()
        with wrap(edge, cloud) as optimizer:
            train(edge, optimizer)
            saved = {name: tensor.clone() for name, tensor in edge.state_dict().items()}
            saved_optimizer = copy.deepcopy(optimizer.state_dict())
            train(edge, optimizer)
            first = {name: tensor.clone() for name, tensor in edge.state_dict().items()}
            edge.load_state_dict(saved)
            optimizer.load_state_dict(saved_optimizer)
            assert all(tensor.equal(saved[name]) for name, tensor in edge.state_dict().items())
            train(edge, optimizer)
            second = edge.state_dict()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_the_clouds_own_optimizer_with_the_edges_learning_rates() -> None:
    def grouped(first: float, second: float, decay: float) -> Callable[[Any], Any]:
        def make(model: Any) -> Any:
            groups = [
                {"params": [p for n, p in model.named_parameters() if "bias" not in n], "lr": first},
                {"params": [p for n, p in model.named_parameters() if "bias" in n], "lr": second},
            ]
            return torch.optim.AdamW(groups, weight_decay=decay, eps=1e30)  # decay is all that is left of a step

        return make

    with host(make=grouped(0.9, 0.9, 1.0)) as cloud:
        before = {name: tensor.clone() for name, tensor in cloud.model.state_dict().items()}
        edge = make_model()
        with wrap(edge, cloud, grouped(0.5, 0.25, 0.0)) as optimizer:
            train(edge, optimizer, steps=1)
    after = cloud.model.state_dict()
    torch.testing.assert_close(after["6.weight"], before["6.weight"] * 0.5)
    torch.testing.assert_close(after["6.bias"], before["6.bias"] * 0.75)
    assert [group["lr"] for group in cloud.optimizer.param_groups] == [0.5, 0.25]


def test_an_optimizer_that_begins_with_a_state() -> None:
    def make(model: Any) -> Any:
        return torch.optim.Adagrad(model.parameters(), lr=0.1, initial_accumulator_value=0.5)

    with host(make=make) as cloud:
        for parameter in cloud.model.parameters():
            state = cloud.optimizer.state[parameter]
            assert state["sum"].shape == parameter.shape
            assert float(state["sum"].max()) == 0.5
        edge = make_model()
        with wrap(edge, cloud, make) as optimizer:
            train(edge, optimizer)
    assert float(cloud.optimizer.state[cloud.model.get_submodule("6").weight]["step"]) == 3


def test_a_second_edge_finds_no_room() -> None:
    with host() as cloud:
        edge, second = make_model(), make_model()
        with wrap(edge, cloud) as optimizer:
            train(edge, optimizer)
            with pytest.raises(ServerFullError):
                wrap(second, cloud)
            assert "3.weight" in second.state_dict(), "its model must be as it was"
            train(edge, optimizer)


def test_an_edge_that_comes_after_the_first_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights do not take the place of those that were trained."""
    refused: list[BaseException] = []

    def stop(server: CloudServer, stop: Any = CloudServer.stop) -> None:
        assert len(server.service.sessions) == 0, "there is a place"
        late = make_model(seed=1)
        try:
            SFTOptimizer(adamw(late), role="edge", model=late, split_at=AT, split_rank=RANK, server=server.address)
        except ServerFullError as error:
            refused.append(error)
        stop(server)

    monkeypatch.setattr(CloudServer, "stop", stop)
    with host() as cloud:
        edge = make_model()
        with wrap(edge, cloud) as optimizer:
            train(edge, optimizer)
            both = edge.state_dict()
    assert cloud.error is None
    assert len(refused) == 1
    assert "the cloud's script trains with one edge, and that has come already" in str(refused[0])
    assert all(tensor.equal(both[name]) for name, tensor in cloud.model.state_dict().items())


class OneModel:
    """An opener with what it stands on, and edges that have uploaded what they begin with."""

    def __init__(self, place: Path, is_over: Callable[[], bool] = lambda: False) -> None:
        self.model = make_model()
        self.hosted = GraphHost(self.model, AT, RANK, "none")
        self.names = [*self.hosted.parameters]
        self.store = BlobStore(place)
        self.opener = ScriptOpener(self.hosted, adamw(self.model), [self.names], self.store, is_over)

    def request(self, value: float) -> pb.OpenSessionRequest:
        """Of an edge all of whose numbers are `value`."""
        hashes = []
        for tensors in (self.hosted.tensors, self.hosted.factors):
            stored = in_memory({name: torch.full_like(tensor, value) for name, tensor in tensors.items()})
            data = b"".join(safetensors_chunks(stored))
            hashes.append(hashlib.sha256(data).hexdigest())
            self.store.of(ANONYMOUS).add(hashes[-1], len(data), [data])
        return pb.OpenSessionRequest(
            protocol_version=PROTOCOL_VERSION,
            cut=pb.Cut(mode=pb.MODE_SFT, layer_name=AT, split_rank=RANK, residual=pb.RESIDUAL_NONE),
            wire_data_type=pb.DATA_TYPE_FLOAT32,
            optimizer=pb.Optimizer(name="AdamW", groups=[pb.ParameterGroup(parameter_names=self.names)]),
            weights_sha256=hashes[0],
            factors_sha256=hashes[1],
        )

    @property
    def value(self) -> float:
        return float(self.model.get_submodule("6").weight.detach()[0, 0])


def test_only_a_session_that_has_had_no_message_makes_room(tmp_path: Path) -> None:
    one = OneModel(tmp_path)
    assert isinstance(one.opener.open(one.request(1.0), ANONYMOUS, at_once), Session)
    second = one.opener.open(one.request(2.0), ANONYMOUS, at_once)
    assert isinstance(second, Session)
    assert one.value == 2.0
    second.has_begun = True
    with pytest.raises(ServerFullError, match="trains with one edge"):
        one.opener.open(one.request(3.0), ANONYMOUS, at_once)
    assert one.value == 2.0


def test_an_edge_that_comes_while_another_is_looked_at(tmp_path: Path) -> None:
    """What an opener has found on the way in may no longer hold when it loads."""
    one = OneModel(tmp_path, is_over=iter([False, False, False, True]).__next__)
    one.opener.open(one.request(1.0), ANONYMOUS, at_once)
    with pytest.raises(ServerFullError, match="trains with one edge"):
        one.opener.open(one.request(2.0), ANONYMOUS, at_once)
    assert one.value == 1.0


def test_an_optimizer_of_a_class_of_the_clouds_own() -> None:
    class Sign(torch.optim.Optimizer):
        """Goes one learning rate along the sign of the gradient."""

        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {"lr": 0.1})

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            with torch.no_grad():
                for group in self.param_groups:
                    for parameter in group["params"]:
                        parameter -= group["lr"] * parameter.grad.sign()

    with host(make=lambda model: Sign(model.parameters())) as cloud:
        before = {name: parameter.detach().clone() for name, parameter in cloud.model.named_parameters()}
        edge = make_model()
        with wrap(edge, cloud, lambda model: torch.optim.SGD(model.parameters(), lr=0.25)) as optimizer:
            train(edge, optimizer, steps=1)
    assert cloud.error is None
    moved = cloud.model.get_submodule("6").weight - before["6.weight"]
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, 0.25))


def in_two_groups(model: Any) -> Any:
    first, *others = model.parameters()
    return torch.optim.AdamW([{"params": [first]}, {"params": others}])


def without_last_bias(model: Any) -> Any:
    return torch.optim.AdamW([*model.parameters()][:-1])


@pytest.mark.parametrize(
    ("make_edge", "make_optimizer", "options", "reason"),
    [
        (make_model, adamw, {"split_rank": 5}, "the edge's script has split_rank 5, the cloud's 4"),
        (make_model, adamw, {"split_at": "6", "split_rank": 3}, "the edge's script has split_at '6', the cloud's '3'"),
        (make_model, in_two_groups, {}, "the edge's optimizer has 2 parameter groups, the cloud's 1"),
        (make_model, without_last_bias, {}, "'6.bias' is trained in group 0 of the cloud's optimizer, but not"),
        (lambda: make_model(width=12), adamw, {}, r"has shape \[12\] on the edge, \[16\] on the cloud"),
        (lambda: nn.Sequential(*make_model(), nn.Tanh(), nn.Linear(3, 3)), adamw, {}, "'8.bias' is trained in group 0"),
        (tiny_model, adamw, {"split_at": None, "split_layer": 2}, "script has split_at none, the cloud's '3'"),
    ],
)  # fmt: skip
def test_an_edge_with_another_script(make_edge: Any, make_optimizer: Any, options: Any, reason: str) -> None:
    """Both sides hear of it, and the cloud waits on for the right one."""
    with host() as cloud:
        edge = make_edge()
        before = [*edge.state_dict()]
        with pytest.raises(ProtocolError, match=reason):
            wrap(edge, cloud, make_optimizer, **options)
        assert [*edge.state_dict()] == before
        right = make_model()
        with wrap(right, cloud) as optimizer:
            train(right, optimizer)
    assert cloud.error is None


def test_another_transformers_model() -> None:
    model = tiny_model(num_labels=3)
    with ScriptCloud(model, adamw(model), split_layer=2, split_rank=4) as cloud:
        options: dict[str, Any] = {"split_at": None, "split_layer": 2, "split_rank": 4}
        for other, reason in (
            (tiny_model("electra"), "the edge's model is electra for sequence-classification, the cloud's bert"),
            (tiny_model(num_labels=4), r"'classifier.bias' has shape \[4\] on the edge, \[3\] on the cloud"),
            (make_model(), "the edge's script has split_at '3', the cloud's none"),
        ):
            own = {"split_at": AT, "split_layer": None} if isinstance(other, nn.Sequential) else {}
            with pytest.raises(ProtocolError, match=reason):
                wrap(other, cloud, **{**options, **own})
        right = tiny_model(num_labels=3)
        with wrap(right, cloud, **options):
            pass
    with pytest.raises(UsageError, match="trained with an edge already"):
        cloud.optimizer.serve("127.0.0.1:0")
    logits = model(torch.randn(2, 5, 4)).logits
    assert logits.shape == (2, 3)


def test_an_output_that_does_not_cross() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.linear(x), x

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), Pair())

    with host(make(), split_at="1") as cloud:
        edge = make()
        with wrap(edge, cloud, split_at="1"), pytest.raises(ProtocolError, match="output is a tuple"):
            edge(torch.randn(2, 6))
    assert isinstance(cloud.error, LinkError)
    assert "output is a tuple" in str(cloud.error)


@pytest.mark.parametrize(
    "address", ["", "50051", "localhost", "localhost:", ":50051", "localhost:http", "localhost:70000", "::1:50051"]
)
def test_no_address(address: str) -> None:
    model = make_model()
    optimizer = SFTOptimizer(adamw(model), role="cloud", model=model, split_at=AT, split_rank=RANK)
    with pytest.raises(UsageError, match=r"^address must be HOST:PORT, such as 0\.0\.0\.0:50051"):
        optimizer.serve(address)


def test_a_port_that_is_taken() -> None:
    model = make_model()
    optimizer = SFTOptimizer(adamw(model), role="cloud", model=model, split_at=AT, split_rank=RANK)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(SFTError, match=r"cannot listen on .*Address already in use; choose another port, or 0 for"):
            optimizer.serve(f"127.0.0.1:{taken.getsockname()[1]}")


def test_a_host_that_is_none() -> None:
    model = make_model()
    optimizer = SFTOptimizer(adamw(model), role="cloud", model=model, split_at=AT, split_rank=RANK)
    with pytest.raises(UsageError, match=r"^host no\.such\.invalid: "):
        optimizer.serve("no.such.invalid:0")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"split_at": "4"}, "'4' is a BatchNorm1d"),
        ({"split_at": None}, "give split_at='NAME'"),
        ({"split_layer": 2}, "not split_layer"),
        ({"residual": "low-rank"}, "for transformers models"),
        ({"split_rank": 9}, "ranks 1 to 8"),
    ],
)
def test_no_such_cut(options: dict[str, Any], reason: str) -> None:
    model = make_model()
    optimizer = adamw(model)
    values = {"split_at": AT, "split_rank": RANK, **options}
    with pytest.raises(UsageError, match=reason):
        SFTOptimizer(optimizer, role="cloud", model=model, **values)
    assert optimizer.param_groups[0]["params"] == [*model.parameters()], "model and optimizer are as they were"
    SFTOptimizer(optimizer, role="cloud", model=model, split_at=AT, split_rank=RANK)
    with pytest.raises(UsageError, match="cut already"):
        SFTOptimizer(adamw(model), role="cloud", model=model, split_at="6", split_rank=2)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)])
def test_an_optimizer_that_has_stepped(kind: Any) -> None:
    """What it has learned is of the model as it was."""
    model = make_model()
    optimizer = kind(model.parameters())
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    with pytest.raises(UsageError, match="has taken steps already"):
        SFTOptimizer(optimizer, role="cloud", model=model, split_at=AT, split_rank=RANK)
    assert "3.weight" in model.state_dict(), "the model is as it was"


def test_what_a_cloud_does_not_do() -> None:
    model = make_model()
    with pytest.raises(UsageError, match="are not the model's"):
        SFTOptimizer(adamw(make_model()), role="cloud", model=model, split_at=AT, split_rank=RANK)
    optimizer = SFTOptimizer(adamw(model), role="cloud", model=model, split_at=AT, split_rank=RANK)
    assert "role='cloud', split_at='3', split_rank=4" in repr(optimizer)
    with pytest.raises(UsageError, match=r"call serve\(\)"):
        optimizer.step()
    with pytest.raises(UsageError, match="on the edge"):
        optimizer.load_state_dict(optimizer.state_dict())
    optimizer.zero_grad()
    optimizer.close()
    transformers_model = tiny_model()
    with pytest.raises(UsageError, match="give split_layer=1 or higher"):
        SFTOptimizer(adamw(transformers_model), role="cloud", model=transformers_model, split_at="x")
    with pytest.raises(CutError, match="blocks 1 to 3"):
        SFTOptimizer(adamw(transformers_model), role="cloud", model=transformers_model, split_layer=9)


_PROGRAM = """
import torch
from torch import nn
from sft import SFTOptimizer
model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
optim = SFTOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), role="cloud", model=model, split_at="0", split_rank=2)
try:
    optim.serve("127.0.0.1:0", lambda address: print(address, flush=True))
finally:
    print("ended in order", flush=True)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
def test_signals(number: signal.Signals, code: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("127.0.0.1:")
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert out == "ended in order\n"
    assert process.returncode == code
    assert ("KeyboardInterrupt" in err) is (number == signal.SIGINT)
    assert number == signal.SIGINT or err == ""
