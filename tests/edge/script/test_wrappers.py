"""A model that is wrapped is refused in a line, before anything is cut; one that is compiled later, when it runs."""

from __future__ import annotations

from typing import Any, Callable

import pytest
import torch
from support.script import adamw, batches, in_process_cloud, tiny_model, wrap
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
        (
            lambda model: torch.compile(model, backend="eager"),
            "this model is of class OptimizedModule: a model that is cut cannot be compiled",
        ),
        (part_compiled, "'bert.encoder' is of class OptimizedModule: .* cannot be compiled"),
        (compiled_in_place, "'bert' is of class BertModel: .* cannot be compiled"),
        (nn.DataParallel, "of class DataParallel: copies .*; give the model itself"),
        (DistributedDataParallel, "of class DistributedDataParallel: copies .*; give the model itself"),
        (offloaded, "'classifier.weight' has no memory: it was offloaded"),
    ],
)
def test_a_wrapped_model(around: Callable[[Any], Any], said: str) -> None:
    model = around(tiny_model())
    with pytest.raises(UsageError, match=said):
        wrap(model, adamw(model), split_layer=2, split_rank=4, server="127.0.0.1:1")


def test_a_model_that_is_compiled_after_it_was_cut() -> None:
    model = tiny_model()
    (batch,) = batches(1, model)
    with wrap(model, adamw(model), split_layer=2, split_rank=4, transport=in_process_cloud()):
        compiled = torch.compile(model, backend="eager")
        with pytest.raises(UsageError, match="cannot be compiled"):
            compiled(**batch)
        model(**batch).loss.backward()  # which works as ever
