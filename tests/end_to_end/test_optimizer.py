"""`SFTOptimizer` against a real server: loops, labels that stay, sessions that end, transformers' Trainer."""

from __future__ import annotations

import gc
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.script import EPS, Wire, adamw, batches, one_machine, sgd, tiny_model, wrap
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from sft.errors import ServerFullError, SessionLostError
from sft.models import Cut
from sft.v1 import split_training_pb2 as pb
from sft_cloud.server import CloudServer
from sft_edge.link.grpc_transport import GrpcTransport
from sft_edge.link.link import Link


def loss_of(model: Any, batch: dict[str, torch.Tensor], travels: bool) -> torch.Tensor:
    if travels:
        return model(**batch).loss
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    return nn.functional.cross_entropy(model(**inputs).logits, batch["labels"])


def train(model: Any, optimizer: Any, travels: bool = True, steps: int = 3) -> None:
    for batch in batches(steps, model):
        optimizer.zero_grad()
        loss_of(model, batch, travels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()


def assert_same(got: dict[str, torch.Tensor], expected: Any, tolerance: float = 1e-6) -> None:
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(got[name], parameter.detach(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("travels", [True, False], ids=["labels-travel", "labels-stay"])
def test_a_loop(cloud: str, travels: bool) -> None:
    model = tiny_model()
    reference = one_machine(model, Cut("sft", 2, 4))
    train(reference, sgd(reference), travels)
    with wrap(model, sgd(model), server=cloud) as optimizer:
        train(model, optimizer, travels)
        assert_same(model.state_dict(), reference)


@pytest.mark.parametrize("wire_dtype", ["bfloat16", "float16"])
def test_half_the_bytes(cloud: str, wire_dtype: str) -> None:
    model = tiny_model()
    reference = one_machine(model, Cut("sft", 2, 4))
    train(reference, sgd(reference), False)
    with wrap(model, sgd(model), server=cloud, wire_dtype=wire_dtype) as optimizer:
        train(model, optimizer, False)
        assert_same(model.state_dict(), reference, tolerance=5e-3)


def test_codecs(cloud: str) -> None:
    model = tiny_model()
    reference = one_machine(model, Cut("sft", 2, 4))
    train(reference, sgd(reference), False)
    wire = Wire(GrpcTransport(cloud))
    with wrap(model, sgd(model), transport=wire, codec="int4", gradient_codec="int8") as optimizer:
        train(model, optimizer, False)
        assert_same(model.state_dict(), reference, tolerance=2e-2)
    up = {message.forward.activation.packed.data_type for message in wire.sent if message.HasField("forward")}
    down = {message.result.packed_gradient.data_type for message in wire.received if message.HasField("result")}
    assert (up, down) == ({pb.DATA_TYPE_INT4}, {pb.DATA_TYPE_INT8})


def test_labels_that_stay_are_in_no_message(cloud: str) -> None:
    model, wire = tiny_model(num_labels=1), Wire(GrpcTransport(cloud))
    label = -7351.28125  # exactly a float32, and like no number that training comes by
    sent: list[bytes] = []
    stream = wire.stream

    def listen(messages: Iterator[bytes]) -> Any:
        return stream(sent.append(data) or data for data in messages)

    wire.stream = listen
    with wrap(model, adamw(model), transport=wire) as optimizer:
        for batch in batches(3, model, labels=False):
            y = torch.full((4,), label)
            optimizer.zero_grad()
            mse_loss(model(**batch).logits.squeeze(-1), y).backward()
            optimizer.step()
            with torch.no_grad():
                assert model(**batch, labels=y).loss > 1e6  # validation: the loss is computed here
        encodings = [struct.pack("<f", label), struct.pack("<d", label), repr(label).encode(), str(int(label)).encode()]
        assert len(sent) > 9
        assert not any(code in data for code in encodings for data in sent)
        sent.clear()
        model(**batch, labels=y)
        assert any(encodings[0] in data for data in sent), "the search would not find a label that travels"


def test_a_server_that_ends_in_the_middle(start_cloud: Callable[..., CloudServer]) -> None:
    server, model = start_cloud(), tiny_model()
    with wrap(model, adamw(model), server=server.address, reconnect_timeout_seconds=0) as optimizer:
        train(model, optimizer)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        loss = loss_of(model, batches(1, model)[0], travels=False)
        server.stop(grace_seconds=0)
        with pytest.raises(SessionLostError):
            loss.backward()
        with pytest.raises(SessionLostError):
            train(model, optimizer)
        with pytest.raises(SessionLostError):
            optimizer.step()
        assert optimizer.step_was_skipped
        assert all(parameter.equal(before[name]) for name, parameter in model.named_parameters())


def download_until_it_ends(link: Link) -> None:
    while True:
        list(link.weights())


def test_a_place_is_freed_by_closing_and_by_forgetting(start_cloud: Callable[..., CloudServer]) -> None:
    server = start_cloud(max_sessions=1)
    model = tiny_model()
    with wrap(model, adamw(model), server=server.address) as optimizer:
        train(model, optimizer)
        other = tiny_model()
        with pytest.raises(ServerFullError):
            wrap(other, adamw(other), server=server.address)
    optimizer = wrap(other, adamw(other), server=server.address)
    train(other, optimizer)
    link = optimizer._role._cross.link
    del optimizer, other
    gc.collect()
    with pytest.raises(SessionLostError):
        download_until_it_ends(link)
    model = tiny_model()
    wrap(model, adamw(model), server=server.address).close()


class Rows(IterableDataset):
    """Rows in order."""

    def __init__(self, model: Any, batch_count: int) -> None:
        self.rows = [
            {name: x[index] for name, x in batch.items()} for batch in batches(batch_count, model) for index in range(4)
        ]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return iter(self.rows)


def run_trainer(
    directory: Path, server: str, steps: int, resume: bool = False, model: Any = None, **options: Any
) -> tuple[Trainer, dict[str, torch.Tensor]]:
    """Transformers' own loop, with accumulation, clipping, its schedule, evaluation and checkpoints."""
    pytest.importorskip("accelerate")
    model = tiny_model() if model is None else model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=EPS)
    with wrap(model, optimizer, server=server) as split:
        arguments = TrainingArguments(
            output_dir=str(directory),
            max_steps=4,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_grad_norm=0.5,
            eval_strategy="steps",
            eval_steps=2,
            save_steps=2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            **options,
        )
        rows = Rows(tiny_model(), 8)
        trainer = Trainer(
            model,
            arguments,
            train_dataset=rows,
            eval_dataset=rows.rows[:8],
            optimizers=(split, None),
        )
        stop_after(trainer, steps)
        trainer.train(resume_from_checkpoint=resume or None)
        return trainer, model.state_dict()


def stop_after(trainer: Trainer, steps: int) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop |= state.global_step >= steps

    trainer.add_callback(Stop())


def test_transformers_trainer(cloud: str, tmp_path: Path) -> None:
    reference = one_machine(tiny_model(), Cut("sft", 2, 4))
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2, eps=EPS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (4 - step) / 4)
    losses = []
    for index, batch in enumerate(batches(8, reference)):
        loss = reference(**batch).loss / 2
        loss.backward()
        losses.append(loss.item())
        if index % 2:
            nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    trainer, weights = run_trainer(tmp_path, cloud, steps=4)
    assert_same(weights, reference)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx([a + b for a, b in zip(losses[::2], losses[1::2], strict=True)], abs=1e-4)
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluated) == 2


