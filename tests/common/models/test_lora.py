"""Adapters on a model and on its halves."""

import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.tiny import ARCHITECTURES, tiny_config
from transformers import AutoModelForCausalLM, AutoModelForQuestionAnswering, AutoModelForSequenceClassification

from sft.errors import ProtocolError, UsageError
from sft.models import Cut, build_net_1, build_net_2, build_whole
from sft.models.adapters import is_adapter
from sft.models.lora import (
    adapter_shapes,
    add_lora,
    lora_from_json,
    lora_to_json,
    merged_tensors,
    resolve_lora,
)
from sft.models.seeding import seeded
from sft.models.weights import factor_tensors, fill
from sft.optim.spec import OptimizerSpec, decay_groups, make_optimizer
from sft.tensors.stream import in_memory

CPU = torch.device("cpu")
HEAD = "sequence-classification"
CUT = Cut("sft", 2, 4)
LENGTHS = [6, 3, 5]
CONFIG = LoraConfig(r=4, lora_alpha=8)


def shape(family="bert", layers=4):
    config = tiny_config(family, layers, num_labels=2)
    config.problem_type = "single_label_classification"
    return config


def batch(step):
    generator = torch.Generator().manual_seed(step)
    inputs = {"input_ids": torch.randint(5, 100, (len(LENGTHS), max(LENGTHS)), generator=generator)}
    return inputs, LENGTHS, {"labels": torch.randint(2, (len(LENGTHS),), generator=generator)}


def whole_net(config, lora, cut=CUT, seed=5):
    net = build_whole(config, HEAD, cut)
    for_edge, for_cloud = factor_tensors(config, HEAD, cut, None, seed)
    fill(net, [*for_edge, *for_cloud], seed)
    if lora is not None:
        add_lora(net, resolve_lora(lora, net), seed)
    return net


def half_nets(config, lora, cut=CUT, seed=5):
    spec = resolve_lora(lora, build_whole(config, HEAD, cut))
    halves = []
    for build, factors, side in zip(
        (build_net_1, build_net_2), factor_tensors(config, HEAD, cut, None, seed), ("edge", "cloud")
    ):
        net = build(config, HEAD, cut)
        fill(net, factors, seed)
        torch.randn(3)
        add_lora(net, spec.of_half(net, side), seed)
        halves.append(net)
    return halves


def optimizer_of(net):
    spec = OptimizerSpec("AdamW", decay_groups(net, {"lr": 1e-2, "weight_decay": 0.1}))
    return make_optimizer(spec, net.whole_parameters())


def trained_names(net):
    return {net.whole_names[own] for own, parameter in net.named_parameters() if parameter.requires_grad}


@pytest.mark.one_in(5)
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_halves_train_as_one_process_does(family):
    config = shape(family)
    whole = whole_net(config, CONFIG).eval()
    net_1, net_2 = (net.eval() for net in half_nets(config, CONFIG))
    frozen = {n: p.detach().clone() for n, p in whole.whole_parameters().items() if n not in trained_names(whole)}
    for name, parameter in {**net_1.whole_parameters(), **net_2.whole_parameters()}.items():
        assert torch.equal(parameter, whole.whole_parameters()[name]), name
    optimizers = [optimizer_of(net) for net in (whole, net_1, net_2)]
    for step in range(3):
        inputs, lengths, labels = batch(step)
        loss = whole(inputs, lengths, labels).loss
        split_loss = net_2(net_1(inputs, lengths), lengths, labels).loss
        torch.testing.assert_close(split_loss, loss, atol=1e-6, rtol=0)
        loss.backward()
        split_loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for half in (net_1, net_2):
        for name, parameter in half.whole_parameters().items():
            torch.testing.assert_close(parameter, whole.whole_parameters()[name], atol=1e-6, rtol=0, msg=name)
    for net in (whole, net_1, net_2):
        for name in frozen.keys() & net.whole_parameters().keys():
            assert torch.equal(net.whole_parameters()[name], frozen[name]), name
    assert trained_names(whole) == trained_names(net_1) | trained_names(net_2)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize(
    "lora",
    [CONFIG, LoraConfig(r=2, target_modules="all-linear"), LoraConfig(r=3, target_modules=["word_embeddings", "wte"])],
)
def test_shapes_of_adapters_are_known_before_they_are_there(family, lora):
    net = whole_net(shape(family), None)
    spec = resolve_lora(lora, net)
    spec = replace(spec, rank_pattern={spec.target_modules[0]: 5})
    expected = adapter_shapes(net, spec)
    add_lora(net, spec, seed=0)
    assert expected == {n: tuple(p.shape) for n, p in net.whole_parameters().items() if is_adapter(n)}


