"""A bi-encoder of sentence-transformers trains split as it does on one machine, and opens again as what it became."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from support.bodies import CUT, D, adamw, config_of
from support.hosting_script import ScriptCloud
from support.tiny import tiny_tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel

from sft import SFTOptimizer
from sft.errors import CutError

sentences = pytest.importorskip("sentence_transformers", reason="it comes with the extra `demo`")

TEXTS = [
    (["a good film", "it rained all day long"], ["a fine movie", "the weather was bad"]),
    (["one", "two three"],) * 2,
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's directory, as such models come."""
    directory = tmp_path_factory.mktemp("sentences")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModel.from_config(config_of("bert")).save_pretrained(directory / "body")
    tiny_tokenizer("bert").save_pretrained(directory / "body")
    newer = importlib.util.find_spec("sentence_transformers.sentence_transformer") is not None
    parts = importlib.import_module(f"sentence_transformers.{'sentence_transformer.modules' if newer else 'models'}")
    body = parts.Transformer(str(directory / "body"), max_seq_length=16)
    pooling = parts.Pooling(D, pooling_mode="mean")
    modules = [body, pooling, parts.Dense(D, 8), parts.Normalize()]
    sentences.SentenceTransformer(modules=modules, device="cpu").save(str(directory / "model"), create_model_card=False)
    return directory / "model"


def opened(path: Path, **options: Any) -> Any:
    return sentences.SentenceTransformer(str(path), device="cpu", **options)


def train(model: Any, optimizer: Any) -> list[Tensor]:
    """By the usual loss of pairs: each text's partner against those of the others."""
    told = []
    model.train()
    for one, other in TEXTS * 2:
        optimizer.zero_grad()
        a, b = (model(model.preprocess(texts))["sentence_embedding"] for texts in (one, other))
        loss = functional.cross_entropy(5 * a @ b.T, torch.arange(len(one)))
        loss.backward()
        optimizer.step()
        told.append(loss.detach())
    return [*told, torch.as_tensor(model.encode(["a film", "the rain was long"]))]


def wrap(model: Any, cloud: ScriptCloud) -> SFTOptimizer:
    return SFTOptimizer(adamw(model), role="edge", model=model, server=cloud.address, **CUT)


def test_it_trains_as_on_one_machine_and_is_saved(saved: Path, tmp_path: Path) -> None:
    whole = opened(saved)
    SFTOptimizer.decompose(whole, **CUT)
    expected = train(whole, adamw(whole))
    model, other = opened(saved), opened(saved)
    with ScriptCloud(other, adamw(other), **CUT) as cloud, wrap(model, cloud) as optimizer:
        torch.testing.assert_close(train(model, optimizer), expected, rtol=1e-5, atol=1e-5)
        model.save(str(tmp_path / "split"), create_model_card=False)
    whole.save(str(tmp_path / "whole"), create_model_card=False)
    for path in (tmp_path / "split", tmp_path / "whole"):
        again = opened(path, trust_remote_code=True)
        embeddings = torch.as_tensor(again.encode(["a film", "the rain was long"]))
        torch.testing.assert_close(embeddings, expected[-1], rtol=1e-5, atol=1e-5)


def test_what_a_call_cannot_give_is_refused(saved: Path) -> None:
    model, other = opened(saved), opened(saved)
    with ScriptCloud(other, adamw(other), **CUT) as cloud, wrap(model, cloud):
        features = model.preprocess(["a film"])
        with pytest.raises(CutError, match="position_ids cannot be given to a model that is cut: give texts alone"):
            model({**features, "position_ids": torch.zeros(1, 3).long()})
        with pytest.raises(CutError, match="is called with input_ids and attention_mask"):
            model({"input_ids": features["input_ids"]})
        assert model(features)["sentence_embedding"].shape == (1, 8)
        assert model.get_sentence_embedding_dimension() == 8


def test_prompts_are_pooled_unless_they_are_to_be_left_out(saved: Path) -> None:
    for leaves_out in (False, True):
        model, other = opened(saved), opened(saved)
        for one in (model, other):
            one[1].include_prompt = not leaves_out
        with ScriptCloud(other, adamw(other), **CUT) as cloud, wrap(model, cloud):
            if leaves_out:
                with pytest.raises(CutError, match="leaves the prompt out, which no module above the cut sees"):
                    model.encode(["a film"], prompt="one two ")
            else:
                assert model.encode(["a film"], prompt="one two ").shape == (1, 8)


def test_a_model_that_does_not_begin_with_token_embeddings(saved: Path) -> None:
    model = opened(saved)
    if not hasattr(model[0], "modality_config"):
        pytest.skip("this release of sentence-transformers knows no other models")
    model[0].modality_config["text"]["method_output_name"] = "pooler_output"
    with pytest.raises(CutError, match="begins with a Transformer, not with token embeddings of a transformers model"):
        SFTOptimizer(adamw(model), role="edge", model=model, server="127.0.0.1:9", **CUT)
