"""trl's SFTTrainer: what each label scores comes back, and a loss that is made of it trains both halves."""

from __future__ import annotations

import types
from typing import Any, Dict

import pytest
import torch
from support.fused_head import with_fused_head
from support.script import Wire, assert_same_training, batches, sgd, tiny_model, wrap
from torch import Tensor

from sft.errors import ProtocolError, UsageError
from sft.models import has_fused_head
from sft.v1 import split_training_pb2 as pb


def scores(model: Any, batch: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """As the library's logits give them on one machine; as the cut model says."""
    if not hasattr(model, "net"):
        output = model(**batch, fused_lm_head=True)
        return {name: output[name] for name in ("log_probs", "entropy", "is_top1", "label_mask")}
    y = batch["labels"][:, 1:]
    logits = model(**{name: x for name, x in batch.items() if name != "labels"}).logits[:, :-1]
    log_p, mask = logits.log_softmax(-1), y != -100
    return {
        "log_probs": log_p.gather(2, y.clamp(min=0)[..., None])[..., 0] * mask,
        "entropy": -(log_p.exp() * log_p).sum(-1).detach() * mask,
        "is_top1": logits.argmax(-1).eq(y) & mask,
        "label_mask": mask,
    }


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_loss_that_is_made_of_scores(family: str) -> None:
    """One that weighs each token, as trl's `dft` does, so that no mean of losses would do."""

    def script(model: Any, optimizer: Any) -> Any:
        for batch in batches(3, model):
            optimizer.zero_grad()
            said = scores(model, batch)
            per_token = -said["log_probs"] * said["log_probs"].exp().detach()
            (per_token.sum() / said["label_mask"].sum()).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            last = scores(model, batches(1, model)[0])
        return {name: x.float() for name, x in {**said, **last}.items()}

    assert_same_training(script, sgd, with_fused_head(tiny_model(family, "causal-lm")), tolerance=1e-5)


def test_no_row_of_the_vocabulary_crosses() -> None:
    model, wire = with_fused_head(tiny_model("llama", "causal-lm")), Wire()
    (batch,) = batches(1, model)
    tokens = int(batch["attention_mask"].sum())
    with wrap(model, sgd(model), transport=wire):
        output = model(**batch, fused_lm_head=True)
        output.loss.backward()
        model.eval()
        with torch.no_grad():
            torch.testing.assert_close(model(**batch, fused_lm_head=True).loss, output.loss.detach())
        outputs = [m.outputs.logits for m in wire.received if m.HasField("outputs")]
        evaluations = [m.evaluation.logits for m in wire.received if m.HasField("evaluation")]
        assert [list(x.shape) for x in outputs + evaluations] == 2 * [[tokens, 3]]
        assert model(**batch).loss is not None  # asked as ever, it is the library's


def test_padding_on_the_left_and_a_batch_without_labels_to_learn() -> None:
    model = with_fused_head(tiny_model("llama", "causal-lm"))
    (batch,) = batches(1, model)
    width, lengths = batch["input_ids"].shape[1], batch["attention_mask"].sum(1)
    place = (torch.arange(width)[None] + lengths[:, None]) % width
    moved = {name: x.gather(1, place) for name, x in batch.items()}
    first = moved["attention_mask"].cumsum(1) == 1
    with wrap(model, sgd(model)) as optimizer:
        model.eval()
        with torch.no_grad():
            right = model(**batch, fused_lm_head=True)
            left = model(**{**moved, "labels": moved["labels"].masked_fill(first, -100)}, fused_lm_head=True)
            unlabelled = model(**moved, fused_lm_head=True)  # nothing that crosses predicts a first token
            divided = model(**batch, fused_lm_head=True, num_items_in_batch=10)
        torch.testing.assert_close(left.log_probs.sum(1), right.log_probs.sum(1))
        assert unlabelled.label_mask.equal(left.label_mask)
        torch.testing.assert_close(divided.loss * 10, right.loss * right.label_mask.sum())
        assert left.log_probs[~left.label_mask].eq(0).all()
        before = {name: x.clone() for name, x in model.state_dict().items()}
        nothing = {**batch, "labels": torch.full_like(batch["labels"], -100)}
        loss = model(**nothing, fused_lm_head=True).loss
        assert loss.item() == 0
        loss.backward()
        optimizer.step()
        assert all(x.equal(before[name]) for name, x in model.state_dict().items())


def test_what_it_cannot_be_asked() -> None:
    class Older(Wire):
        """A cloud that knows no scores."""

        def stream(self, messages: Any) -> Any:
            def forgetful() -> Any:
                for data in messages:
                    message = pb.EdgeMessage.FromString(data)
                    message.forward.ClearField("scored") if message.HasField("forward") else None
                    yield message.SerializeToString()

            return super().stream(forgetful())

    model = with_fused_head(tiny_model("llama", "causal-lm"))
    (batch,) = batches(1, model)
    with wrap(model, sgd(model), transport=Older()):
        with pytest.raises(UsageError, match="fused_lm_head=True needs labels"):
            model(**{name: x for name, x in batch.items() if name != "labels"}, fused_lm_head=True)
        with pytest.raises(ProtocolError, match="no scores of labels: it is of an older release; upgrade it"):
            model(**batch, fused_lm_head=True)
    plain = tiny_model("llama", "causal-lm")
    with wrap(plain, sgd(plain)), pytest.raises((UsageError, TypeError), match="fused_lm_head"):
        plain(**batch, fused_lm_head=True)


@pytest.mark.parametrize(
    ("asked", "wants"),
    [({"temperature": 0.7}, "a temperature of 0.7"), ({"outputs": ("log_probs", "mean_logits")}, "mean_logits")],
)
def test_another_of_trls_trainers_is_refused(asked: Dict[str, Any], wants: str) -> None:
    model = with_fused_head(tiny_model("llama", "causal-lm"), **asked)
    with pytest.raises(UsageError, match=f"SFTTrainer alone takes a cut model: this one wants {wants}"):
        wrap(model, sgd(model))


def test_another_forward_of_ones_own_is_refused() -> None:
    model = tiny_model("llama", "causal-lm")
    assert has_fused_head(with_fused_head(tiny_model("gpt2", "causal-lm")))
    model.forward = types.MethodType(lambda self, *args, fused_lm_head=False, **kwargs: None, model)
    assert not has_fused_head(model)
    with pytest.raises(UsageError, match="has a forward of its own"):
        wrap(model, sgd(model), server="127.0.0.1:1")
