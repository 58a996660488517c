"""Adapters that are put into a net before it has weights are those that are put into one that has."""

import pytest
import torch
from peft import LoraConfig
from support.tiny import tiny_config

from sft.models import build_whole
from sft.models.adapters import draw_adapters, is_adapter, set_adapters
from sft.models.lora import add_lora, resolve_lora
from sft.models.weights import fill
from sft.tensors.stream import in_memory

HEAD = "sequence-classification"


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(r=4),
        LoraConfig(r=2, target_modules="all-linear", init_lora_weights="gaussian", use_rslora=True),
        LoraConfig(r=3, target_modules=["word_embeddings", "wte"]),
    ],
    ids=["usual", "all", "embeddings"],
)
def test_adapters_that_come_before_the_weights(family, lora):
    config = tiny_config(family, layers=2)
    first, then = build_whole(config, HEAD), build_whole(config, HEAD)
    spec = resolve_lora(lora, first)
    fill(first, [], 5)
    add_lora(first, spec, 5)
    given = {n: torch.randn(p.shape) for n, p in first.whole_parameters().items() if "1" in n and is_adapter(n)}
    torch.manual_seed(0)
    expected = torch.randn(2)
    torch.manual_seed(0)
    add_lora(then, spec, 5)
    assert torch.equal(torch.randn(2), expected), "another thread may be drawing"
    assert {parameter.device.type for parameter in then.parameters()} == {"meta"}
    fill(then, in_memory(given), 5)
    for _ in draw_adapters(then, spec.init_lora_weights, 5, in_memory(given)):
        pass
    assert [name for name, _ in then.named_parameters()] == [name for name, _ in first.named_parameters()]
    assert then.whole_names == first.whole_names
    for name, parameter in then.whole_parameters().items():
        assert torch.equal(parameter, given.get(name, first.whole_parameters()[name])), name
        assert parameter.requires_grad == first.whole_parameters()[name].requires_grad, name
    tokens = {"input_ids": torch.arange(8).reshape(2, 4)}
    set_adapters(first, in_memory(given))
    assert torch.equal(first.eval()(tokens, [4, 4], {}).logits, then.eval()(tokens, [4, 4], {}).logits)
