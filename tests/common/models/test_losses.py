"""The losses of the heads: those of the library's own models, over tokens only."""

from __future__ import annotations

from typing import Dict, Optional

import pytest
import torch
from support.tiny import tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForQuestionAnswering, AutoModelForSequenceClassification

from sft.batch import attention_mask
from sft.models.losses import head_loss

IDS_BS = torch.randint(5, 40, (3, 7), generator=torch.Generator().manual_seed(1))
FULL = [7, 7, 7]
KINDS = {
    "single_label_classification": (3, torch.tensor([0, 2, 1])),
    "multi_label_classification": (3, torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0]])),
    "regression": (1, torch.tensor([0.5, 4.25, 5.0])),
}


def model_of(auto_class: type, name: str = "bert", **overrides: object) -> torch.nn.Module:
    torch.manual_seed(0)
    model = auto_class.from_config(tiny_config(name, layers=1, initializer_range=0.3, **overrides))  # type: ignore[attr-defined]
    return model.eval()  # type: ignore[no-any-return]


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_classification(kind: str, told: bool) -> None:
    """The same bits, whether the problem's type is told or seen from the labels."""
    num_labels, y = KINDS[kind]
    model = model_of(AutoModelForSequenceClassification, num_labels=num_labels)
    output = model(IDS_BS, labels=y)
    problem_type: Optional[str] = kind if told else None
    loss = head_loss("sequence-classification", problem_type, output.logits, {"labels": y}, FULL)
    assert torch.equal(loss, output.loss)


def test_regression_of_several_targets() -> None:
    y_BC = torch.tensor([[0.5, 1.0], [2.0, 0.0], [1.5, 3.0]])
    model = model_of(AutoModelForSequenceClassification, num_labels=2, problem_type="regression")
    output = model(IDS_BS, labels=y_BC)
    assert torch.equal(
        head_loss("sequence-classification", "regression", output.logits, {"labels": y_BC}, FULL), output.loss
    )


def test_question_answering() -> None:
    y = {"start_positions": torch.tensor([1, 0, 6]), "end_positions": torch.tensor([3, 0, 6])}
    output = model_of(AutoModelForQuestionAnswering)(IDS_BS, **y)
    logits_BS2 = torch.stack([output.start_logits, output.end_logits], dim=-1)
    assert torch.equal(head_loss("question-answering", None, logits_BS2, y, FULL), output.loss)


def test_no_answer_is_in_padding() -> None:
    """Logits of padding, whatever they are, leave the loss alone."""
    y = {"start_positions": torch.tensor([1, 0, 4]), "end_positions": torch.tensor([3, 0, 4])}
    logits_BS2 = torch.randn(3, 7, 2, generator=torch.Generator().manual_seed(0))
    other = logits_BS2.clone()
    other[2, 5:] = 100.0
    lengths = [7, 7, 5]
    assert torch.equal(*(head_loss("question-answering", None, one, y, lengths) for one in (logits_BS2, other)))
    alone = head_loss("question-answering", None, other[2:, :5], {name: v[2:] for name, v in y.items()}, [5])
    first = head_loss("question-answering", None, other[:2], {name: v[:2] for name, v in y.items()}, [7, 7])
    both = head_loss("question-answering", None, other, y, lengths)
    torch.testing.assert_close(both, (alone + 2 * first) / 3)


@pytest.mark.parametrize("lengths", [[7, 7, 7], [7, 3, 5], [1, 2, 7]])
def test_a_language_model(lengths: list) -> None:  # type: ignore[type-arg]
    """The library is told with -100 what padding is; here the lengths say it."""
    y_BS = IDS_BS.clone()
    y_BS[0, 4] = -100
    mask_BS = attention_mask(lengths, 7)
    model = model_of(AutoModelForCausalLM, "gpt2")
    output = model(IDS_BS, attention_mask=mask_BS, labels=y_BS.masked_fill(mask_BS == 0, -100))
    loss = head_loss("causal-lm", None, output.logits, {"labels": y_BS}, lengths)
    torch.testing.assert_close(loss, output.loss, atol=1e-6, rtol=1e-6)


def test_the_first_token_is_predicted_by_none() -> None:
    logits_BSV = torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(0))
    losses = [
        head_loss("causal-lm", None, logits_BSV, {"labels": torch.tensor([[first, 2, 3]])}, [3]) for first in (0, 4)
    ]
    assert torch.equal(*losses)
    expected = torch.nn.functional.cross_entropy(logits_BSV[0, :2], torch.tensor([2, 3]))
    torch.testing.assert_close(losses[0], expected)


def test_nothing_to_predict_is_not_a_number() -> None:
    assert head_loss("causal-lm", None, torch.zeros(1, 1, 5), {"labels": torch.tensor([[1]])}, [1]).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_give_a_float32_loss(dtype: torch.dtype) -> None:
    logits_BC, y = torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).to(dtype), torch.tensor([0, 2, 1])
    labels: Dict[str, Tensor] = {"labels": y}
    loss = head_loss("sequence-classification", None, logits_BC, labels, FULL)
    assert torch.equal(loss, torch.nn.functional.cross_entropy(logits_BC.float(), y))


@pytest.mark.parametrize("head", ["sequence-classification", "question-answering", "causal-lm"])
def test_labels_of_another_head(head: str) -> None:
    with pytest.raises(KeyError):
        head_loss(head, None, torch.zeros(3, 7, 2), {"else": torch.zeros(3)}, FULL)
