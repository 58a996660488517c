"""Inputs of every form that the library takes: padding on either side, positions, embeddings in the place of ids."""

from __future__ import annotations

import copy
import inspect
from typing import Any, Dict

import pytest
import torch
from support.script import adamw, assert_same_training, batches, sgd, tiny_model, wrap
from torch import Tensor
from torch.nn.functional import cross_entropy

from sft.errors import UsageError
from sft.models import HEADS

KINDS = [
    ("bert", "token-classification"),
    ("bert", "question-answering"),
    ("electra", "token-classification"),
    ("roberta", "masked-lm"),
    ("distilbert", "question-answering"),
    ("deberta-v2", "token-classification"),
    ("gpt2", "sequence-classification"),
    ("opt", "causal-lm"),
    ("llama", "causal-lm"),
    ("llama", "sequence-classification"),
]

LABELS = ("labels", "start_positions", "end_positions")


def on_the_left(batch: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """The same sequences with their padding on the other side."""
    length, width = batch["attention_mask"].sum(-1), batch["attention_mask"].shape[-1]
    place = (torch.arange(width) - (width - length)[..., None]) % width
    moved = {name: x.gather(-1, place) if x.shape == place.shape else x for name, x in batch.items()}
    for name in ("start_positions", "end_positions"):
        if name in moved:
            moved[name] = moved[name] + width - length
    return moved


def uncut(model: Any) -> Dict[str, Any]:
    """Options with which the cut changes nothing but the last digits."""
    return {"split_rank": 32, "residual": "low-rank", "calibration": batches(8, model, labels=False)}


def logits_of(output: Any) -> Tensor:
    return output.start_logits if hasattr(output, "start_logits") else output.logits


def of_tokens(x: Tensor, batch: Dict[str, Tensor], head: str) -> Tensor:
    return x[batch["attention_mask"].bool()] if HEADS[head].per_token else x


@pytest.mark.one_in(3)
@pytest.mark.parametrize("given", ["ids", "embeddings"])
@pytest.mark.parametrize(("family", "head"), KINDS)
def test_padding_on_the_left(family: str, head: str, given: str) -> None:
    """What the library's own model, in one piece, makes of it."""
    model = tiny_model(family, head)
    if family == "distilbert" and "position_ids" not in inspect.signature(type(model).forward).parameters:
        pytest.skip("in this release it takes no positions, and is refused")
    library = copy.deepcopy(model).eval()
    batch = on_the_left(batches(1, model)[0])
    if head == "causal-lm":  # nothing that crosses predicts a first token
        first = batch["attention_mask"].cumsum(1) == 1
        batch["labels"] = batch["labels"].masked_fill(first, -100)
    if given == "embeddings":
        batch["inputs_embeds"] = library.get_input_embeddings()(batch.pop("input_ids")).detach()
    with torch.no_grad():
        if given == "embeddings" and family in ("gpt2", "llama") and head == "sequence-classification":
            # The library would look for the last token among ids.
            hidden = library.base_model(**{name: x for name, x in batch.items() if name != "labels"})[0]
            expected_logits = library.score(hidden[:, -1])
            expected_loss = cross_entropy(expected_logits, batch["labels"])
        else:
            expected = library(**batch)
            expected_logits, expected_loss = logits_of(expected), expected.loss
    with wrap(model, sgd(model), **uncut(model)):
        model.eval()
        output = model(**batch)
        output.loss.backward()  # it travels
        if output.get("logits") is None and head != "question-answering":  # of a vocabulary
            with torch.no_grad():
                output = model(**batch)
        said = logits_of(output).detach() + 0  # those of a vocabulary come when they are looked at
    if head != "question-answering":  # the library's own loss counts padding
        torch.testing.assert_close(output.loss.detach(), expected_loss, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        of_tokens(said, batch, head), of_tokens(expected_logits, batch, head), rtol=1e-3, atol=2e-3
    )


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    ("family", "head"), [("bert", "question-answering"), ("bert", "token-classification"), ("llama", "causal-lm")]
)
@pytest.mark.parametrize("travels", [True, False])
def test_either_side_trains_the_same(family: str, head: str, travels: bool) -> None:
    ends = []
    for side in (dict, on_the_left):
        model = tiny_model(family, head)
        with wrap(model, sgd(model)) as optimizer:
            for batch in map(side, batches(3, model)):
                mask = batch["attention_mask"]
                batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
                if head == "causal-lm":
                    batch["labels"] = batch["labels"].masked_fill(mask.cumsum(1) == 1, -100)
                optimizer.zero_grad()
                with torch.set_grad_enabled(travels):
                    loss = model(**batch).loss
                if not travels:
                    y = {name: batch.pop(name) for name in list(batch) if name in LABELS}
                    output = model(**batch)
                    again = loss_here(output, y, mask, shift=head == "causal-lm")
                    torch.testing.assert_close(again.detach(), loss)
                    loss = again
                loss.backward()
                optimizer.step()
            ends.append(model.state_dict())
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, rtol=0, atol=1e-6)


