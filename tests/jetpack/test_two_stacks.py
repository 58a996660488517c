"""An edge with JetPack 5's releases and a cloud with the newest ones compute together what one process computes."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Dict, List

import pytest
from support.interpreter import Interpreter
from support.jobs import flags, read_json
from support.tiny import make_tiny_model

from sft_edge.tasks.synthetic import write_synthetic

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "transformers", "grpcio", "protobuf", "safetensors")
VERSIONS = f"""
import json, platform
from importlib.metadata import version
print(json.dumps([platform.python_version(), *[version(name).split("+")[0] for name in {PACKAGES}]]))
"""

LOSS_TOLERANCE = 1e-6


def pins(constraints: str) -> Dict[str, List[str]]:
    """Versions of PACKAGES in a file of constraints; there may be one for every range of Pythons."""
    found = re.findall(r"^([a-z]+)==([^\s;]+)", (ROOT / constraints).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {name: [version for package, version in found if package == name] for name in PACKAGES}


def test_each_side_has_the_releases_that_are_pinned(device: Interpreter, newest: Interpreter, found: List[str]) -> None:
    sides = {
        # NVIDIA's build has no pin that an index could satisfy.
        "edge": (device, {**pins("edge_client/constraints-py38.txt"), "torch": ["2.1.0"]}),
        "cloud": (newest, pins("constraints.txt")),
    }
    for side, (interpreter, pinned) in sides.items():
        python, *versions = json.loads(interpreter.run("-c", VERSIONS).stdout)
        installed = dict(zip(PACKAGES, versions))
        assert {name: installed[name] in pinned[name] for name in PACKAGES} == dict.fromkeys(PACKAGES, True), installed
        assert (side == "edge") == python.startswith("3.8.")
        found.append(f"{side}: Python {python}, " + ", ".join(f"{name} {installed[name]}" for name in PACKAGES))


def test_torch_is_as_nvidia_builds_it(device: Interpreter) -> None:
    code = "import torch.distributed as d; print(d.is_available(), hasattr(d, 'ReduceOp'))"
    assert device.run("-c", code).stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    ("mode", "epsilon", "tolerance"), [("sft", 1e-8, 1e-5), ("sl", 1e-8, 1e-5), ("sft", 1e-6, 1e-6), ("sl", 1e-6, 1e-6)]
)
def test_split_training_is_one_process_training(
    device: Interpreter, cloud: str, found: List[str], mode: str, epsilon: float, tolerance: float
) -> None:
    """The reference runs on the edge's torch alone. The cloud's is twelve releases younger, and rounds otherwise.

    Over seeds 0 to 3 and both modes the losses differ by at most 2.4e-7, two last bits, and the parameters by 4e-6:
    AdamW divides by |g| + epsilon, so gradients that are nothing but rounding, such as those of the keys' biases, move
    parameters, too. With an epsilon above such gradients 1.2e-7 is left, one last bit, and verify's own tolerance
    holds. The tolerance of 1e-5 is a fifth of what one update moves a parameter by, the learning rate of 5e-5.
    """
    options = flags(mode=mode, server=cloud, adam_epsilon=epsilon, tolerance=tolerance, json=True)
    done = device.run("-m", "sft_edge", "verify", *options)
    report = json.loads(done.stdout)
    assert report["passed"] is True
    assert report["max_loss_difference"] <= LOSS_TOLERANCE
    assert report["max_parameter_difference"] <= tolerance
    assert report["steps"] == 20
    assert report["parameters_compared"] > 10_000_000
    assert report["last_loss"] != report["first_loss"]
    found.append(
        f"verify --mode {mode} --adam-epsilon {epsilon:g}: {done.seconds:.1f} s; largest differences: "
        f"loss {report['max_loss_difference']:.1e}, parameter {report['max_parameter_difference']:.1e}"
    )


def test_it_trains_and_answers(device: Interpreter, cloud: str, minilm: str, tmp_path: Path, found: List[str]) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    write_synthetic(data, seed=0)
    options = flags(
        server=cloud,
        model=minilm,
        task="sst2",
        data_dir=data,
        split_layer=5,
        split_rank=8,
        max_seq_length=32,
        max_train_samples=960,
        num_train_epochs=1,
        per_device_train_batch_size=16,
        learning_rate=2e-4,
        warmup_steps=6,
        seed=0,
        device="cpu",
        output_dir=out,
    )
    seconds = device.run("-m", "sft_edge", "train", *options).seconds
    results = read_json(out / "all_results.json")
    assert results["train_steps"] == 60
    assert results["eval_accuracy"] > 60  # 50 is chance; the standard error of 400 rows is 2.5
    found.append(f"train, 60 steps of MiniLM: {seconds:.1f} s, accuracy {results['eval_accuracy']:.1f}")

    # The cloud evaluated its half; now the edge has both.
    answers = device.run("-m", "sft_edge", "predict", "--model", out, "--file", data / "SST-2" / "dev.tsv").stdout
    said = [line.split("\t")[0] for line in answers.splitlines()]
    rows = (data / "SST-2" / "dev.tsv").read_text(encoding="utf-8").splitlines()[1:]
    right = [answer == ("negative", "positive")[int(row.split("\t")[1])] for answer, row in zip(said, rows)]
    assert len(said) == len(rows) == results["eval_samples"]
    assert 100 * sum(right) / len(right) == pytest.approx(results["eval_accuracy"], abs=0.5)

    # Without a locale, text is still UTF-8.
    text = "schön, naïve 電影"
    (answer,) = device.run(
        "-m", "sft_edge", "predict", "--model", out, "--text", text, "--json-lines"
    ).stdout.splitlines()
    assert json.loads(answer)["sentence"] == text


@pytest.mark.parametrize("script", ["accelerate_loop.py", "trainer.py"])
def test_scripts_of_ones_own(device: Interpreter, cloud: str, tmp_path: Path, script: str) -> None:
    """The examples, with the releases of transformers and accelerate that Python 3.8 has."""
    write_synthetic(tmp_path, seed=0)
    options = {
        "model": make_tiny_model(tmp_path / "model", layers=2),
        "data-dir": tmp_path / "SST-2",
        "server": cloud,
        "split-layer": 2,
        "max-train-samples": 64,
    }
    if script == "trainer.py":
        options["model-name-or-path"] = options.pop("model")
        options.update({"output-dir": tmp_path / "out", "max-steps": 4, "save-steps": 2, "report-to": "none"})
    printed = device.run(ROOT / "examples" / script, *flags(**options)).stdout
    assert re.search(r"accuracy on dev:? \d+\.\d", printed)
    if script == "trainer.py":
        assert {path.name for path in (tmp_path / "out").iterdir()} >= {"checkpoint-2", "checkpoint-4"}


@pytest.mark.parametrize("kind", ["layer", "body"])
def test_models_of_ones_own(device: Interpreter, newest: Interpreter, kind: str) -> None:
    """The same script in both environments, cut at a layer or around a transformers model, of which there are two
    releases then."""
    script = Path(__file__).parent / "own_script.py"
    with subprocess.Popen([newest.path, str(script), kind, "cloud"], stdout=subprocess.PIPE, encoding="utf-8") as cloud:
        try:
            assert cloud.stdout is not None
            address = cloud.stdout.readline().strip()
            assert address, "it has ended"
            of_losses, of_weights = map(float, device.run(script, kind, "edge", address).stdout.split())
            assert of_losses < 1e-5
            assert of_weights < 1e-4, "steps of Adam by gradients that differ in the last bits"
            assert cloud.wait(60) == 0
        finally:
            cloud.kill()


def test_adapters_of_two_releases_of_peft(device: Interpreter, cloud: str, tmp_path: Path) -> None:
    write_synthetic(tmp_path, seed=0)
    options = flags(
        server=cloud,
        model=make_tiny_model(tmp_path / "model", layers=3),
        task="sst2",
        data_dir=tmp_path,
        split_layer=2,
        lora_r=4,
        max_steps=4,
        max_eval_samples=16,
        device="cpu",
        output_dir=tmp_path / "out",
    )
    device.run("-m", "sft_edge", "train", *options)
    assert read_json(tmp_path / "out" / "all_results.json")["train_steps"] == 4
    text = device.run("-m", "sft_edge", "predict", "--model", tmp_path / "out", "--text", "good").stdout
    assert text.split("\t")[0] in ("negative", "positive")
