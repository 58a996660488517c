"""The files in examples/configs: options that the command understands, and runs that train."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.jobs import Job, flags, read_json, same_bits, weights_of

from sft.cli.options import parse
from sft_edge.cli import main
from sft_edge.options import TRAIN_OPTIONS, CutOptions, LinkOptions, LoraOptions, TrainingOptions, check_together

ROOT = Path(__file__).parents[2]
CONFIGS = {path.stem: path for path in sorted((ROOT / "examples" / "configs").glob("*"))}

MODES = {"local": "local", "sl": "sl", "frozen": "frozen"}


def options_of(arguments: Sequence[str]) -> dict[type, Any]:
    return dict(zip(TRAIN_OPTIONS, parse(TRAIN_OPTIONS, arguments, "sft-edge train"), strict=True))


def commands_in(path: Path) -> list[list[str]]:
    return [shlex.split(line[1:]) for line in path.read_text(encoding="utf-8").splitlines() if "sft-edge train" in line]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_command_understands_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where `out` is not there yet
    options = options_of(["--config", str(CONFIGS[name])])
    check_together(options[CutOptions], options[LinkOptions], options[TrainingOptions], options[LoraOptions])
    assert options[CutOptions].mode == MODES.get(name, "sft")
    assert (options[LinkOptions].labels == "local") is (name == "sft_labels_local")
    assert (options[LoraOptions].lora_r > 0) is (name == "lora")
    assert (options[TrainingOptions].resume_from_checkpoint is not None) is (name == "resume")


@pytest.mark.parametrize("name", CONFIGS)
def test_it_says_how_it_is_run(name: str) -> None:
    (command,) = commands_in(CONFIGS[name])
    assert command[:4] == ["sft-edge", "train", "--config", f"examples/configs/{CONFIGS[name].name}"]


@pytest.mark.parametrize("mode", ["local", "sl", "sft"])
def test_the_figures_of_the_readme_are_those_of_the_file(mode: str) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(r"^sft-edge train (--mode MODE .*\\\n.*)$", readme, flags=re.MULTILINE)
    assert found is not None
    command = shlex.split(found[1].replace("\\\n", " "))
    told = options_of([{"MODE": mode}.get(word, word) for word in command])
    meant = options_of(["--config", str(CONFIGS[mode]), "--data-dir", "DIR"])
    if mode == "local":  # where the whole model is trained, and no cut is made
        told[CutOptions] = replace(told[CutOptions], split_layer=None, split_rank=8)
    assert told == meant


def run(name: str, job: Job, model: Path, cloud: str, output_dir: Path, **options: object) -> dict[str, Any]:
    """A few steps of a tiny model in the place of MiniLM, all else as the file has it."""
    small: dict[str, object] = {
        "model": model,
        "data_dir": job.data_dir,
        "output_dir": output_dir,
        "max_steps": 3,
        "device": "cpu",
        **({} if name == "local" else {"split_layer": 2, "server": cloud}),
        **options,
    }
    assert main(["train", "--config", str(CONFIGS[name]), *flags(**small)]) == 0
    results = read_json(output_dir / "all_results.json")
    assert results["train_steps"] == 3
    return dict(results)


@pytest.mark.first_only
@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - {"resume"}))
def test_it_trains(name: str, job: Job, model: Path, cloud: str, tmp_path: Path) -> None:
    results = run(name, job, model, cloud, tmp_path / "out")
    assert results["mode"] == MODES.get(name, "sft")
    assert (results["wire_bytes_sent"] == 0) is (name == "local")
    assert 0 <= results["eval_accuracy"] <= 100


def test_the_one_that_resumes_goes_on(job: Job, model: Path, cloud: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("resume", job, model, cloud, out, save_steps=1)
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    first = weights_of(out)
    run("resume", job, model, cloud, out, save_steps=1)
    assert same_bits(weights_of(out), first)
