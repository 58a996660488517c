"""The examples with transformers' Trainer, accelerate and Lightning Fabric run as they are, against a real cloud."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from support.tiny import make_tiny_model
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
CHECKPOINT_STEP = 30


@pytest.fixture(scope="module")
def steady_model(tmp_path_factory):
    """No dropout, so that a run that goes on ends where one that was never stopped does."""
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    # Weights large enough to learn within a few steps.
    return make_tiny_model(tmp_path_factory.mktemp("steady") / "tiny", layers=3, initializer_range=0.2, **no_dropout)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """One word tells the two classes apart."""
    directory = tmp_path_factory.mktemp("sst2")
    for name, count in (("train", 96), ("dev", 24)):
        rows = [f"it is the {('worst', 'best')[i % 2]} film of {i % 7} or more people\t{i % 2}" for i in range(count)]
        (directory / f"{name}.tsv").write_text("sentence\tlabel\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return directory


@pytest.fixture
def run_example(monkeypatch, capsys):
    """Runs a script of examples/ with flags and gives what it printed."""

    def run(name, *flags):
        monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
        monkeypatch.syspath_prepend(str(EXAMPLES))
        AcceleratorState._reset_state(reset_partial_state=True)  # of a script before, which a process would not have
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def accuracy(printed):
    (line,) = [line for line in printed.splitlines() if "accuracy on dev" in line][-1:]
    return float(line.split()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--mixed-precision", "bf16")], ids=("float32", "bf16"))
def test_accelerate(run_example, steady_model, data_dir, cloud, flags):
    printed = run_example(
        "accelerate_loop.py",
        *("--model", steady_model, "--data-dir", data_dir, "--server", cloud, "--split-layer", 2),
        *("--learning-rate", 5e-3, "--epochs", 20, *flags),
    )
    assert accuracy(printed) == 100


@pytest.mark.first_only
@pytest.mark.parametrize("flags", [(), ("--precision", "bf16-mixed")], ids=("float32", "bf16"))
def test_fabric(run_example, steady_model, data_dir, cloud, flags):
    printed = run_example(
        "fabric_loop.py",
        *("--model", steady_model, "--data-dir", data_dir, "--server", cloud, "--split-layer", 2),
        *("--learning-rate", 5e-3, "--epochs", 15, *flags),
    )
    assert accuracy(printed) == 100


def test_ner(run_example, steady_model, cloud, tmp_path):
    """Tags that each word tells."""
    words = {"people": "B-PER", "many": "B-NUM", "film": "O", "story": "O", "the": "O"}
    for name, count in (("train", 64), ("dev", 16)):
        sentences = [[list(words)[(i * k) % 5] for k in range(1, 3 + i % 4)] for i in range(count)]
        text = "\n\n".join("\n".join(f"{word} x {words[word]}" for word in sentence) for sentence in sentences)
        (tmp_path / f"{name}.txt").write_text(text + "\n", encoding="utf-8")
    printed = run_example(
        "ner.py",
        *("--model_name_or_path", steady_model, "--data_dir", tmp_path, "--server", cloud, "--split_layer", 2),
        *("--output_dir", tmp_path / "out", "--per_device_train_batch_size", 16, "--learning_rate", 5e-3),
        *("--num_train_epochs", 12, "--report_to", "none", "--disable_tqdm", "True", "--use_cpu", "True"),
    )
    assert accuracy(printed) == 100
    opened = AutoModelForTokenClassification.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert set(opened.config.id2label.values()) == set(words.values())


def test_sft_trainer(run_example, cloud, tmp_path, tmp_path_factory):
    pytest.importorskip("trl", reason="trl is not installed")
    pytest.importorskip("datasets", reason="datasets, which trl needs, is not installed")
    model = make_tiny_model(tmp_path_factory.mktemp("decoder") / "tiny", "llama", layers=3, head="causal-lm")
    AutoTokenizer.from_pretrained(model, eos_token="[SEP]").save_pretrained(model)
    rows = [{"text": "the film is a good story of people and many more"} for _ in range(16)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run_example(
        "sft_trainer.py",
        *("--model_name_or_path", model, "--data_file", tmp_path / "texts.jsonl", "--server", cloud),
        *("--split_layer", 2, "--output_dir", tmp_path / "out", "--max_steps", 3, "--report_to", "none"),
        *("--use_cpu", "True", "--bf16", "False"),
    )
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)


def train(run_example, steady_model, data_dir, cloud, output_dir, *flags):
    return run_example(
        "trainer.py",
        *("--model_name_or_path", steady_model, "--data_dir", data_dir, "--server", cloud, "--split_layer", 2),
        *("--output_dir", output_dir, "--per_device_train_batch_size", 16, "--learning_rate", 5e-3, "--seed", 3),
        *("--max_steps", 2 * CHECKPOINT_STEP, "--save_steps", CHECKPOINT_STEP, "--eval_strategy", "epoch"),
        *("--warmup_steps", 2, "--gradient_accumulation_steps", 2, "--report_to", "none", "--disable_tqdm", "True"),
        *("--use_cpu", "True", *flags),
    )


@pytest.mark.slow
def test_trainer_trains_evaluates_and_goes_on_from_a_checkpoint(run_example, steady_model, data_dir, cloud, tmp_path):
    printed = train(run_example, steady_model, data_dir, cloud, tmp_path / "one")
    assert accuracy(printed) == 100
    assert printed.count("'eval_accuracy'") >= 3  # after epochs, and at the end
    checkpoint = tmp_path / "one" / f"checkpoint-{CHECKPOINT_STEP}"

    train(run_example, steady_model, data_dir, cloud, tmp_path / "two", "--resume_from_checkpoint", checkpoint)

    last = f"checkpoint-{2 * CHECKPOINT_STEP}/model.safetensors"
    straight, resumed = load_file(tmp_path / "one" / last), load_file(tmp_path / "two" / last)
    assert straight.keys() == resumed.keys()
    assert any(".ffn3." in name for name in straight)  # the cloud's half is in there, too
    for name, value in straight.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=1e-6, msg=name)
    # ... which says something only if the second half of the run changed the weights.
    halfway = load_file(checkpoint / "model.safetensors")
    assert any(not torch.equal(halfway[name], value) for name, value in straight.items())