@pytest.mark.parametrize("name", ["bert.nothing", "bert.embeddings.LayerNorm"])
def test_no_shape_without_a_module(name):
    net = whole_net(shape(), None)
    with pytest.raises(UsageError, match=f"no module '{name}' that an adapter is for"):
        adapter_shapes(net, replace(resolve_lora(CONFIG, net), target_modules=[name]))


def test_adapters_can_be_given():
    net = whole_net(shape(), CONFIG)
    given = {n: torch.randn(p.shape) for n, p in net.whole_parameters().items() if "layer.1" in n and is_adapter(n)}
    again = whole_net(shape(), None)
    add_lora(again, resolve_lora(CONFIG, again), 5, values=in_memory({**given, "classifier.bias": torch.ones(2)}))
    for name, parameter in again.whole_parameters().items():
        assert parameter.equal(given.get(name, net.whole_parameters()[name])), name


def test_what_is_trained_of_either_half():
    net_1, net_2 = half_nets(shape(), CONFIG)
    adapters = 2 * 2 * 2 * 4 * 32  # query and value of two blocks, A and B of rank 4 at width 32
    assert sum(p.numel() for p in net_1.parameters() if p.requires_grad) == adapters + 4 * 64
    assert sum(p.numel() for p in net_2.parameters() if p.requires_grad) == adapters + 16 + 4 * 32 + 32 + 2 * 32 + 2
    for net in (net_1, net_2):
        held = [parameter for group in optimizer_of(net).param_groups for parameter in group["params"]]
        assert {id(p) for p in held} == {id(p) for p in net.parameters() if p.requires_grad}


def test_the_seed_draws_adapters_by_name_alone():
    def drawn(seed):
        (net_1, _) = half_nets(shape(), CONFIG, seed=seed)
        return {n: p for n, p in net_1.whole_parameters().items() if "lora_A" in n}

    first = drawn(1)
    assert all(torch.equal(first[name], again) for name, again in drawn(1).items())
    assert not any(torch.equal(first[name], other) for name, other in drawn(2).items())
    assert len({float(a.detach().sum()) for a in first.values()}) == len(first)


def test_adding_adapters_leaves_the_global_generator_alone():
    net = whole_net(shape(), None)
    spec = resolve_lora(CONFIG, net)
    torch.manual_seed(0)
    expected = torch.randn(2)
    torch.manual_seed(0)
    add_lora(net, spec, seed=1)
    assert torch.equal(torch.randn(2), expected)


def test_dropout_belongs_to_the_seed():
    config = shape()
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    net = whole_net(config, LoraConfig(r=4, lora_dropout=0.5)).train()
    for name, parameter in net.whole_parameters().items():
        if "lora_B" in name:
            parameter.data.fill_(0.1)

    def logits(*parts):
        with seeded(CPU, 7, *parts):
            return net(*batch(0)).logits

    assert torch.equal(logits("whole", 0, 0), logits("whole", 0, 0))
    assert not torch.equal(logits("whole", 0, 0), logits("whole", 0, 1))
    net.eval()
    assert torch.equal(logits("whole", 0, 0), logits("whole", 0, 1))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("lora", [CONFIG, LoraConfig(r=2, lora_alpha=3, use_rslora=True, target_modules="all-linear")])
def test_merged_weights_are_the_trained_model(family, lora):
    config = shape(family)
    net = whole_net(config, lora).eval()
    optimizer = optimizer_of(net)
    net(*batch(0)).loss.backward()
    optimizer.step()
    net(*batch(1)).loss.backward()
    optimizer.step()
    before = {name: parameter.detach().clone() for name, parameter in net.whole_parameters().items()}
    merged = build_whole(config, HEAD, CUT)
    tensors = merged_tensors(net)
    assert [tensor.name for tensor in tensors] == sorted(merged.whole_names.values())
    fill(merged, tensors, seed=0)
    inputs, lengths, _ = batch(2)
    torch.testing.assert_close(
        merged.eval()(inputs, lengths, {}).logits, net(inputs, lengths, {}).logits, atol=1e-6, rtol=0
    )
    assert not torch.allclose(
        whole_net(config, None).eval()(inputs, lengths, {}).logits, net(inputs, lengths, {}).logits
    )
    assert all(torch.equal(parameter, before[name]) for name, parameter in net.whole_parameters().items())


