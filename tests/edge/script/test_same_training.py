"""Scripts on a split model end with the weights of the same script on one machine."""

from __future__ import annotations

from typing import Any, Callable, Dict, List

import pytest
import torch
from support.script import EPS, TWO_STACKS, adamw, assert_same_training, batches, sgd, tiny_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sft_edge.script.gradients import PARAMETER_NAME

STEPS = 4


def _loss(model: Any, batch: Dict[str, Tensor], travels: bool) -> Tensor:
    """The same loss, computed by whoever has the labels."""
    if travels:
        return model(**batch).loss
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    return cross_entropy(model(**inputs).logits, batch["labels"])


both_label_modes = pytest.mark.parametrize("travels", [True, False], ids=["labels-travel", "labels-stay"])
stays_first = pytest.mark.parametrize("travels", [False, True], ids=["labels-stay", "labels-travel"])
"""By turns where `first_only` leaves one."""


@both_label_modes
@pytest.mark.parametrize("make_optimizer", [adamw, sgd])
def test_plain_loop(travels: bool, make_optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
    def script(model: Any, optimizer: Any) -> Any:
        losses = []
        for batch in batches(STEPS, model):
            optimizer.zero_grad()
            loss = _loss(model, batch, travels)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    assert_same_training(script, make_optimizer)


@pytest.mark.first_only
@both_label_modes
def test_zero_grad_between_forward_and_backward(travels: bool) -> None:
    def script(model: Any, optimizer: Any) -> None:
        for batch in batches(STEPS, model):
            loss = _loss(model, batch, travels)
            optimizer.zero_grad(set_to_none=False)
            loss.backward()
            optimizer.step()

    assert_same_training(script, sgd)


@pytest.mark.first_only
@stays_first
def test_zero_grad_of_the_model_after_the_step(travels: bool) -> None:
    def script(model: Any, optimizer: Any) -> None:
        for batch in batches(STEPS, model):
            _loss(model, batch, travels).backward()
            optimizer.step()
            model.zero_grad()

    assert_same_training(script)


@pytest.mark.first_only
@both_label_modes
def test_gradients_that_are_never_zeroed(travels: bool) -> None:
    def script(model: Any, optimizer: Any) -> None:
        for batch in batches(STEPS, model):
            _loss(model, batch, travels).backward()
            optimizer.step()

    assert_same_training(script, sgd)


@both_label_modes
def test_accumulation_with_clipping(travels: bool) -> None:
    def script(model: Any, optimizer: Any) -> Any:
        norms = []
        for index, batch in enumerate(batches(2 * STEPS, model)):
            (_loss(model, batch, travels) / 2).backward()
            if index % 2:
                norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.3).detach())
                optimizer.step()
                optimizer.zero_grad()
        return torch.stack(norms)

    assert_same_training(script, sgd)


@pytest.mark.first_only
@stays_first
def test_clipping_each_micro_batch(travels: bool) -> None:
    def script(model: Any, optimizer: Any) -> None:
        for index, batch in enumerate(batches(2 * STEPS, model)):
            _loss(model, batch, travels).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            if index % 2:
                optimizer.step()
                optimizer.zero_grad()

    assert_same_training(script, sgd)


@both_label_modes
def test_two_forwards_before_one_backward(travels: bool) -> None:
    def script(model: Any, optimizer: Any) -> None:
        data = batches(2 * STEPS, model)
        for one, other in zip(data[::2], data[1::2]):
            optimizer.zero_grad()
            (_loss(model, one, travels) + 3 * _loss(model, other, travels)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            optimizer.step()

    assert_same_training(script, sgd)


@pytest.mark.first_only
@both_label_modes
def test_backwards_in_another_order(travels: bool) -> None:
    def script(model: Any, optimizer: Any) -> Any:
        norms = []
        data = batches(2 * STEPS, model)
        for one, other in zip(data[::2], data[1::2]):
            first, second = _loss(model, one, travels), _loss(model, other, travels)
            optimizer.zero_grad()
            second.backward()
            (2 * first).backward()
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.3).detach())
            optimizer.step()
        return torch.stack(norms)

    assert_same_training(script, sgd)


