"""peft's own models through `SFTOptimizer`: adapters are trained on whichever half holds them, as on one machine."""

from __future__ import annotations

import copy
from typing import Any, Callable, Dict, List, Optional

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from support.adapted import adapted, script, sgd, trained
from support.script import EPS, OneMachine, Wire, tiny_model, wrap
from torch import Tensor

from sft import SFTOptimizer
from sft.errors import UsageError
from sft.models import Cut, build_whole, head_of
from sft.models.lora import add_lora, resolve_lora
from sft.models.weights import fill, live_factors, live_tensors

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft itself asks
    pytest.mark.filterwarnings("ignore:Could not find a config file in"),  # older peft, of a model without a name
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),  # torch 2.1, of its own loader
]

PREFIX = "base_model.model."
W = "bert.encoder.layer.1.output.dense"

both_label_modes = pytest.mark.parametrize("travels", [True, False], ids=["labels-travel", "labels-stay"])


def one_machine(model: Any, cut: Cut) -> OneMachine:
    """The decomposed model with the adapters that its configuration means, of the values that the model's have now."""
    base = model.get_base_model()
    whole = build_whole(base.config, head_of(base), cut)
    for_edge, for_cloud = live_factors(base, whole.head, cut)
    fill(whole, [*live_tensors(base, whole), *for_edge, *for_cloud], seed=0)
    add_lora(whole, resolve_lora(model.peft_config["default"], whole), seed=0)
    values = {name.replace(PREFIX, ""): parameter for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in whole.whole_parameters().items():
            if "lora_" in name:
                parameter.copy_(values[name])
    return OneMachine(whole).train()


def adamw(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained(model), lr=1e-2, eps=EPS)


def of_peft(name: str, state: Dict[str, Tensor]) -> str:
    """What peft calls a parameter of the whole model."""
    plain = {one.replace(".base_layer", "").replace(".modules_to_save.default", ""): one for one in state}
    return plain[PREFIX + name]


def assert_same_training(
    model: Any,
    make_optimizer: Callable[[Any], torch.optim.Optimizer] = sgd,
    travels: bool = True,
    change: Callable[[Any], object] = lambda model: None,
    split_layer: int = 2,
    transport: Optional[Wire] = None,
) -> Dict[str, Tensor]:
    """`change` is done to the peft model and to the one machine's. Returns the state that training began with."""
    reference = one_machine(model, Cut("sft", split_layer, 4))
    change(reference)
    before = {name: parameter.detach().clone() for name, parameter in reference.named_parameters()}
    expected = script(reference, make_optimizer(reference), travels)
    change(model)
    optimizer = make_optimizer(model)
    with wrap(model, optimizer, split_layer=split_layer, transport=transport) as optimizer:
        first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        got = script(model, optimizer, travels)
        after = model.state_dict()
    weights = dict(reference.named_parameters())
    assert len(weights) == len([name for name in after if "original_module" not in name])
    for name, parameter in weights.items():
        own = of_peft(name, after)
        torch.testing.assert_close(after[own], parameter.detach(), rtol=0, atol=1e-6, msg=lambda m, n=own: f"{n}: {m}")
        learned = not parameter.detach().equal(before[name])
        assert learned is not after[own].equal(first[own]), name
        assert learned is parameter.requires_grad, name
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    return first


@pytest.mark.one_in(5)
@both_label_modes
@pytest.mark.parametrize("make_optimizer", [sgd, adamw])
@pytest.mark.parametrize(
    ("family", "head"),
    [("bert", "sequence-classification"), ("gpt2", "sequence-classification"), ("llama", "causal-lm")],
)
def test_adapters_on_both_halves(family: str, head: str, make_optimizer: Any, travels: bool) -> None:
    assert_same_training(adapted(family, head), make_optimizer, travels)


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["query", "dense"], "use_rslora": True},
        {"target_modules": r".*layer\.[12]\.attention.*key"},
        {
            "target_modules": ["value"],
            "rank_pattern": {"layer.2.attention.self.value": 2},
            "alpha_pattern": {"layer.0.attention.self.value": 3},
        },
        {"target_modules": ["word_embeddings", "query"], "modules_to_save": ["pooler", "position_embeddings"]},
    ],
)
def test_what_a_configuration_can_say(settings: Dict[str, Any]) -> None:
    assert_same_training(adapted(**settings))


