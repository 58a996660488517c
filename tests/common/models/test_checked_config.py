"""Configurations that nobody made by hand with care: numbers that are none, and settings that would have code run."""

from __future__ import annotations

from typing import Any, Dict

import pytest
from support.tiny import tiny_config

from sft.errors import UnsupportedModelError
from sft.models import max_positions
from sft.models.checked_config import config_of, without_code


def of(family: str, **changes: Any) -> Dict[str, Any]:
    return {**tiny_config(family).to_dict(), **changes}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"num_attention_heads": 0}),
        ("llama", {"num_key_value_heads": -1}),
        ("gpt2", {"n_head": 0}),
        ("gpt2", {"n_embd": "24"}),
        ("distilbert", {"dim": -3}),
        ("opt", {"ffn_dim": [3]}),
        ("bert", {"hidden_size": 32.0}),
        ("bert", {"vocab_size": True}),
        ("bert", {"max_position_embeddings": None}),
        ("bert", {"layer_norm_eps": "1e-12"}),
        ("bert", {"initializer_range": float("nan")}),
        ("llama", {"bos_token_id": "<s>"}),
        ("llama", {"eos_token_id": [1, "2"]}),
    ],
)
def test_a_number_that_is_none_is_named(family: str, changes: Dict[str, Any]) -> None:
    with pytest.raises(Exception, match=next(iter(changes))) as caught:  # ours, or what the newest library raises
        config_of(of(family, **changes))
    assert not isinstance(caught.value, ArithmeticError)


def test_a_token_of_minus_one_is_none() -> None:
    config = config_of(of("llama", pad_token_id=-1, bos_token_id=-1, eos_token_id=[1, 2]))
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (None, None, [1, 2])


@pytest.mark.parametrize(("pad", "longest"), [(0, 129), (1, 128), (3, 126), (100, 29)])
def test_roberta_counts_positions_from_its_padding_token_on(pad: int, longest: int) -> None:
    assert max_positions(config_of(of("roberta", max_position_embeddings=130, pad_token_id=pad))) == longest


@pytest.mark.parametrize("pad", [None, -1, 129, 500])
def test_roberta_without_a_place_for_tokens(pad: object) -> None:
    with pytest.raises(UnsupportedModelError, match="padding token"):
        config_of(of("roberta", max_position_embeddings=130, pad_token_id=pad))


def test_what_would_have_code_run_is_left_out() -> None:
    evil = {
        "auto_map": {"AutoConfig": "evil.Config"},
        "quantization_config": {"quant_method": "bitsandbytes"},
        "attn_implementation": "someone/kernels",
        "_attn_implementation_internal": "someone/kernels",
        "use_kernels": True,
    }
    assert without_code({**evil, "hidden_size": 24}) == {"hidden_size": 24}
    assert "someone" not in config_of(of("bert", **evil)).to_json_string(use_diff=False)