def test_embeddings_can_have_an_adapter():
    net = whole_net(shape(), LoraConfig(r=2, target_modules=["word_embeddings"]))
    net(*batch(0)).loss.backward()
    with torch.no_grad():
        for name, parameter in net.whole_parameters().items():
            if "lora_embedding_A" in name:
                parameter.add_(0.1)
    merged = build_whole(shape(), HEAD, CUT)
    fill(merged, merged_tensors(net), seed=0)
    inputs, lengths, _ = batch(1)
    torch.testing.assert_close(
        merged.eval()(inputs, lengths, {}).logits, net.eval()(inputs, lengths, {}).logits, atol=1e-6, rtol=0
    )


def test_without_adapters_merged_weights_are_the_parameters():
    net = whole_net(shape(), None)
    tensors = merged_tensors(net)
    assert {tensor.name for tensor in tensors} == set(net.whole_parameters())
    assert all(tensor.read().data_ptr() == net.whole_parameters()[tensor.name].data_ptr() for tensor in tensors)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft itself asks
@pytest.mark.parametrize(
    ("family", "head", "options"),
    [
        ("bert", HEAD, {}),
        ("bert", HEAD, {"target_modules": ["query", "dense"]}),
        ("bert", HEAD, {"target_modules": r".*layer\.[01]\..*(query|key)"}),
        ("bert", HEAD, {"target_modules": ["key"], "layers_to_transform": [1, 3]}),
        ("bert", HEAD, {"target_modules": ["key"], "layers_to_transform": 2, "layers_pattern": "layer"}),
        ("bert", HEAD, {"modules_to_save": ["pooler"], "use_rslora": True}),
        ("bert", HEAD, {"rank_pattern": {r"layer.1.attention.self.query": 2}, "alpha_pattern": {"value": 5}}),
        ("distilbert", HEAD, {"target_modules": ["q_lin"]}),
        ("roberta", "question-answering", {}),
        ("gpt2", HEAD, {"target_modules": ["c_attn", "c_proj"]}),
        ("llama", "causal-lm", {}),
        ("opt", "causal-lm", {"target_modules": "all-linear"}),
    ],
)
def test_an_uncut_model_is_trained_as_peft_trains_it(family, head, options):
    classes = {
        HEAD: (AutoModelForSequenceClassification, "SEQ_CLS"),
        "question-answering": (AutoModelForQuestionAnswering, "QUESTION_ANS"),
        "causal-lm": (AutoModelForCausalLM, "CAUSAL_LM"),
    }
    auto_class, task_type = classes[head]
    config = shape(family)
    conv = {"fan_in_fan_out": True} if family == "gpt2" else {}
    theirs = get_peft_model(auto_class.from_config(config), LoraConfig(task_type=task_type, r=3, **conv, **options))
    expected = {
        name.replace("base_model.model.", "").replace("modules_to_save.default.", ""): parameter.shape
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    ours = build_whole(config, head)
    spec = resolve_lora(LoraConfig(task_type=task_type, r=3, **options), ours)
    add_lora(ours, spec, seed=0)
    assert {ours.whole_names[n]: p.shape for n, p in ours.named_parameters() if p.requires_grad} == expected
    for name in spec.target_modules:
        mine, peft_layer = ours.model.get_submodule(name), theirs.base_model.model.get_submodule(name)
        assert mine.scaling == peft_layer.scaling, name


def test_only_one_half_can_be_adapted():
    config = shape()
    whole, net_1 = whole_net(config, None), build_net_1(config, HEAD, CUT)
    add_lora(whole, resolve_lora(CONFIG, whole).of_half(net_1, "edge"), 0, among=net_1.whole_names.values())
    of_edge = set(net_1.whole_names.values())
    trained = trained_names(whole)
    assert set(build_net_2(config, HEAD, CUT).whole_names.values()) <= trained
    assert trained & of_edge == {"bert.encoder.layer.1.output.dense.ffn1.weight"}
    assert not [name for name in trained if "lora_" in name and "layer.2." in name]


def test_a_half_without_target_modules_says_what_it_has():
    config = shape()
    whole, net_2 = build_whole(config, HEAD, Cut("sft", 4, 4)), build_net_2(config, HEAD, Cut("sft", 4, 4))
    with pytest.raises(UsageError, match=r"the cloud's half has none .*\(query, value\); it has classifier, dense"):
        resolve_lora(CONFIG, whole).of_half(net_2, "cloud")


def test_what_both_halves_need_stays_frozen():
    config = shape("deberta-v2")
    whole = whole_net(config, LoraConfig(r=2, modules_to_save=["rel_embeddings"]))
    assert not [name for name in trained_names(whole) if "rel_embeddings" in name]


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        ({"r": 4}, "a peft.LoraConfig, not by a dict"),
        (LoraConfig(r=4, target_modules=["c_attn"]), "this model has .*query.*value"),
        (LoraConfig(r=4, target_modules=["query", "LayerNorm"]), "LayerNorm' is a LayerNorm"),
        (LoraConfig(r=2000), "rank must be from 1 to 1024, not 2000"),
        (LoraConfig(r=0), "rank must be"),
        (LoraConfig(rank_pattern={"query": 0}), "rank must be"),
        (LoraConfig(lora_alpha=0), "lora_alpha must be above 0"),
        (LoraConfig(lora_dropout=1.0), "below 1, not 1.0"),
        (LoraConfig(bias="all"), "bias='all'"),
        (LoraConfig(use_dora=True), "use_dora is not supported"),
        (LoraConfig(init_lora_weights="pissa"), "init_lora_weights can be"),
        (LoraConfig(layer_replication=[(0, 1)]), "layer_replication is not supported"),
        (LoraConfig(inference_mode=True), "trains nothing"),
    ],
)
def test_configurations_that_cannot_be_followed(lora, says):
    with pytest.raises(UsageError, match=says):
        resolve_lora(lora, build_whole(shape(), HEAD, CUT))