def test_a_trainer_makes_its_own_optimizer(cloud: str, tmp_path: Path) -> None:
    """The wrap after `Trainer(...)`: what it is told of the model is then what the whole model said of itself."""
    pytest.importorskip("accelerate")
    model = tiny_model()
    reference = one_machine(tiny_model(), Cut("sft", 2, 4))
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        adam_epsilon=EPS,
        lr_scheduler_type="constant",
        max_grad_norm=0.5,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=Rows(model, 8))
    trainer.create_optimizer()
    with wrap(model, trainer.optimizer, server=cloud) as split:
        trainer.optimizer = split
        trainer.train()
        weights = model.state_dict()
    # Newer releases leave the division to a model that takes a number of items, and the classification does not divide.
    shares = 1 if getattr(trainer, "model_accepts_loss_kwargs", False) else 2
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2, eps=EPS, weight_decay=0.0)
    for index, batch in enumerate(batches(8, reference)):
        (reference(**batch).loss / shares).backward()
        if index % 2:
            nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    assert_same(weights, reference)


def test_a_trainers_checkpoint_is_gone_on_from(cloud: str, tmp_path: Path) -> None:
    _, expected = run_trainer(tmp_path / "whole", cloud, steps=4)
    run_trainer(tmp_path / "parts", cloud, steps=2)
    assert (tmp_path / "parts" / "checkpoint-2" / "optimizer.pt").is_file()
    _, got = run_trainer(tmp_path / "parts", cloud, steps=4, resume=True)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft itself asks
def test_a_trainers_checkpoint_of_a_model_with_adapters(cloud: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> Any:
        torch.manual_seed(1)
        return peft.get_peft_model(tiny_model(), peft.LoraConfig(task_type="SEQ_CLS", r=4))

    _, expected = run_trainer(tmp_path / "whole", cloud, steps=4, model=adapted())
    run_trainer(tmp_path / "parts", cloud, steps=2, model=adapted())
    _, got = run_trainer(tmp_path / "parts", cloud, steps=4, resume=True, model=adapted())
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-6)
    # The best one back: by a measure of which the first is.
    best = {"load_best_model_at_end": True, "metric_for_best_model": "runtime", "greater_is_better": True}
    trainer, back = run_trainer(tmp_path / "best", cloud, steps=4, model=adapted(), **best)
    saved = load_file(Path(trainer.state.best_model_checkpoint) / "adapter_model.safetensors")
    assert saved
    assert all(back[name].equal(tensor) for name, tensor in saved.items())


def test_a_trainer_takes_its_best_model_back(cloud: str, tmp_path: Path) -> None:
    trainer, weights = run_trainer(tmp_path, cloud, steps=4, load_best_model_at_end=True, metric_for_best_model="loss")
    best = load_file(Path(trainer.state.best_model_checkpoint) / "model.safetensors")
    assert [name for name in best if name not in weights] == [
        "bert.encoder.layer.1.output.dense.weight"
    ]  # in W's place
    assert all(best[name].equal(tensor) for name, tensor in weights.items())
