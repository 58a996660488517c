import pytest
import torch
from torch import nn
from transformers import AutoConfig

from sft.errors import UsageError
from sft.models import Cut, build_net_1, build_net_2, build_whole
from sft.optim import gradients
from sft.optim.gradients import clip_scale, scalar_product, scale_gradients, squared_gradient_norm, squared_norm
from sft.optim.spec import (
    GroupSpec,
    OptimizerSpec,
    decay_groups,
    factors_apart,
    make_optimizer,
    set_learning_rates,
    spec_from_proto,
    spec_to_proto,
)


def one_group(name="SGD", **arguments):
    return OptimizerSpec(name, [GroupSpec(["w"], {"lr": 0.1, **arguments})])


def parameter(*values):
    return nn.Parameter(torch.tensor(values))


def test_biases_and_norms_do_not_decay():
    config = AutoConfig.for_model("bert", num_hidden_layers=2, hidden_size=32, num_attention_heads=2)
    whole = build_whole(config, "sequence-classification", Cut("sft", 1, 4))
    decayed, undecayed = decay_groups(whole, {"lr": 1e-3, "weight_decay": 0.1})
    assert decayed.arguments["weight_decay"] == 0.1
    assert undecayed.arguments["weight_decay"] == 0.0
    assert "bert.encoder.layer.0.output.dense.ffn2.weight" in decayed.parameter_names
    assert {name for name in undecayed.parameter_names if not name.endswith("bias")} == {
        name for name in whole.whole_names.values() if "LayerNorm.weight" in name
    }
    names = decayed.parameter_names + undecayed.parameter_names
    assert sorted(names) == sorted(whole.whole_parameters())


def test_the_halves_share_the_groups():
    config = AutoConfig.for_model("bert", num_hidden_layers=2, hidden_size=32, num_attention_heads=2)
    cut = Cut("sft", 1, 4)
    head = "sequence-classification"
    spec = OptimizerSpec("AdamW", decay_groups(build_whole(config, head, cut), {"lr": 1e-3, "weight_decay": 0.1}))
    halves = [spec.restricted_to(build(config, head, cut).whole_names.values()) for build in (build_net_1, build_net_2)]
    for group, at_edge, at_cloud in zip(spec.groups, halves[0].groups, halves[1].groups):
        assert sorted(group.parameter_names) == sorted(at_edge.parameter_names + at_cloud.parameter_names)
        assert group.arguments == at_edge.arguments == at_cloud.arguments


def test_what_is_frozen_is_in_no_group():
    config = AutoConfig.for_model("bert", num_hidden_layers=2, hidden_size=32, num_attention_heads=2)
    whole = build_whole(config, "sequence-classification", Cut("sft", 1, 4))
    whole.model.bert.embeddings.requires_grad_(False)
    names = [name for group in decay_groups(whole, {"lr": 1e-3}) for name in group.parameter_names]
    assert not [name for name in names if "embeddings" in name]
    assert "classifier.weight" in names


def test_norms_of_every_kind_do_not_decay():
    config = AutoConfig.for_model("llama", num_hidden_layers=2, hidden_size=32, num_attention_heads=2, vocab_size=50)
    whole = build_whole(config, "causal-lm")
    _, undecayed = decay_groups(whole, {"lr": 1e-3, "weight_decay": 0.1})
    assert sorted(undecayed.parameter_names) == [
        *(f"model.layers.{i}.{name}_layernorm.weight" for i in range(2) for name in ("input", "post_attention")),
        "model.norm.weight",
    ]


def test_factors_have_a_rate_of_their_own_in_either_half():
    config = AutoConfig.for_model("bert", num_hidden_layers=2, hidden_size=32, num_attention_heads=2)
    cut, head = Cut("sft", 1, 4), "sequence-classification"
    groups = decay_groups(build_whole(config, head, cut), {"lr": 1e-3, "weight_decay": 0.1})
    spec = OptimizerSpec("AdamW", factors_apart(groups, 1e-2))
    factors = [f"bert.encoder.layer.0.output.dense.ffn{number}.weight" for number in (1, 2, 3)]
    assert spec.groups[2] == GroupSpec(factors, {"lr": 1e-2, "weight_decay": 0.1})
    assert spec.groups[0].parameter_names == [name for name in groups[0].parameter_names if name not in factors]
    assert spec.groups[1] == groups[1]
    at_edge, at_cloud = (
        spec.restricted_to(build(config, head, cut).whole_names.values()) for build in (build_net_1, build_net_2)
    )
    assert at_edge.groups[2].parameter_names == factors[:1]
    assert at_cloud.groups[2].parameter_names == factors[1:]


def test_sums_over_tensors():
    one = [torch.tensor([3.0, 4.0]), None, torch.tensor([[2.0]])]
    other = [torch.tensor([1.0, -1.0]), torch.ones(5), torch.tensor([[10.0]])]
    assert squared_norm(one) == 29.0
    assert scalar_product(one, other) == 19.0
    assert (squared_norm([None]), scalar_product([None], one)) == (0.0, 0.0)
    many = [torch.full((10_000,), 1e-4)] * 100  # in single precision such sums lose digits
    assert scalar_product(many, many) == pytest.approx(1e6 * float(many[0][0]) ** 2, rel=1e-7)


