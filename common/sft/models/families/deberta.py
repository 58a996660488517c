"""DeBERTa-v2 and -v3: BERT's blocks, whose attention reads one table of relative positions."""

from dataclasses import replace

from sft.models.families.bert import BERT

DEBERTA = replace(
    BERT,
    model_types=("deberta-v2",),  # of both versions
    after_embeddings=(),
    after_block_1="encoder.conv",  # v2's larger members
    for_every_block=("encoder.rel_embeddings", "encoder.LayerNorm"),
    runs_blocks="encoder",
)
