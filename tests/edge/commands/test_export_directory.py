"""What `sft-edge export` writes: weights, code, configuration, tokenizer and card."""

from __future__ import annotations

import ast
import builtins
import re
from pathlib import Path
from typing import Callable, List, Optional

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.jobs import read_json
from support.saved import save_tiny
from support.tiny import tiny_tokenizer

from sft.models import Cut
from sft_edge.commands.export.card import export_card
from sft_edge.commands.export.content import Export
from sft_edge.model_files import DENSE, FACTORED
from sft_edge.model_files.saved import load_model

CUT = Cut("sft", 2, 4)
W = "bert.encoder.layer.1.output.dense"


@pytest.mark.parametrize("residual", ["none", "low-rank", "full"])
def test_dense_is_the_product_and_factored_is_smaller(write: Callable[..., Path], residual: str) -> None:
    cut = Cut("sft", 2, 4, residual)
    factors = load_file(str(write(FACTORED, cut=cut) / "model.safetensors"))
    dense = load_file(str(write(DENSE, cut=cut) / "model.safetensors"))
    u, s, v = (factors[f"{W}.ffn{number}.weight"] for number in (1, 2, 3))
    place = W if residual == "full" else f"{W}.dense"
    assert dense[f"{place}.weight"].shape == (32, 64 + 32 if residual == "low-rank" else 64)
    torch.testing.assert_close(dense[f"{place}.weight"], v @ s @ u)
    assert dense[f"{place}.bias"].equal(factors[f"{W}.ffn3.bias"])
    assert sum(x.numel() for x in factors.values()) < sum(x.numel() for x in dense.values())


@pytest.mark.parametrize(
    ("cut", "form", "has_code"),
    [
        (None, DENSE, False),
        (Cut("sft", 2, 4, "full"), DENSE, False),
        (Cut("sft", 2, 4, "full"), FACTORED, True),
        (Cut("sft", 2, 4, "low-rank"), DENSE, True),
        (CUT, DENSE, True),
    ],
)
def test_code_travels_only_where_the_library_has_none(
    write: Callable[..., Path], cut: Optional[Cut], form: str, has_code: bool
) -> None:
    to = write(form, cut=cut)
    config = read_json(to / "config.json")
    assert (to / "modeling_sft.py").exists() == has_code
    assert ("auto_map" in config) == ("sft" in config) == has_code
    assert config["model_type"] == ("sft-bert" if has_code else "bert")
    if not has_code:
        model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
            str(to), output_loading_info=True
        )
        assert type(model) is transformers.BertForSequenceClassification
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]


def test_matrices_of_gpt2_stay_as_it_holds_them(write: Callable[..., Path]) -> None:
    tensors = load_file(str(write(family="gpt2", cut=Cut("sft", 2, 4, "full")) / "model.safetensors"))
    assert tensors["transformer.h.1.mlp.c_proj.weight"].shape == (64, 32)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("form", [DENSE, FACTORED])
def test_the_code_names_all_that_it_uses(write: Callable[..., Path], family: str, form: str) -> None:
    text = (write(form, family=family, cut=CUT) / "modeling_sft.py").read_text()
    tree = ast.parse(text)
    imported: List[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported.append(str(node.module))
    assert set(imported) == {"__future__", "typing", "torch", "transformers"}
    bound = set(dir(builtins))
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, ast.alias):
            bound.add(node.asname or node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert used - bound == set()
    assert "noqa" not in text
    assert "mypy" not in text


def test_labels_and_the_kind_of_problem(write: Callable[..., Path]) -> None:
    names = ["bad", "so-so", "good"]
    values = {"problem_type": "multi_label_classification", "label_names": names}
    config = read_json(write(cut=CUT, num_labels=3, description=values) / "config.json")
    assert config["id2label"] == {"0": "bad", "1": "so-so", "2": "good"}
    assert config["label2id"] == {"bad": 0, "so-so": 1, "good": 2}
    assert config["problem_type"] == "multi_label_classification"


def test_the_tokenizer_does_what_the_task_did(write: Callable[..., Path]) -> None:
    """As much is cut off as in training, and no token types are made for a model that has none."""
    bert = tiny_tokenizer("bert")
    to = write(family="roberta", type_vocab_size=1, tokenizer=bert, description={"max_seq_length": 6})
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(to))
    encoding = tokenizer("a good film and the worst plot of them", "it", truncation=True)
    assert len(encoding["input_ids"]) == 6
    assert set(encoding) == {"input_ids", "attention_mask"}


def test_a_decoder_knows_its_padding(write: Callable[..., Path]) -> None:
    tokenizer = tiny_tokenizer("gpt2")
    tokenizer.pad_token, tokenizer.eos_token, tokenizer.padding_side = None, "[SEP]", "left"
    to = write(family="gpt2", tokenizer=tokenizer, pad_token_id=None)
    assert read_json(to / "config.json")["pad_token_id"] == tokenizer.eos_token_id
    opened = transformers.AutoTokenizer.from_pretrained(str(to))
    assert (opened.pad_token, opened.padding_side) == ("[SEP]", "right")


def test_half_precision_in_the_configuration_says_nothing(write: Callable[..., Path]) -> None:
    """Newer releases would open float32 weights in it."""
    to = write(torch_dtype="float16")
    assert transformers.AutoModelForSequenceClassification.from_pretrained(str(to)).dtype == torch.float32


@pytest.mark.parametrize(
    ("head", "auto_class"),
    [
        ("sequence-classification", "AutoModelForSequenceClassification"),
        ("question-answering", "AutoModelForQuestionAnswering"),
    ],
)
@pytest.mark.parametrize("cut", [None, CUT])
def test_the_card(tmp_path: Path, head: str, auto_class: str, cut: Optional[Cut]) -> None:
    card = export_card(Export(load_model(save_tiny(tmp_path, head=head, cut=cut)), DENSE))
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: ")
    assert "base_model: tiny\n---\n\n# tiny, fine-tuned on sst2\n" in card
    assert ("trust_remote_code=True" in card) == ("modeling_sft.py" in card) == (cut is not None)
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    imported = {alias.name for alias in ast.parse(code).body[0].names}  # type: ignore[attr-defined]
    assert auto_class in imported
    assert all(hasattr(transformers, name) for name in imported)
