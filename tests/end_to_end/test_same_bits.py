"""What must not change a run does not change a bit of it, dropout on; what must, does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.jobs import Job, read_json, run_options, same_bits, squad, sst2, weights_of
from support.tiny import make_tiny_model

from sft_edge.cli import main
from sft_edge.model_files.source import open_source
from sft_edge.options.train import ModelOptions
from sft_edge.systems.open import open_system
from sft_edge.systems.split import SplitSystem
from sft_edge.tasks import make_task

STEPS = {"max_steps": 6, "logging_steps": 1}


def losses(output_dir: Path) -> list[float]:
    return [entry["loss"] for entry in read_json(output_dir / "trainer_state.json")["log_history"] if "loss" in entry]


@pytest.mark.first_only
@pytest.mark.parametrize("mode", ["sft", "sl", "local"])
def test_the_seed_decides(job: Job, model: Path, train: Callable[..., Path], mode: str) -> None:
    one, same, other = (train(job, model=model, mode=mode, seed=seed, **STEPS) for seed in (1, 1, 2))
    assert same_bits(weights_of(one), weights_of(same))
    assert losses(one) == losses(same)
    assert not same_bits(weights_of(one), weights_of(other))
    assert not set(losses(one)) & set(losses(other))


@pytest.mark.first_only
@pytest.mark.parametrize("mode", ["sft", "sl", "local"])
def test_evaluation_does_not_disturb_training(job: Job, model: Path, train: Callable[..., Path], mode: str) -> None:
    undisturbed = train(job, model=model, mode=mode, **STEPS)
    for options in ({"eval_strategy": "steps", "eval_steps": 1}, {"eval_strategy": "epoch"}):
        disturbed = train(job, model=model, mode=mode, **options, **STEPS)
        evaluations = [e for e in read_json(disturbed / "trainer_state.json")["log_history"] if "eval_loss" in e]
        assert len(evaluations) > 1
        assert same_bits(weights_of(undisturbed), weights_of(disturbed))
        assert losses(undisturbed) == losses(disturbed)


# Later Pythons warn of any fork beside threads; what the workers do touches none of what threads hold.
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.first_only
@pytest.mark.parametrize("mode", ["sft", "local"])
def test_workers_change_nothing(job: Job, model: Path, train: Callable[..., Path], mode: str) -> None:
    """Into the second epoch, when the link's threads run while workers are forked."""
    alone = train(job, model=model, mode=mode, **STEPS)
    helped = train(job, model=model, mode=mode, dataloader_num_workers=2, **STEPS)
    assert same_bits(weights_of(alone), weights_of(helped))
    assert losses(alone) == losses(helped)


