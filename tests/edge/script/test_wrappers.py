"""A model that is wrapped is refused in a line, before anything is cut; one that is compiled runs uncompiled."""

from __future__ import annotations

from typing import Any, Callable

import pytest
import torch
from support.script import adamw, batches, sgd, tiny_model, wrap
from torch import nn

from sft.errors import UsageError


class DistributedDataParallel(nn.Module):
    """As torch calls it; the real one needs a process group."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def part_compiled(model: Any) -> Any:
    model.bert.encoder = torch.compile(model.bert.encoder, backend="eager")
    return model


def compiled_in_place(model: Any) -> Any:
    model.bert.compile(backend="eager")
    return model


def offloaded(model: Any) -> Any:
    model.classifier.to("meta")
    return model


@pytest.mark.parametrize(
    ("around", "said"),
    [
        (part_compiled, "'bert.encoder' is of class OptimizedModule: .* before a part of it was compiled"),
        (compiled_in_place, "'bert' is of class BertModel: .* before a part of it was compiled"),
        (nn.DataParallel, "of class DataParallel: copies .*; give the model itself"),
        (DistributedDataParallel, "of class DistributedDataParallel: copies .*; give the model itself"),
        (offloaded, "'classifier.weight' has no memory: it was offloaded"),
    ],
)
def test_a_wrapped_model(around: Callable[[Any], Any], said: str) -> None:
    model = around(tiny_model())
    with pytest.raises(UsageError, match=said):
        wrap(model, adamw(model), split_layer=2, split_rank=4, server="127.0.0.1:1")


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def compiled_itself(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def trained(model: Any, calls: Any, optimizer: Any) -> Any:
    """Of batches of several lengths, for which a compiler compiles anew."""
    for index, batch in enumerate(batches(4, model)):
        optimizer.zero_grad()
        calls(**{name: x[:, : 7 - index % 2] if x.dim() == 2 else x for name, x in batch.items()}).loss.backward()
        optimizer.step()
    return model.state_dict()


@pytest.mark.one_in(5)
@pytest.mark.parametrize("compiles", [compiled, compiled_itself])
@pytest.mark.parametrize("when", ["before", "before, and called", "after"])
def test_a_model_that_is_compiled(compiles: Any, when: str, caplog: pytest.LogCaptureFixture) -> None:
    if when == "before, and called" and not hasattr(torch.compiler, "is_compiling"):
        pytest.skip("transformers itself asks for what this release of torch has not")
    plain = tiny_model()
    with wrap(plain, sgd(plain)) as optimizer:
        expected = trained(plain, plain, optimizer)
    model = calls = tiny_model()
    made = sgd(model)
    if when != "after":
        calls = compiles(model)
        if when != "before":
            calls(**batches(1, model)[0])
    with wrap(calls, made) as optimizer:
        assert ("the model is compiled, and runs uncompiled" in caplog.text) is (when != "after")
        if when == "after":
            calls = compiles(model)
        got = trained(model, calls, optimizer)
    assert all(got[name].equal(x) for name, x in expected.items())
