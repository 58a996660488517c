"""Scripts that load weights before they make an optimizer: the factors are in their places first."""

from __future__ import annotations

import copy
import inspect
import io
from pathlib import Path
from typing import Any, Callable, Dict

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.bodies import Tagger, made
from support.opened import code_copied_to
from support.script import adamw, batches, one_machine, sgd, tiny_model, with_dropout_above, wrap

from sft import SFTOptimizer
from sft.errors import CutError, UsageError
from sft.models import HEADS, Cut

CUT: Dict[str, Any] = {"split_layer": 2, "split_rank": 4}
KINDS = [("bert", "sequence-classification"), ("gpt2", "causal-lm"), ("deberta-v2", "token-classification")]


def steps(model: Any, optimizer: Any, first: int, last: int) -> None:
    for batch in batches(last, model)[first:]:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


def same(one: Dict[str, torch.Tensor], other: Dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(x.equal(other[name]) for name, x in one.items())


def with_dropout(family: str, head: str, **overrides: Any) -> Any:
    """Above the cut: the cloud's, which is drawn from the seed of the session that the run began with."""
    return with_dropout_above(tiny_model(family, head, **overrides), hidden_dropout_prob=0.1, resid_pdrop=0.1)


@pytest.mark.parametrize("residual", ["none", "low-rank"])
@pytest.mark.parametrize(("family", "head"), KINDS)
def test_it_is_the_whole_model_that_both_halves_are(family: str, head: str, residual: str) -> None:
    model = tiny_model(family, head)
    calibration = batches(2, model, labels=False) if residual == "low-rank" else []
    reference = one_machine(model, Cut("sft", 2, 4, residual), calibration)
    held = dict(model.named_parameters())
    SFTOptimizer.decompose(model, **CUT, residual=residual, calibration=calibration or None)
    (batch,) = batches(1, model)
    mask = batch["attention_mask"].bool() if HEADS[head].per_token else slice(None)
    with torch.no_grad():
        expected = reference(**{name: x for name, x in batch.items() if name != "labels"}).logits[mask]
        torch.testing.assert_close(model(**batch).logits[mask], expected, rtol=1e-5, atol=1e-6)
    others = [name for name, parameter in model.named_parameters() if held.get(name) is not parameter]
    assert all(".ffn" in name or name == "lm_head.weight" for name in others)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("family", "head"), KINDS)
@pytest.mark.parametrize("make", [adamw, sgd])
def test_it_trains_as_one_that_is_decomposed_where_it_is_cut(family: str, head: str, make: Any) -> None:
    ends = []
    for before in (False, True):
        model = with_dropout(family, head)
        if before:
            SFTOptimizer.decompose(model, **CUT)
        with wrap(model, make(model)) as optimizer:
            steps(model, optimizer, 0, 3)
            ends.append(model.state_dict())
    assert same(*ends)


@pytest.mark.first_only
@pytest.mark.parametrize(("family", "head"), KINDS)
def test_a_run_goes_on_from_weights_that_are_loaded_first(family: str, head: str) -> None:
    """In another session, to the bits of one that was never stopped."""
    straight, first = with_dropout(family, head), with_dropout(family, head)
    with wrap(straight, adamw(straight)) as optimizer:
        steps(straight, optimizer, 0, 4)
        expected = straight.state_dict()
    with wrap(first, adamw(first)) as optimizer:
        steps(first, optimizer, 0, 2)
        saved = copy.deepcopy({"model": first.state_dict(), "optimizer": optimizer.state_dict()})
    again = with_dropout(family, head, initializer_range=0.3)  # what it was drawn with is of no account
    SFTOptimizer.decompose(again, **CUT)
    loaded = again.load_state_dict(saved["model"])
    assert not loaded.missing_keys
    assert not loaded.unexpected_keys
    with wrap(again, adamw(again), seed=99) as optimizer:
        optimizer.load_state_dict(saved["optimizer"])
        steps(again, optimizer, 2, 4)
        assert same(again.state_dict(), expected)


