"""Directories of people that are no model yet, each refused in a line that says what it is and what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable, Dict

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import make_tiny_model

from sft.errors import CheckpointError, SFTError, UsageError
from sft.models import build_whole
from sft.models.weights import pretrained_tensors
from sft_edge.model_files.source import Source, open_source
from sft_edge.model_files.tokenizer_file import read_tokenizer
from sft_edge.options.train import ModelOptions

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:abab\nsize 90868376\n"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def opened(model: Path, **options: Any) -> Source:
    return open_source(ModelOptions(model=str(model), **options), {})


def own_code(model: Path) -> None:
    edit(model / "config.json", model_type="mybert", auto_map={"AutoConfig": "configuration_my.MyConfig"})
    (model / "configuration_my.py").write_text("raise SystemExit('it was run')")


def own_tokenizer(model: Path) -> None:
    edit(model / "tokenizer_config.json", tokenizer_class="Mine", auto_map={"AutoTokenizer": ["mine.Mine", None]})
    (model / "mine.py").write_text("raise SystemExit('it was run')")


def adapters(model: Path) -> None:
    (model / "config.json").unlink()
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "bert-base-uncased"}))


def a_gap(model: Path) -> None:
    path = model / "tokenizer.json"
    content: Dict[str, Any] = json.loads(path.read_text())
    del content["model"]["vocab"]["worst"]
    content["model"]["vocab"]["jetson"] = 300
    path.write_text(json.dumps(content))


def sentencepiece_alone(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "spm.model").write_bytes(b"\x0e")


def pickled(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (own_code, r"config.json: 'mybert' is no model of transformers .*code of their own are not supported"),
        (own_tokenizer, r"tokenizer_config.json: 'Mine' is no tokenizer .*code of their own are not supported"),
        (adapters, r"here are adapters of 'bert-base-uncased', not a model: .*--lora-r.*merge_and_unload"),
        (a_gap, r"token 'jetson' with number 300, the model knows numbers up to \d+: .*--tokenizer-name"),
        (sentencepiece_alone, r"spm.model: this tokenizer needs sentencepiece; .*\[sentencepiece\]"),
        (pickled, r"pytorch_model.bin: pickled checkpoints.*save_pretrained"),
        (lambda m: edit(m / "config.json", quantization_config={"quant_method": "gptq"}), r"quantized \(gptq\)"),
        (lambda m: (m / "config.json").write_text(POINTER), r"config.json: a Git LFS pointer .*git lfs pull"),
        (lambda m: (m / "model.safetensors").write_text(POINTER), r"model.safetensors: a Git LFS pointer"),
        (lambda m: (m / "tokenizer.json").write_text(POINTER), r"tokenizer.json: a Git LFS pointer"),
        (lambda m: edit(m / "config.json", model_type=None), r"it says no model_type"),
        (lambda m: edit(m / "tokenizer_config.json", model_max_length=-1), r"model_max_length must be .*, not -1"),
        (lambda m: edit(m / "tokenizer_config.json", model_max_length="16"), r"model_max_length must be .*, not '16'"),
    ],
)
def test_what_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object], said: str
) -> None:
    model = make_tiny_model(tmp_path / "tiny", layers=1)
    change(model)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody is asked"))
    with pytest.raises(SFTError, match=said) as caught:
        opened(model)
    assert "\n" not in str(caught.value)


def test_a_folder_that_hides_a_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bert-base-uncased").mkdir()
    (tmp_path / "bert-base-uncased" / "all_results.json").write_text("{}")
    with pytest.raises(CheckpointError, match="the folder bert-base-uncased is taken for the model and hides"):
        opened(Path("bert-base-uncased"))


def test_positions_are_what_the_configuration_leaves(tmp_path: Path) -> None:
    """rinna's RoBERTa has padding token 3: of 130 positions 126 are tokens'."""
    model = make_tiny_model(tmp_path / "tiny", "roberta", layers=1)
    edit(model / "config.json", pad_token_id=3)
    opened(model, max_seq_length=126)
    with pytest.raises(UsageError, match="--max-seq-length 127 is more than this model's 126 positions"):
        opened(model, max_seq_length=127)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_behind_a_wrapper(tmp_path: Path, wrapper: str) -> None:
    model = make_tiny_model(tmp_path / "tiny", layers=1)
    source = opened(model)
    whole = build_whole(source.config, "sequence-classification")
    expected = [(tensor.name, tensor.read().clone()) for tensor in pretrained_tensors(whole, source.checkpoint)]
    tensors = load_file(str(model / "model.safetensors"))
    save_file({wrapper + name: x for name, x in tensors.items()}, str(model / "model.safetensors"))
    found = [(tensor.name, tensor.read()) for tensor in pretrained_tensors(whole, opened(model).checkpoint)]
    assert [name for name, _ in found] == [name for name, _ in expected]
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(found, expected))


def test_other_names_are_shown(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "tiny", layers=1)
    tensors = load_file(str(model / "model.safetensors"))
    save_file({f"net.{name}": x for name, x in tensors.items()}, str(model / "model.safetensors"))
    source = opened(model)
    with pytest.raises(CheckpointError, match="is incomplete, or has other names: it holds 'net"):
        pretrained_tensors(build_whole(source.config, "sequence-classification"), source.checkpoint)


def test_a_library_that_asks_is_not_reached(tmp_path: Path) -> None:
    """A class that is known wins over one beside the model."""
    model = make_tiny_model(tmp_path / "tiny", layers=1)
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.Mine", None]})
    (model / "mine.py").write_text("raise SystemExit('it was run')")
    assert len(read_tokenizer(model))
