"""RoBERTa, XLM-RoBERTa and CamemBERT: BERT's blocks, with positions that start after the padding id."""

from dataclasses import replace

from sft.models.families.bert import BERT

ROBERTA = replace(BERT, model_types=("roberta", "xlm-roberta", "camembert"), reserved_positions=2)
