import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import make_tiny_model
from transformers import AutoConfig

from sft.errors import CheckpointError
from sft.models import Cut, build_net_1, build_net_2
from sft.models.weights import fill, pretrained_tensors, shapes
from sft.tensors.hub import find_model
from sft.tensors.pretrained import PretrainedWeights

CUT = Cut("sl", 2)


@pytest.fixture
def directory(tmp_path):
    return make_tiny_model(tmp_path / "model", "bert")


def net_2_of(directory, **overrides):
    config = AutoConfig.from_pretrained(directory, **{"num_labels": 3, **overrides})
    return build_net_2(config, "sequence-classification", CUT)


def shard(directory):
    """Cuts model.safetensors in two, as the library saves large models."""
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, directory / file)
    weight_map = {name: file for file, held in files.items() for name in held}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "model.safetensors").unlink()


def test_sharded_and_single_give_the_same(directory):
    single = net_2_of(directory)
    fill(single, pretrained_tensors(single, PretrainedWeights(directory)), seed=0)
    shard(directory)
    sharded = net_2_of(directory)
    fill(sharded, pretrained_tensors(sharded, PretrainedWeights(directory)), seed=0)
    for name, parameter in single.whole_parameters().items():
        assert torch.equal(parameter, sharded.whole_parameters()[name]), name


def test_a_side_reads_only_its_own_tensors(directory, monkeypatch):
    read = []
    original = PretrainedWeights._read
    monkeypatch.setattr(PretrainedWeights, "_read", lambda self, key: read.append(key) or original(self, key))
    net_1 = build_net_1(AutoConfig.from_pretrained(directory), "sequence-classification", CUT)
    fill(net_1, pretrained_tensors(net_1, PretrainedWeights(directory)), seed=0)
    assert len(read) == len(list(net_1.parameters()))
    assert not any("layer.2" in key or "layer.3" in key or "pooler" in key for key in read)


def rewrite(directory, change):
    path = directory / "model.safetensors"
    tensors = change(load_file(path))
    save_file(tensors, path)


def test_names_without_prefix_and_with_gamma_and_beta(directory):
    expected = net_2_of(directory)
    fill(expected, pretrained_tensors(expected, PretrainedWeights(directory)), seed=0)

    def old_spelling(tensors):
        renamed = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): x for name, x in tensors.items()}
        renamed = {name.replace("LayerNorm.bias", "LayerNorm.beta"): x for name, x in renamed.items()}
        return {name[5:] if name.startswith("bert.") else "bert." + name: x for name, x in renamed.items()}

    rewrite(directory, old_spelling)
    net = net_2_of(directory)
    fill(net, pretrained_tensors(net, PretrainedWeights(directory)), seed=0)
    for name, parameter in expected.whole_parameters().items():
        assert torch.equal(parameter, net.whole_parameters()[name]), name


def test_half_precision_becomes_float32(directory):
    rewrite(directory, lambda tensors: {name: x.half() for name, x in tensors.items()})
    net = net_2_of(directory)
    fill(net, pretrained_tensors(net, PretrainedWeights(directory)), seed=0)
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}


def test_a_head_of_another_size_is_drawn_anew(directory):
    net = net_2_of(directory, num_labels=7)
    tensors = pretrained_tensors(net, PretrainedWeights(directory))
    assert not any(tensor.name.startswith("classifier") for tensor in tensors)
    fill(net, tensors, seed=0)
    assert net.model.classifier.weight.shape == (7, net.model.config.hidden_size)


def test_missing_body_tensor_is_torn(directory):
    rewrite(directory, lambda tensors: {n: x for n, x in tensors.items() if "layer.3.output.dense.weight" not in n})
    with pytest.raises(CheckpointError, match=r"layer\.3\.output\.dense\.weight' is missing; .* incomplete"):
        pretrained_tensors(net_2_of(directory), PretrainedWeights(directory))


def test_body_of_another_shape_than_the_config_says(directory):
    with pytest.raises(CheckpointError, match=r"has shape \[.*\], config.json says"):
        pretrained_tensors(net_2_of(directory, intermediate_size=48), PretrainedWeights(directory))


def test_truncated_file(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        PretrainedWeights(directory)


def test_garbage_file(directory):
    (directory / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        PretrainedWeights(directory)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_broken_index(directory, content):
    shard(directory)
    (directory / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="not an index"):
        PretrainedWeights(directory)


def test_missing_shard(directory):
    shard(directory)
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors: this part .* missing"):
        PretrainedWeights(directory)


def test_shard_without_a_tensor_of_the_index(directory):
    shard(directory)
    save_file({"other": torch.zeros(1)}, directory / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="is not in the file that the index names"):
        PretrainedWeights(directory)


def test_directories_without_safetensors(tmp_path):
    with pytest.raises(CheckpointError, match="no such directory"):
        PretrainedWeights(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"holds neither model.safetensors nor"):
        PretrainedWeights(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match="pickled checkpoints are not read"):
        PretrainedWeights(tmp_path)


def test_find_model(tmp_path, directory):
    assert find_model(str(directory)) == directory
    assert find_model("model", model_dir=tmp_path) == directory
    assert find_model("someone/model", model_dir=tmp_path) == directory
    for name in ("../model", "/etc", "a/b/c", "nobody/has-this", ""):
        with pytest.raises(CheckpointError):
            find_model(name, model_dir=tmp_path, download=False)


def test_shapes_cover_every_parameter(directory):
    net = net_2_of(directory)
    assert len(shapes(net)) == len(list(net.parameters()))


def test_a_directory_whose_name_is_not_utf8(directory):
    latin = directory.rename(directory.parent / "caf\udce9")
    with pytest.raises(CheckpointError, match="its name is not UTF-8"):
        PretrainedWeights(latin)
