"""The arguments of a transformers model's forward, checked and brought into the form in which they cross.

Shape suffixes: B batch, S padded sequence, C labels.
"""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, NamedTuple, Optional

import torch
from torch import Tensor
from transformers import PretrainedConfig

from sft.batch import IGNORED, Batch, attention_mask
from sft.errors import UsageError
from sft.models import HEADS, max_positions
from sft.wire.codec.messages import outputs_of

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_TAKEN = (*_INPUTS, "labels", "start_positions", "end_positions", "return_dict")


class Call(NamedTuple):
    """One call of a model."""

    batch: Batch
    return_dict: Optional[bool]
    items_in_batch: Optional[float]
    """What a language model's sum of token losses is to be divided by, instead of their number here."""
    choices: int = 1
    """Sequences in a row that are choices of the same question."""


def read_call(arguments: Mapping[str, Any], config: PretrainedConfig, head: str) -> Call:
    """`arguments` by name. Raises UsageError for what cannot cross, and for labels that do not fit."""
    arguments = dict(arguments)
    items = arguments.pop("num_items_in_batch", None) if head == "causal-lm" else None
    if head != "question-answering":  # a Trainer gives it to any; the library's other heads look away
        arguments.pop("num_items_in_batch", None)
    for name, value in arguments.items():
        if name not in _TAKEN and not _says_nothing(value):
            raise UsageError(f"the argument {name} cannot cross to the cloud: call the model without it")
    input_ids, choices = arguments.get("input_ids"), 1
    if head == "multiple-choice" and isinstance(input_ids, Tensor) and input_ids.dim() == 3:
        choices = input_ids.shape[1]
        arguments.update({name: x.flatten(0, 1) for name, x in arguments.items() if name in _INPUTS and x is not None})
        input_ids = arguments["input_ids"]
    elif head == "multiple-choice":
        raise UsageError("the model needs input_ids, a tensor of shape (questions, choices, tokens)")
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.numel() == 0:
        raise UsageError("the model needs input_ids, a tensor of shape (sequences, tokens)")
    if input_ids.shape[1] > max_positions(config):
        raise UsageError(
            f"sequences of {input_ids.shape[1]} tokens are longer than the model's {max_positions(config)} positions"
        )
    inputs = {"input_ids": input_ids}
    if arguments.get("token_type_ids") is not None:
        inputs["token_type_ids"] = arguments["token_type_ids"]
    lengths = lengths_of(arguments.get("attention_mask"), input_ids)
    labels = _labels(arguments, lengths, input_ids, config, head, choices)
    items = None if items is None else float(items)
    return Call(Batch(inputs, lengths, labels), arguments.get("return_dict"), items, choices)


def lengths_of(mask_BS: Optional[Tensor], input_ids_BS: Tensor) -> List[int]:
    """The number of tokens of each sequence. Raises UsageError unless padding is on the right."""
    B, S = input_ids_BS.shape
    if mask_BS is None:
        return [S] * B
    if tuple(mask_BS.shape) != (B, S):
        raise UsageError(f"attention_mask has shape {list(mask_BS.shape)}, input_ids {[B, S]}; only such masks cross")
    mask_BS = mask_BS.detach().cpu()
    lengths = [int(length) for length in mask_BS.sum(1)]
    if min(lengths) < 1 or not mask_BS.eq(attention_mask(lengths, S)).all():
        raise UsageError(
            "attention_mask must be ones followed by zeros, a one at least: pad on the right "
            "(tokenizer.padding_side = 'right')"
        )
    return lengths


def _says_nothing(value: Any) -> bool:
    """Whether an argument's value is one that asks for nothing: None, False, 0."""
    return value is None or (isinstance(value, (bool, int)) and not value)


def _labels(
    arguments: Mapping[str, Any],
    lengths: List[int],
    input_ids_BS: Tensor,
    config: PretrainedConfig,
    head: str,
    choices: int,
) -> Dict[str, Tensor]:
    """As `sft.batch.Batch` has them; empty without labels."""
    if head == "question-answering":
        start, end = arguments.get("start_positions"), arguments.get("end_positions")
        if start is None and end is None:
            return {}
        if start is None or end is None:
            raise UsageError("a span needs both start_positions and end_positions")
        spans = {"start_positions": start.reshape(-1), "end_positions": end.reshape(-1)}
        for name, positions_B in spans.items():
            _check_ids(name, positions_B, [len(lengths)], input_ids_BS.shape[1])
            if any(not 0 <= int(position) < length for position, length in zip(positions_B, lengths)):
                raise UsageError(f"{name} must lie within the tokens: padding is no place for an answer")
        return spans
    y = arguments.get("labels")
    if y is None:
        return {}
    B, C = len(lengths), outputs_of(config, head)
    if HEADS[head].learns == "tokens":
        learned = y[attention_mask(lengths, input_ids_BS.shape[1]).bool().to(y.device)] if y.dim() == 2 else y
        if y.dim() == 2 and int((y != IGNORED).sum()) != int((learned != IGNORED).sum()):
            raise UsageError(f"labels of padding must be {IGNORED}: nothing is learned from what does not cross")
        _check_ids("labels", y, list(input_ids_BS.shape), C)
        return {"labels": y.long()}
    if head == "multiple-choice":
        _check_ids("labels", y, [B // choices], choices)
        return {"labels": y.long()}
    kind = problem_type(config)
    if kind == "single_label_classification":
        y = y.reshape(-1)
        if y.is_floating_point():
            raise UsageError(
                "labels are numbers, but the head was cut for one class a sequence: set model.config.problem_type to "
                "'multi_label_classification' or 'regression' before the model is wrapped"
            )
        _check_ids("labels", y, [B], C)
        return {"labels": y.long()}
    y = y.float()
    if kind == "regression" and C == 1:
        y = y.reshape(-1)
    expected = [B] if kind == "regression" and C == 1 else [B, C]
    if list(y.shape) != expected:
        raise UsageError(f"labels have shape {list(y.shape)}, the head wants {expected}")
    return {"labels": y}


def _check_ids(name: str, ids: Tensor, shape: List[int], end: int) -> None:
    if list(ids.shape) != shape or ids.is_floating_point():
        raise UsageError(f"{name} must be whole numbers of shape {shape}, not {ids.dtype} of shape {list(ids.shape)}")
    counted = ids[ids != IGNORED]
    if counted.numel() and (int(counted.min()) < 0 or int(counted.max()) >= end):
        raise UsageError(
            f"{name} must be from 0 to {end - 1}; they are from {int(counted.min())} to {int(counted.max())}"
        )


def problem_type(config: PretrainedConfig) -> str:
    """What a classification head learns: what the configuration says, else the library's own choice for classes."""
    usual = "regression" if config.num_labels == 1 else "single_label_classification"
    return str(config.problem_type or usual)


def may_travel(labels: Dict[str, Tensor]) -> bool:
    """Whether the cloud computes a loss of these labels. Of numbers that are none, the loss is none either, as a script
    that passes over such a batch expects: it is computed here."""
    return bool(labels) and all(not y.is_floating_point() or bool(torch.isfinite(y).all()) for y in labels.values())


def count_learned(y_BS: Tensor) -> int:
    """How many tokens a language model learns from: a token predicts the one that follows it. `torch.int64` labels."""
    return int((y_BS[:, 1:] != IGNORED).sum())