def test_the_adapter_of_the_layer_that_is_cut_goes_into_its_factors() -> None:
    model = adapted(target_modules=["output.dense"])
    layer = model.get_base_model().get_submodule(W)
    with torch.no_grad():
        matrix = layer.base_layer.weight + layer.get_delta_weight("default")
    assert not matrix.allclose(layer.base_layer.weight)
    first = assert_same_training(model)
    ffn_1, ffn_2, ffn_3 = (first[f"{PREFIX}{W}.{factor}.weight"] for factor in ("ffn1", "ffn2", "ffn3"))
    u, s, v = torch.linalg.svd(matrix)
    torch.testing.assert_close(ffn_3 @ ffn_2 @ ffn_1, u[:, :4] @ torch.diag(s[:4]) @ v[:4])
    assert not [name for name in first if f"{W}.lora" in name or f"{W}.base_layer" in name]


def test_a_cloud_without_adapters_trains_head_and_factors() -> None:
    wire = Wire()
    assert_same_training(adapted(), split_layer=3, transport=wire)
    assert wire.requests[-1].lora_json == ""


def test_more_than_peft_trains() -> None:
    def unfreeze(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if "LayerNorm" in name:
                parameter.requires_grad_(True)
            if "layer.2" in name and "lora_A" in name:
                parameter.requires_grad_(False)

    assert_same_training(adapted(), change=unfreeze)


def test_factors_are_in_the_group_of_what_they_replace_else_in_the_first_that_trains() -> None:
    def groups(model: Any) -> List[List[int]]:
        frozen = [p for p in model.parameters() if not p.requires_grad and p.numel() != 1]
        groups = [{"params": frozen[:2]}, {"params": trained(model), "lr": 0.2}, {"params": frozen[2:], "lr": 0.3}]
        rates = []
        for held in (groups[:2], groups):
            again = adapted()
            by_name = dict(zip((id(p) for p in model.parameters()), again.parameters()))
            mine = [{**group, "params": [by_name[id(p)] for p in group["params"]]} for group in held]
            wire = Wire()
            with wrap(again, torch.optim.SGD(mine, lr=0.1), transport=wire) as optimizer:
                own = dict(again.named_parameters())[f"{PREFIX}{W}.ffn1.weight"]
                of_edge = [any(own is p for p in group["params"]) for group in optimizer.param_groups]
            of_cloud = [list(group.parameter_names) for group in wire.requests[-1].optimizer.groups]
            rates.append(
                [of_edge.index(True), *(f"{W}.ffn{n}.weight" in of_cloud[of_edge.index(True)] for n in (2, 3))]
            )
        return rates

    assert groups(adapted()) == [[1, True, True], [2, True, True]]


def test_the_state_has_pefts_names_and_goes_on_in_another_session() -> None:
    names = {name for name in adapted().state_dict() if "original_module" not in name and f"{W}." not in name}
    names |= {f"{PREFIX}{W}.{own}" for own in ("ffn1.weight", "ffn2.weight", "ffn3.weight", "ffn3.bias")}
    model = adapted()
    with wrap(model, adamw(model)) as optimizer:
        script(model, optimizer)
        states = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        script(model, optimizer)
        expected = model.state_dict()
    assert set(expected) == names
    again = adapted()
    with wrap(again, adamw(again)) as optimizer:
        assert not any(tensor.equal(expected[name]) for name, tensor in again.state_dict().items() if "lora" in name)
        again.load_state_dict(states[0])
        optimizer.load_state_dict(states[1])
        script(again, optimizer)
        got = again.state_dict()
        with pytest.raises(
            RuntimeError, match=r"size mismatch for base_model.*classifier\.modules_to_save\.default\.weight"
        ):
            again.load_state_dict({**got, f"{PREFIX}classifier.modules_to_save.default.weight": torch.zeros(2)})
    assert all(got[name].equal(tensor) for name, tensor in expected.items())


def test_other_adapters_need_no_new_upload_of_the_weights() -> None:
    hashes = []
    for seed in range(2):
        model, wire = adapted("llama", "causal-lm"), Wire()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora" in name:
                    parameter.fill_(0.1 * seed)
        with wrap(model, sgd(model), transport=wire):
            hashes.append((wire.requests[-1].weights_sha256, wire.requests[-1].factors_sha256))
    assert hashes[0][0] == hashes[1][0]
    assert hashes[0][1] != hashes[1][1]


def test_adapters_that_transformers_has_added() -> None:
    models = [tiny_model(), adapted(modules_to_save=[], task_type=None)]
    models[0].add_adapter(LoraConfig(r=4, lora_alpha=8))
    ends = []
    for model in models:
        values = {name: p for name, p in models[1].named_parameters() if "lora" in name}
        if model is models[0]:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora" in name:
                        parameter.copy_(values[PREFIX + name])
    for model in models:
        with wrap(model, sgd(model)) as optimizer:
            script(model, optimizer)
            ends.append({name.replace(PREFIX, ""): tensor for name, tensor in model.state_dict().items()})
    assert ends[0].keys() == ends[1].keys()
    assert all(tensor.equal(ends[1][name]) for name, tensor in ends[0].items())


def test_a_model_that_peft_has_left_is_trained_whole() -> None:
    model, wire = adapted().merge_and_unload(), Wire()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with wrap(model, sgd(model), transport=wire) as optimizer:
        script(model, optimizer)
    assert wire.requests[-1].lora_json == ""


def merged() -> Any:
    model = adapted()
    model.merge_adapter()
    return model


def with_another() -> Any:
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2))
    return model


