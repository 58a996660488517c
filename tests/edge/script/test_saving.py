"""What a script saves opens as what it has trained, where this package is not installed, and nothing else opens it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterator

import pytest
import torch
from safetensors.torch import load_file
from support.opened import code_copied_to
from support.saved import save_tiny
from support.script import batches, sgd, tiny_model, wrap
from support.tiny import tiny_tokenizer

from sft.errors import CheckpointError, SFTError, StorageError, UsageError
from sft.models import HEADS, Cut
from sft_edge.commands.export.content import Export
from sft_edge.model_files import DENSE, FACTORED, load_model, task_of

AUTO = {name: head.auto_class for name, head in HEADS.items()}


@pytest.fixture(autouse=True)
def code(tmp_path: Path) -> Iterator[None]:
    with code_copied_to(tmp_path / "modules"):
        yield


def trained(model: Any, to: Path, **options: Any) -> Any:
    """What the model says in the script, after two steps and `save_pretrained`."""
    two = batches(2, model)
    calibration = batches(1, model, labels=False) if options.get("residual") == "low-rank" else None
    with wrap(model, sgd(model), calibration=calibration, **options) as optimizer:
        for batch in two:
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
        model.eval().save_pretrained(str(to))
        with torch.no_grad():
            output = model(**two[0])
            return two[0], type(output)(**{name: x + 0 for name, x in output.items()})


def logits(output: Any) -> torch.Tensor:
    return output.start_logits if hasattr(output, "start_logits") else output.logits


@pytest.mark.one_in(5)
@pytest.mark.parametrize("residual", ["none", "low-rank"])
@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("bert", "sequence-classification"),
        ("distilbert", "question-answering"),
        ("roberta", "sequence-classification"),
        ("deberta-v2", "sequence-classification"),
        ("gpt2", "causal-lm"),
        ("opt", "causal-lm"),
        ("llama", "sequence-classification"),
        ("bert", "token-classification"),
        ("bert", "multiple-choice"),
        ("bert", "masked-lm"),
        ("distilbert", "masked-lm"),
        ("electra", "masked-lm"),
        ("xlm-roberta", "masked-lm"),
        ("deberta-v2", "masked-lm"),
    ],
)
def test_it_opens_as_what_was_trained(tmp_path: Path, family: str, head: str, residual: str) -> None:
    to = tmp_path / f"saved-{family}-{residual}"
    batch, said = trained(tiny_model(family, head), to, residual=residual)
    opened = AUTO[head].from_pretrained(str(to), trust_remote_code=True).eval()
    with torch.no_grad():
        again = opened(**batch)
    mask = batch["attention_mask"].bool() if HEADS[head].per_token else slice(None)
    torch.testing.assert_close(logits(again)[mask], logits(said)[mask], rtol=1e-5, atol=1e-5)


def test_the_librarys_own_class_refuses_it(tmp_path: Path) -> None:
    model = tiny_model()
    kind = type(model)
    trained(model, tmp_path / "saved")
    with pytest.raises(RuntimeError, match=r"size mismatch|ignore_mismatched_sizes"):
        kind.from_pretrained(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="trust_remote_code"):
        AUTO["sequence-classification"].from_pretrained(str(tmp_path / "saved"), trust_remote_code=False)


def test_its_weights_are_those_of_state_dict(tmp_path: Path) -> None:
    """Also where the library cuts them into several files; what stands in W's place, loading passes over."""
    model = tiny_model()
    with wrap(model, sgd(model)) as optimizer:
        model.save_pretrained(str(tmp_path), max_shard_size="20KB")
        state_dict = model.state_dict()
        files = sorted(tmp_path.glob("model-*.safetensors"))
        saved = {name: tensor for file in files for name, tensor in load_file(str(file)).items()}
        assert len(files) > 1
        assert saved.keys() - state_dict.keys() == {"bert.encoder.layer.1.output.dense.weight"}
        assert all(saved[name].equal(tensor) for name, tensor in state_dict.items())
        for batch in batches(2, model):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
        model.load_state_dict(saved)
        assert all(state_dict[name].equal(tensor) for name, tensor in model.state_dict().items())


def test_a_state_dict_that_is_given_is_saved(tmp_path: Path) -> None:
    model = tiny_model()
    with wrap(model, sgd(model)):
        doubled = {name: 2 * tensor for name, tensor in model.state_dict().items()}
        model.save_pretrained(str(tmp_path), state_dict=doubled)
        saved = load_file(str(tmp_path / "model.safetensors"))
        assert all(saved[name].equal(tensor) for name, tensor in doubled.items())
        name = "classifier.weight"
        lacking = {own: tensor for own, tensor in doubled.items() if own != name}
        with pytest.raises(UsageError, match=f"state_dict lacks '{name}'"):
            model.save_pretrained(str(tmp_path), state_dict=lacking)
        with pytest.raises(UsageError, match="state_dict has, and the model has not, 'more'"):
            model.save_pretrained(str(tmp_path), state_dict={**doubled, "more": torch.zeros(2)})


def test_what_the_script_has_named_is_in_the_configuration(tmp_path: Path) -> None:
    model = tiny_model()
    with wrap(model, sgd(model)):
        model.config.id2label = {0: "no", 1: "perhaps", 2: "yes"}
        model.save_pretrained(str(tmp_path / "saved-names"))
    opened = AUTO["sequence-classification"].from_pretrained(str(tmp_path / "saved-names"), trust_remote_code=True)
    assert opened.config.id2label == {0: "no", 1: "perhaps", 2: "yes"}
    assert type(model.config).__name__ == "BertConfig"
    assert not hasattr(model.config, "sft")


