"""BERT and the models that kept its modules' names."""

from sft.models.families.family import Family

BERT = Family(
    model_types=("bert", "electra"),
    blocks="encoder.layer",
    embeddings="embeddings",
    ffn_out="output.dense",
    ffn_dropout="output.dropout",
    ffn_norm="output.LayerNorm",
    counts_padding=True,
    after_embeddings=("embeddings_project",),  # ELECTRA's, where embeddings are narrower than the model
)
