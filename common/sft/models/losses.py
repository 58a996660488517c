"""The loss of every head, from logits alone: whichever side has the labels computes the same bits.

These are the losses of transformers' own heads, except that padding never counts: it does not travel.

Shape suffixes: B batch, S padded sequence, C outputs, V vocabulary.
"""

from __future__ import annotations

from typing import Dict, Optional, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from sft.batch import IGNORED
from sft.models.heads import HEADS


def head_loss(
    head: str, problem_type: Optional[str], logits: Tensor, labels: Dict[str, Tensor], lengths: Sequence[int]
) -> Tensor:
    """The loss that training minimizes: a 0-dim mean over sequences, or over the tokens that have a label.

    `logits`, with `labels` as in `sft.batch.Batch` on the same device:

    - "sequence-classification": (B, C); `problem_type` is transformers' (what it infers from C and the labels if None)
    - "question-answering": (B, S, 2) start and end logits, of which those of padding are not looked at
    - "causal-lm": (B, S, V); `labels` are not shifted, and padding is ignored whatever its label. NaN where no token
      has a label.
    - "masked-lm", (B, S, V), and "token-classification", (B, S, C): likewise, each token with a label of its own
    - "multiple-choice": (B, 1), of sequences of which as many in a row belong together as there are for each label

    Raises KeyError when `labels` lack what the head needs.
    """
    logits = logits.float()
    if head == "question-answering":
        return _span_loss(logits, labels, lengths)
    y = labels["labels"]
    if head == "multiple-choice":
        return functional.cross_entropy(logits.reshape(len(y), -1), y)
    if HEADS[head].learns == "tokens":
        y = _labels_of_tokens(y, lengths, head)
        return functional.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=IGNORED)
    kind = problem_type or _problem_type(logits, y)
    if kind == "regression":
        return functional.mse_loss(logits.squeeze(-1), y.squeeze(-1) if y.ndim == logits.ndim else y)
    if kind == "multi_label_classification":
        return functional.binary_cross_entropy_with_logits(logits, y)
    return functional.cross_entropy(logits, y)


def token_scores(head: str, logits: Tensor, y_BS: Tensor, lengths: Sequence[int]) -> Tensor:
    """What a loss of one's own may be made of, in the place of (B, S, C) logits.

    (B, S, 3) float32: the log of the probability of each token's label, which has a gradient; the entropy in nats; and
    1 where the label is the best. Zeros where there is no label. `y_BS` as `head_loss` takes it.
    """
    y_BS = _labels_of_tokens(y_BS, lengths, head)
    mask_BS = y_BS != IGNORED
    y_N, log_p_NC = y_BS[mask_BS], logits[mask_BS].float().log_softmax(-1)
    log_p_N = log_p_NC.gather(1, y_N[:, None])[:, 0]
    with torch.no_grad():
        entropy_N = -(log_p_NC.exp() * log_p_NC).sum(1)
        best_N = log_p_NC.argmax(1).eq(y_N).float()
    scores_BS3 = logits.new_zeros(*y_BS.shape, 3, dtype=torch.float32)
    return scores_BS3.masked_scatter(mask_BS[:, :, None], torch.stack([log_p_N, entropy_N, best_N], dim=1))


def _problem_type(logits_BC: Tensor, y: Tensor) -> str:
    if logits_BC.shape[-1] == 1:
        return "regression"
    return "multi_label_classification" if y.is_floating_point() else "single_label_classification"


def _span_loss(logits_BS2: Tensor, labels: Dict[str, Tensor], lengths: Sequence[int]) -> Tensor:
    # The library's own counts padding among the places where an answer may start or end.
    padding_BS = _padding(lengths, logits_BS2)
    logits_BS2 = logits_BS2.masked_fill(padding_BS[:, :, None], torch.finfo(logits_BS2.dtype).min)
    start = functional.cross_entropy(logits_BS2[:, :, 0], labels["start_positions"])
    end = functional.cross_entropy(logits_BS2[:, :, 1], labels["end_positions"])
    return (start + end) / 2


def _labels_of_tokens(y_BS: Tensor, lengths: Sequence[int], head: str) -> Tensor:
    y_BS = y_BS.masked_fill(_padding(lengths, y_BS), IGNORED)
    # In a causal language model a token predicts the one that follows it.
    return functional.pad(y_BS[:, 1:], (0, 1), value=IGNORED) if head == "causal-lm" else y_BS


def _padding(lengths: Sequence[int], like: Tensor) -> Tensor:
    positions_S = torch.arange(like.shape[1], device=like.device)
    return positions_S[None, :] >= torch.tensor(list(lengths), device=like.device)[:, None]
