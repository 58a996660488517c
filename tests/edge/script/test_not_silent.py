"""What would train half a model, or another than was meant, is refused where it happens, and the session goes on."""

from __future__ import annotations

import gc
import math
from typing import Any, Callable, Dict

import pytest
import torch
from support.script import OneMachine, Wire, adamw, assert_same_training, batches, sgd, tiny_model, wrap
from torch import Tensor, nn
from transformers import BertForSequenceClassification

from sft.errors import UsageError
from sft_edge.script.crossing import LinkCross
from sft_edge.script.other_optimizers import _checks


def backward(model: Any) -> None:
    model(**batches(1, model)[0]).loss.backward()


def evaluate(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**batches(1, model)[0]).logits
    return logits


def of_base(model: Any) -> None:
    model.bert.eval()


def of_block(model: Any) -> None:
    model.bert.encoder.layer[1].eval()


def of_dropout(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()


def no_dropout(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (of_base, r"'bert' and the model around it are not both in train\(\) or eval\(\) mode"),
        (of_block, r"'bert\.encoder\.layer\.1' and the model around it are not both"),
        (of_dropout, r"'bert\.encoder\.layer\.1\.attention\.self\.dropout' and the model around it are not both"),
        (no_dropout, r"p of 'bert\.encoder\.layer\.1\.\S+' has become 0\.0 since the model was cut"),
    ],
)
def test_another_mode_or_dropout_than_the_clouds(change: Callable[[Any], None], says: str) -> None:
    config = tiny_model().config
    config.attention_probs_dropout_prob = 0.1
    model = BertForSequenceClassification(config).train()
    with wrap(model, sgd(model)):
        model.bert.embeddings.eval()  # the edge's alone, as a frozen block below is
        backward(model)
        change(model)
        with pytest.raises(UsageError, match=says):
            backward(model)


def test_a_second_optimizer_over_what_is_on_the_cloud() -> None:
    model = tiny_model()
    head = [parameter for name, parameter in model.named_parameters() if name.startswith("classifier")]
    body = [parameter for name, parameter in model.named_parameters() if not name.startswith("classifier")]
    other = sgd(nn.ParameterList(head))
    with wrap(model, torch.optim.SGD(body, lr=0.1)) as optimizer:
        backward(model)
        with pytest.raises(UsageError, match=r"this SGD is over parameters that are on the cloud: make one optimizer"):
            other.step()
        optimizer.step()


def test_a_new_optimizer_over_a_cut_model() -> None:
    model = tiny_model()
    with wrap(model, sgd(model)) as optimizer:
        other = adamw(model)
        backward(model)
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        with pytest.raises(UsageError, match=r"this AdamW was made of a model that is cut, .* step the SFTOptimizer"):
            other.step()
        assert all(parameter.equal(before[name]) for name, parameter in model.named_parameters())
        optimizer.step()


def test_optimizers_over_something_else_and_over_the_edges_alone() -> None:
    model, another = tiny_model(), nn.Linear(2, 2)
    embeddings = sgd(model.bert.embeddings)
    rest = [p for name, p in model.named_parameters() if "embeddings" not in name]
    with wrap(model, torch.optim.SGD(rest, lr=0.1)) as optimizer:
        before = model.bert.embeddings.word_embeddings.weight.detach().clone()
        backward(model)
        another(torch.ones(1, 2)).sum().backward()
        for one in (sgd(another), embeddings, optimizer):
            one.step()
        assert not model.bert.embeddings.word_embeddings.weight.equal(before)


def test_the_optimizer_that_is_wrapped() -> None:
    model = tiny_model()
    inner = sgd(model)
    with wrap(model, inner) as optimizer:
        backward(model)
        with pytest.raises(UsageError, match=r"this SGD steps the edge alone: step the SFTOptimizer around it"):
            inner.step()
        optimizer.step()


def test_a_new_optimizer_after_the_first_is_gone() -> None:
    """The model holds the session."""
    model, wire = tiny_model(), Wire()
    optimizer = wrap(model, sgd(model), transport=wire)
    del optimizer
    gc.collect()
    backward(model)
    with pytest.raises(UsageError, match="was made of a model that is cut"):
        adamw(model).step()
    wire.close()


def test_nothing_is_looked_at_once_the_model_is_gone() -> None:
    gc.collect()
    before = len(_checks)
    model = tiny_model()
    optimizer = wrap(model, sgd(model))
    assert len(_checks) == before + 1
    optimizer.close()
    del model, optimizer
    gc.collect()
    assert len(_checks) == before


def clip_values(model: Any) -> None:
    largest = max(float(parameter.grad.abs().max()) for parameter in model.parameters() if parameter.grad is not None)
    nn.utils.clip_grad_value_(model.parameters(), 0.5 * largest)


def add_noise(model: Any) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.add_(0.01 * torch.randn_like(parameter.grad))


def noise_on_matrices(model: Any) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None and parameter.dim() > 1:
            parameter.grad.add_(0.01 * torch.randn_like(parameter.grad))


def signs(model: Any) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.sign_()


def penalty(model: Any) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach(), alpha=0.1)


def mask(model: Any) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(parameter.detach() != 0)


@pytest.mark.parametrize("edit", [clip_values, add_noise, noise_on_matrices, signs, penalty, mask])
def test_gradients_that_are_edited_one_by_one(edit: Callable[[Any], None]) -> None:
    model = tiny_model()
    with wrap(model, sgd(model)) as optimizer:
        backward(model)
        edit(model)
        with pytest.raises(UsageError, match="gradients were edited otherwise than by multiplying all of them by one"):
            optimizer.step()
        optimizer.zero_grad()
        backward(model)
        optimizer.step()


