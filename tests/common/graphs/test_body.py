"""Where a module around a transformers model can be cut, and what is said where it cannot."""

from __future__ import annotations

from typing import Any, Optional

import pytest
import torch
from support.bodies import B, C, D, First, Mean, S, Tagger, batches, config_of, made, replaced_head
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForNextSentencePrediction, AutoModelForTokenClassification

from sft.errors import CutError
from sft.graphs.body import cut_around, find_body
from sft.graphs.cut import cut
from sft.models import body_of


def encoder() -> Any:
    return AutoModel.from_config(config_of("bert"))


class Around(nn.Module):
    """Something around two models, the second of which is the same where `is_one`."""

    def __init__(self, is_one: bool = True) -> None:
        super().__init__()
        self.one = encoder()
        self.other = self.one if is_one else encoder()
        self.head = nn.Linear(D, C)

    def forward(self, ids: Tensor, mask: Tensor) -> Any:
        return self.head(self.one(ids, mask)[0][:, 0] - self.other(ids, mask)[0][:, 0])


@pytest.mark.parametrize(
    ("model", "name"),
    [(made(Mean), "encoder"), (made(First), "inner.bert"), (made(Tagger), "bert"), (made(replaced_head), "bert")],
)
def test_the_transformers_model_in_a_module_is_found(model: nn.Module, name: str) -> None:
    assert find_body(model) == name
    assert find_body(nn.ModuleDict({"a": model}), "a") == f"a.{name}"
    assert str(body_of(model.get_submodule(name))).startswith("body")


def test_of_several_one_is_named() -> None:
    model = Around(is_one=False)
    with pytest.raises(CutError, match="this Around has several transformers models, 'one' and 'other': name one"):
        find_body(model)
    assert find_body(model, "other") == "other"
    with pytest.raises(CutError, match="this Around has no module 'third'"):
        find_body(model, "third")
    with pytest.raises(CutError, match="a BertModel gives hidden states, and no head: give the module around it"):
        find_body(encoder())
    with pytest.raises(CutError, match="split_layer is for transformers models, and for modules around"):
        find_body(nn.Linear(2, 2))


def test_both_halves_and_the_tail_are_what_the_module_computes() -> None:
    model = made(Mean).eval()
    split = cut_around(model, "encoder")
    assert split.upper_names == {
        *(f"norm.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
        *(f"classifier.{index}.{name}" for index in (0, 2) for name in ("weight", "bias")),
    }
    assert split.reads_mask(0)
    ids, mask, y, _ = next(iter(batches(1)))

    def cross(named: Any, variant: int) -> Tensor:
        return split.run_net_2((model.encoder(**named), named["attention_mask"]), variant)

    loss, logits = split.run(cross, (ids, mask), {"labels": y})
    expected_loss, expected = model(ids, mask, y)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(split.run(cross, (ids, mask), {}), expected)
    assert not cut_around(made(First), "inner.bert").reads_mask(0)


def test_what_has_two_names_above_the_body() -> None:
    model = made(Mean)
    model.again = model.classifier[2]
    split = cut_around(model, "encoder")
    assert split.other_names == {f"again.{own}": f"classifier.2.{own}" for own in ("weight", "bias")}


def test_heads_of_the_library_that_have_no_name_here() -> None:
    model = made(AutoModelForNextSentencePrediction.from_config).eval()
    split = cut_around(model, "bert")
    ids, mask, _, _ = next(iter(batches(1)))

    def cross(named: Any, variant: int) -> Tensor:
        return split.run_net_2((model.bert(**named), mask), variant)

    output = split.run(cross, (), {"input_ids": ids, "attention_mask": mask})
    torch.testing.assert_close(output.logits, model(ids, mask).logits)
    split = cut_around(made(AutoModelForTokenClassification.from_config), "bert")
    assert all(frozenset({"input_ids", "attention_mask", *more}) in split.variants for more in ([], ["labels"]))


class OfBatch(Mean):
    """One argument, a dictionary, of which the mask is read twice."""

    def forward(self, batch: Any) -> Any:
        hidden = self.encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
        mask = batch["attention_mask"].unsqueeze(-1)
        return self.classifier((hidden * mask).sum(1) / mask.sum(1))


def test_a_dictionary_of_what_the_model_takes() -> None:
    model = made(OfBatch).eval()
    split = cut_around(model, "encoder")
    ids, mask, _, _ = next(iter(batches(1)))

    def cross(named: Any, variant: int) -> Tensor:
        return split.run_net_2((model.encoder(**named), mask), variant)

    batch = {"input_ids": ids, "attention_mask": mask}
    torch.testing.assert_close(split.run(cross, (batch,), {}), model(batch))


class ReadsIds(Mean):
    """An embedding of its own, above the cut."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        hidden = self.encoder(input_ids, attention_mask)[0]
        return self.classifier(hidden[:, 0] * (input_ids[:, :1] > 3))


class OwnPooler(Mean):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        hidden = self.encoder(input_ids, attention_mask)[0]
        return self.classifier(self.encoder.pooler(hidden))


class Tied(Mean):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.out = nn.Linear(D, config.vocab_size, bias=False)
        self.out.weight = self.encoder.get_input_embeddings().weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return self.out(self.encoder(input_ids, attention_mask)[0])


class Both(Mean):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        output = self.encoder(input_ids, attention_mask)
        return output.last_hidden_state, self.classifier(output.pooler_output)


class LastLayers(Mean):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        output = self.encoder(input_ids, attention_mask, output_hidden_states=True)
        return self.classifier((output.hidden_states[-2] + output.hidden_states[-1])[:, 0])


class Whatever(Mean):
    def forward(self, **kwargs: Any) -> Any:
        return self.classifier(self.encoder(**kwargs).pooler_output)


class Decides(Mean):
    def forward(self, input_ids: Tensor, attention_mask: Tensor, other: Optional[Tensor] = None) -> Any:
        hidden = self.encoder(input_ids, attention_mask).last_hidden_state
        return self.classifier(hidden[:, 0] if hidden.sum() > 0 else hidden[:, 1])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (ReadsIds, r"'gt' \(gt\) is used above the cut at 'encoder'"),
        (OwnPooler, "the model calls its encoder.pooler by itself"),
        (Tied, r"are one parameter, which halves around a body cannot share: untie them"),
        (Both, "needs several tensors of the cloud"),
        (LastLayers, "the model reads its hidden_states, of which those of the lower blocks stay on the edge"),
        (Whatever, "the forward method of this Whatever takes whatever it is given: name its arguments"),
        (Decides, "cannot be traced by torch.fx"),
    ],
)
def test_what_cannot_be_cut(make: Any, reason: str) -> None:
    model = made(make)
    before = model.state_dict().keys()
    with pytest.raises(CutError, match=reason):
        cut_around(model, "encoder")
    assert model.state_dict().keys() == before


def test_a_layer_inside_a_body() -> None:
    with pytest.raises(CutError, match=r"is in a transformers model, .*: give split_layer"):
        cut(made(Mean), "encoder.encoder.layer.1.output.dense", 4)


def test_a_body_that_is_called_twice() -> None:
    with pytest.raises(CutError, match=r"calls it 2 times; .* call the model for each"):
        cut_around(Around(), "one")
    assert Around()(torch.ones(B, S).long(), torch.ones(B, S).long()).shape == (B, C)
