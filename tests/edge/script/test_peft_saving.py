"""What a script saves of a model with adapters: all that was trained, opened as that and gone on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file
from support.adapted import adapted, script, sgd
from support.opened import code_copied_to
from support.script import batches, tiny_model, wrap

from sft.errors import UsageError
from sft.models import HEADS

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft itself asks
    pytest.mark.filterwarnings("ignore:Could not find a config file in"),  # older peft, of a model without a name
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),  # torch 2.1, of its own loader
]


@pytest.mark.one_in(7)
@pytest.mark.parametrize(
    ("family", "head", "settings"),
    [
        ("bert", "sequence-classification", {"use_rslora": True, "rank_pattern": {"layer.2.attention.self.value": 2}}),
        (
            "bert",
            "sequence-classification",
            {"target_modules": ["word_embeddings", "query"], "modules_to_save": ["pooler", "position_embeddings"]},
        ),
        ("bert", "sequence-classification", {"target_modules": ["layer.1.output.dense"]}),
        ("gpt2", "causal-lm", {}),
        ("llama", "sequence-classification", {"target_modules": "all-linear"}),
        ("bert", "token-classification", {}),
        ("roberta", "masked-lm", {}),
    ],
)
def test_what_it_saves_is_all_that_was_trained(
    tmp_path: Path, family: str, head: str, settings: Dict[str, Any]
) -> None:
    """Adapters are merged: nothing is needed beside the directory. From the file beside, training goes on."""
    to = tmp_path / f"saved-{len(str(settings))}-{family}"
    model = adapted(family, head, **settings)
    (batch,) = batches(1, model.get_base_model(), labels=False)
    with wrap(model, sgd(model)) as optimizer:
        script(model, optimizer)
        model.eval().save_pretrained(str(to))
        said, trained_state = model(**batch).logits.detach(), model.state_dict()
    assert not (to / "adapter_config.json").exists()
    with code_copied_to(tmp_path / "modules"):
        opened = HEADS[head].auto_class.from_pretrained(str(to), trust_remote_code=True).eval()
    assert not [name for name in opened.state_dict() if "lora" in name]
    mask = batch["attention_mask"].bool() if HEADS[head].per_token else slice(None)
    torch.testing.assert_close(opened(**batch).logits.detach()[mask], said[mask], rtol=1e-4, atol=1e-5)

    again = adapted(family, head, **settings)
    with wrap(again, sgd(again)):
        again.load_adapter(str(to), "default", is_trainable=True)
        assert all(trained_state[name].equal(tensor) for name, tensor in again.state_dict().items())


def test_adapters_that_are_not_of_this_model_are_not_loaded(tmp_path: Path) -> None:
    of_peft, cut_elsewhere = adapted(), adapted()
    of_peft.save_pretrained(str(tmp_path / "peft"))
    with wrap(cut_elsewhere, sgd(cut_elsewhere), split_layer=1):
        cut_elsewhere.save_pretrained(str(tmp_path / "elsewhere"))
    model = adapted()
    with wrap(model, sgd(model)):
        before = model.state_dict()
        for name, match in {
            "peft": r"peft/adapter_model\.safetensors is of another model or cut: it (has|lacks)",
            "elsewhere": "is of another model or cut: it (has|lacks)",
            "nothing": r"there is no .*nothing/adapter_model\.safetensors",
        }.items():
            with pytest.raises(UsageError, match=match):
                model.load_adapter(str(tmp_path / name), "default")
        model.save_pretrained(str(tmp_path / "own"))
        with pytest.raises(UsageError, match="takes no 'other'"):
            model.load_adapter(str(tmp_path / "own"), "other")
        assert all(before[name].equal(tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("size", ["20KB", "1GB"])
def test_a_library_model_with_adapters_saves_all_and_takes_no_merged_weights(tmp_path: Path, size: str) -> None:
    to = tmp_path / f"added-{size}"
    model = tiny_model()
    model.add_adapter(LoraConfig(r=4, lora_alpha=8))
    with wrap(model, sgd(model)) as optimizer:
        script(model, optimizer)
        model.eval().save_pretrained(str(to), max_shard_size=size)
        (batch,) = batches(1, model, labels=False)
        said = model(**batch).logits.detach()
        weights = {}
        for file in to.glob("model*.safetensors"):
            weights.update(load_file(str(file)))
        with pytest.raises(UsageError, match=r"adapters merged: call model\.load_adapter\(DIR\) instead"):
            model.load_state_dict(weights, strict=False)
        model.load_adapter(str(to))
        assert model(**batch).logits.equal(said)
    with code_copied_to(tmp_path / "modules"):
        opened = HEADS["sequence-classification"].auto_class.from_pretrained(str(to), trust_remote_code=True).eval()
    torch.testing.assert_close(opened(**batch).logits.detach(), said, rtol=1e-4, atol=1e-5)


def test_the_model_inside_saves_the_same_and_what_is_not_the_whole_is_refused(tmp_path: Path) -> None:
    model = adapted()
    with wrap(model, sgd(model)):
        model.save_pretrained(str(tmp_path / "outer"))
        model.get_base_model().save_pretrained(str(tmp_path / "inner"))
        for path in (tmp_path / "outer").glob("*.safetensors"):
            assert path.read_bytes() == (tmp_path / "inner" / path.name).read_bytes()
        with pytest.raises(UsageError, match="state_dict lacks 'base_model"):
            model.save_pretrained(str(tmp_path / "none"), state_dict=get_peft_model_state_dict(model))
        with pytest.raises(UsageError, match="leave selected_adapters out"):
            model.save_pretrained(str(tmp_path / "none"), selected_adapters=["other"])
    assert not (tmp_path / "none").exists()
