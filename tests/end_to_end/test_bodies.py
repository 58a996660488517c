"""Modules of one's own around a transformers model train split as they do on one machine."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any, Callable, Optional

import pytest
import torch
from support.bodies import (
    CUT,
    LENGTHS,
    B,
    C,
    D,
    First,
    Mean,
    Pooled,
    S,
    Tagger,
    adamw,
    batches,
    config_of,
    made,
    one_machine,
    replaced_head,
)
from support.closeness import assert_close, assert_same_state
from support.hosting_script import ScriptCloud
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel

from sft import SFTOptimizer
from sft.errors import ProtocolError, UsageError

STEPS = 3


def host(model: nn.Module, **options: Any) -> ScriptCloud:
    return ScriptCloud(model, adamw(model), **{**CUT, **options})


def wrap(model: nn.Module, cloud: ScriptCloud, **options: Any) -> SFTOptimizer:
    return SFTOptimizer(adamw(model), role="edge", model=model, server=cloud.address, **{**CUT, **options})


def of_mean(model: Any, ids: Tensor, mask: Tensor, y: Tensor, tags: Tensor) -> Any:
    return model(ids, mask, labels=y)


def of_norm_at_rest(model: Any, *batch: Tensor) -> Any:
    model.norm.eval()
    return of_mean(model, *batch)


def of_first(model: Any, ids: Tensor, mask: Tensor, y: Tensor, tags: Tensor) -> Any:
    logits = model(ids, mask=mask)
    return functional.cross_entropy(logits, y), logits


def of_pooled(model: Any, ids: Tensor, mask: Tensor, y: Tensor, tags: Tensor) -> Any:
    logits = model(ids)["scores"]
    return functional.cross_entropy(logits, y), logits


def of_tagger(model: Any, ids: Tensor, mask: Tensor, y: Tensor, tags: Tensor) -> Any:
    output = model(input_ids=ids, attention_mask=mask, labels=tags)
    return output["loss"], output["logits"][mask == 1]


def of_replaced(model: Any, ids: Tensor, mask: Tensor, y: Tensor, tags: Tensor) -> Any:
    output = model(input_ids=ids, attention_mask=mask)
    return functional.cross_entropy(output.logits, y), output.logits


KINDS: dict[str, tuple[Any, Callable[..., Any]]] = {
    "mean": (Mean, of_mean),
    "norm at rest": (Mean, of_norm_at_rest),
    "first": (First, of_first),
    "tagger": (Tagger, of_tagger),
    "replaced": (replaced_head, of_replaced),
}


def train(model: Any, optimizer: Any, call: Callable[..., Any], first: int = 0, last: int = STEPS) -> list[Tensor]:
    """Clipped, in every step two micro-batches and an evaluation: all that comes out."""
    told = []
    for index, batch in list(enumerate(batches(2 * last)))[2 * first :]:
        loss, logits = call(model, *batch)
        (loss / 2).backward()
        told += [loss.detach(), logits.detach()]
        if index % 2:
            told.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).detach())
            optimizer.step()
            optimizer.zero_grad()
            model.eval()
            with torch.no_grad():
                told += call(model, *batch)
            model.train()
    return told


@pytest.mark.parametrize("kind", KINDS)
def test_they_train_as_on_one_machine(kind: str) -> None:
    make, call = KINDS[kind]
    whole = one_machine(made(make))
    expected = train(whole, adamw(whole), call)
    model = made(make)
    with host(made(make)) as cloud, wrap(model, cloud) as optimizer:
        assert_close(train(model, optimizer, call), expected)
        assert_same_state(model, whole)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("family", ["distilbert", "deberta-v2", "roberta", "electra", "gpt2", "llama"])
def test_of_every_family(family: str) -> None:
    whole = one_machine(made(Mean, family))
    expected = train(whole, adamw(whole), of_mean)
    model = made(Mean, family)
    with host(made(Mean, family)) as cloud, wrap(model, cloud) as optimizer:
        assert_close(train(model, optimizer, of_mean), expected)
        assert_same_state(model, whole)


def test_without_a_mask_and_with_the_pooler() -> None:
    def run(model: Any, optimizer: Any) -> list[Tensor]:
        told = []
        for batch in batches(STEPS, padded=False):
            optimizer.zero_grad()
            loss, logits = of_pooled(model, *batch)
            loss.backward()
            optimizer.step()
            told += [loss.detach(), logits.detach()]
        return told

    whole = one_machine(made(Pooled))
    expected = run(whole, adamw(whole))
    model = made(Pooled)
    with host(made(Pooled)) as cloud, wrap(model, cloud) as optimizer:
        assert_close(run(model, optimizer), expected)
        assert_same_state(model, whole)


def test_a_low_rank_residual_and_a_code() -> None:
    calibration = [{"input_ids": ids, "attention_mask": mask} for ids, mask, _, _ in batches(2)]
    options = {"residual": "low-rank", "calibration": calibration}
    whole = one_machine(made(Mean), **options)
    expected = train(whole, adamw(whole), of_mean)
    model = made(Mean)
    with host(made(Mean), residual="low-rank") as cloud, wrap(model, cloud, **options) as optimizer:
        assert_close(train(model, optimizer, of_mean), expected)
    model = made(Mean)
    with host(made(Mean), residual="low-rank") as cloud, wrap(model, cloud, codec="int8", **options) as optimizer:
        coded = train(model, optimizer, of_mean)
    torch.testing.assert_close(coded[0], expected[0], rtol=0.1, atol=0.1)
    assert not coded[0].equal(expected[0])


def test_a_run_goes_on_by_weights_that_are_loaded_before_the_optimizer_is_made() -> None:
    whole = one_machine(made(Mean))
    expected = train(whole, adamw(whole), of_mean)
    model, saved = made(Mean), io.BytesIO()
    with host(made(Mean)) as cloud, wrap(model, cloud) as optimizer:
        told = train(model, optimizer, of_mean, last=2)
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    saved.seek(0)
    state = torch.load(saved)
    again = made(Mean, seed=1)
    SFTOptimizer.decompose(again, **CUT)
    again.load_state_dict(state["model"])
    with host(made(Mean, seed=1)) as cloud, wrap(again, cloud) as optimizer:
        optimizer.load_state_dict(state["optimizer"])
        told += train(again, optimizer, of_mean, first=2)
        assert_same_state(again, whole)
    assert_close(told, expected)


def test_the_body_is_saved_as_what_was_trained(tmp_path: Path) -> None:
    """With the code that it needs; a class of the script's own does not open what it would draw anew in part."""
    model = made(Tagger)
    ids, mask, _, _ = next(iter(batches(1)))
    with host(made(Tagger)) as cloud, wrap(model, cloud) as optimizer:
        train(model, optimizer, of_tagger, last=1)
        model.eval()
        with torch.no_grad():
            logits = model(ids, mask)["logits"]
        model.bert.save_pretrained(tmp_path / "body")
        model.save_pretrained(tmp_path / "own")
        head = model.state_dict()["classifier.weight"], model.state_dict()["classifier.bias"]
        with pytest.raises(UsageError, match="cannot be copied or pickled"):  # it would save what is trained here
            copy.deepcopy(model.bert)
    body = AutoModel.from_pretrained(tmp_path / "body", trust_remote_code=True, add_pooling_layer=False).eval()
    with torch.no_grad():
        opened = functional.linear(body(ids, attention_mask=mask).last_hidden_state, *head)
    assert_close(opened[mask == 1], logits[mask == 1])
    with pytest.raises(Exception, match=r"size mismatch|mismatched|shape"):
        Tagger.from_pretrained(tmp_path / "own")


