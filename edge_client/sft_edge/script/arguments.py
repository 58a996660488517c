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
from sft.models import HEADS, family_of, head_named, max_positions
from sft.wire.codec.messages import outputs_of
from sft_edge.script.padding import Moved, lengths_of

_EMBEDDED = ("input_ids", "inputs_embeds")
_OF_TOKENS = ("attention_mask", "token_type_ids", "position_ids")
_TAKEN = (*_EMBEDDED, *_OF_TOKENS, "labels", "start_positions", "end_positions", "return_dict")
_OF_GENERATE = ("past_key_values", "use_cache", "cache_position", "logits_to_keep", "num_logits_to_keep")


class Call(NamedTuple):
    """One call of a model."""

    batch: Batch
    return_dict: Optional[bool]
    items_in_batch: Optional[float]
    """What a language model's sum of token losses is to be divided by, instead of their number here."""
    choices: int = 1
    """Sequences in a row that are choices of the same question."""
    moved: Optional[Moved] = None
    """How tokens were moved in `batch`."""


def read_call(arguments: Mapping[str, Any], config: PretrainedConfig, head: str) -> Call:
    """`arguments` by name. Raises UsageError for what cannot cross, and for labels that do not fit."""
    arguments = {name: value for name, value in arguments.items() if value is not None}
    items = arguments.pop("num_items_in_batch", None) if head == "causal-lm" else None
    if head != "question-answering":  # a Trainer gives it to any; the library's other heads look away
        arguments.pop("num_items_in_batch", None)
    for name, value in arguments.items():
        if name not in _TAKEN and not _says_nothing(value):
            generates = ", as generate() does not: save the model, and generate with that" * (name in _OF_GENERATE)
            raise UsageError(f"the argument {name} cannot cross to the cloud: call the model without it{generates}")
    choices = _flatten_choices(arguments) if head == "multiple-choice" else 1
    main = _embedded(arguments)
    B, S = main.shape[:2]
    if max_positions(config) < S:
        raise UsageError(f"sequences of {S} tokens are longer than the model's {max_positions(config)} positions")
    for name in ("token_type_ids", "position_ids"):
        given = arguments.get(name)
        if given is not None:
            if not isinstance(given, Tensor) or given.dim() != 2 or given.shape[0] not in (1, B) or given.shape[1] != S:
                raise UsageError(f"{name} must be a tensor of shape {[B, S]}")
            arguments[name] = given.expand(B, S)
    lengths, moved = lengths_of(arguments.get("attention_mask"), B, S)
    if moved is not None and not head_named(head).per_token and not family_of(config).decoder:
        raise UsageError("this model's head reads the first token, which would be padding: pad on the right")
    inputs = {name: arguments[name] for name in (*_EMBEDDED, "token_type_ids") if name in arguments}
    if moved is not None:
        inputs = {name: moved.to_the_start(x) for name, x in inputs.items()}
    position_ids = _positions(arguments, lengths, moved, config)
    if position_ids is not None:
        inputs["position_ids"] = position_ids
    labels = _labels(arguments, lengths, moved, S, config, head, choices)
    items = None if items is None else float(items)
    return Call(Batch(inputs, lengths, labels), arguments.get("return_dict"), items, choices, moved)


def _flatten_choices(arguments: Dict[str, Any]) -> int:
    """Each choice becomes a sequence; how many there are for a question."""
    for name, dimensions in (("input_ids", 3), ("inputs_embeds", 4)):
        given = arguments.get(name)
        if isinstance(given, Tensor) and given.dim() == dimensions:
            for one in (name, *_OF_TOKENS):
                if one in arguments:
                    arguments[one] = arguments[one].flatten(0, 1)
            return int(given.shape[1])
    raise UsageError("the model needs input_ids, a tensor of shape (questions, choices, tokens)")


def _embedded(arguments: Mapping[str, Any]) -> Tensor:
    """Token ids, or what stands for them."""
    given = [name for name in _EMBEDDED if name in arguments]
    if len(given) == 2:
        raise UsageError("the model takes input_ids or inputs_embeds, not both")
    main = arguments.get(given[0] if given else "input_ids")
    dimensions = 3 if given == ["inputs_embeds"] else 2
    if not isinstance(main, Tensor) or main.dim() != dimensions or main.numel() == 0:
        raise UsageError("the model needs input_ids, a tensor of shape (sequences, tokens)")
    return main


def _positions(
    arguments: Mapping[str, Any], lengths: List[int], moved: Optional[Moved], config: PretrainedConfig
) -> Optional[Tensor]:
    """What the embeddings are to be told of positions; None where they find them themselves.

    Raises UsageError for positions that the cloud's blocks would have to know.
    """
    family = family_of(config)
    is_rotary = family.decoder and not family.added_to_embeddings
    given_BS: Optional[Tensor] = arguments.get("position_ids")
    if given_BS is None:
        after_padding = family.positions_after_padding and "inputs_embeds" in arguments
        if moved is None or not (family.counts_padding or after_padding):
            return None
        return moved.places_BS + (int(config.pad_token_id) + 1 if after_padding else 0)
    positions_BS = given_BS
    if moved is not None:
        positions_BS = moved.to_the_start(positions_BS)
    looks_for_packing = family.decoder and "attention_mask" not in arguments
    if not is_rotary and not looks_for_packing:
        return positions_BS
    for row_S, length in zip(positions_BS, lengths):
        if not bool((row_S[1:length] - row_S[: length - 1]).eq(1).all()):
            raise UsageError("position_ids must count the tokens of a sequence one by one: the cloud's blocks do so")
    return None if is_rotary else positions_BS


def _says_nothing(value: Any) -> bool:
    """Whether an argument's value is one that asks for nothing: None, False, 0."""
    return value is None or (isinstance(value, (bool, int)) and not value)


def _labels(
    arguments: Mapping[str, Any],
    lengths: List[int],
    moved: Optional[Moved],
    S: int,
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
            _check_ids(name, positions_B, [len(lengths)], S)
            if moved is not None:
                positions_B = spans[name] = positions_B - torch.tensor(moved.starts, device=positions_B.device)
            if any(not 0 <= int(position) < length for position, length in zip(positions_B, lengths)):
                raise UsageError(f"{name} must lie within the tokens: padding is no place for an answer")
        return spans
    y = arguments.get("labels")
    if y is None:
        return {}
    B, C = len(lengths), outputs_of(config, head)
    if HEADS[head].learns == "tokens":
        _check_ids("labels", y, [B, S], C)
        if moved is not None:
            y = moved.to_the_start(y)
        padding = ~attention_mask(lengths, S).bool().to(y.device)
        if not bool(y[padding].eq(IGNORED).all()):
            raise UsageError(f"labels of padding must be {IGNORED}: nothing is learned from what does not cross")
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


def calibration_batch(batch: Dict[str, Tensor], config: PretrainedConfig, head: str) -> Batch:
    """What a low-rank residual is fitted to, from a batch as the model takes it. Raises UsageError."""
    if not {"input_ids", "inputs_embeds"}.intersection(batch):
        raise UsageError("a calibration batch is a dict of what the model takes, input_ids at least")
    inputs = ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids")
    return read_call({name: batch[name] for name in inputs if name in batch}, config, head).batch
