"""Llama and the models that kept its modules' names: pre-norm blocks, rotary positions, no dropout at the FFN."""

from sft.models.families.family import Family

LLAMA = Family(
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    blocks="layers",
    embeddings="embed_tokens",
    ffn_out="mlp.down_proj",
    final_norm="norm",
    decoder=True,
)
