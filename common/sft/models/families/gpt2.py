"""GPT-2: pre-norm blocks, positions added in the model's forward, matrices stored as the transpose of a Linear's."""

from sft.models.families.family import Family

GPT2 = Family(
    model_types=("gpt2",),
    blocks="h",
    embeddings="wte",
    ffn_out="mlp.c_proj",
    ffn_dropout="mlp.dropout",
    final_norm="ln_f",
    added_to_embeddings=("wpe",),
    after_embeddings=("drop",),
    ffn_width="n_inner",
    counts_padding=True,
    decoder=True,
)