def test_a_tied_weight_has_no_adapter():
    config = shape("gpt2")
    assert config.tie_word_embeddings
    with pytest.raises(UsageError, match=r"'transformer\.wte' shares its weight with lm_head"):
        resolve_lora(LoraConfig(target_modules=["wte"]), build_whole(config, "causal-lm"))
    resolve_lora(LoraConfig(target_modules=["wte"]), build_whole(config, "causal-lm", CUT))  # the cut unties it


def test_a_spec_survives_the_wire():
    config = LoraConfig(r=4, lora_alpha=7, lora_dropout=0.25, use_rslora=True, rank_pattern={"query": 2})
    spec = resolve_lora(config, build_whole(shape(), HEAD, CUT))
    assert lora_from_json(lora_to_json(spec)) == spec
    assert set(asdict(spec)) <= set(LoraConfig.__dataclass_fields__)


@pytest.mark.parametrize(
    "changed",
    [
        {"r": 10**6},
        {"r": True},
        {"r": "8"},
        {"lora_alpha": float("nan")},
        {"lora_alpha": None},
        {"lora_dropout": -1},
        {"use_rslora": 1},
        {"init_lora_weights": "pissa_niter_1000000000"},
        {"init_lora_weights": False},
        {"target_modules": "(a+)+$"},
        {"target_modules": ["(a+)+$"]},
        {"target_modules": ["../../etc/passwd"]},
        {"target_modules": [1]},
        {"modules_to_save": ["a..b"]},
        {"modules_to_save": None},
        {"rank_pattern": {"(a+)+$": 2}},
        {"rank_pattern": [2]},
        {"alpha_pattern": {"bert": 2}},
        {"base_model_name_or_path": "/etc"},
    ],
)
def test_a_wire_that_lies(changed):
    spec = asdict(resolve_lora(CONFIG, build_whole(shape(), HEAD, CUT)))
    with pytest.raises(ProtocolError, match=r"lora_json|LoRA"):
        lora_from_json(json.dumps({**spec, **changed}))


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", "[" * 100000, '{"r": 8}', " " * (1 << 23)])
def test_a_wire_that_is_not_ours(text):
    with pytest.raises(ProtocolError, match="lora_json"):
        lora_from_json(text)


def test_modules_that_a_half_does_not_have():
    net = build_net_2(shape(), HEAD, CUT)
    spec = resolve_lora(CONFIG, build_whole(shape(), HEAD, CUT))
    with pytest.raises(UsageError, match=r"no module 'bert.encoder.layer.0"):
        add_lora(net, spec, seed=0)
    of_norm = replace(spec.of_half(net, "cloud"), target_modules=["bert.encoder.layer.3.output.LayerNorm"])
    with pytest.raises(UsageError, match="LayerNorm"):
        add_lora(net, of_norm, seed=0)


def test_without_peft_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match=r"pip install 'split-fine-tuning\[peft\]'"):
        resolve_lora(CONFIG, build_whole(shape(), HEAD, CUT))


@pytest.mark.slow
def test_peft_is_imported_only_for_lora():
    code = "import sys, sft.lora, sft.models.weights; assert not [m for m in sys.modules if m.startswith('peft')]"
    subprocess.run([sys.executable, "-c", code], check=True)