def test_values_that_clipping_leaves_are_no_edit() -> None:
    model = tiny_model()
    with wrap(model, sgd(model)) as optimizer:
        backward(model)
        nn.utils.clip_grad_value_(model.parameters(), 1e6)
        optimizer.step()


def test_a_session_ends_in_order_after_an_edit() -> None:
    """The step before it is taken by the cloud, too."""
    model, wire = tiny_model(), Wire()
    optimizer = wrap(model, sgd(model), transport=wire)
    backward(model)
    optimizer.step()
    backward(model)
    clip_values(model)
    optimizer.close()
    assert wire.closed
    assert any(message.HasField("commit") for message in wire.sent)


def test_another_default_type() -> None:
    """Of this process alone: here the cloud is in it, and has opened the session before."""
    model, real = tiny_model(), Wire()
    model(**batches(1, model)[0])
    with pytest.MonkeyPatch.context() as patch:
        opened = LinkCross.__init__

        def with_another(*args: Any) -> None:
            torch.set_default_dtype(torch.float64)
            try:
                opened(*args)
            finally:
                torch.set_default_dtype(torch.float32)

        patch.setattr(LinkCross, "__init__", with_another)
        optimizer = wrap(model, sgd(model), transport=real)
    with optimizer:
        backward(model)
        optimizer.step()


@pytest.mark.parametrize("setting", ["output_hidden_states", "output_attentions"])
def test_a_configuration_that_asks_for_more(setting: str) -> None:
    model = tiny_model(attn_implementation="eager")
    with wrap(model, sgd(model)) as optimizer:
        setattr(model.config, setting, True)
        with pytest.raises(UsageError, match=rf"config\.{setting} asks for what stays on the cloud"):
            backward(model)
        model(**batches(1, model)[0], **{setting: False})  # the call has the word
        setattr(model.config, setting, False)
        backward(model)
        optimizer.step()


def test_a_part_of_the_model_alone() -> None:
    model = tiny_model()
    with wrap(model, sgd(model)) as optimizer:
        with pytest.raises(UsageError, match="the rest is on the cloud: call the model itself"):
            model.bert(**batches(1, model, labels=False)[0])
        backward(model)
        optimizer.step()


class Ema:
    """As scripts have it, over the parameters that they see, or over the whole state."""

    def __init__(self, model: nn.Module, over_state: bool = False) -> None:
        self.model, self.over_state = model, over_state
        self.shadow = {name: x.clone() for name, x in self._now().items()}

    def _now(self) -> Dict[str, Tensor]:
        if self.over_state:
            return dict(self.model.state_dict())
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

    def update(self) -> None:
        for name, x in self._now().items():
            self.shadow[name] = 0.9 * self.shadow[name] + 0.1 * x

    def apply_shadow(self) -> None:
        self.backup = {name: x.clone() for name, x in self._now().items()}
        self._put(self.shadow)

    def restore(self) -> None:
        self._put(self.backup)

    def _put(self, values: Dict[str, Tensor]) -> None:
        if self.over_state:
            self.model.load_state_dict(values)
            return
        for name, parameter in self.model.named_parameters():
            if name in values:
                parameter.data.copy_(values[name])


def test_an_average_of_the_edges_half_alone() -> None:
    model = tiny_model()
    with wrap(model, sgd(model)) as optimizer:
        ema = Ema(model)
        for _ in range(2):
            backward(model)
            optimizer.step()
            ema.update()
        ema.apply_shadow()
        changed = (
            "'bert.encoder.layer.1.output.dense.ffn1.weight' was changed past the optimizer, .* by load_state_dict"
        )
        for attempt in (lambda: evaluate(model), lambda: backward(model), model.state_dict, optimizer.step):
            with pytest.raises(UsageError, match=changed):
                attempt()
        ema.restore()
        evaluate(model)
        backward(model)
        optimizer.step()


def test_an_average_of_the_whole_state() -> None:
    """Evaluates as the averaged model does on one machine, and training goes on as if nothing had been."""

    def script(model: Any, optimizer: Any) -> Any:
        ema = Ema(model, over_state=True)
        for _ in range(2):
            backward(model)
            optimizer.step()
            optimizer.zero_grad()
            ema.update()
        ema.apply_shadow()
        averaged = evaluate(model)
        ema.restore()
        backward(model)
        optimizer.step()
        return averaged

    assert_same_training(script, sgd)


def test_weights_that_a_script_may_change_itself() -> None:
    """Embeddings that are perturbed and put back, a part below the cut that is loaded, another type and back."""

    def script(model: Any, optimizer: Any) -> None:
        first = model.net.model if isinstance(model, OneMachine) else model
        words, part = first.bert.embeddings.word_embeddings.weight, first.bert.encoder.layer[0]
        for _ in range(2):
            backward(model)
            kept = words.detach().clone()
            words.data.add_(words.grad / words.grad.norm())
            backward(model)
            words.data.copy_(kept)
            part.load_state_dict({name: 0.9 * x for name, x in part.state_dict().items()})
            optimizer.step()
            optimizer.zero_grad()

    assert_same_training(script, sgd)
    model = tiny_model()
    with wrap(model, sgd(model)) as optimizer:
        model.bfloat16().state_dict()
        model.float()
        backward(model)
        optimizer.step()
        with torch.no_grad():
            model.bert.encoder.layer[1].output.dense.ffn1.weight.fill_(math.nan)
        model.state_dict()  # of weights that diverged