def test_sums_of_squares_that_single_precision_cannot_hold():
    """A gradient scaler may bring them about; and those that are next to nothing count, too."""
    huge, tiny = torch.full((3,), 2.0**100), torch.full((2, 2), 2.0**-100)
    assert squared_norm([huge]) == 3 * 2.0**200
    assert squared_norm([tiny.t()]) == 4 * 2.0**-200
    assert scalar_product([huge, tiny], [-huge, tiny]) == -3 * 2.0**200
    assert squared_norm([torch.tensor([float("inf")]), tiny]) == float("inf")


def test_sums_over_more_than_one_piece(monkeypatch):
    monkeypatch.setattr(gradients, "_PIECE", 4)
    x = torch.arange(30.0).reshape(5, 6)
    assert squared_norm([x.t(), torch.empty(0)]) == sum(i * i for i in range(30))
    assert scalar_product([x], [torch.ones(6, 5).t()]) == sum(range(30))


ARGUMENTS = {"lr": 1e-3, "betas": (0.9, 0.99), "amsgrad": True, "eps": 1e-6, "weight_decay": 0.0}


def test_an_optimizer_crosses_the_wire():
    spec = OptimizerSpec("AdamW", [GroupSpec(["w"], ARGUMENTS), GroupSpec([], {**ARGUMENTS, "lr": 1.0})])
    assert spec_from_proto(spec_to_proto(spec)) == spec
    optimizer = make_optimizer(spec_from_proto(spec_to_proto(spec)), {"w": parameter(1.0)})
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.99)
    assert optimizer.param_groups[0]["amsgrad"] is True
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1.0]


def test_none_among_numbers_crosses_the_wire():
    spec = OptimizerSpec("Adafactor", [GroupSpec(["w"], {"lr": 1e-2, "eps": (None, 1e-3), "many": (1, None, 2.0)})])
    assert spec_from_proto(spec_to_proto(spec)) == spec


@pytest.mark.parametrize(
    "name",
    [
        "Adadelta",
        "Adagrad",
        "Adam",
        "adamw",
        "Adamax",
        "ASGD",
        "NAdam",
        "RAdam",
        "RMSprop",
        "Rprop",
        "sgd",
        "Adafactor",
    ],
)
def test_any_optimizer_of_torch(name):
    if not any(attribute.lower() == name.lower() for attribute in vars(torch.optim)):
        pytest.skip(f"torch {torch.__version__} has no {name}")
    w = parameter([1.0, 2.0])
    optimizer = make_optimizer(one_group(name), {"w": w})
    before = w.detach().clone()
    for _ in range(2):
        w.grad = torch.ones_like(w)
        optimizer.step()
    assert not torch.equal(before, w)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (one_group("Adamant"), "no optimizer 'Adamant'; try AdamW"),
        (OptimizerSpec("SGD", [GroupSpec(["w", "w"], {"lr": 0.1})]), "names a parameter twice in one group"),
        (one_group("LBFGS"), "LBFGS cannot train a split model"),
        (one_group("SparseAdam"), "sparse gradients"),
        (one_group("Optimizer"), "base class"),
        (one_group("SGD", nesterov=True), "SGD: Nesterov"),
        (one_group("SGD", betas=(0.9, 0.9)), "SGD: .*betas"),
        (one_group("SGD", lr=-1.0), "SGD: Invalid learning rate"),
        (OptimizerSpec("SGD", [GroupSpec(["v"], {"lr": 0.1})]), "parameter 'v'"),
        (OptimizerSpec("SGD", []), "SGD: .*empty"),
        (OptimizerSpec("SGD", [GroupSpec(["w"], {"lr": 0.1}), GroupSpec([], {"lr": -1.0})]), "Invalid learning rate"),
    ],
)
def test_optimizers_that_cannot_be(spec, says):
    with pytest.raises(UsageError, match=says):
        make_optimizer(spec, {"w": parameter(1.0)})


def test_an_argument_that_cannot_travel():
    with pytest.raises(UsageError, match="lr=None cannot be sent"):
        spec_to_proto(one_group(lr=None))


def test_norm_and_scale_agree_with_torch():
    parameters = [parameter([3.0, 4.0]), parameter([[1.0], [2.0]]), parameter([7.0])]
    for p in parameters[:2]:
        p.grad = p.detach().clone()
    squared = squared_gradient_norm(parameters)
    assert squared == pytest.approx(30.0)
    scale_gradients(parameters, clip_scale(squared**0.5, 1.0))
    ours = [p.grad.clone() for p in parameters[:2]]
    for p in parameters[:2]:
        p.grad = p.detach().clone()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for mine, p in zip(ours, parameters):
        torch.testing.assert_close(mine, p.grad)
    assert squared_gradient_norm([parameter(1.0)]) == 0.0
    assert (clip_scale(0.5, 1.0), clip_scale(1e9, 0.0)) == (1.0, 1.0)


def test_learning_rates_go_to_their_groups():
    spec = OptimizerSpec("SGD", [GroupSpec(["w"], {"lr": 0.1}), GroupSpec([], {"lr": 0.2})])
    optimizer = make_optimizer(spec, {"w": parameter(1.0)})
    set_learning_rates(optimizer, [0.5, 0.25])
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]
