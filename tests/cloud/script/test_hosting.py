"""A script's model on the cloud: how it is trained by an edge, and how serving begins and ends."""

from __future__ import annotations

import copy
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.hosting_script import AT, RANK, host, make_model, train, wrap
from support.script import adamw

from sft import SFTOptimizer
from sft.errors import ServerFullError
from sft_cloud.server import CloudServer


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


@pytest.mark.slow
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
