"""RoBERTa, XLM-RoBERTa and CamemBERT: BERT's blocks, with positions that start after the padding id."""

from dataclasses import replace

from transformers import PretrainedConfig

from sft.models.families.bert import BERT


def _refuses(config: PretrainedConfig) -> str:
    pad, positions = config.pad_token_id, config.max_position_embeddings
    if type(pad) is not int or pad < 0:
        return f"it counts positions from its padding token on, and pad_token_id is {pad!r:.80}; give its number"
    if type(positions) is int and positions <= pad + 1:
        return f"with {positions} positions, counted from the padding token {pad} on, no token has one"
    return ""


ROBERTA = replace(
    BERT,
    model_types=("roberta", "xlm-roberta", "camembert"),
    counts_padding=False,
    positions_after_padding=True,
    refuses=_refuses,
)
