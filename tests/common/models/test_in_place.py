"""Cutting a model object of a script, in place."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from typing import Any, List, Tuple

import pytest
import torch
from support.tiny import ARCHITECTURES, tiny_config
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, AutoModelForNextSentencePrediction, PreTrainedModel

from sft.batch import Batch
from sft.errors import CutError, UnsupportedModelError, UsageError
from sft.models import HEADS, Cut, Net, Net1, build_net_2, build_whole, cut_live, family_of, head_of, heads_of
from sft.models.gone import Gone
from sft.models.weights import fill, live_factors, live_tensors
from sft.tensors.stream import StoredTensor

EVERY = [(name, head) for name in ARCHITECTURES for head in heads_of(tiny_config(name))]
HEAD = "sequence-classification"
CUT = Cut("sft", 2, 4)
IDS_BS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 0, 0]])
BATCH = Batch({"input_ids": IDS_BS}, [5, 3], {})


def make_model(name: str = "bert", head: str = HEAD, **overrides: object) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return HEADS[head].auto_class.from_config(tiny_config(name, 3, **overrides)).eval()


def take(model: PreTrainedModel, head: str, cut: Cut) -> Tuple[Net1, List[StoredTensor]]:
    """net_1 of a model that is cut in place, FFN-1 filled, and all that went to the cloud."""
    for_edge, for_cloud = live_factors(model, head, cut, [BATCH] if cut.residual == "low-rank" else [])
    tensors = [*live_tensors(model, build_net_2(model.config, head, cut)), *for_cloud]
    net_1 = cut_live(model, head, cut)
    fill_meta(net_1, for_edge)
    return net_1, tensors


def fill_meta(net_1: Net, tensors: List[StoredTensor]) -> None:
    values = {tensor.name: tensor.read() for tensor in tensors}
    for name, parameter in list(net_1.named_parameters()):
        if parameter.is_meta:
            parent, _, child = name.rpartition(".")
            setattr(net_1.get_submodule(parent), child, nn.Parameter(values[net_1.whole_names[name]]))


@pytest.mark.one_in(11)
@pytest.mark.parametrize("residual", ["none", "low-rank"])
@pytest.mark.parametrize(("name", "head"), EVERY)
def test_a_model_in_use_is_cut_as_one_from_a_checkpoint(name: str, head: str, residual: str) -> None:
    """Halves out of the object, and the whole with all its weights, give the same."""
    model, cut = make_model(name, head), Cut("sft", 2, 4, residual)
    config = model.config
    net_2, whole = build_net_2(config, head, cut), build_whole(config, head, cut)
    for_edge, _ = live_factors(model, head, cut, [BATCH] if residual == "low-rank" else [])
    everything = [*live_tensors(model, whole), *for_edge]
    net_1, for_cloud = take(model, head, cut)
    fill(net_2, for_cloud, seed=1)
    fill(whole, [*for_cloud, *everything], seed=2)
    with torch.no_grad():
        split = net_2.eval()(net_1(BATCH.inputs, BATCH.lengths), BATCH.lengths, {}).logits
        expected = whole.eval()(*BATCH).logits
    for row, length in enumerate(BATCH.lengths):
        of_tokens = slice(0, length) if HEADS[head].per_token else slice(None)
        torch.testing.assert_close(split[row][of_tokens], expected[row][of_tokens], atol=1e-6, rtol=1e-5)


@pytest.mark.one_in(11)
@pytest.mark.parametrize(("name", "head"), EVERY)
def test_what_is_left_of_the_object_is_net_1(name: str, head: str) -> None:
    model = make_model(name, head)
    family = family_of(model.config)
    upper = weakref.ref(model.base_model.get_submodule(family.blocks)[2])
    before = dict(model.named_parameters(remove_duplicate=False))
    net_1, for_cloud = take(model, head, CUT)
    assert dict(model.named_parameters()).keys() == net_1.whole_parameters().keys()
    left = net_1.whole_parameters()
    assert [one for one in left if one not in before] == [one for one in left if one.endswith("ffn1.weight")]
    assert all(parameter is before[one] for one, parameter in left.items() if one in before)
    assert {t.name for t in for_cloud}.isdisjoint({n for n, p in net_1.whole_parameters().items() if p.requires_grad})
    here = [child for child, module in model.named_children() if not isinstance(module, Gone)]
    assert here == [model.base_model_prefix]
    model.tie_weights()
    del for_cloud, before
    gc.collect()
    assert upper() is None


def test_plain_split_learning() -> None:
    model = make_model("gpt2")
    with torch.no_grad():
        expected = model.transformer(IDS_BS, output_hidden_states=True).hidden_states[2]
        a_BSD = cut_live(model, HEAD, Cut("sl", 2))({"input_ids": IDS_BS}, [5, 5])
    torch.testing.assert_close(a_BSD, expected)
    assert live_factors(make_model("gpt2"), HEAD, Cut("sl", 2)) == ([], [])


def test_what_was_frozen_stays_frozen() -> None:
    model = make_model()
    for parameter in model.bert.parameters():
        parameter.requires_grad_(False)
    net_1 = cut_live(model, HEAD, CUT)
    assert not any(parameter.requires_grad for parameter in net_1.parameters())


def test_a_tied_head_is_the_embedding() -> None:
    model = make_model("gpt2", "causal-lm")
    embedding = model.transformer.wte.weight
    assert model.lm_head.weight is embedding
    net_2 = build_net_2(model.config, "causal-lm", CUT)
    tensors = {tensor.name: tensor.read() for tensor in live_tensors(model, net_2)}
    assert torch.equal(tensors["lm_head.weight"], embedding)
    cut_live(model, "causal-lm", CUT)
    assert isinstance(model.lm_head, Gone)
    assert not model.config.tie_word_embeddings


def test_calibrating_leaves_the_model_alone() -> None:
    model = make_model().train()
    model.classifier.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    layer = model.bert.encoder.layer[1].output.dense
    live_factors(model, HEAD, Cut("sft", 2, 4, "low-rank"), [BATCH])
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.bert.encoder.layer[1].output.dense is layer
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    live_factors(model, HEAD, Cut("sft", 2, 4, "low-rank"), [BATCH])
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(("name", "head"), EVERY)
def test_the_head_of_a_model(name: str, head: str) -> None:
    assert head_of(make_model(name, head)) == head


@pytest.mark.parametrize("make", [AutoModel, AutoModelForNextSentencePrediction])
def test_models_without_one_of_the_heads(make: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="cannot be cut; give a transformers model with one of the heads"):
        head_of(make.from_config(tiny_config()))


def test_what_is_no_model_of_the_library() -> None:
    with pytest.raises(UnsupportedModelError, match="a Linear cannot be cut"):
        head_of(nn.Linear(2, 2))


@pytest.mark.parametrize("cut", [CUT, Cut("sft", 3, 4), Cut("sl", 2)])
def test_a_model_is_cut_once(cut: Cut) -> None:
    model = make_model()
    cut_live(model, HEAD, cut)
    for again in (cut_live, live_factors):
        with pytest.raises(UsageError, match="BertForSequenceClassification is cut already"):
            again(model, HEAD, CUT)


def test_double_precision_is_not_trained() -> None:
    model = make_model()
    model.classifier.double()
    for act in (cut_live, live_factors):
        with pytest.raises(UsageError, match=r"'classifier.weight' is torch.float64; load the model in float32"):
            act(model, HEAD, CUT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32(dtype: torch.dtype) -> None:
    """Of the same numbers, in the parameters that an optimizer holds."""
    model, same = make_model().to(dtype), make_model().to(dtype).float()
    before = dict(model.named_parameters())
    net_1, for_cloud = take(model, HEAD, CUT)
    other, expected = take(same, HEAD, CUT)
    for one, parameter in net_1.whole_parameters().items():
        assert parameter.dtype is torch.float32
        assert torch.equal(parameter, other.whole_parameters()[one])
        assert one.endswith("ffn1.weight") or parameter is before[one]
    for tensor, float_one in zip(for_cloud, expected):
        assert torch.equal(tensor.read().float(), float_one.read())


@pytest.mark.parametrize(
    ("cut", "says"),
    [
        (Cut("sft", 4, 4), "blocks 1 to 3"),
        (Cut("sft", 2, 33), "ranks 1 to 32"),
        (Cut("sft", 2, 4, "full"), "choose residual none or low-rank"),
        (Cut("sft", 2, 4, "some"), "the residual can be none, low-rank, full, not 'some'"),
    ],
)
def test_a_cut_that_cannot_be_leaves_the_model_whole(cut: Cut, says: str) -> None:
    model = make_model()
    names = {name: id(parameter) for name, parameter in model.named_parameters()}
    with pytest.raises(CutError, match=says):
        cut_live(model, HEAD, cut)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == names


def test_a_low_rank_residual_wants_data() -> None:
    with pytest.raises(UsageError, match="give batches to calibrate with"):
        live_factors(make_model(), HEAD, Cut("sft", 2, 4, "low-rank"))


def checkpoint_with(model: Any, use_reentrant: bool) -> None:
    # What `gradient_checkpointing_enable` calls, under whichever name the release has it.
    model._set_gradient_checkpointing(gradient_checkpointing_func=partial(checkpoint, use_reentrant=use_reentrant))


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_gradient_checkpointing(name: str) -> None:
    """Not reentrant it gives the same gradients; reentrant it would give none, and says so."""
    gradients = []
    for checkpoints in (False, True):
        model = make_model(name)
        net_1 = take(model, HEAD, CUT)[0].train()
        for module in net_1.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        for attention in net_1.modules():
            if hasattr(attention, "attention_dropout"):
                attention.attention_dropout = 0.0
        if checkpoints:
            checkpoint_with(model, use_reentrant=False)
        net_1(BATCH.inputs, BATCH.lengths).square().sum().backward()
        gradients.append({one: parameter.grad for one, parameter in net_1.whole_parameters().items()})
    assert gradients[0].keys() == gradients[1].keys()
    for one, gradient in gradients[0].items():
        if gradient is not None:
            torch.testing.assert_close(gradients[1][one], gradient)
    checkpoint_with(model, use_reentrant=True)
    with pytest.raises(UsageError, match='"use_reentrant": False'):
        net_1(BATCH.inputs, BATCH.lengths)