def loss_here(output: Any, y: Dict[str, Tensor], mask: Tensor, shift: bool) -> Tensor:
    if "labels" in y:
        logits, labels = (output.logits[:, :-1], y["labels"][:, 1:]) if shift else (output.logits, y["labels"])
        return cross_entropy(logits.flatten(0, 1), labels.flatten())
    return (
        cross_entropy(output.start_logits, y["start_positions"]) + cross_entropy(output.end_logits, y["end_positions"])
    ) / 2


@pytest.mark.parametrize("family", ["bert", "gpt2", "roberta"])
def test_positions_of_ones_own(family: str) -> None:
    model = tiny_model(family)
    library, (batch,) = copy.deepcopy(model).eval(), batches(1, model, labels=False)
    batch["position_ids"] = torch.arange(7).flip(0)[None] + 4
    with torch.no_grad():
        expected = library(**batch).logits
        with wrap(model, sgd(model), **{**uncut(model), "calibration": [batch, *batches(8, model, labels=False)]}):
            torch.testing.assert_close(model.eval()(**batch).logits, expected, rtol=1e-3, atol=2e-3)


def test_rotary_positions_are_the_clouds_too() -> None:
    """They are how far tokens are apart: where they begin does not matter, what they skip does."""
    model = tiny_model("llama")
    (batch,) = batches(1, model, labels=False)
    with wrap(model, adamw(model)), torch.no_grad():
        model.eval()
        said = model(**batch).logits
        assert model(**batch, position_ids=torch.arange(7)[None] + 3).logits.equal(said)
        with pytest.raises(UsageError, match="position_ids must count the tokens of a sequence one by one"):
            model(**batch, position_ids=2 * torch.arange(7)[None])


def test_embeddings_of_ones_own_are_trained() -> None:
    """What made them gets its gradient, as of a soft prompt."""

    def script(model: Any, optimizer: Any) -> Any:
        table = model.net.model.get_input_embeddings() if hasattr(model, "net") else model.get_input_embeddings()
        for batch in batches(3, model):
            optimizer.zero_grad()
            batch["inputs_embeds"] = 2 * table(batch.pop("input_ids"))
            model(**batch).loss.backward()
            optimizer.step()

    assert_same_training(script, sgd, tiny_model("llama", "causal-lm"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"inputs_embeds": torch.zeros(4, 7, 32)}, "input_ids or inputs_embeds, not both"),
        ({"input_ids": None}, "needs input_ids"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(4, 7)}, "needs input_ids"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1, 1, 1, 1]] * 4)}, "ones, with zeros on the right or on the left"),
        ({"attention_mask": torch.zeros(4, 7).long()}, "and a one at least"),
        ({"token_type_ids": torch.zeros(4, 6).long()}, r"token_type_ids must be a tensor of shape \[4, 7\]"),
        ({"position_ids": torch.zeros(7).long()}, r"position_ids must be a tensor of shape \[4, 7\]"),
        ({"attention_mask": torch.ones(4, 6).long()}, r"shape \[4, 6\], the inputs \[4, 7\]"),
    ],
)
def test_bad_inputs(change: Dict[str, Any], says: str) -> None:
    model = tiny_model()
    (batch,) = batches(1, model)
    with wrap(model, sgd(model)):
        with pytest.raises(UsageError, match=says):
            model(**{**batch, **change})
        model(**batch).loss.backward()


@pytest.mark.parametrize("head", ["sequence-classification", "multiple-choice"])
def test_a_head_that_reads_the_first_token_wants_it_first(head: str) -> None:
    """On one machine it would read padding."""
    model = tiny_model("bert", head)
    (batch,) = batches(1, model)
    with wrap(model, sgd(model)):
        with pytest.raises(UsageError, match="reads the first token, which would be padding: pad on the right"):
            model(**on_the_left(batch))
        model(**batch).loss.backward()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_packed_rows_are_refused(family: str) -> None:
    """Without a mask the library keeps documents apart whose positions begin anew; the cloud could not."""
    model = tiny_model(family, "causal-lm")
    (batch,) = batches(1, model)
    del batch["attention_mask"]
    batch["labels"] = batch["input_ids"]
    with wrap(model, sgd(model)):
        model(**batch, position_ids=torch.arange(7)[None]).loss.backward()
        with pytest.raises(UsageError, match="position_ids must count the tokens of a sequence one by one"):
            model(**batch, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]]))
