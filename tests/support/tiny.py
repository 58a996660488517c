"""Tiny checkpoints made on the fly: random weights and a tokenizer that reads any text, without a hub."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Dict, List, Optional

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from sft.batch import Batch
from sft.models import HEADS

FAMILIES = ("bert", "roberta", "electra", "distilbert")
"""Encoders of which whole jobs are tested."""

DECODERS = tuple(
    name for name in ("gpt2", "opt", "llama", "qwen2", "qwen3", "mistral", "gemma") if name in CONFIG_MAPPING
)
"""Those that the installed release has: Qwen3 is younger than the oldest one."""

ARCHITECTURES = (*FAMILIES, "xlm-roberta", "deberta-v2", *DECODERS)

_WORDS = (
    "an and are bad best but by did do every film for from good great had has he her his how in is it its like many "
    "more most movie no not of on one or people plot she so some story that the their there they this to very was were "
    "what when where which who why with worst"
)


def tiny_vocabulary(special_tokens: List[str]) -> Dict[str, int]:
    """About 200 pieces, `special_tokens` first; every printable ASCII word can be spelled with them."""
    characters = string.ascii_lowercase + string.digits
    pieces = list(special_tokens) + list(characters) + ["##" + one for one in characters] + list(string.punctuation)
    pieces += _WORDS.split()
    return {piece: index for index, piece in enumerate(pieces)}


def tiny_tokenizer(family: str = "bert", max_length: int = 128) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer with the special tokens of the family; only BERT and ELECTRA make token types."""
    if family.endswith("roberta"):  # <pad> is 1, as in the real one: RoBERTa counts positions from there
        begin, pad, end, unknown, mask = specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    else:
        pad, unknown, begin, end, mask = specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = tiny_vocabulary(specials)
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin}:0 $A:0 {end}:0",
        pair=f"{begin}:0 $A:0 {end}:0 $B:1 {end}:1",
        special_tokens=[(token, vocabulary[token]) for token in (begin, end)],
    )
    inputs = ["input_ids", "attention_mask"]
    if family in ("bert", "electra"):
        inputs.insert(1, "token_type_ids")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        model_input_names=inputs,
        pad_token=pad,
        unk_token=unknown,
        cls_token=begin,
        sep_token=end,
        mask_token=mask,
    )


def tiny_config(family: str = "bert", layers: int = 4, **overrides: object) -> PretrainedConfig:
    """Hidden 32, FFN 64, 2 heads, 128 positions. `overrides` go to the configuration as they are."""
    tokenizer = tiny_tokenizer(family)
    values: Dict[str, object] = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    if family == "distilbert":
        values.update(dim=32, hidden_dim=64, n_heads=2, n_layers=layers, max_position_embeddings=128)
    elif family == "gpt2":
        values.update(n_embd=32, n_inner=64, n_head=2, n_layer=layers, n_positions=128)
    else:
        values.update(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=layers)
        # RoBERTa's first position is pad_token_id + 1.
        values.update(max_position_embeddings=130 if family.endswith("roberta") else 128)
    if family == "electra":
        values.update(embedding_size=16)
    if family == "deberta-v2":  # as v3: relative positions alone, in buckets
        values.update(relative_attention=True, position_buckets=8, norm_rel_ebd="layer_norm", share_att_key=True)
        values.update(pos_att_type=["p2c", "c2p"], position_biased_input=False, type_vocab_size=0)
        values.update(pooler_hidden_size=32)
    if family == "opt":
        values.update(ffn_dim=64, word_embed_proj_dim=32)
    if family in ("llama", "mistral", "qwen2", "qwen3", "gemma"):
        values.update(num_key_value_heads=1)
    if family in ("qwen3", "gemma"):
        values.update(head_dim=16)
    if family in DECODERS:
        values.update(bos_token_id=tokenizer.cls_token_id, eos_token_id=tokenizer.sep_token_id)
    values.update(overrides)
    return AutoConfig.for_model(family, **values)


def make_tiny_model(
    directory: Path,
    family: str = "bert",
    layers: int = 4,
    head: Optional[str] = None,
    seed: int = 0,
    max_shard_size: str = "1GB",
    **overrides: object,
) -> Path:
    """Write config, random float32 safetensors and tokenizer into `directory`, as a download from the hub would be.

    Without `head` it holds the base model alone, under names without a prefix; with one of
    `sft.models.HEADS` the whole model. A small `max_shard_size`, such as "20KB", makes a sharded
    checkpoint.
    """
    config = tiny_config(family, layers, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (AutoModel if head is None else HEADS[head].auto_class).from_config(config)
    model.save_pretrained(str(directory), max_shard_size=max_shard_size)
    tiny_tokenizer(family).save_pretrained(str(directory))
    return Path(directory)


def tiny_batch(*lengths: int, seed: int = 0) -> Batch:
    """Sequences of these lengths, of two classes by turns."""
    generator = torch.Generator().manual_seed(seed)
    ids_BS = torch.randint(5, 100, (len(lengths), max(lengths)), generator=generator)
    return Batch({"input_ids": ids_BS}, list(lengths), {"labels": torch.arange(len(lengths)) % 2})
