"""What a run starts from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Optional

import pytest
from support.tiny import make_tiny_model, tiny_config, tiny_tokenizer

from sft.errors import CheckpointError, UnsupportedModelError, UsageError
from sft.tensors.pretrained import PretrainedWeights
from sft_edge.model_files.config_file import read_config
from sft_edge.model_files.source import open_source, told_name
from sft_edge.model_files.tokenizer_file import read_tokenizer
from sft_edge.options.train import ModelOptions


def test_a_model_directory(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "tiny", layers=2)
    source = open_source(ModelOptions(model=str(model)), {"num_labels": 5, "problem_type": "regression"})
    assert source.name == "tiny"
    assert isinstance(source.checkpoint, PretrainedWeights)
    assert (source.config.num_labels, source.config.problem_type) == (5, "regression")
    assert source.config.num_hidden_layers == 2
    assert len(source.tokenizer) == source.config.vocab_size


def test_another_tokenizer(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "tiny", layers=2)
    tiny_tokenizer(max_length=17).save_pretrained(str(tmp_path / "tokenizer"))
    source = open_source(ModelOptions(model=str(model), tokenizer_name=str(tmp_path / "tokenizer")), {})
    assert source.tokenizer.model_max_length == 17


def test_a_shape(tmp_path: Path) -> None:
    """Weights from the seed: the cloud has nothing to look for."""
    tiny_config("roberta", layers=5).save_pretrained(str(tmp_path))
    tiny_tokenizer("roberta").save_pretrained(str(tmp_path))
    options = ModelOptions(from_config=tmp_path / "config.json", tokenizer_name=str(tmp_path))
    source = open_source(options, {})
    assert (source.name, source.checkpoint, source.config.num_hidden_layers) == ("", None, 5)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "deberta-v2", "gpt2", "opt", "llama"])
def test_the_longest_sequence(tmp_path: Path, family: str) -> None:
    """RoBERTa has 130 positions, of which two are no token's; where positions are relative, the configuration says."""
    model, longest = str(make_tiny_model(tmp_path / "tiny", family, layers=1)), 128
    open_source(ModelOptions(model=model, max_seq_length=longest), {})
    with pytest.raises(UsageError, match="--max-seq-length 129 is more than this model's 128 positions"):
        open_source(ModelOptions(model=model, max_seq_length=longest + 1), {})


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("minilm", "minilm"),
        ("sentence-transformers/all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"),
        ("../models/tiny", ""),
        ("/abs/olute", ""),
        ("a/b/c", ""),
        ("with space", ""),
        ("umläut", ""),
    ],
)
def test_what_the_cloud_is_told_to_look_for(model: str, name: str) -> None:
    assert told_name(model) == name


def test_of_a_directory_the_cloud_hears_nothing_but_what_somebody_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny_model(tmp_path / "of-dr-x" / "my-model", layers=1)
    monkeypatch.chdir(tmp_path)
    for name in (str(model), "of-dr-x/my-model", ".", "of-dr-x"):
        assert told_name(name) == ""
    assert told_name("of-dr-x/my-model", "bert-base") == "bert-base"
    source = open_source(ModelOptions(model=str(model), model_name="a/b"), {})
    assert (source.name, source.told_name) == ("my-model", "a/b")
    with pytest.raises(UsageError, match=r"model_name '\.\./x' is neither a hub id nor the name of a directory"):
        told_name("minilm", "../x")


def test_code_beside_a_model_is_never_run(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "tiny", layers=1)
    content = json.loads((model / "config.json").read_text())
    content["auto_map"] = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    (model / "config.json").write_text(json.dumps(content))
    (model / "evil.py").write_text("raise SystemExit('it was run')")
    config = open_source(ModelOptions(model=str(model)), {}).config
    assert not hasattr(config, "auto_map")
    assert "evil" not in config.to_json_string(use_diff=False)


@pytest.mark.parametrize("content", [None, "", "{", "[1]", "{}", '{"model_type": 7}', '{"model_type": "none such"}'])
def test_what_is_no_configuration(tmp_path: Path, content: Optional[str]) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError) as caught:
        read_config(tmp_path / "config.json", {})
    assert str(caught.value).startswith(str(tmp_path / "config.json"))
    assert "\n" not in str(caught.value)


def test_a_member_of_a_family_that_cannot_be_cut(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "tiny", "opt", layers=1, do_layer_norm_before=False)
    with pytest.raises(UnsupportedModelError, match="type 'opt' cannot be cut: its blocks end in a norm"):
        open_source(ModelOptions(model=str(model)), {})


def test_what_is_no_tokenizer(tmp_path: Path) -> None:
    """Newer releases would make an empty one up, and every word would be unknown to it."""
    model = make_tiny_model(tmp_path / "tiny", layers=1)
    (model / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer can be read from here"):
        read_tokenizer(model)
    (model / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="no tokenizer can be read from here"):
        read_tokenizer(model)
