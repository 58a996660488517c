"""The released models' shapes, cut on the meta device: nothing is downloaded, nothing takes memory."""

from __future__ import annotations

from typing import Any, Dict, Tuple

import pytest
from transformers import CONFIG_MAPPING, AutoConfig

from sft.models import Cut, build_net_1, build_net_2, build_whole, ffn_out_name, max_positions
from sft.models.weights import shapes

_BERT = {"vocab_size": 30522}
_ROPE_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# What the hub's config.json of each release says where it is not the library's default.
RELEASES: Dict[str, Tuple[str, Dict[str, Any]]] = {
    "bert-base-uncased": ("bert", _BERT),
    "roberta-base": ("roberta", {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}),
    "xlm-roberta-base": ("xlm-roberta", {"vocab_size": 250002, "max_position_embeddings": 514, "type_vocab_size": 1}),
    "electra-base-discriminator": (
        "electra",
        {"embedding_size": 768, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    ),
    "distilbert-base-uncased": ("distilbert", {}),
    "deberta-v3-base": (
        "deberta-v2",
        {
            "vocab_size": 128100,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "type_vocab_size": 0,
            "relative_attention": True,
            "position_buckets": 256,
            "max_relative_positions": -1,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
            "pooler_hidden_size": 768,
        },
    ),
    "gpt2": ("gpt2", {}),
    "opt-125m": ("opt", {"hidden_size": 768, "ffn_dim": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}),
    "Llama-3.2-1B": (
        "llama",
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "rope_theta": 500000.0,
            "rope_scaling": _ROPE_LLAMA3,
            "tie_word_embeddings": True,
        },
    ),
    "Qwen2.5-0.5B": (
        "qwen2",
        {
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
        },
    ),
    "Qwen3-0.6B": (
        "qwen3",
        {
            "vocab_size": 151936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": True,
        },
    ),
    "Mistral-7B-v0.1": ("mistral", {"max_position_embeddings": 32768, "tie_word_embeddings": False}),
    "gemma-2b": (
        "gemma",
        {
            "vocab_size": 256000,
            "hidden_size": 2048,
            "intermediate_size": 16384,
            "num_hidden_layers": 18,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "hidden_act": "gelu",
            "hidden_activation": "gelu_pytorch_tanh",
        },
    ),
}
# L, D, F, longest sequence, and millions of parameters with a causal-lm or question-answering head.
EXPECTED = {
    "bert-base-uncased": (12, 768, 3072, 512, 109),
    "roberta-base": (12, 768, 3072, 512, 124),
    "xlm-roberta-base": (12, 768, 3072, 512, 277),
    "electra-base-discriminator": (12, 768, 3072, 512, 109),
    "distilbert-base-uncased": (6, 768, 3072, 512, 66),
    "deberta-v3-base": (12, 768, 3072, 512, 184),
    "gpt2": (12, 768, 3072, 1024, 124),
    "opt-125m": (12, 768, 3072, 2048, 125),
    "Llama-3.2-1B": (16, 2048, 8192, 131072, 1236),
    "Qwen2.5-0.5B": (24, 896, 4864, 32768, 494),
    "Qwen3-0.6B": (28, 1024, 3072, 40960, 596),
    "Mistral-7B-v0.1": (32, 4096, 14336, 32768, 7242),
    "gemma-2b": (18, 2048, 16384, 8192, 2506),
}
SHARED = ("encoder.rel_embeddings.", "encoder.LayerNorm.")
KNOWN = [name for name, (model_type, _) in RELEASES.items() if model_type in CONFIG_MAPPING]


def config_of(release: str) -> Any:
    model_type, values = RELEASES[release]
    return AutoConfig.for_model(model_type, **values)


def size(shape: Tuple[int, ...]) -> int:
    count = 1
    for one in shape:
        count *= one
    return count


def last_head(release: str) -> str:
    return (
        "causal-lm"
        if RELEASES[release][0] in ("gpt2", "opt", "llama", "qwen2", "qwen3", "mistral", "gemma")
        else ("question-answering")
    )


@pytest.mark.parametrize("release", KNOWN)
def test_the_shape_is_the_released_one(release: str) -> None:
    layers, D, _, longest, millions = EXPECTED[release]
    config = config_of(release)
    whole = shapes(build_whole(config, last_head(release)))
    assert (config.num_hidden_layers, config.hidden_size, max_positions(config)) == (layers, D, longest)
    assert round(sum(size(shape) for shape in whole.values()) / 1e6) == millions


@pytest.mark.one_in(7)
@pytest.mark.parametrize("residual", ["none", "low-rank"])
@pytest.mark.parametrize("head", ["sequence-classification", "the other"])
@pytest.mark.parametrize("release", KNOWN)
def test_the_halves_are_the_whole(release: str, head: str, residual: str) -> None:
    layers, D, F, _, _ = EXPECTED[release]
    head = last_head(release) if head == "the other" else head
    config, split_layer, R = config_of(release), layers // 2, 8
    cut = Cut("sft", split_layer, R, residual)
    whole = shapes(build_whole(config, head, cut))
    net_2 = build_net_2(config, head, cut)
    lower, upper = shapes(build_net_1(config, head, cut)), shapes(net_2)
    assert {**lower, **upper} == whole
    assert all(any(part in name for part in SHARED) for name in lower.keys() & upper.keys())
    assert net_2.width == R
    w = ffn_out_name(config, head, split_layer)
    inner = F + D if residual == "low-rank" else F
    assert lower[f"{w}.ffn1.weight"] == (R, inner)
    assert (upper[f"{w}.ffn2.weight"], upper[f"{w}.ffn3.weight"]) == ((R, R), (D, R))
    blocks = w.split(f".{split_layer - 1}.")[0] + "."
    below, above = (
        {int(name[len(blocks) :].split(".")[0]) for name in half if name.startswith(blocks)} for half in (lower, upper)
    )
    assert below == set(range(split_layer))
    assert above == set(range(split_layer - 1, layers))