def disabled() -> Any:
    model = adapted()
    model.base_model.disable_adapter_layers()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


REFUSED: Dict[str, Any] = {
    "one can be trained, named 'default'": with_another,
    "model has adapters mine": lambda: get_peft_model(tiny_model(), LoraConfig(r=2), adapter_name="mine"),
    "not by a IA3Config": lambda: get_peft_model(tiny_model(), IA3Config(task_type="SEQ_CLS")),
    "not by a PromptTuningConfig": lambda: get_peft_model(
        tiny_model("gpt2", "causal-lm"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    ),
    "not by a AdaLoraConfig": lambda: get_peft_model(tiny_model(), AdaLoraConfig(task_type="SEQ_CLS", total_step=9)),
    "merged or disabled": merged,
    "or disabled: unmerge": disabled,
    "use_dora is not supported": lambda: adapted(use_dora=True),
    "bias='all'": lambda: adapted(bias="all"),
    "init_lora_weights can be": lambda: adapted(init_lora_weights=False),
    "modules_to_save holds 'bert.encoder.layer.1.output.dense'": lambda: adapted(modules_to_save=["output.dense"]),
    "'bert.encoder.layer.1.output.dense', the layer that is cut": lambda: adapted(modules_to_save=["layer.1.output"]),
}


@pytest.mark.parametrize("match", REFUSED)
def test_adapters_that_cannot_be_followed(match: str) -> None:
    model = REFUSED[match]()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = sgd(model)
    held = list(optimizer.param_groups[0]["params"])
    with pytest.raises(UsageError, match=match):
        wrap(model, optimizer, server="127.0.0.1:9")
    assert all(parameter.equal(before[name]) for name, parameter in model.named_parameters())
    assert all(one is other for one, other in zip(optimizer.param_groups[0]["params"], held))


def test_no_adapter_on_what_both_halves_need() -> None:
    base = tiny_model("deberta-v2")
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["rel_embeddings"]))
    with pytest.raises(UsageError, match=r"both halves need 'deberta.encoder.rel_embeddings'"):
        wrap(model, sgd(model), server="127.0.0.1:9")


def test_a_model_that_is_decomposed_takes_no_adapters() -> None:
    model = tiny_model()
    SFTOptimizer.decompose(model, split_layer=2, split_rank=4)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    with pytest.raises(UsageError, match="decomposed where it is cut: leave decompose"):
        wrap(model, sgd(model), server="127.0.0.1:1")


def test_what_is_tied_in_the_library_is_trained_whole_or_not_at_all() -> None:
    """Peft's copy of a head's matrix has a bias of its own, where the library's has one under two names."""
    model = adapted("bert", "masked-lm", modules_to_save=["decoder"])
    with pytest.raises(UsageError, match=r"'cls.predictions.bias' are tied in the library's model: train both"):
        wrap(model, sgd(model), server="127.0.0.1:1")


def test_around_a_model_of_ones_own() -> None:
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    with pytest.raises(UsageError, match="are for the library's models with a head, not for a Sequential"):
        wrap(model, sgd(model), split_layer=None, split_at="0", server="127.0.0.1:1")