def test_another_model_was_there_before(tmp_path: Path) -> None:
    """Of a run, of a save in several files or in one, of peft: nothing of it is left that could be opened instead."""
    to = tmp_path / "saved-over"
    save_tiny(to, cut=Cut("sft", 2, 4))
    (to / "adapter_config.json").write_text("{}")
    (to / "notes.txt").write_text("mine")
    model = tiny_model()
    with wrap(model, sgd(model)):
        for size in ("20KB", "1GB", "20KB"):
            model.save_pretrained(str(to), max_shard_size=size)
            (single, index) = (to / "model.safetensors").exists(), (to / "model.safetensors.index.json").exists()
            assert (single, index) == (size == "1GB", size == "20KB")
            held = load_model(to).net.whole_parameters()
            assert all(held[name].equal(tensor) for name, tensor in model.state_dict().items())
    assert not [
        path.name for path in to.iterdir() if "decomposed" in path.name or path.name.startswith(("adapter", "."))
    ]
    assert (to / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"push_to_hub": True}, r"push_to_hub=True\) is not for a cut model: call model\.push_to_hub"),
        ({"state_dict": {}}, "state_dict lacks 'bert"),
    ],
)
def test_what_saving_refuses(tmp_path: Path, options: Dict[str, Any], match: str) -> None:
    model = tiny_model()
    with wrap(model, sgd(model)):
        with pytest.raises(UsageError, match=match):
            model.save_pretrained(str(tmp_path / "saved"), **options)
        wrong = {name: torch.zeros(3) for name in model.state_dict()}
        with pytest.raises(UsageError, match=r"state_dict is not this model's: .*size mismatch"):
            model.save_pretrained(str(tmp_path / "saved"), state_dict=wrong)
        (tmp_path / "file").write_text("")
        with pytest.raises(StorageError, match=r"^save_pretrained: cannot write .*file: .*; free some space, or give"):
            model.save_pretrained(str(tmp_path / "file"))
        assert not list(tmp_path.glob("saved/*"))


def test_it_can_be_saved_often_and_nothing_is_left_in_the_systems_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "system"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    model = tiny_model()
    with wrap(model, sgd(model)):
        for name in ("first", "second"):
            model.save_pretrained(str(tmp_path / name))
            assert (tmp_path / name / "modeling_sft.py").stat().st_size > 1000
    assert not list(place.iterdir())


def test_a_session_that_is_over(tmp_path: Path) -> None:
    model = tiny_model()
    with wrap(model, sgd(model)):
        pass
    with pytest.raises(SFTError, match="session"):
        model.save_pretrained(str(tmp_path))
    assert not list(tmp_path.glob("model*"))


@pytest.mark.parametrize("head", ["sequence-classification", "question-answering"])
def test_this_package_asks_it_too(tmp_path: Path, head: str) -> None:
    """What `sft-edge predict` and `evaluate` open says what the script's model said."""
    batch, said = trained(tiny_model("bert", head), tmp_path)
    tiny_tokenizer(max_length=24).save_pretrained(str(tmp_path))
    saved = load_model(tmp_path)
    with torch.no_grad():
        again = saved.net({"input_ids": batch["input_ids"]}, batch["attention_mask"].sum(1).tolist(), {}).logits
    if head == "question-answering":
        again = again[..., 0].masked_fill(batch["attention_mask"] == 0, torch.finfo(torch.float32).min)
    torch.testing.assert_close(again, logits(said), rtol=1e-5, atol=1e-5)
    assert saved.description.max_seq_length == 24
    assert task_of(saved.description).head == head


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("form", "head"), [(DENSE, "sequence-classification"), (FACTORED, "sequence-classification"), (DENSE, "masked-lm")]
)
def test_an_export_of_it(tmp_path: Path, form: str, head: str) -> None:
    """And an export of that export."""
    batch, said = trained(tiny_model("bert", head), tmp_path / "saved")
    tiny_tokenizer().save_pretrained(str(tmp_path / "saved"))
    for source, to in (("saved", "first"), ("first", "second")):
        (tmp_path / to).mkdir()
        Export(load_model(tmp_path / source), form).write(tmp_path / to)
    saved = load_model(tmp_path / "second")
    with torch.no_grad():
        again = saved.net({"input_ids": batch["input_ids"]}, batch["attention_mask"].sum(1).tolist(), {}).logits
    mask = batch["attention_mask"].bool() if HEADS[head].per_token else slice(None)
    torch.testing.assert_close(again[mask], said.logits[mask], rtol=1e-4, atol=1e-4)


def test_a_language_model_has_no_rows_to_answer(tmp_path: Path) -> None:
    trained(tiny_model("gpt2", "causal-lm"), tmp_path)
    tiny_tokenizer().save_pretrained(str(tmp_path))
    with pytest.raises(UsageError, match="a model for causal-lm is asked with transformers"):
        task_of(load_model(tmp_path).description)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sft": {"form": "factored"}}, "does not say which layer is split"),
        ({"architectures": None}, "holds no sft.json"),
        ({"architectures": 3}, "is no list of classes"),
        ({"architectures": ["BertModel"]}, "holds no sft.json"),
        ({"sft": None}, "no model of transformers"),
        ({"model_type": "sft-x"}, "no model of transformers"),
    ],
)
def test_a_configuration_that_is_odd(tmp_path: Path, change: Dict[str, Any], message: str) -> None:
    model = tiny_model()
    with wrap(model, sgd(model)):
        model.save_pretrained(str(tmp_path))
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)
