"""`sft-edge train` from data files to a directory that works without a cloud, for every kind of task and system."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.jobs import JOBS, Job, flags, read_json, same_bits, sst2, weights_of
from support.tiny import make_tiny_model
from torch import Tensor
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification

from sft_edge.cli import main
from sft_edge.commands.train import train as train_module
from sft_edge.model_files.saved import load_model, task_of
from sft_edge.systems.local import LocalSystem
from sft_edge.systems.split import SplitSystem
from sft_edge.tasks.base import batches_of

MODES = ("sft", "sl", "local")
KEYS = {
    "mode",
    "split_layer",
    "split_rank",
    "train_steps",
    "train_loss",
    "train_runtime",
    "train_samples_per_second",
    "wire_payload_bytes_sent",
    "wire_payload_bytes_received",
    "wire_bytes_sent",
    "wire_bytes_received",
    "wire_reduction",
    "edge_peak_memory_bytes",
}
METRICS = {
    "sst2": {"eval_accuracy"},
    "stsb": {"eval_pearson", "eval_spearmanr"},
    "text": {"eval_f1", "eval_accuracy"},
    "squad": {"eval_exact_match", "eval_f1"},
}
SPEED = ("eval_runtime", "eval_samples_per_second")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    return {name: write(tmp_path_factory.mktemp(name)) for name, write in JOBS.items()}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The logits of the last evaluation of any run: one tensor a batch."""
    heard: list[Tensor] = []
    for system in (SplitSystem, LocalSystem):

        def listening(self, batches, step, logits=system.logits):
            heard.clear()
            for batch in logits(self, batches, step):
                heard.append(batch)
                yield batch

        monkeypatch.setattr(system, "logits", listening)
    return heard


@pytest.mark.one_in(5)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("task", JOBS)
def test_what_a_run_leaves_works_without_a_cloud(
    jobs: dict[str, Job],
    model: Path,
    train: Callable[..., Path],
    asked: list[Tensor],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    task: str,
    mode: str,
) -> None:
    job = jobs[task]
    cut = {"wire_dtype": "float32"} if mode != "local" else {"split_layer": None, "split_rank": None}
    output_dir = train(job, model=model, mode=mode, max_steps=4, logging_steps=2, **cut)
    results = read_json(output_dir / "all_results.json")

    # The results, the state and the card.
    assert results.keys() >= KEYS | METRICS[task]
    columns, *steps = [line.split(",") for line in (output_dir / "ledger.csv").read_text().splitlines()]
    assert len(steps) == results["train_steps"]
    for name in ("payload_bytes_sent", "bytes_received"):
        assert sum(int(step[columns.index(name)]) for step in steps) == results[f"wire_{name}"]
    assert (results["mode"], results["split_layer"]) == (mode, None if mode == "local" else 2)
    assert results["split_rank"] == (4 if mode == "sft" else None)
    assert results["train_steps"] == 4
    assert results["train_samples"] == 32
    assert results["edge_peak_memory_bytes"] > 50e6
    assert results["train_samples_per_second"] == pytest.approx(32 / results["train_runtime"])
    assert (results["wire_bytes_sent"] == 0) is (results["wire_reduction"] is None) is (mode == "local")
    state = read_json(output_dir / "trainer_state.json")
    losses = [entry for entry in state["log_history"] if "loss" in entry]
    assert [entry["step"] for entry in losses] == [2, 4]
    assert results["train_loss"] == pytest.approx(sum(entry["loss"] for entry in losses) / 2)
    assert state["log_history"][-1].items() >= {name: results[name] for name in METRICS[task]}.items()
    card = (output_dir / "README.md").read_text()
    assert task in card
    assert ("block 2, counted from 1" in card) is (mode != "local")
    assert {path.name for path in output_dir.iterdir()} >= {"config.json", "tokenizer.json", "sft.json"}

    # The weights: asked again, in one process, they say what they said at the end of training.
    saved = load_model(output_dir)
    the_task = task_of(saved.description, job.data_dir)
    rows = the_task.read("validation")
    features = the_task.encode(rows, saved.tokenizer, 64)
    assert len(rows) == job.eval_rows
    heard = [row for batch in asked for row in batch]
    for logits, before in zip(saved.logits(the_task, features, 8), heard, strict=True):
        length = len(before)  # behind the end of a question's tokens, a split model knows no logits
        if task == "squad":
            length = next(f.length for f, row in zip(features, heard, strict=True) if row is before)
        assert logits[:length].equal(before[:length])

    # So do the commands.
    capsys.readouterr()
    file = tmp_path / "results.json"
    asking = flags(model=output_dir, data_dir=job.data_dir, per_device_eval_batch_size=8)
    assert main(["evaluate", *asking, "--output-file", str(file)]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated == read_json(file)
    assert {**evaluated, **dict.fromkeys(SPEED)} == {
        **{name: value for name, value in results.items() if name in evaluated},
        **dict.fromkeys(SPEED),
    }
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(dict(zip(the_task.text_fields, row.texts))) + "\n" for row in rows))
    predicting = flags(model=output_dir, file=questions, json_lines=True, per_device_eval_batch_size=8)
    assert main(["predict", *predicting]) == 0
    predicted = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(predicted) == len(rows)
    for prediction, row, told in zip(predicted, rows, the_task.predictions(heard, features, rows), strict=True):
        told.pop("id", None)  # the file to predict names none
        expected = {**dict(zip(the_task.text_fields, row.texts)), **told}
        assert prediction == json.loads(json.dumps(expected))


