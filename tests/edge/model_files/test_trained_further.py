"""A result is trained further: what a run left, and what was exported of it, computes what it did before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable, Dict, Optional

import pytest
import torch
from safetensors.torch import load_file
from support.jobs import run_options, sst2
from support.saved import save_tiny

from sft.errors import CheckpointError, CutError
from sft.models import Cut, build_net_1, build_net_2, build_whole
from sft.models.weights import factor_tensors, fill, pretrained_tensors
from sft_edge.commands.export.content import Export
from sft_edge.commands.train.train import TrainingRun
from sft_edge.model_files import DENSE, FACTORED
from sft_edge.model_files.saved import load_model
from sft_edge.model_files.source import Source, open_source
from sft_edge.options.train import ModelOptions
from sft_edge.systems.halves import whole_tensors
from sft_edge.systems.open import cut_of

SEQUENCES = "sequence-classification"


def exported(model: Path, form: str) -> Path:
    to = model.parent / f"{model.name}-{form}"
    to.mkdir()
    Export(load_model(model), form).write(to)
    return to


def logits_of(net: Any) -> torch.Tensor:
    ids = torch.arange(5, 26).reshape(3, 7)
    with torch.no_grad():
        return net.eval()({"input_ids": ids}, [7, 3, 5], {}).logits  # type: ignore[no-any-return]


def opened(model: Path) -> Source:
    return open_source(ModelOptions(model=str(model)), {"num_labels": 2, "problem_type": "single_label_classification"})


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("family", "residual", "form"),
    [
        ("bert", "none", None),
        ("bert", "none", FACTORED),
        ("bert", "none", DENSE),
        ("bert", "low-rank", None),
        ("bert", "full", DENSE),
        ("gpt2", "none", DENSE),
        ("llama", "low-rank", DENSE),
    ],
)
def test_it_computes_what_it_did(tmp_path: Path, family: str, residual: str, form: Optional[str]) -> None:
    cut = Cut("sft", 2, 4, residual)
    model = save_tiny(tmp_path / "model", family, cut=cut)
    source = opened(model if form is None else exported(model, form))
    as_library = residual == "full" and form == DENSE
    assert source.cut == (None if as_library else cut)
    whole = build_whole(source.config, SEQUENCES, source.cut)
    fill(whole, whole_tensors(whole, source, source.cut, seed=99), seed=99)
    assert torch.allclose(logits_of(whole), logits_of(load_model(model).net), atol=1e-5)


def test_the_factors_are_kept_as_they_are(tmp_path: Path) -> None:
    """Each half gets its own, to the bit: moments aside, the second run goes on where the first ended."""
    cut = Cut("sft", 2, 4)
    model = save_tiny(tmp_path / "model", cut=cut)
    source = opened(model)
    halves = factor_tensors(source.config, SEQUENCES, cut, source.checkpoint, seed=99)
    stored = load_file(str(model / "decomposed.safetensors"))
    found: Dict[str, torch.Tensor] = {}
    for build, factors in zip((build_net_1, build_net_2), halves):
        net = build(source.config, SEQUENCES, cut)
        fill(net, [*pretrained_tensors(net, source.checkpoint), *factors], seed=99)
        found.update(net.whole_parameters())
    assert found.keys() == stored.keys()
    assert all(found[name].equal(x) for name, x in stored.items())


@pytest.mark.parametrize(
    "options", [{"split_rank": 8}, {"split_layer": 1}, {"residual": "low-rank"}, {"mode": "sl"}, {"mode": "local"}]
)
def test_another_cut_is_refused(tmp_path: Path, options: Dict[str, Any]) -> None:
    source = opened(save_tiny(tmp_path / "model", cut=Cut("sft", 2, 4)))
    given = run_options(**{"split_layer": 2, "split_rank": 4, **options}).cut
    if options == {"mode": "local"}:
        assert cut_of(given, source) == source.cut
        return
    with pytest.raises(
        CutError, match=r"in block 2 with rank 4 .*--mode sft --split-layer 2 --split-rank 4 --residual none"
    ):
        cut_of(given, source)


@pytest.mark.parametrize("change", [{"rank": "4"}, {"layer": "bert"}, {"residual": "some"}])
def test_an_export_that_says_nothing_sensible(tmp_path: Path, change: Dict[str, Any]) -> None:
    model = exported(save_tiny(tmp_path / "model", cut=Cut("sft", 2, 4)), FACTORED)
    path = model / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "sft": {**content["sft"], **change}}))
    with pytest.raises(CheckpointError, match="does not say which layer is split"):
        opened(model)


@pytest.mark.parametrize("of", [lambda model: model, lambda model: exported(model, FACTORED)], ids=["result", "export"])
def test_a_run_on_a_result(tmp_path: Path, of: Callable[[Path], Path]) -> None:
    """In one process, which is not told where the model is decomposed; the result is such a model again."""
    model = save_tiny(tmp_path / "model", cut=Cut("sft", 2, 4))
    job = sst2(tmp_path / "data", train_rows=8)
    options = {"mode": "local", "split_layer": None, "max_steps": 1, "learning_rate": 0.0, "disable_tqdm": True}
    TrainingRun(run_options(model=str(of(model)), data_dir=job.data_dir, output_dir=tmp_path / "out", **options)).run()
    before, after = load_model(model), load_model(tmp_path / "out")
    assert after.description.cut == before.description.cut
    assert torch.equal(logits_of(before.net), logits_of(after.net))
