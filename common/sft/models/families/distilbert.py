"""DistilBERT: post-norm blocks like BERT's, under names of its own."""

from sft.models.families.family import Family

DISTILBERT = Family(
    model_types=("distilbert",),
    blocks="transformer.layer",
    embeddings="embeddings",
    ffn_out="ffn.lin2",
    ffn_dropout="ffn.dropout",
    ffn_norm="output_layer_norm",
    ffn_width="hidden_dim",
    counts_padding=True,
)