@pytest.mark.first_only
@stays_first
def test_a_forward_without_backward(travels: bool) -> None:
    def script(model: Any, optimizer: Any) -> None:
        data = batches(3 * STEPS, model)
        for index in range(STEPS):
            optimizer.zero_grad()
            _loss(model, data[3 * index], travels).backward()
            _loss(model, data[3 * index + 1], travels)  # only looked at
            _loss(model, data[3 * index + 2], travels).backward()
            optimizer.step()

    assert_same_training(script, sgd)


@both_label_modes
def test_gradients_dropped_in_the_middle_of_a_step(travels: bool) -> None:
    def script(model: Any, optimizer: Any) -> None:
        data = batches(2 * STEPS, model)
        for one, other in zip(data[::2], data[1::2]):
            _loss(model, one, travels).backward()
            optimizer.zero_grad()
            _loss(model, other, travels).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            optimizer.step()
            optimizer.zero_grad()

    assert_same_training(script, sgd)


@pytest.mark.first_only
@both_label_modes
def test_a_loss_that_counts_nothing(travels: bool) -> None:
    """Gradients are zeros then, not nothing: momentum goes on."""

    def script(model: Any, optimizer: Any) -> None:
        for index, batch in enumerate(batches(STEPS, model)):
            optimizer.zero_grad()
            (_loss(model, batch, travels) * (index != 1)).backward()
            optimizer.step()

    assert_same_training(script, sgd)
    assert_same_training(script, adamw)


@pytest.mark.one_in(3)
@both_label_modes
@pytest.mark.parametrize("factor", [0.0, -1.0])
def test_gradients_multiplied_by_hand(travels: bool, factor: float) -> None:
    def script(model: Any, optimizer: Any) -> None:
        for index, batch in enumerate(batches(2 * STEPS, model)):
            _loss(model, batch, travels).backward()
            if index % 3 == 1:
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter.grad.mul_(factor)
            if index % 2:
                optimizer.step()
                if index != 3:
                    optimizer.zero_grad()

    assert_same_training(script, sgd)


@both_label_modes
def test_evaluation_in_between(travels: bool) -> None:
    def script(model: Any, optimizer: Any) -> Any:
        seen: List[Tensor] = []
        for index, batch in enumerate(batches(STEPS, model)):
            optimizer.zero_grad()
            loss = _loss(model, batch, travels)
            loss.backward()
            model.eval()
            with torch.no_grad():
                seen.append(model(**batch).logits)
                seen.append(model(**batch).loss)
            model.train()
            optimizer.step()
            if index % 2:
                model.eval()
                with torch.no_grad():
                    seen.append(model(**batch).logits)
                model.train()
        return seen

    assert_same_training(script, sgd)


@pytest.mark.first_only
@both_label_modes
def test_one_cycle_schedule_of_rates_and_betas(travels: bool) -> None:
    def script(model: Any, optimizer: Any) -> None:
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-2, total_steps=2 * STEPS)
        for batch in batches(2 * STEPS - 1, model):
            optimizer.zero_grad()
            _loss(model, batch, travels).backward()
            optimizer.step()
            schedule.step()

    assert_same_training(script)
    assert_same_training(script, sgd)


@pytest.mark.first_only
@stays_first
def test_groups_by_name(travels: bool) -> None:
    def make(model: Any) -> torch.optim.Optimizer:
        named = [(name, p) for name, p in model.named_parameters() if name != PARAMETER_NAME]
        low = [p for name, p in named if ".layer.0." in name or ".layer.1." in name]
        head = [p for name, p in named if "classifier" in name]
        rest = [p for name, p in named if not any(p is q for q in low + head)]
        groups = [{"params": head, "lr": 3e-2, "weight_decay": 0.0}, {"params": low, "lr": 1e-3}, {"params": rest}]
        return torch.optim.AdamW(groups, lr=1e-2, eps=EPS)

    def script(model: Any, optimizer: Any) -> Any:
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, [lambda n: 1.0, lambda n: 0.5**n, lambda n: 1.0 / (n + 1)]
        )
        for batch in batches(STEPS, model):
            optimizer.zero_grad()
            _loss(model, batch, travels).backward()
            optimizer.step()
            schedule.step()
        return torch.tensor([group["lr"] for group in optimizer.param_groups])

    assert_same_training(script, make)


