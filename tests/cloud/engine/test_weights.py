"""Where weights come from: uploads by hash, and the cloud's own models, if they are the edge's."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.tiny import make_tiny_model

from sft.errors import ProtocolError, SFTError
from sft.models import Cut
from sft.models.lora import LoraSpec, lora_to_json
from sft.tensors.stream import in_memory, safetensors_chunks, sha256_of
from sft_cloud.engine.build import build
from sft_cloud.engine.request import check_request
from sft_cloud.engine.weights import WeightsFinder
from sft_cloud.storage.blobs import BlobStore

CPU = torch.device("cpu")


@pytest.fixture
def store(tmp_path):
    return BlobStore(tmp_path / "blobs")


def find(finder, store, edge, **overrides):
    spec = check_request(edge.request(**overrides))
    return finder.find(spec, build(spec, CPU).net_2, store)


def upload(store, edge):
    for sha256, content in edge.blobs().items():
        store.add(sha256, len(content), [content])


def values(tensors):
    return {tensor.name: tensor.read() for tensor in tensors}


def assert_all_of_net_2(tensors, edge):
    found, expected = values(tensors), values([*edge.weights, *edge.factors])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_uploads_by_hash(store, tmp_path, edge):
    finder = WeightsFinder(tmp_path / "no-models")
    assert find(finder, store, edge) == ([], [sha256_of(edge.factors), sha256_of(edge.weights)])
    upload(store, edge)
    tensors, missing = find(finder, store, edge)
    assert missing == []
    assert_all_of_net_2(tensors, edge)


def test_plain_split_learning_needs_no_factors(store, tmp_path, make_edge):
    edge = make_edge(cut=Cut("sl", 2))
    finder = WeightsFinder(tmp_path / "no-models")
    assert find(finder, store, edge) == ([], [sha256_of(edge.weights)])
    upload(store, edge)
    assert_all_of_net_2(find(finder, store, edge)[0], edge)


def test_without_pretrained_weights_only_factors_are_needed(store, tmp_path, edge):
    finder = WeightsFinder(tmp_path / "no-models")
    assert find(finder, store, edge, weights_sha256="") == ([], [sha256_of(edge.factors)])
    upload(store, edge)
    tensors, missing = find(finder, store, edge, weights_sha256="")
    assert missing == []
    assert values(tensors).keys() == values(edge.factors).keys()


@pytest.mark.parametrize("model_name", ["tiny", "someone/tiny"])
def test_the_cloud_s_own_model_spares_the_upload(store, edge, tiny_directory, model_name):
    finder = WeightsFinder(tiny_directory.parent)
    tensors, missing = find(finder, store, edge, model_name=model_name)
    assert missing == [sha256_of(edge.factors)]
    assert values(tensors).keys() == values(edge.weights).keys()


@pytest.mark.parametrize("place", ["whatever", "someone/else"])
def test_a_model_without_a_name_is_known_by_its_weights(store, tmp_path, edge, tiny_directory, place):
    make_tiny_model(tmp_path / "models" / "another", "bert", layers=3, seed=5)
    make_tiny_model(tmp_path / "models" / "smaller", "bert", layers=1)
    finder = WeightsFinder(tmp_path / "models")
    assert sha256_of(edge.weights) in find(finder, store, edge, model_name="")[1]
    shutil.copytree(tiny_directory, tmp_path / "models" / place)
    tensors, missing = find(finder, store, edge, model_name="")
    assert missing == [sha256_of(edge.factors)]
    assert values(tensors).keys() == values(edge.weights).keys()


def test_a_script_s_own_head_comes_beside_the_factors(store, edge, tiny_directory):
    head = {"classifier.weight": torch.ones(3, 32), "classifier.bias": torch.zeros(3)}
    own = [*edge.factors, *in_memory(head)]
    content = b"".join(safetensors_chunks(own))
    store.add(sha256_of(own), len(content), [content])
    tensors, missing = find(WeightsFinder(tiny_directory.parent), store, edge, factors_sha256=sha256_of(own))
    assert missing == []
    assert values(tensors).keys() == values([*edge.weights, *own]).keys()
    assert values(tensors)["classifier.weight"].eq(1).all()


def test_a_model_without_a_name_is_asked_for(store, edge, tiny_directory):
    finder = WeightsFinder(tiny_directory)  # which would be found under the empty name
    assert sha256_of(edge.weights) in find(finder, store, edge, model_name="")[1]


def test_a_model_of_the_same_name_with_other_weights_does_not_count(store, tmp_path, edge):
    make_tiny_model(tmp_path / "models" / "tiny", "bert", layers=3, seed=5)
    assert sha256_of(edge.weights) in find(WeightsFinder(tmp_path / "models"), store, edge)[1]


def test_a_model_that_changes_under_way_is_noticed(store, tmp_path, edge, tiny_directory):
    shutil.copytree(tiny_directory, tmp_path / "models" / "tiny")
    finder = WeightsFinder(tmp_path / "models")
    assert find(finder, store, edge)[1] == [sha256_of(edge.factors)]
    make_tiny_model(tmp_path / "models" / "tiny", "bert", layers=3, seed=5)
    assert sha256_of(edge.weights) in find(finder, store, edge)[1]


@pytest.mark.parametrize("harm", ["torn", "pickled", "empty"])
def test_a_model_that_cannot_be_read_is_asked_for(store, tmp_path, edge, tiny_directory, harm):
    model = tmp_path / "models" / "tiny"
    shutil.copytree(tiny_directory, model)
    weights = model / "model.safetensors"
    if harm == "torn":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        weights.unlink()
        if harm == "pickled":
            (model / "pytorch_model.bin").write_bytes(b"x")
    assert sha256_of(edge.weights) in find(WeightsFinder(tmp_path / "models"), store, edge)[1]


def test_a_directory_outside_the_model_directory_is_not_looked_into(store, tmp_path, edge, tiny_directory, monkeypatch):
    monkeypatch.chdir(tiny_directory.parent)  # where a path `tiny` would lead to the very model
    assert sha256_of(edge.weights) in find(WeightsFinder(tmp_path / "no-models"), store, edge)[1]


def other_blob(edge, **tensors):
    factors = {**values(edge.factors), **tensors}
    return in_memory({name: value for name, value in factors.items() if value is not None})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"bert.embeddings.word_embeddings.weight": torch.zeros(2, 2)}, "does not belong there"),
        ({"classifier.weight": torch.zeros(5, 32)}, "has shape"),
        ({"bert.encoder.layer.1.output.dense.ffn2.weight": torch.zeros(4, 5)}, "has shape"),
        ({"bert.encoder.layer.1.output.dense.ffn2.weight": None}, "must hold all"),
    ],
    ids=str,
)
def test_blobs_that_hold_something_else(store, tmp_path, edge, change, says):
    upload(store, edge)
    content = b"".join(safetensors_chunks(other_blob(edge, **change)))
    sha256 = sha256_of(other_blob(edge, **change))
    store.add(sha256, len(content), [content])
    with pytest.raises(ProtocolError, match=says):
        find(WeightsFinder(tmp_path / "no-models"), store, edge, factors_sha256=sha256)


QUERY = "bert.encoder.layer.2.attention.self.query"
ADAPTER = {f"{QUERY}.lora_A.default.weight": torch.ones(2, 32), f"{QUERY}.lora_B.default.weight": torch.ones(32, 2)}


@pytest.mark.parametrize(
    ("adapters", "module", "says"),
    [
        (ADAPTER, QUERY, None),
        ({}, QUERY, None),
        ({f"{QUERY}.lora_A.default.weight": torch.ones(2, 32)}, QUERY, "all adapters or none"),
        ({**ADAPTER, f"{QUERY}.lora_A.default.weight": torch.ones(3, 32)}, QUERY, "has shape"),
        (ADAPTER, QUERY.replace("query", "value"), "does not belong there"),
        (ADAPTER, "bert.embeddings.word_embeddings", "this half has no module"),
    ],
)
def test_adapters_beside_the_factors(store, tmp_path, edge, adapters, module, says):
    blob = other_blob(edge, **adapters)
    content, sha256 = b"".join(safetensors_chunks(blob)), sha256_of(blob)
    store.add(sha256, len(content), [content])
    lora = LoraSpec(2, 8, 0.0, False, True, [module])
    finder = WeightsFinder(tmp_path / "no-models")
    request = {"weights_sha256": "", "factors_sha256": sha256, "lora_json": lora_to_json(lora)}
    if says is None:
        tensors, missing = find(finder, store, edge, **request)
        assert missing == []
        assert values(tensors).keys() == values(edge.factors).keys() | adapters.keys()
    else:
        with pytest.raises(SFTError, match=says):
            find(finder, store, edge, **request)


def test_blobs_that_are_no_tensors(store, tmp_path, edge):
    import hashlib

    content = b"\xff" * 100
    sha256 = hashlib.sha256(content).hexdigest()
    store.add(sha256, len(content), [content])
    with pytest.raises(ProtocolError, match="is not a safetensors file"):
        find(WeightsFinder(tmp_path / "no-models"), store, edge, weights_sha256=sha256)


def test_a_model_that_several_ask_for_together_is_read_once(store, tmp_path, edge, tiny_directory, monkeypatch):
    finder, together, read = WeightsFinder(tiny_directory.parent), threading.Barrier(3), []

    def reads(tensors):
        read.append(None)
        return sha256_of(tensors)

    def ask():
        together.wait(30)
        finder._hash(tiny_directory, edge.weights)

    monkeypatch.setattr("sft_cloud.engine.weights.sha256_of", reads)
    with ThreadPoolExecutor(3) as threads:
        for one in [threads.submit(ask) for _ in range(3)]:
            one.result(30)
    assert len(read) == 1