def test_in_half_precision_it_is_trained_in_single() -> None:
    def half() -> Any:
        model = made(Mean)
        model.encoder.to(torch.bfloat16)
        return model

    single = half()
    single.encoder.float()
    whole = one_machine(single)
    expected = train(whole, adamw(whole), of_mean)
    model = half()
    with host(half()) as cloud, wrap(model, cloud) as optimizer:
        assert_close(train(model, optimizer, of_mean), expected)


class Unmasked(Mean):
    """A mean over padding, too."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Any = None) -> Any:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.classifier(hidden.mean(1))


class OfMore(Mean):
    """A field that the body's output has not."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return self.classifier(self.encoder(input_ids, attention_mask)[5])


@pytest.mark.parametrize("padded", [True, False])
def test_what_the_models_forward_raises_on_the_cloud_is_told(padded: bool) -> None:
    model = made(OfMore)
    with host(made(OfMore)) as cloud, wrap(model, cloud):
        ids, mask, _, _ = next(iter(batches(1, padded)))
        with pytest.raises(ProtocolError, match="on the cloud the model's forward raised IndexError: "):
            model(ids, mask)


class Third(Mean):
    """A token that some texts do not have."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return self.classifier(self.encoder(input_ids, attention_mask)[0][:, 2])


def test_what_reads_padding_is_refused() -> None:
    for kind, harmless in ((Unmasked, LENGTHS[:1] * B), (Third, LENGTHS)):
        model = made(kind)
        with host(made(kind)) as cloud, wrap(model, cloud):
            for lengths in (harmless, (7, 1, 5, 6)):
                mask = (torch.arange(S)[None] < torch.tensor(lengths)[:, None]).long()
                if lengths is harmless:
                    assert model(mask * 7, mask).shape == (B, C)
                    continue
                with pytest.raises(ProtocolError, match="depends on those of padding, which does not cross"):
                    model(mask * 7, mask)


class OverTokens(Mean):
    """Statistics over tokens, in training alone."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.norm = nn.BatchNorm1d(D)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        hidden = self.norm(self.encoder(input_ids, attention_mask)[0].transpose(1, 2)).transpose(1, 2)
        mask = attention_mask.unsqueeze(-1)
        return self.classifier((hidden * mask).sum(1) / mask.sum(1))


def test_what_learns_from_padding_in_training_alone_is_refused() -> None:
    model = made(OverTokens)
    with host(made(OverTokens)) as cloud, wrap(model, cloud):
        ids, mask, y, _ = next(iter(batches(1)))
        with pytest.raises(ProtocolError, match="depends on those of padding"):
            functional.cross_entropy(model(ids, mask), y).backward()