@pytest.mark.first_only
@both_label_modes
def test_a_closure(travels: bool) -> None:
    def script(model: Any, optimizer: Any) -> Any:
        losses = []
        for batch in batches(STEPS, model):

            def closure(batch: Dict[str, Tensor] = batch) -> Tensor:
                optimizer.zero_grad()
                loss = _loss(model, batch, travels)
                loss.backward()
                return loss

            losses.append(optimizer.step(closure).detach())
        return torch.stack(losses)

    assert_same_training(script, sgd)


@both_label_modes
def test_autocast(travels: bool) -> None:
    def script(model: Any, optimizer: Any) -> None:
        for batch in batches(STEPS, model):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = _loss(model, batch, travels)
            loss.backward()
            optimizer.step()

    # One rounding to bfloat16 is 4e-3 of a gradient.
    assert_same_training(script, sgd, tolerance=2e-3 if TWO_STACKS else 1e-3)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("frozen", ["encoder.layer.0", "encoder.layer.1.output", "encoder.layer.2", "bert."])
@both_label_modes
def test_frozen_parameters(travels: bool, frozen: str) -> None:
    model = tiny_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)

    def script(model: Any, optimizer: Any) -> None:
        for batch in batches(STEPS, model):
            optimizer.zero_grad()
            _loss(model, batch, travels).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            optimizer.step()

    def make(model: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2, momentum=0.9)

    assert_same_training(script, make, model)


@pytest.mark.first_only
@stays_first
def test_parameters_that_the_optimizer_does_not_hold(travels: bool) -> None:
    def make(model: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for name, p in model.named_parameters() if "bias" in name], lr=1e-1)

    def script(model: Any, optimizer: Any) -> None:
        for batch in batches(STEPS, model):
            optimizer.zero_grad()
            _loss(model, batch, travels).backward()
            optimizer.step()

    assert_same_training(script, make)


@both_label_modes
def test_an_edge_that_trains_nothing(travels: bool) -> None:
    """Nothing needs a gradient below the cut, and yet the cloud learns."""
    model = tiny_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layer.2" in name or "pooler" in name or "classifier" in name)

    def script(model: Any, optimizer: Any) -> None:
        for batch in batches(STEPS, model):
            optimizer.zero_grad()
            _loss(model, batch, travels).backward()
            optimizer.step()

    assert_same_training(script, adamw, model)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("name", ["Adagrad", "Adam", "NAdam", "RMSprop", "Adadelta", "Adamax", "ASGD"])
def test_optimizers_of_torch(name: str) -> None:
    def make(model: Any) -> torch.optim.Optimizer:
        settings = {} if name == "ASGD" else {"eps": EPS}
        return getattr(torch.optim, name)(model.parameters(), lr=1e-3, **settings)

    def script(model: Any, optimizer: Any) -> None:
        for batch in batches(STEPS, model):
            optimizer.zero_grad()
            _loss(model, batch, True).backward()
            optimizer.step()

    assert_same_training(script, make)


def test_a_loss_scaler() -> None:
    if not hasattr(torch.amp, "GradScaler"):
        pytest.skip("before torch 2.3 only CUDA has gradient scalers")

    def script(model: Any, optimizer: Any) -> Any:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        norms = []
        for index, batch in enumerate(batches(2 * STEPS, model)):
            optimizer.zero_grad()
            scaler.scale(_loss(model, batch, index % 2 == 0)).backward()
            if index == 3:
                next(p for p in model.parameters() if p.grad is not None).grad.fill_(float("inf"))
            scaler.unscale_(optimizer)
            if index != 3:
                norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.3).detach())
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 2.0**7, "the step with infinite gradients must be skipped, and no other"
        return torch.stack(norms)

    assert_same_training(script, sgd)
