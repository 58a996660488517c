"""Edges, addresses, models and optimizers that a script's cloud does not take."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.hosting_script import AT, RANK, ScriptCloud, host, make_model, train, wrap
from support.script import adamw, tiny_model
from torch import Tensor, nn

from sft import SFTOptimizer
from sft.errors import CutError, LinkError, ProtocolError, SFTError, UsageError


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
        (tiny_model, adamw, {"split_at": None, "split_layer": 2}, "script has split_layer 2, the cloud's none"),
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


def test_a_schedule_free_optimizer_on_one_side_alone() -> None:
    def free(model: Any) -> Any:
        return pytest.importorskip("schedulefree").AdamWScheduleFree(model.parameters())

    for on_cloud, on_edge, reason in (
        (adamw, free, r"the edge's optimizer is schedulefree\.AdamWScheduleFree, the cloud's AdamW: both are"),
        (free, adamw, "the edge's optimizer is AdamW, the cloud's AdamWScheduleFree: both are schedule-free, or none"),
    ):
        with host(make=on_cloud) as cloud:
            with pytest.raises(ProtocolError, match=reason) as caught:
                wrap(make_model(), cloud, on_edge)
            assert "\n" not in str(caught.value)
            right = make_model()
            with wrap(right, cloud, on_cloud) as optimizer:
                optimizer.train()
                train(right, optimizer)
        assert cloud.error is None


def test_another_transformers_model() -> None:
    model = tiny_model(num_labels=3)
    with ScriptCloud(model, adamw(model), split_layer=2, split_rank=4) as cloud:
        options: dict[str, Any] = {"split_at": None, "split_layer": 2, "split_rank": 4}
        for other, reason in (
            (tiny_model("electra"), "the edge's model is electra for sequence-classification, the cloud's bert"),
            (tiny_model(num_labels=4), r"'classifier.bias' has shape \[4\] on the edge, \[3\] on the cloud"),
            (make_model(), "the edge's script has split_layer none, the cloud's 2"),
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


@pytest.mark.parametrize(
    ("around", "reason"),
    [
        (nn.DataParallel, "of class DataParallel: copies of a model cannot share a session"),
        (
            lambda model: get_peft_model(model, LoraConfig(target_modules=["0"])),
            "a script hosts no PeftModel: adapters",
        ),
    ],
)
def test_a_wrapped_model(around: Any, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        host(around(make_model()))


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
        ({"split_layer": 2}, "split_layer is for transformers models"),
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