def test_rows_come_in_another_order_every_epoch(tmp_path: Path, train: Callable[..., Path]) -> None:
    """Without learning and dropout, what a step's loss is depends on its row alone."""
    model = make_tiny_model(tmp_path / "still", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    job = sst2(tmp_path, train_rows=8)
    each = {"per_device_train_batch_size": 1, "num_train_epochs": 2, "logging_steps": 1}
    seen = losses(train(job, model=model, learning_rate=0, **each))
    assert seen[:8] != seen[8:]
    assert sorted(seen[:8]) == sorted(seen[8:])


@pytest.mark.first_only
@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_a_configuration_file_is_as_good_as_flags(
    job: Job, model: Path, train: Callable[..., Path], cloud: str, tmp_path: Path, suffix: str
) -> None:
    options = {
        "learning_rate": 5e-4,
        "weight_decay": 0.1,
        "optim_args": "amsgrad=true",
        "lr_scheduler_type": "polynomial",
        "lr_scheduler_kwargs": {"power": 2.0},
        "gradient_accumulation_steps": 2,
        "eval_strategy": "no",
        "split_rank": 3,
    }
    by_flags = train(
        job, model=model, **{**options, "lr_scheduler_kwargs": json.dumps(options["lr_scheduler_kwargs"])}, **STEPS
    )
    content = {**options, **STEPS, "task": job.task, "data_dir": str(job.data_dir), "model": str(model)}
    content.update(split_layer=2, max_seq_length=64, per_device_train_batch_size=8, per_device_eval_batch_size=8)
    content.update(seed=999, device="cpu", server=cloud, output_dir=str(tmp_path / "by-file"))
    file = tmp_path / f"run{suffix}"
    if suffix == ".json":
        file.write_text(json.dumps(content))
    else:
        file.write_text("".join(f"{name.replace('_', '-')}: {json.dumps(value)}\n" for name, value in content.items()))
    assert main(["train", "--config", str(file), "--seed", "7"]) == 0  # a flag wins over the file
    assert same_bits(weights_of(by_flags), weights_of(tmp_path / "by-file"))
    assert losses(by_flags) == losses(tmp_path / "by-file")


# Bytes.


@pytest.mark.first_only
@pytest.mark.parametrize("rank", [1, 4, 32])
def test_payload_is_n_over_r_of_plain_split_learning(
    job: Job, model: Path, train: Callable[..., Path], rank: int
) -> None:
    """The same batches, packed alike: 32 numbers a token over `rank` numbers, exactly, each way."""
    options = {"max_steps": 5, "gradient_accumulation_steps": 2, "codec": "float32"}
    plain = read_json(train(job, model=model, mode="sl", **options) / "all_results.json")
    ours = read_json(train(job, model=model, mode="sft", split_rank=rank, **options) / "all_results.json")
    for way in ("sent", "received"):
        name = f"wire_payload_bytes_{way}"
        assert rank * plain[name] == 32 * ours[name]
        assert ours[name] < ours[f"wire_bytes_{way}"] < ours[name] + 5 * 1000
    assert rank * ours["wire_reduction"] == pytest.approx(32 * plain["wire_reduction"])


@pytest.mark.first_only
@pytest.mark.parametrize("write", [sst2, squad])
def test_wire_reduction_is_padded_float32_over_payload(
    tmp_path: Path, model: Path, train: Callable[..., Path], write: Callable[..., Job]
) -> None:
    job = write(tmp_path, train_rows=10)
    output_dir = train(job, model=model, per_device_train_batch_size=4, num_train_epochs=1, codec="float32")
    results = read_json(output_dir / "all_results.json")
    task = make_task(job.task, job.data_dir)
    source = open_source(ModelOptions(model=str(model)), task.config_overrides())
    features = task.encode(task.read("train"), source.tokenizer, 64)
    tokens = sum(feature.length for feature in features)
    assert results["wire_payload_bytes_sent"] == results["wire_payload_bytes_received"] == tokens * 4 * 4
    # What the rows are padded to depends on the batches they fall into; some padding there is, but not more than this.
    longest = max(feature.length for feature in features)
    assert 32 / 4 < results["wire_reduction"] <= 32 / 4 * len(features) * longest / tokens
    all_in_one = train(job, model=model, per_device_train_batch_size=10, num_train_epochs=1)
    results = read_json(all_in_one / "all_results.json")
    # In int8, rows of rank 4 have five bytes instead of 16.
    assert results["wire_reduction"] == pytest.approx(16 / 5 * 32 / 4 * len(features) * longest / tokens)


# Others on the same cloud.


def test_edges_that_take_turns_end_with_the_bits_of_their_solo_runs(job: Job, model: Path, cloud: str) -> None:
    """Two sessions on one device, their steps interleaved, and an evaluation amid a step of the other."""
    task = make_task(job.task, job.data_dir)
    source = open_source(ModelOptions(model=str(model)), task.config_overrides())
    features = task.encode(task.read("train"), source.tokenizer, 64)

    def opened(seed: int) -> SplitSystem:
        system = open_system(
            source,
            task.head,
            run_options(model=str(model), split_rank=4, seed=seed, learning_rate=1e-3, server=cloud),
        )
        return system

    def step(system: SplitSystem, index: int) -> float:
        rows = features[4 * index : 4 * index + 4]
        loss = system.forward_backward(task.collate(rows[:2]), index, 0, 0.5)
        if between := others.get((id(system), index)):
            between()
        loss += system.forward_backward(task.collate(rows[2:]), index, 1, 0.5)
        system.update(index, 1.0)
        return loss

    others: dict[tuple[int, int], Callable[[], object]] = {}
    expected = {}
    for seed in (1, 2):
        with opened(seed) as system:
            solo = [step(system, index) for index in range(4)]
            expected[seed] = (solo, [b"".join(shard.chunks) for shard in system.shards()])
    with opened(1) as one, opened(2) as other:
        others[id(one), 2] = lambda: list(other.logits([task.collate(features[:5])], 2))
        turns: dict[int, list[float]] = {1: [], 2: []}
        for index in range(4):
            turns[1].append(step(one, index))
            turns[2].append(step(other, index))
        for seed, system in ((1, one), (2, other)):
            assert turns[seed] == expected[seed][0]
            assert [b"".join(shard.chunks) for shard in system.shards()] == expected[seed][1]
