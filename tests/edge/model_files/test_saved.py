"""The directory of a trained model: what is read is what was written, and what is torn is refused."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from typing import Callable, Iterator, List, Optional

import pytest
import torch
from support.jobs import same_bits, weights_of
from support.tiny import tiny_config, tiny_tokenizer
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from sft.errors import CheckpointError, SessionLostError, StorageError, UsageError
from sft.models import Cut, Whole, build_whole
from sft.models.weights import fill
from sft.tensors.stream import Shard, in_memory, safetensors_chunks
from sft_edge.model_files.description import Description, read_description
from sft_edge.model_files.saved import load_model, save_model, task_of

CUT = Cut("sft", 2, 4)


def describe(cut: Optional[Cut] = CUT, head: str = "sequence-classification", **values: object) -> Description:
    known = {"task": "sst2", "problem_type": "single_label_classification", "label_names": ["negative", "positive"]}
    fixed = {"head": head, "max_seq_length": 64, "base_model": "tiny", "mode": "sft" if cut else "local"}
    where = {"split_layer": cut.split_layer, "split_rank": cut.split_rank} if cut else {}
    return Description(**{**known, **fixed, **where, **values})  # type: ignore[arg-type]


def make_net(
    cut: Optional[Cut] = CUT, head: str = "sequence-classification", family: str = "bert", seed: int = 0
) -> Whole:
    config = tiny_config(family, layers=3, num_labels=2)
    net = build_whole(config, head, cut)
    fill(net, [], seed)
    return net.eval()


def shards_of(net: Whole, count: int = 1) -> List[Shard]:
    tensors = in_memory(dict(net.whole_parameters()))
    parts = [tensors[index::count] for index in range(count)]
    return [Shard([tensor.name for tensor in part], safetensors_chunks(part)) for part in parts]


def config_of(net: Whole) -> PretrainedConfig:
    return net.model.config  # type: ignore[no-any-return]


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def run(net: Whole, description: Description, count: int = 1) -> Path:
        save_model(tmp_path / "model", shards_of(net, count), config_of(net), tiny_tokenizer(), description)
        return tmp_path / "model"

    return run


@pytest.mark.one_in(5)
@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "distilbert"])
@pytest.mark.parametrize("head", ["sequence-classification", "question-answering"])
@pytest.mark.parametrize(("cut", "count"), [(None, 1), (None, 2), (CUT, 1), (CUT, 2)])
def test_a_round_trip(save: Callable[..., Path], family: str, head: str, cut: Optional[Cut], count: int) -> None:
    net = make_net(cut, head, family)
    directory = save(net, describe(cut, head), count)
    saved = load_model(directory)
    assert same_bits(dict(saved.net.whole_parameters()), dict(net.whole_parameters()))
    assert saved.description == describe(cut, head)
    assert saved.description.cut == cut
    assert not saved.net.training
    inputs = {"input_ids": torch.randint(5, 100, (2, 7), generator=torch.Generator().manual_seed(0))}
    with torch.no_grad():
        assert saved.net(inputs, [7, 3], {}).logits.equal(net(inputs, [7, 3], {}).logits)
    assert saved.tokenizer("a good film")["input_ids"] == tiny_tokenizer()("a good film")["input_ids"]


def test_the_library_reads_configuration_and_tokenizer(save: Callable[..., Path]) -> None:
    directory = save(make_net(), describe())
    config = AutoConfig.from_pretrained(str(directory))
    assert config.architectures == ["BertForSequenceClassification"]
    assert AutoTokenizer.from_pretrained(str(directory)).decode([5, 6])


@pytest.mark.one_in(5)
@pytest.mark.parametrize("first", [(None, 1), (None, 2), (CUT, 1), (CUT, 2)])
@pytest.mark.parametrize("second", [(None, 1), (None, 2), (CUT, 1), (CUT, 2)])
def test_a_new_model_takes_the_place_of_the_old(save: Callable[..., Path], first: tuple, second: tuple) -> None:
    for seed, (cut, count) in enumerate((first, second)):
        net = make_net(cut, seed=seed)
        directory = save(net, describe(cut), count)
    assert same_bits(dict(load_model(directory).net.whole_parameters()), dict(net.whole_parameters()))
    assert same_bits(weights_of(directory), dict(net.whole_parameters()))


def test_other_files_stay(save: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for name in ("model-mine.safetensors", "notes.txt", "all_results.json"):
        (tmp_path / "model" / name).write_text("mine")
    directory = save(make_net(), describe())
    assert (directory / "model-mine.safetensors").read_text() == "mine"
    assert (directory / "notes.txt").read_text() == "mine"


def test_a_link_that_breaks_while_saving_leaves_the_model_that_was_there(tmp_path: Path) -> None:
    net = make_net()
    save_model(tmp_path, shards_of(net, 2), config_of(net), tiny_tokenizer(), describe())

    def broken() -> Iterator[bytes]:
        yield b"half of"
        raise SessionLostError("the cloud was lost")

    first, second = shards_of(net, 2)
    with pytest.raises(SessionLostError):
        save_model(tmp_path, [first, second._replace(chunks=broken())], config_of(net), tiny_tokenizer(), describe())
    assert not [name for name in os.listdir(str(tmp_path)) if name.startswith(".")]
    for name, parameter in load_model(tmp_path).net.whole_parameters().items():
        assert torch.equal(parameter, net.whole_parameters()[name]), name


def test_a_disk_without_room_for_the_tokenizer(tmp_path: Path) -> None:
    """The package that writes it raises nothing better than Exception."""
    net, shard = make_net(), Shard([], [b"small"])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))  # bytes in a file
    try:
        with pytest.raises(StorageError, match=rf"cannot write {tmp_path}: File too large .*; free some space"):
            save_model(tmp_path, [shard], config_of(net), tiny_tokenizer(), describe())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(str(tmp_path)) == []


def test_a_directory_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    net = make_net()
    with pytest.raises(StorageError, match="cannot write"):
        save_model(tmp_path / "file" / "model", shards_of(net), config_of(net), tiny_tokenizer(), describe())


# What is not a whole model.


@pytest.mark.parametrize("name", ["sft.json", "config.json", "tokenizer.json", "decomposed.safetensors.index.json"])
def test_a_missing_file(save: Callable[..., Path], name: str) -> None:
    directory = save(make_net(), describe(), 2)
    (directory / name).unlink()
    with pytest.raises(CheckpointError) as caught:
        load_model(directory)
    assert "\n" not in str(caught.value)
    assert str(directory) in str(caught.value)


def test_a_missing_shard_and_a_torn_one(save: Callable[..., Path]) -> None:
    directory = save(make_net(), describe(), 2)
    shard = directory / "decomposed-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_model(directory)
    shard.unlink()
    with pytest.raises(CheckpointError, match="this part of the checkpoint is missing"):
        load_model(directory)


@pytest.mark.parametrize(
    "lost", ["classifier.weight", "bert.pooler.dense.bias", "bert.encoder.layer.1.output.dense.ffn2.weight"]
)
def test_a_tensor_that_is_not_there_is_not_made_up(tmp_path: Path, lost: str) -> None:
    """Of a checkpoint to be trained a head may be missing; of a trained model nothing may."""
    net = make_net()
    tensors = in_memory({name: x for name, x in net.whole_parameters().items() if name != lost})
    shard = Shard([tensor.name for tensor in tensors], safetensors_chunks(tensors))
    save_model(tmp_path, [shard], config_of(net), tiny_tokenizer(), describe())
    with pytest.raises(CheckpointError, match=f"tensor '{lost}' is missing"):
        load_model(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"task": "sst2"}', "null", '"sst2"'])
def test_a_description_that_is_none(save: Callable[..., Path], content: str) -> None:
    directory = save(make_net(), describe())
    (directory / "sft.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"sft\.json: not the description of a saved model"):
        load_model(directory)


def test_a_later_release_may_describe_more(save: Callable[..., Path]) -> None:
    directory = save(make_net(), describe())
    content = json.loads((directory / "sft.json").read_text())
    (directory / "sft.json").write_text(json.dumps({**content, "adapters": 3}))
    assert read_description(directory) == describe()


@pytest.mark.parametrize("residual", ["none", "low-rank", "full"])
def test_the_residual_is_remembered(save: Callable[..., Path], residual: str) -> None:
    cut = Cut("sft", 2, 4, residual)
    directory = save(make_net(cut), describe(cut, residual=residual))
    assert load_model(directory).description.cut == cut
    content = json.loads((directory / "sft.json").read_text())
    assert content["residual"] == residual


def test_a_model_of_an_earlier_release_keeps_its_residual(save: Callable[..., Path]) -> None:
    directory = save(make_net(), describe())
    content = json.loads((directory / "sft.json").read_text())
    del content["residual"]
    for kept, residual in ((True, "full"), (False, "none")):
        (directory / "sft.json").write_text(json.dumps({**content, "keep_residual": kept}))
        assert load_model(directory).description.cut == Cut("sft", 2, 4, residual)


def test_the_task_of_a_description() -> None:
    names = ["bad", "good", "so-so"]
    task = task_of(describe(task="text", label_names=names))
    assert task.label_names == names
    assert task_of(describe(task="stsb", problem_type="regression", label_names=None)).num_labels == 1
    with pytest.raises(UsageError):
        task_of(describe(task="sst3"))