def test_what_it_saves_opens_as_what_it_is(tmp_path: Path) -> None:
    model, opens = tiny_model(), transformers.AutoModelForSequenceClassification.from_pretrained
    SFTOptimizer.decompose(model, **CUT)
    (batch,) = batches(1, model)
    model.eval().save_pretrained(str(tmp_path / "before"))
    with code_copied_to(tmp_path / "modules"):
        opened = opens(str(tmp_path / "before"), trust_remote_code=True).eval()
        torch.testing.assert_close(opened(**batch).logits, model(**batch).logits)
        with wrap(model, sgd(model)) as optimizer:
            steps(model.train(), optimizer, 0, 1)
            model.eval().save_pretrained(str(tmp_path / "after"))
            with torch.no_grad():
                said = model(**batch).logits
        opened = opens(str(tmp_path / "after"), trust_remote_code=True).eval()
        torch.testing.assert_close(opened(**batch).logits, said)


def pickled(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def averaged(model: Any) -> Any:
    return torch.optim.swa_utils.AveragedModel(model).module


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, averaged])
@pytest.mark.parametrize("make", [tiny_model, lambda: made(Tagger)], ids=["library's", "own"])
def test_a_copy_saves_and_loads_its_own(copied: Callable[[Any], Any], make: Any, tmp_path: Path) -> None:
    model = make()
    SFTOptimizer.decompose(model, **CUT)
    twin = copied(model)
    others = {name: x.clone() for name, x in model.state_dict().items()}
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    for one in [twin] if make is tiny_model else [twin, twin.bert]:
        mine = {name: x.clone() for name, x in one.state_dict().items()}
        one.save_pretrained(str(tmp_path))
        saved = load_file(str(tmp_path / "model.safetensors"))
        assert all(saved[name].equal(x) for name, x in mine.items())
        assert saved.keys() > mine.keys()  # what has the library's own class refuse it
        one.load_state_dict({name: x * 2 for name, x in saved.items()})
        assert all(x.equal(mine[name] * 2) for name, x in one.state_dict().items())
        of_class = type(one).save_pretrained.__get__(one)
        assert inspect.signature(one.save_pretrained) == inspect.signature(of_class)
    assert same(model.state_dict(), others)


def test_half_precision() -> None:
    model = tiny_model("llama").bfloat16()
    SFTOptimizer.decompose(model, **CUT)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    with wrap(model, sgd(model)) as optimizer:
        steps(model, optimizer, 0, 1)


def test_what_is_frozen_stays_so() -> None:
    model = tiny_model()
    model.bert.encoder.layer[1].requires_grad_(False)
    SFTOptimizer.decompose(model, **CUT)
    with wrap(model, sgd(model)) as optimizer:
        before = {name: x.clone() for name, x in model.state_dict().items()}
        steps(model, optimizer, 0, 1)
        after = model.state_dict()
        matrices = [name for name in before if name.endswith("dense.weight") or ".ffn" in name]
        assert all(after[name].equal(before[name]) is ("layer.1." in name) for name in matrices)


def test_what_cannot_be_decomposed() -> None:
    with pytest.raises(UsageError, match="split_layer is for transformers models"):
        SFTOptimizer.decompose(torch.nn.Linear(2, 2), split_layer=1)
    with pytest.raises(UsageError, match="not for masked language models: load their weights after"):
        SFTOptimizer.decompose(tiny_model("bert", "masked-lm"), **CUT)
    model = tiny_model()
    with pytest.raises(CutError, match="blocks 1 to 3"):
        SFTOptimizer.decompose(model, split_layer=4)
    SFTOptimizer.decompose(model, **CUT)
    for other in ({"split_layer": 1}, {"split_rank": 5}, {"residual": "low-rank", "calibration": batches(1, model)}):
        with pytest.raises(UsageError, match="is decomposed with split_layer=2, split_rank=4, residual='none': cut it"):
            wrap(model, sgd(model), server="127.0.0.1:1", **other)
    for cut in (CUT, {"split_layer": 3, "split_rank": 4}):
        with pytest.raises(UsageError, match="is decomposed"):
            SFTOptimizer.decompose(model, **cut)
    model = tiny_model()
    with wrap(model, sgd(model)), pytest.raises(UsageError, match="is cut already"):
        SFTOptimizer.decompose(model, **CUT)
