"""Whole jobs with LoRA: across an edge and a cloud, and in one process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from support.jobs import STEADY, Job, read_json, weights_of
from support.tiny import make_tiny_model
from support.tiny_edge import TinyEdge
from transformers import AutoConfig

from sft.errors import ProtocolError, UsageError
from sft.models import build_net_2, build_whole
from sft.models.lora import add_lora, lora_to_json, resolve_lora
from sft.optim.spec import decay_groups
from sft.tensors.pretrained import PretrainedWeights
from sft_cloud.engine.build import build, make_session
from sft_cloud.engine.request import check_request
from sft_cloud.errors import PreconditionError
from sft_cloud.session.session import Session
from sft_edge.cli import main

LORA = {**STEADY, "max_steps": 4, "lora_r": 4, "lora_alpha": 32, "learning_rate": 1e-2}


@pytest.fixture
def model_without_dropout(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "tiny", layers=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def changed(model: Path, output_dir: Path) -> set[str]:
    """The pretrained tensors that a run left other bits of."""
    after = weights_of(output_dir)
    shapes = {name: tuple(tensor.shape) for name, tensor in after.items() if ".ffn" not in name}
    before = {tensor.name: tensor for tensor in PretrainedWeights(model).tensors(shapes, "bert")}
    return {name for name, tensor in before.items() if not torch.equal(tensor.read(), after[name])}


@pytest.mark.parametrize("options", [{}, {"lora_target_modules": "all-linear", "use_rslora": True}])
def test_split_training_is_one_process_training(
    job: Job, model_without_dropout: Path, train: Callable[..., Path], options: dict[str, object]
) -> None:
    """Merged weights of plain split learning are those of the undecomposed model, adapters in both halves."""
    options = {**LORA, "model": model_without_dropout, **options}
    split = weights_of(train(job, mode="sl", split_layer=2, **options))
    local = weights_of(train(job, mode="local", **options))
    assert split.keys() == local.keys()
    for name, tensor in local.items():
        torch.testing.assert_close(split[name], tensor, atol=1e-6, rtol=0, msg=name)


def test_only_what_has_an_adapter_changes(job: Job, model: Path, train: Callable[..., Path]) -> None:
    adapted = {
        f"bert.encoder.layer.{block}.attention.self.{name}.weight" for block in range(3) for name in ("query", "value")
    }
    output_dir = train(job, model=model, **LORA)
    assert changed(model, output_dir) == adapted
    assert not [name for name in weights_of(output_dir) if "lora" in name or "base_layer" in name]


def test_one_half_with_adapters_the_other_whole(job: Job, model: Path, train: Callable[..., Path]) -> None:
    on_edge = changed(model, train(job, model=model, **LORA, lora_half="edge"))
    on_cloud = changed(model, train(job, model=model, **LORA, lora_half="cloud"))
    block_1, block_3 = "bert.encoder.layer.0.attention.self.", "bert.encoder.layer.2.attention.self."
    assert {f"{block_1}query.weight"} <= on_edge
    assert f"{block_1}key.weight" not in on_edge
    assert f"{block_3}key.weight" in on_edge
    assert {f"{block_3}query.weight"} <= on_cloud
    assert f"{block_3}key.weight" not in on_cloud
    assert f"{block_1}key.weight" in on_cloud
    assert "bert.embeddings.word_embeddings.weight" in on_cloud - on_edge


def test_the_seed_decides_dropout_and_adapters(job: Job, model: Path, train: Callable[..., Path]) -> None:
    options = {**LORA, "lora_dropout": 0.3, "model": model}
    first, again = weights_of(train(job, **options)), weights_of(train(job, **options))
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    other = weights_of(train(job, **options, seed=1))
    name = "bert.encoder.layer.2.attention.self.query.weight"
    assert not torch.equal(first[name], other[name])


def test_the_saved_model_is_the_one_that_was_evaluated(
    job: Job, model: Path, train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without peft, for which it has no use."""
    output_dir = train(job, model=model, **LORA)
    expected = read_json(output_dir / "all_results.json")
    monkeypatch.setitem(sys.modules, "peft", None)
    report = tmp_path / "report.json"
    flags = [f"--model={output_dir}", f"--data-dir={job.data_dir}", f"--output-file={report}"]
    assert main(["evaluate", *flags]) == 0
    results = read_json(report)
    assert results["eval_accuracy"] == expected["eval_accuracy"]
    assert results["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lora_target_modules": "c_attn"}, "no module matches"),
        ({"split_layer": 3}, "the cloud's half has none of the target modules (query, value); it has classifier"),
        ({"lora_r": 4000}, "a rank must be from 1 to 1024"),
        ({"mode": "local", "lora_half": "edge"}, "--lora-half edge needs two halves"),
        ({"lora_r": 0}, "--lora-alpha needs --lora-r"),
    ],
)
def test_bad_input(failing: Callable[..., tuple[int, str]], options: dict[str, object], says: str) -> None:
    code, line = failing(**{**LORA, **options})
    assert code == 2
    assert says in line


