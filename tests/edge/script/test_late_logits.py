"""A language model's evaluation: the loss and the best tokens come back, and logits where somebody looks at them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
import torch
from support.script import Wire, batches, sgd, tiny_model, wrap
from torch import Tensor

from sft.errors import ProtocolError, UsageError
from sft.v1 import split_training_pb2 as pb
from sft_edge.systems import crossing


def evaluated(model: Any, batch: Dict[str, Tensor]) -> Any:
    with torch.no_grad():
        return model.eval()(**batch)


def session(family: str = "gpt2", trains: bool = True) -> Tuple[Any, Any, Wire, List[Dict[str, Tensor]]]:
    model, wire = tiny_model(family, "causal-lm"), Wire()
    two = batches(2, model)
    optimizer = wrap(model, sgd(model), transport=wire)
    if trains:
        model(**two[0]).loss.backward()
        optimizer.step()
    return model, optimizer, wire, two


def answers(wire: Wire) -> List[pb.Evaluation]:
    return [message.evaluation for message in wire.received if message.HasField("evaluation")]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_loss_and_best_tokens_are_those_of_the_logits(family: str) -> None:
    model, optimizer, wire, (_, batch) = session(family)
    with optimizer:
        late = evaluated(model, batch)
        assert [len(answer.logits.data) for answer in answers(wire)] == [0]
        best, shape = late.logits.argmax(dim=-1), late.logits.shape
        assert len(answers(wire)) == 1
        unlabelled = evaluated(model, {name: x for name, x in batch.items() if name != "labels"})
        assert shape == unlabelled.logits.shape
        assert best.equal(unlabelled.logits.argmax(-1))
        assert not best.eq(best.flatten()[0]).all()
        learned = batch["labels"][:, 1:]
        loss = torch.nn.functional.cross_entropy(unlabelled.logits[:, :-1].flatten(0, 1), learned.flatten())
        torch.testing.assert_close(late.loss, loss)
        assert type(late.logits + 0) is Tensor
        assert (late.logits + 0).equal(unlabelled.logits)


LOOKS: Dict[str, Any] = {
    "an element": lambda x: x[0, 1, 2].item(),
    "softmax": lambda x: torch.softmax(x, -1),
    "topk": lambda x: x.topk(2, dim=-1).indices,
    "argmax of another dimension": lambda x: x.argmax(1),
    "argmax that keeps the dimension": lambda x: x.argmax(-1, keepdim=True),
    "argmax of all": lambda x: x.argmax(),
    "numpy": lambda x: torch.from_numpy(x.numpy()),
    "cpu": lambda x: x.cpu().numpy().sum().item(),
    "a list": lambda x: x.tolist(),
    "as an argument": lambda x: torch.zeros(()) + x,
    "in a list": lambda x: torch.cat([x, x]),
    "written into": lambda x: x.clone().masked_fill_(x > 0, 0.0),
    "float": lambda x: x.float(),
    "half": lambda x: x.to(torch.float16),
    "argmax by another name of the dimension": lambda x: x.argmax(axis=0),
    "argmax into a tensor": lambda x: torch.argmax(x, dim=-1, out=torch.empty(0, dtype=torch.int64)),
    "printed": lambda x: str(x.detach() * 1),
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("look", LOOKS)
def test_whoever_looks_sees_what_there_would_be(look: str) -> None:
    model, optimizer, wire, (_, batch) = session()
    with optimizer:
        late = evaluated(model, batch).logits
        assert len(answers(wire)) == 1
        got = LOOKS[look](late)
        assert len(answers(wire)) == 2, "they were fetched"
        expected = LOOKS[look](evaluated(model, {n: x for n, x in batch.items() if n != "labels"}).logits)
        assert got.equal(expected) if isinstance(got, Tensor) else got == expected
        late.sum()
        assert len(answers(wire)) == 3, "once"


def test_what_looks_at_no_value_fetches_nothing() -> None:
    model, optimizer, wire, (_, batch) = session()
    with optimizer:
        late = evaluated(model, batch).logits
        detached = late.detach()
        assert (detached.shape, detached.dtype, len(late), late.dim()) == (late.shape, torch.float32, 4, 3)
        assert (late.is_nested, late.requires_grad, late.device.type) == (False, False, "cpu")
        assert repr(late) == f"LateLogits(shape={tuple(late.shape)})"
        assert detached.argmax(2).equal(torch.argmax(late, dim=-1))
        assert late.argmax(axis=-1).equal(detached.argmax(-1))
        assert (late.grad, late.nbytes, late.is_complex()) == (None, 4 * late.numel(), False)
        assert isinstance(late, Tensor)
        assert len(answers(wire)) == 1


def test_what_is_written_into_them_counts() -> None:
    model, optimizer, _, (_, batch) = session()
    with optimizer:
        late = evaluated(model, batch).logits
        banned = late.argmax(-1)[0, 0]
        late[..., banned] = float("-inf")
        assert not late.argmax(-1).eq(banned).any()


def test_only_a_language_models_labels_travel_for_an_evaluation() -> None:
    model, wire = tiny_model(), Wire()
    first, second = batches(2, model)
    with wrap(model, sgd(model), transport=wire) as optimizer:
        model(**first).loss.backward()
        optimizer.step()
        assert evaluated(model, second).loss is not None
    assert [message.evaluate.HasField("labels") for message in wire.sent if message.HasField("evaluate")] == [False]


@pytest.mark.parametrize("trains", [True, False])
def test_logits_that_are_too_large_for_a_message(trains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are refused here, and the session goes on; loss and best tokens need none."""
    model, optimizer, _, (one, batch) = session(trains=trains)
    with optimizer:
        monkeypatch.setattr(crossing, "MAX_MESSAGE_BYTES", 1000 + crossing._BESIDE_BYTES)
        if trains:
            late = evaluated(model, batch).logits
            late.argmax(-1)
            with pytest.raises(UsageError, match="output"):
                late.sum()
        else:
            with pytest.raises(UsageError, match="output"):
                evaluated(model, batch)
        monkeypatch.undo()
        model.train()(**one).loss.backward()
        optimizer.step()