class Turned(Tagger):
    """Tokens last, as `cross_entropy` takes them; or nothing but the loss."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Optional[Tensor] = None) -> Any:
        logits = self.classifier(self.bert(input_ids, attention_mask)[0])
        if labels is None:
            return logits.transpose(1, 2)
        return functional.cross_entropy(logits.view(-1, C), labels.view(-1))


def test_tokens_are_found_wherever_they_are_counted() -> None:
    whole = one_machine(made(Turned))
    model = made(Turned)
    with host(made(Turned)) as cloud, wrap(model, cloud):
        for ids, mask, _, tags in batches(1):
            for one in (model, whole):
                functional.cross_entropy(one(ids, mask), tags).backward()
            assert_close(model(ids, mask, tags), whole(ids, mask, tags))
        expected = whole.bert.get_input_embeddings().weight.grad
        assert_close(model.bert.get_input_embeddings().weight.grad, expected)


def hooked(model: Any) -> None:
    model.encoder.encoder.layer[2].register_forward_hook(lambda *_: None)


def with_less_dropout(model: Any) -> None:
    model.encoder.encoder.layer[2].output.dropout.p = 0.5


def with_adapters(model: Any) -> None:
    model.encoder.encoder.layer[1].output.dense.lora_A = nn.Linear(2, 2)


def in_half(model: Any) -> None:
    model.to(torch.bfloat16)


def replaced(model: Any) -> None:
    model.forward = model.forward


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (hooked, "has hooks, which the cloud's would not have"),
        (with_less_dropout, r"has p=0\.5, and by model\.config the cloud's has"),
        (with_adapters, "has adapters, which are not for a model inside a module of your own"),
        (in_half, r"is torch\.bfloat16: call model\.float\(\) first"),
        (replaced, "the forward of this Mean was replaced"),
    ],
)
def test_what_would_be_lost_on_the_cloud_is_refused(change: Any, says: str) -> None:
    model = made(Mean)
    change(model)
    for role in ("edge", "cloud"):
        with pytest.raises(UsageError, match=says):
            SFTOptimizer(adamw(model), role=role, model=model, server="127.0.0.1:9", **CUT)


def test_a_body_in_another_mode_than_its_module_is_refused_where_it_draws() -> None:
    for setting in ("hidden_dropout_prob", "classifier_dropout", "summary_first_dropout"):
        config = config_of("bert")
        setattr(config, setting, 0.1)
        model, other = Mean(config).train(), Mean(config).train()
        with host(other) as cloud, wrap(model, cloud):
            ids, mask, _, _ = next(iter(batches(1)))
            model.encoder.eval()
            if setting == "hidden_dropout_prob":
                with pytest.raises(UsageError, match=r"are not both in train.*: call train\(\) or eval\(\) of"):
                    model(ids, mask)
            else:
                assert model(ids, mask).shape == (B, C)


def test_a_loss_that_learns_from_padding_is_refused() -> None:
    model = made(Tagger)
    with host(made(Tagger)) as cloud, wrap(model, cloud):
        ids, mask, _, _ = next(iter(batches(1)))
        with pytest.raises(ProtocolError, match="depends on those of padding"):
            model(ids, mask)["logits"].sum().backward()


def test_calls_that_cannot_cross_are_refused() -> None:
    model = made(Mean)
    with host(made(Mean)) as cloud, wrap(model, cloud):
        ids, mask, _, _ = next(iter(batches(1)))
        with pytest.raises(UsageError, match="pad on the right"):
            model(ids.flip(1), mask.flip(1))
        with pytest.raises(UsageError, match=r"attention_mask is torch\.bool"):
            model(ids, mask.bool())
        with pytest.raises(UsageError, match="attention_mask must be ones"):
            model(ids, mask * 0)
        assert model(ids, mask).shape == (B, C)


def test_another_cut_on_the_other_side_is_refused() -> None:
    with host(made(Mean), split_layer=1) as cloud:
        with pytest.raises(ProtocolError, match="the edge's script has split_layer 2, the cloud's 1"):
            wrap(made(Mean), cloud)
        with pytest.raises(ProtocolError, match=r"the edge's script has split_rank 4, the cloud's 8"):
            wrap(made(Mean), cloud, split_layer=1, split_rank=4)
        model = made(Mean)
        with wrap(model, cloud, split_layer=1) as optimizer:
            train(model, optimizer, of_mean, last=1)


def test_afterwards_the_cloud_has_the_upper_half() -> None:
    model = made(Mean)
    with host(made(Mean)) as cloud, wrap(model, cloud) as optimizer:
        train(model, optimizer, of_mean, last=1)
    upper = cloud.model.eval()
    assert upper(torch.zeros(B, S, 8)).shape == (B, C)
    names = set(upper.state_dict())
    assert "encoder.encoder.layer.2.output.dense.weight" in names
    assert not any("embeddings" in name or "layer.0." in name for name in names)
