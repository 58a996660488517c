"""Optimizers of other packages: what the wire can ask of them."""

from typing import Any, Dict

import pytest
import torch
from torch import Tensor, nn

from sft.errors import UsageError
from sft.optim.listed import LISTED, counted, name_of
from sft.optim.spec import GroupSpec, OptimizerSpec, make_optimizer
from sft.optim.state import checked_state, stored_state


@pytest.mark.parametrize(
    ("name", "argument", "value", "says"),
    [
        ("lion_pytorch.Lion", "use_triton", True, "no setting 'use_triton' that travels"),
        ("lion_pytorch.Lion", "betas", (0.9,), r"betas is by default \(0\.9, 0\.99\), unlike \(0\.9,\)"),
        ("bitsandbytes.Adam8bit", "min_8bit_size", "x", "no setting 'min_8bit_size'"),
        ("bitsandbytes.Adam", "args", "x", "no setting 'args'"),
        ("bitsandbytes.Adam", "eps", "x", "eps is by default 1e-08, unlike 'x'"),
        ("bitsandbytes.AdamW", "weight_decay", True, "weight_decay is by default 0.01, unlike True"),
        ("schedulefree.AdamWScheduleFree", "k", 3, "AdamWScheduleFree: "),
        ("transformers.Adafactor", "eps", (None, 1e-3), "eps is by default .*, unlike"),
        ("transformers.Adafactor", "beta1", "x", "beta1 is by default None, unlike 'x'"),
    ],
)
def test_no_argument_but_settings_of_a_group(name: str, argument: str, value: object, says: str) -> None:
    pytest.importorskip(name.partition(".")[0])
    spec = OptimizerSpec(name, [GroupSpec(["w"], {"lr": 1e-3, argument: value})])
    with pytest.raises(UsageError, match=says) as caught:
        make_optimizer(spec, {"w": nn.Parameter(torch.zeros(2))})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["PagedAdam", "PagedAdam32bit", "PagedAdamW8bit", "PagedLion8bit"])
def test_the_cloud_pages_nothing(name: str) -> None:
    optim = pytest.importorskip("bitsandbytes.optim")
    made_as = name_of(getattr(optim, name)([torch.zeros(1, requires_grad=True)]))
    assert made_as == f"bitsandbytes.{name[len('Paged') :].replace('32bit', '')}"
    assert not any("Paged" in listed for listed in LISTED)


def state_of(optimizer: torch.optim.Optimizer, parameters: Dict[str, nn.Parameter]) -> Dict[str, Tensor]:
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {tensor.name: tensor.read() for tensor in stored_state(optimizer, parameters)}


@pytest.mark.parametrize("shape", [(5000,), (60, 90), (20, 20, 20), (32, 16, 3, 3), (16, 8, 4, 4, 3)], ids=str)
def test_eight_bits_of_every_number_of_dimensions(shape: Any) -> None:
    optim = pytest.importorskip("bitsandbytes.optim")
    parameters = {"w": nn.Parameter(torch.ones(shape))}
    optimizer = optim.Adam8bit(parameters.values())
    state = state_of(optimizer, parameters)
    assert state["w/state1"].dtype == torch.uint8
    checked_state(optimizer, parameters, state)


def test_what_the_process_has_told_bitsandbytes_is_not_for_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    optim = pytest.importorskip("bitsandbytes.optim")
    manager = optim.GlobalOptimManager.get_instance()
    monkeypatch.setattr(manager, "index2config", {})
    parameters = {"w": nn.Parameter(torch.ones(60, 90))}
    optimizer = optim.Adam8bit(parameters.values())
    state = state_of(optimizer, parameters)
    manager.index2config[0, 0] = {"optim_bits": 32}
    checked_state(optimizer, parameters, state)
    assert manager.index2config == {(0, 0): {"optim_bits": 32}}


def test_what_is_for_logs_alone_is_not_counted() -> None:
    free = pytest.importorskip("schedulefree")
    (counts,) = counted(free.AdamWScheduleFree([torch.zeros(1, requires_grad=True)]))
    assert sorted(counts) == ["k", "lr_max", "train_mode", "weight_sum"]