def test_logits_are_of_the_precision_of_the_evaluation() -> None:
    model, optimizer, _, (_, batch) = session()
    with optimizer:
        unlabelled = {name: x for name, x in batch.items() if name != "labels"}
        with torch.autocast("cpu", torch.bfloat16):
            late, expected = evaluated(model, batch).logits, evaluated(model, unlabelled).logits
        assert (late + 0).equal(expected)
        assert not expected.equal(evaluated(model, unlabelled).logits)


def test_logits_of_an_evaluation_before_weights_were_loaded() -> None:
    model, optimizer, _, (_, batch) = session()
    with optimizer:
        late = evaluated(model, batch).logits
        model.load_state_dict(model.state_dict())
        with pytest.raises(UsageError, match="look at them before it"):
            late.sum()


def test_labels_that_never_travelled_do_not_travel_for_an_evaluation() -> None:
    model, optimizer, wire, (_, batch) = session(trains=False)
    with optimizer:
        output = evaluated(model, batch)
        assert type(output.logits) is Tensor
        assert not any(message.evaluate.HasField("labels") for message in wire.sent)
        assert len(answers(wire)[0].logits.data) > 0


def test_a_cloud_that_knows_nothing_of_it_sends_logits() -> None:
    """An older one passes over the field."""
    model, optimizer, _, (_, batch) = session()
    with optimizer:
        new = evaluated(model, batch)
    model, wire = tiny_model("gpt2", "causal-lm"), Older()
    two = batches(2, model)
    with wrap(model, sgd(model), transport=wire) as optimizer:
        model(**two[0]).loss.backward()
        optimizer.step()
        old = evaluated(model, two[1])
    assert wire.passed_over == 1
    assert type(old.logits) is Tensor
    torch.testing.assert_close(old.loss, new.loss)


class Older(Wire):
    passed_over = 0

    def stream(self, messages: Any) -> Any:
        def without() -> Any:
            for data in messages:
                message = pb.EdgeMessage.FromString(data)
                self.passed_over += message.evaluate.HasField("labels")
                if message.HasField("evaluate"):
                    message.evaluate.ClearField("labels")
                yield message.SerializeToString()

        return super().stream(without())


def test_logits_of_an_evaluation_before_a_step() -> None:
    model, optimizer, _, (one, batch) = session()
    with optimizer:
        late = evaluated(model, batch).logits
        optimizer.zero_grad()
        model.train()(**one).loss.backward()
        optimizer.step()
        with pytest.raises(UsageError, match="asked for after a step: look at them before it"):
            late.sum()
        assert late.argmax(-1).shape == batch["input_ids"].shape


@pytest.mark.parametrize("best", [[], [1] * 20, [100_000] * 21])
def test_best_tokens_that_make_no_sense(best: List[int], monkeypatch: pytest.MonkeyPatch) -> None:
    from sft_edge.link.link import Link

    real = Link.evaluate

    def lying(*args: Any, **kwargs: Any) -> Any:
        reply = real(*args, **kwargs)
        message = reply.result().message
        del message.evaluation.best_tokens[:]
        message.evaluation.best_tokens.extend(best)
        return reply

    model, optimizer, _, (_, batch) = session()
    monkeypatch.setattr(Link, "evaluate", lying)
    with optimizer, pytest.raises(ProtocolError, match=rf"sent {len(best)} best tokens of 21, or one that is none"):
        evaluated(model, batch)


def test_eight_sequences_of_128_tokens() -> None:
    """At most a hundredth of what the logits take."""
    model, wire = tiny_model("gpt2", "causal-lm", vocab_size=3000, n_positions=128, max_position_embeddings=128), Wire()
    ids = torch.randint(0, 3000, (8, 128), generator=torch.Generator().manual_seed(0))
    with wrap(model, sgd(model), transport=wire) as optimizer:
        model(input_ids=ids[:1, :8], labels=ids[:1, :8]).loss.backward()
        optimizer.step()
        evaluated(model, {"input_ids": ids, "labels": ids}).logits.argmax(-1)
    (answer,) = answers(wire)
    assert answer.ByteSize() < 4 * 8 * 128 * 3000 / 100


def test_a_trainers_metrics_see_the_best_tokens(tmp_path: Path) -> None:
    """As transformers' run_clm.py has it: an accuracy of argmax."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model, optimizer, wire, two = session()
    rows = [{name: x[index] for name, x in batch.items()} for batch in two for index in range(4)]
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True)

    def accuracy(prediction: Any) -> Dict[str, float]:
        places = prediction.label_ids[:, 1:] != -100
        return {"accuracy": float((prediction.predictions[:, :-1] == prediction.label_ids[:, 1:])[places].mean())}

    with optimizer:
        trainer = Trainer(
            model,
            arguments,
            eval_dataset=rows,
            compute_metrics=accuracy,
            preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(dim=-1),
        )
        late = trainer.evaluate()
        assert [len(answer.logits.data) for answer in answers(wire)] == [0]
        trainer.preprocess_logits_for_metrics = lambda logits, labels: logits.float().argmax(dim=-1)
        whole = trainer.evaluate()
    assert late["eval_accuracy"] == whole["eval_accuracy"]
    assert late["eval_loss"] == pytest.approx(whole["eval_loss"])