def test_without_peft(failing: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    code, line = failing(**LORA)
    assert code == 2
    assert "pip install 'split-fine-tuning[peft]'" in line


# What the cloud is told.


@pytest.fixture
def edge(model: Path) -> TinyEdge:
    config = AutoConfig.from_pretrained(model, num_labels=2, problem_type="single_label_classification")
    return TinyEdge(model, config)


def opened(edge: TinyEdge, lora_json: str) -> Session:
    spec, device = check_request(edge.request(lora_json=lora_json)), torch.device("cpu")
    return make_session(spec, build(spec, device), [*edge.weights, *edge.factors], device)


def test_the_cloud_learns_with_adapters(edge: TinyEdge) -> None:
    net_2, whole = build_net_2(edge.config, edge.head, edge.cut), build_whole(edge.config, edge.head, edge.cut)
    spec = resolve_lora(LoraConfig(r=2), whole).of_half(net_2, "cloud")
    add_lora(net_2, spec, edge.seed)
    edge.groups = decay_groups(net_2, {"lr": 1e-2, "weight_decay": 0.1})
    session = opened(edge, lora_to_json(spec))
    before = {tensor.name: tensor.read().clone() for tensor in session.stored_parameters()}
    assert before.keys() == set(build_net_2(edge.config, edge.head, edge.cut).whole_names.values())
    for step in range(2):  # B is 0 at first, and A's gradient with it
        session.handle(edge.forward(step))
        session.handle(edge.commit(step))
    moved = {
        tensor.name for tensor in session.stored_parameters() if not torch.equal(tensor.read(), before[tensor.name])
    }
    adapted = {f"bert.encoder.layer.2.attention.self.{name}.weight" for name in ("query", "value")}
    trained_whole = {name for name in before if ".ffn" in name or name.startswith("classifier.")}
    assert moved == adapted | trained_whole


def test_requests_that_make_no_sense(edge: TinyEdge) -> None:
    whole = build_whole(edge.config, edge.head, edge.cut)
    spec = resolve_lora(LoraConfig(r=2), whole)
    with pytest.raises(ProtocolError, match="lora_json"):
        opened(edge, '{"r": 8}')
    with pytest.raises(UsageError, match=r"no module 'bert\.encoder\.layer\.0"):
        opened(edge, lora_to_json(spec))


def test_a_cloud_without_peft_says_so(edge: TinyEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build_whole(edge.config, edge.head, edge.cut)
    spec = resolve_lora(LoraConfig(r=2), whole).of_half(build_net_2(edge.config, edge.head, edge.cut), "cloud")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(PreconditionError, match=r"the cloud lacks peft, .* whoever runs it has to install"):
        opened(edge, lora_to_json(spec))
