"""The cloud's half is built from the configuration: what else a script has done to its modules is refused, not lost."""

from __future__ import annotations

from typing import Any, Callable

import pytest
import torch
from support.script import Wire, adamw, assert_same_training, batches, sgd, tiny_model, wrap
from torch import Tensor, nn

from sft import SFTOptimizer
from sft.errors import UsageError
from sft.models import HEADS


def doubled(_: nn.Module, __: Any, output: Tensor) -> Any:
    return output * 2 if isinstance(output, Tensor) else None


def hooked(name: str) -> Callable[[Any], object]:
    return lambda model: model.get_submodule(name).register_forward_hook(doubled)


def hook_of_backward(model: Any) -> None:
    model.bert.pooler.register_full_backward_hook(lambda *_: None)


def clamped(model: Any) -> None:
    """As it is done where clip_grad_value_ comes too late."""
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))


def stepped_in_backward(model: Any) -> None:
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: None)


def more_dropout(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5


def another_activation(model: Any) -> None:
    model.bert.encoder.layer[2].intermediate.intermediate_act_fn = nn.ReLU()


def another_forward(model: Any) -> None:
    head = model.classifier.forward
    model.classifier.forward = lambda x: 3 * head(x)


def one_head_dropout_at_rest(model: Any) -> None:
    model.config.classifier_dropout = 0.1
    model.dropout.p = 0.1
    model.dropout.eval()


def shared_with_the_edge(model: Any) -> None:
    model.bert.encoder.layer[2] = model.bert.encoder.layer[0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (hooked("classifier"), "'classifier' of the BertForSequenceClassification has hooks, which the cloud's would"),
        (hooked("bert.encoder.layer.2.output"), "'bert.encoder.layer.2.output' of the .* has hooks"),
        (hooked("bert.encoder.layer.1"), "'bert.encoder.layer.1' of the .* has hooks"),
        (
            hooked("bert.encoder.layer.1.output.LayerNorm"),
            "'bert.encoder.layer.1.output.LayerNorm' of the .* has hooks",
        ),
        (hooked("bert.encoder"), "'bert.encoder' of the .* has hooks"),
        (hooked("bert"), "'bert' of the .* has hooks"),
        (hook_of_backward, "'bert.pooler' of the .* has hooks"),
        (clamped, "of the .* has hooks"),
        (stepped_in_backward, "of the .* has hooks"),
        (more_dropout, r"has p=0\.5, and by model\.config the cloud's has"),
        (
            another_activation,
            "'bert.encoder.layer.2.intermediate.intermediate_act_fn' .* is a ReLU, and model.config de",
        ),
        (another_forward, "'classifier' of the BertForSequenceClassification has a forward of its own"),
        (one_head_dropout_at_rest, r"'dropout' of the .* is in eval\(\) mode, and the cloud's follows the model"),
        (shared_with_the_edge, "'bert.encoder.layer.0.\\S+' and 'bert.encoder.layer.2.\\S+' are one parameter, which"),
    ],
)
def test_what_the_cloud_would_not_have_is_refused(change: Callable[[Any], object], says: str) -> None:
    if change is stepped_in_backward and not hasattr(Tensor, "register_post_accumulate_grad_hook"):
        pytest.skip("this release of torch has no such hooks")
    model, wire = tiny_model(), Wire()
    change(model)
    with pytest.raises(UsageError, match=says):
        wrap(model, sgd(model), transport=wire)
    assert not wire.requests
    assert model.classifier is not None, "the model is whole"


def test_dropout_that_a_block_keeps_as_a_number() -> None:
    model = tiny_model("opt")
    model.model.decoder.layers[2].dropout = 0.5
    with pytest.raises(UsageError, match=r"layers.2' of the .* has dropout=0\.5, and by model\.config the"):
        wrap(model, sgd(model))


def test_another_way_to_compute_attention_is_no_other_class() -> None:
    """Of releases that have a class for each."""
    model = tiny_model()
    model.config._attn_implementation = "eager"
    with wrap(model, sgd(model)) as optimizer:
        model(**batches(1, model)[0]).loss.backward()
        optimizer.step()


def around_and_below(model: Any) -> None:
    inside = model.net.model if hasattr(model, "net") else model
    model.register_forward_hook(lambda _, __, output: None)
    hooked("bert.embeddings")(inside)
    hooked("bert.encoder.layer.0")(inside)
    hooked("bert.encoder.layer.1.intermediate")(inside)
    words = inside.bert.embeddings.word_embeddings.weight
    words.register_hook(lambda gradient: gradient * 0.5)


def test_what_is_around_the_model_or_below_the_cut_is_the_edges() -> None:
    def script(model: Any, optimizer: Any) -> None:
        around_and_below(model)
        for batch in batches(3, model):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()

    assert_same_training(script, adamw, tolerance=1e-5)
    model = tiny_model()
    around_and_below(model)
    with wrap(model, sgd(model)) as optimizer:
        script(model, optimizer)


@pytest.mark.parametrize(("family", "head"), [("bert", "masked-lm"), ("gpt2", "causal-lm"), ("llama", "causal-lm")])
def test_what_the_library_itself_has_put_there_is_no_hook_of_a_script(family: str, head: str) -> None:
    """Hooks that capture hidden states stay in a model that was asked for them once; a tied head is one parameter."""
    model = HEADS[head].auto_class.from_config(tiny_model(family, head).config)
    (batch,) = batches(1, model)
    assert model(**batch, output_hidden_states=True).hidden_states
    with wrap(model, sgd(model)) as optimizer:
        model(**batch).loss.backward()
        optimizer.step()


def test_a_model_that_is_decomposed_is_looked_at_where_it_is_cut() -> None:
    model = tiny_model()
    SFTOptimizer.decompose(model, split_layer=2, split_rank=4)
    hook = model.classifier.register_forward_hook(doubled)
    with pytest.raises(UsageError, match=r"'classifier' of the .* has hooks"):
        wrap(model, sgd(model))
    hook.remove()
    wrap(model, sgd(model)).close()


def test_hooks_of_all_parameters_of_a_cut_model() -> None:
    model = tiny_model()
    with wrap(model, sgd(model)) as optimizer:
        hooks = [p.register_hook(lambda gradient: gradient) for p in model.parameters()]
        with pytest.raises(UsageError, match="'cloud_gradients' stands for all gradients on the cloud"):
            model(**batches(1, model)[0])
        for hook in hooks:
            hook.remove()
        model.bert.embeddings.word_embeddings.weight.register_hook(lambda gradient: gradient)
        model(**batches(1, model)[0]).loss.backward()
        optimizer.step()


def test_a_call_with_other_weights_than_the_models() -> None:
    if not hasattr(torch, "func"):
        pytest.skip("this release of torch has no torch.func")
    model = tiny_model()
    with wrap(model, sgd(model)) as optimizer:
        others = {name: 2 * parameter.detach() for name, parameter in model.named_parameters()}
        with pytest.raises(UsageError, match="was exchanged for another tensor, as torch"):
            torch.func.functional_call(model, others, (), batches(1, model)[0])
        model(**batches(1, model)[0]).loss.backward()
        optimizer.step()