@pytest.mark.one_in(5)
@pytest.mark.parametrize("mode", ["local", "sl"])
@pytest.mark.parametrize("task", JOBS)
def test_an_undecomposed_model_is_a_plain_checkpoint(
    jobs: dict[str, Job], model: Path, train: Callable[..., Path], task: str, mode: str
) -> None:
    output_dir = train(jobs[task], model=model, mode=mode, max_steps=2)
    head = AutoModelForQuestionAnswering if task == "squad" else AutoModelForSequenceClassification
    plain, info = head.from_pretrained(output_dir, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for parameter in plain.eval().parameters():
        parameter.data = parameter.data.clone()  # as mapped from the file its alignment differs, and so do last bits
    saved = load_model(output_dir)
    the_task = task_of(saved.description, jobs[task].data_dir)
    features = the_task.encode(the_task.read("validation"), saved.tokenizer, 64)
    ours = saved.logits(the_task, features, 8)
    for batch in batches_of(the_task, features, 8):
        mask_BS = (torch.arange(max(batch.lengths)) < torch.tensor(batch.lengths)[:, None]).long()
        with torch.no_grad():
            output = plain(**batch.inputs, attention_mask=mask_BS)
        if task == "squad":
            theirs = torch.stack([output.start_logits, output.end_logits], dim=-1)
        else:
            theirs = output.logits
        for row, logits in enumerate(theirs):
            assert logits.equal(ours.pop(0)), row
    if task == "sst2":
        assert plain.config.id2label == {0: "negative", 1: "positive"}


def test_a_decomposed_model_is_not_taken_for_a_plain_one(job: Job, model: Path, train: Callable[..., Path]) -> None:
    output_dir = train(job, model=model, mode="sft", max_steps=1)
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForSequenceClassification.from_pretrained(output_dir)


def test_another_system_in_the_same_directory_leaves_nothing_of_the_first(
    job: Job, model: Path, train: Callable[..., Path], tmp_path: Path
) -> None:
    """Old weights beside new ones could be taken for them, by the library as by us."""
    again, of_its_own = tmp_path / "again", {}
    for mode in ("local", "sl", "sft", "sl", "local"):
        if mode not in of_its_own:
            of_its_own[mode] = train(job, model=model, mode=mode, max_steps=2)
        fresh = of_its_own[mode]
        train(job, model=model, mode=mode, max_steps=2, output_dir=again, overwrite_output_dir=True)
        assert sorted(path.name for path in again.iterdir()) == sorted(path.name for path in fresh.iterdir())
        assert same_bits(load_model(again).net.state_dict(), load_model(fresh).net.state_dict())


@pytest.mark.first_only
@pytest.mark.parametrize("mode", MODES)
def test_training_learns(train: Callable[..., Path], tmp_path: Path, mode: str) -> None:
    """One word tells the classes apart, and rows never seen are told apart by it too."""
    eager = make_tiny_model(tmp_path / "eager", layers=3, initializer_range=0.1)
    schedule = {"num_train_epochs": 8, "learning_rate": 3e-3, "warmup_ratio": 0.1, "logging_steps": 12}
    job = sst2(tmp_path, train_rows=192)
    output_dir = train(job, model=eager, mode=mode, per_device_train_batch_size=16, **schedule)
    losses = [entry["loss"] for entry in read_json(output_dir / "trainer_state.json")["log_history"] if "loss" in entry]
    assert losses[0] > 0.6
    assert losses[-1] < 0.2
    assert read_json(output_dir / "all_results.json")["eval_accuracy"] == 100.0


def test_weights_drawn_from_the_seed(job: Job, model: Path, train: Callable[..., Path]) -> None:
    """`--from-config`: both sides draw what one process draws."""
    shape = {"from_config": model / "config.json", "tokenizer_name": model}
    still = {**shape, "learning_rate": 0, "max_steps": 1}
    split = weights_of(train(job, mode="sl", **still))
    whole = weights_of(train(job, mode="local", **still))
    assert same_bits(split, whole)
    another = weights_of(train(job, mode="local", **{**still, "seed": 8}))
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert not whole[name].equal(another[name])
    assert read_json(train(job, mode="sft", **{**shape, "max_steps": 2}) / "all_results.json")["train_steps"] == 2


@pytest.mark.parametrize("residual", ["full", "low-rank"])
def test_a_decomposed_layer_in_one_process(job: Job, model: Path, train: Callable[..., Path], residual: str) -> None:
    """`--residual`, Fig. 2: the residual makes a difference, and asking the saved model knows of it."""
    kept = train(job, model=model, mode="local", residual=residual, max_steps=2)
    saved = load_model(kept)
    assert saved.description.residual == residual
    assert "ffn1" in " ".join(weights_of(kept))
    if residual == "full":  # a low-rank residual changes shapes, too
        the_task = task_of(saved.description, job.data_dir)
        features = the_task.encode(the_task.read("validation"), saved.tokenizer, 64)
        with_residual = saved.logits(the_task, features, 8)
        text = (kept / "sft.json").read_text()
        (kept / "sft.json").write_text(text.replace('"residual": "full"', '"residual": "none"'))
        without = load_model(kept).logits(the_task, features, 8)
        assert not any(one.equal(other) for one, other in zip(with_residual, without, strict=True))


def test_every_system_decomposes_alike(job: Job, model: Path, train: Callable[..., Path]) -> None:
    """A low-rank residual is fitted to the same rows wherever the model is trained."""
    still = {"model": model, "residual": "low-rank", "learning_rate": 0, "max_steps": 1}
    one, split = (weights_of(train(job, mode=mode, **still)) for mode in ("local", "sft"))
    assert same_bits(one, split)
    dropped = weights_of(train(job, mode="sft", **{**still, "residual": "none"}))
    (name,) = (name for name in one if name.endswith("ffn1.weight"))
    assert one[name].shape == (4, 96)
    assert dropped[name].shape == (4, 64)


def test_a_rate_of_their_own_moves_the_factors_alone(job: Job, model: Path, train: Callable[..., Path]) -> None:
    """Of both halves, where that of all else is 0."""
    given = {"model": model, "mode": "sft", "max_steps": 2, "learning_rate": 0}
    still, moved = (weights_of(train(job, factor_learning_rate=rate, **given)) for rate in (0, 1e-2))
    factors = {f"bert.encoder.layer.1.output.dense.ffn{number}.weight" for number in (1, 2, 3)}
    assert {name for name, tensor in still.items() if not torch.equal(tensor, moved[name])} == factors


def test_what_both_halves_hold_is_saved_once(job: Job, train: Callable[..., Path], tmp_path: Path) -> None:
    """DeBERTa's relative positions, which neither half trains."""
    deberta = make_tiny_model(tmp_path / "deberta", "deberta-v2", layers=3)
    output_dir = train(job, model=deberta, mode="sft", max_steps=2, learning_rate=1e-2)
    name = "deberta.encoder.rel_embeddings.weight"
    trained, before = weights_of(output_dir), weights_of(deberta)  # weights_of finds no tensor in two files
    assert trained[name].equal(before[name.partition(".")[2]])
    assert load_model(output_dir).net.whole_parameters()[name].equal(trained[name])


@pytest.mark.first_only
@pytest.mark.parametrize("wire_dtype", ["bfloat16", "float16"])
def test_half_the_bytes(job: Job, model: Path, train: Callable[..., Path], wire_dtype: str) -> None:
    full = read_json(train(job, model=model, max_steps=3, wire_dtype="float32") / "all_results.json")
    half = read_json(train(job, model=model, max_steps=3, wire_dtype=wire_dtype) / "all_results.json")
    assert 2 * half["wire_payload_bytes_sent"] == full["wire_payload_bytes_sent"]
    assert 2 * half["wire_payload_bytes_received"] == full["wire_payload_bytes_received"]
    assert half["wire_reduction"] == 2 * full["wire_reduction"]
    assert half["train_loss"] != full["train_loss"]
    assert half["train_loss"] == pytest.approx(full["train_loss"], abs=0.01)


def test_a_frozen_edge(job: Job, model: Path, train: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    """As easy as the others, said to give the text away, and the library opens what comes of it."""
    spelled_out = {"mode": "sl", "freeze_edge": True, "codec": "int8", "activations": "keep-on-cloud"}
    options = {"split_layer": 1, "max_steps": 20, "seed": 3}
    output_dir = train(job, model=model, mode="frozen", **options)
    assert "gives the text away more readily than the paper's rank-R activation" in capsys.readouterr().err
    assert same_bits(weights_of(output_dir), weights_of(train(job, model=model, **spelled_out, **options)))
    results = read_json(output_dir / "all_results.json")
    assert results["mode"] == "frozen"
    rows = read_json(output_dir / "trainer_state.json")["epoch"]
    assert rows > 1, "so that rows come again"
    assert results["wire_payload_bytes_received"] == 0
    opened = AutoModelForSequenceClassification.from_pretrained(output_dir)
    kept = load_file(model / "model.safetensors")
    for name, parameter in opened.bert.named_parameters():
        is_edge = name.startswith(("embeddings", "encoder.layer.0"))
        assert torch.equal(parameter, kept[name]) is is_edge, name


def test_codecs(job: Job, model: Path, train: Callable[..., Path]) -> None:
    """Of rank 4: a byte for the scale, and half a byte or a byte for each element."""
    full, usual, coded = (
        read_json(train(job, model=model, max_steps=3, **how) / "all_results.json")
        for how in ({"wire_dtype": "float32"}, {}, {"codec": "int4", "gradient_codec": "int8"})
    )
    assert 16 * usual["wire_payload_bytes_sent"] == 5 * full["wire_payload_bytes_sent"]
    assert 16 * coded["wire_payload_bytes_sent"] == 3 * full["wire_payload_bytes_sent"]
    assert 16 * coded["wire_payload_bytes_received"] == 5 * full["wire_payload_bytes_received"]
    for results in (usual, coded):
        assert results["train_loss"] == pytest.approx(full["train_loss"], abs=0.05)


def test_evaluation_in_between_and_tensorboard(
    job: Job, model: Path, train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated: list[int] = []

    def counting(system, task, data, batch_size, step, evaluate=train_module.evaluate):
        evaluated.append(step)
        return evaluate(system, task, data, batch_size, step)

    monkeypatch.setattr(train_module, "evaluate", counting)
    options = {"max_steps": 5, "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1}
    output_dir = train(job, model=model, **options, report_to="tensorboard", logging_dir=tmp_path / "board")
    assert evaluated == [2, 4, 5]
    state = read_json(output_dir / "trainer_state.json")
    scores = [entry["eval_accuracy"] for entry in state["log_history"] if "eval_accuracy" in entry]
    assert len(scores) == 3
    assert state["best_metric"] == max(scores)
    assert all(math.isfinite(entry["grad_norm"]) for entry in state["log_history"] if "loss" in entry)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3, 4, 5]
    assert [event.value for event in board.Scalars("eval/accuracy")] == pytest.approx(scores)
