"""The options of the optimizer and its schedule."""

import pytest
import torch

from sft.errors import UsageError
from sft_edge.options.optimizer import OptimizerOptions


def test_the_default_is_adamw_without_decay():
    assert OptimizerOptions().arguments() == {"lr": 5e-5, "weight_decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-8}


def test_optimizers_get_only_what_they_take():
    options = OptimizerOptions("SGD", "momentum=0.9, nesterov=true", learning_rate=0.5, weight_decay=0.25)
    assert options.arguments() == {"lr": 0.5, "weight_decay": 0.25, "momentum": 0.9, "nesterov": True}
    assert OptimizerOptions("RMSprop", "eps=1e-6").arguments() == {"lr": 5e-5, "weight_decay": 0.0, "eps": 1e-6}


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD", "RMSprop", "Adagrad", "NAdam", "RAdam", "Adamax", "Rprop"])
def test_torch_takes_the_arguments(name):
    optimizer = getattr(torch.optim, name)
    arguments = OptimizerOptions(name, learning_rate=0.25).arguments()
    assert optimizer([torch.zeros(1)], **arguments).param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": "adamw"}, "--optim: torch.optim has no optimizer 'adamw'; it has AdamW"),
        ({"optim": "adamw_bnb_8bit"}, "--optim: torch.optim has no optimizer 'adamw_bnb_8bit'; try AdamW"),
        ({"optim": "AdamZ"}, "--optim: torch.optim has no optimizer 'AdamZ'; try AdamW"),
        ({"optim": "lr_scheduler"}, "--optim: torch.optim has no optimizer 'lr_scheduler'"),
        ({"optim": "Optimizer"}, "--optim: optimizer Optimizer cannot train a split model: it is the base class"),
        ({"optim": "LBFGS"}, "--optim: optimizer LBFGS cannot train a split model: it evaluates the loss several"),
        (
            {"optim": "SparseAdam"},
            "--optim: optimizer SparseAdam cannot train a split model: it wants sparse",
        ),
        ({"optim": "Rprop", "weight_decay": 0.1}, "--optim Rprop has no --weight-decay"),
        ({"optim_args": "momentum=0.9"}, "--optim-args: AdamW takes no 'momentum'; it takes amsgrad, "),
        ({"optim_args": "lr=1"}, "--optim-args: lr has an option of its own"),
        ({"optim_args": "amsgrad"}, "--optim-args: 'amsgrad' is not of the form name=value"),
        ({"optim_args": "=1"}, "--optim-args: '=1' is not of the form name=value"),
        ({"learning_rate": -1.0}, "--learning-rate must be 0 or more"),
        ({"learning_rate": float("nan")}, "--learning-rate must be 0 or more"),
        ({"factor_learning_rate": -1.0}, "--factor-learning-rate must be 0 or more"),
        ({"max_grad_norm": -1.0}, "--max-grad-norm must be 0 or more"),
        ({"adam_beta1": 1.0}, "--adam-beta1 must be 0 or more and below 1"),
        ({"warmup_steps": -1}, "--warmup-steps must be 0 or more"),
        ({"warmup_ratio": 1.5}, "--warmup-ratio must be between 0 and 1"),
        ({"warmup_steps": 10, "warmup_ratio": 0.1}, "only one of --warmup-steps and --warmup-ratio"),
        ({"lr_scheduler_type": "wavy"}, "--lr-scheduler-type 'wavy' is none of linear, cosine,"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "'reduce_lr_on_plateau' is none of"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "--lr-scheduler-kwargs do not suit cosine_with_min_lr: .*min_lr"),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"pow": 2}},
            "--lr-scheduler-kwargs do not suit polynomial: .*pow",
        ),
    ],
)
def test_what_makes_no_sense_is_named(changes, message):
    with pytest.raises(UsageError, match=message):
        OptimizerOptions(**changes)


def rates(options, total_steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=options.learning_rate)
    scheduler = options.scheduler(optimizer, total_steps)
    taken = []
    for _ in range(total_steps):
        taken.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return taken


def test_linear_falls_to_zero():
    assert rates(OptimizerOptions(learning_rate=1.0), 4) == pytest.approx([1.0, 0.75, 0.5, 0.25])


@pytest.mark.parametrize(
    "warmup", [{"warmup_steps": 2}, {"warmup_ratio": 0.3}, {"warmup_steps": 0.3}]
)  # 0.3 of 5 steps, rounded up
def test_warm_up_rises_from_zero(warmup):
    options = OptimizerOptions(learning_rate=1.0, lr_scheduler_type="constant_with_warmup", **warmup)
    assert rates(options, 5) == pytest.approx([0.0, 0.5, 1.0, 1.0, 1.0])


def test_schedules_take_their_arguments():
    options = OptimizerOptions(
        learning_rate=1.0, lr_scheduler_type="polynomial", lr_scheduler_kwargs={"lr_end": 0.5, "power": 1.0}
    )
    assert rates(options, 2) == pytest.approx([1.0, 0.75])


def test_names_of_training_arguments_mean_what_they_mean_there():
    """And the same run, so that a checkpoint of one spelling goes on with another."""
    assert OptimizerOptions(optim="adamw_torch") == OptimizerOptions()
    assert OptimizerOptions(optim="sgd") == OptimizerOptions(optim="SGD")
    assert str(OptimizerOptions(warmup_steps=10.0).warmup_steps) == "10"
    assert OptimizerOptions(warmup_steps=0.1) == OptimizerOptions(warmup_ratio=0.1)
