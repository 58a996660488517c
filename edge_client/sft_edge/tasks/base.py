"""What a task is to the rest of the edge: rows in, batches out, logits judged.

Sizes: B features in a batch, S tokens of the longest of them, C labels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from torch import Tensor

from sft.batch import Batch
from sft.errors import DataError, NonFiniteLossError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase


Label = Union[int, float, Tuple[float, ...]]
"""A class id, a regression target, or a 0/1 for each label name."""

SPLITS = ("train", "validation")


class Answer(NamedTuple):
    """One accepted answer of a question."""

    start: int
    """Position of its first character in the context."""

    text: str


class Row(NamedTuple):
    """One example, checked."""

    texts: Tuple[str, ...]
    """One text or two, named by the task's `text_fields`; a question and its context for question answering."""

    label: Optional[Label] = None
    """None where it is not known, and for question answering."""

    answers: Tuple[Answer, ...] = ()
    """For question answering; the first one is trained on, all of them count as right."""

    id: str = ""
    """What the file calls the row; question answering only."""

    @property
    def is_blank(self) -> bool:
        """Whether there is nothing in it to be asked about: a blank line of a file to predict."""
        return not any(text.strip() for text in self.texts)


class Feature(NamedTuple):
    """One tokenized sequence: a row, or one window of a question's context."""

    row: int
    """Index of the row it was made of."""

    inputs: Dict[str, NDArray[np.int32]]
    """What the tokenizer made, without padding and attention mask; each (length,)."""

    padding: Mapping[str, int]
    """What each input is padded with."""

    label: Optional[Label] = None
    """As in the row."""

    span: Optional[Tuple[int, int]] = None
    """First and last token of the answer; both the classification token's where this window does not hold it."""

    context_start: int = 0
    """Position of the context's first token in this window."""

    offsets: Optional[NDArray[np.int32]] = None
    """(context tokens, 2): where each begins and ends in the context, in characters. Question answering only."""

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.inputs["input_ids"])


class Task(ABC):
    """One kind of examples, where they lie, and how answers to them are judged."""

    name: str
    """As `--task` spells it."""

    head: str
    """"sequence-classification" or "question-answering"."""

    problem_type: Optional[str] = None
    """As transformers spells it: "single_label_classification", "multi_label_classification" or "regression"; None for
    question answering."""

    label_names: Optional[List[str]] = None
    """By class id; None for regression and question answering."""

    num_labels: int
    """Logits a sequence, or a token for question answering."""

    main_metric: str
    """Key of `metrics` that a model is chosen and reported by."""

    text_fields: Tuple[str, ...]
    """Names of the texts of a row: one or two."""

    inferred: str = ""
    """What was made of the labels of the train file, for people, in one line; empty where that is no question."""

    def __init__(self, data_dir: Optional[Path]) -> None:
        """`data_dir` may be left out where no split is read."""
        self.data_dir = data_dir

    @abstractmethod
    def read(self, split: str, limit: Optional[int] = None) -> List[Row]:
        """Rows of "train" or "validation" in the order of the file, the first `limit` of them if given.

        Rows after the limit are not looked at. Raises DataError, which names file and line (file and question for
        SQuAD), for a file that is missing or empty and for every row that is malformed.
        """

    @abstractmethod
    def read_inputs(self, path: Path) -> List[Row]:
        """Rows to predict: texts without labels, of a .tsv, .csv or .jsonl file with columns named as in
        `text_fields`, or of a .txt file with one text a line, where a blank line is a blank row. Raises DataError."""

    @abstractmethod
    def config_overrides(self) -> Dict[str, object]:
        """What this task sets in the model's configuration."""

    @abstractmethod
    def encode(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> List[Feature]:
        """Tokenized rows in order, each of at most `max_seq_length` tokens; several features a row are possible."""

    @abstractmethod
    def collate_labels(self, features: Sequence[Feature]) -> Dict[str, Tensor]:
        """Labels of a batch as `sft.batch.Batch` holds them; empty when a feature has none."""

    @abstractmethod
    def metrics(self, logits: Sequence[Tensor], features: Sequence[Feature], rows: Sequence[Row]) -> Dict[str, float]:
        """Scores of labelled rows, named as in transformers' run_glue and run_qa, in percent (0 to 100).

        `logits` has one entry a feature: (C,), or (length or more, 2) for question answering. Raises
        NonFiniteLossError if one is NaN or infinite.
        """

    @abstractmethod
    def predictions(
        self, logits: Sequence[Tensor], features: Sequence[Feature], rows: Sequence[Row]
    ) -> List[Dict[str, object]]:
        """One JSON object a row; `logits` as for `metrics`."""

    def expect(self, text_fields: Sequence[str]) -> None:
        """Takes the texts of a row to be those that a model was trained on."""
        self.text_fields = tuple(text_fields)

    def row(self, *texts: str) -> Row:
        """A row to predict, made of texts that somebody typed. Raises UsageError for the wrong number of them."""
        if len(texts) != len(self.text_fields):
            wanted = " and a ".join(self.text_fields)
            raise UsageError(f"task {self.name} takes a {wanted}: {len(self.text_fields)} text(s), not {len(texts)}")
        for text in texts:
            if not text.strip():
                raise UsageError("the text to predict is empty")
        return Row(texts)

    def collate(self, features: Sequence[Feature]) -> Batch:
        """A batch padded on the right to its longest sequence, whichever side the tokenizer pads on."""
        lengths = [feature.length for feature in features]
        padded_length = max(lengths)
        inputs = {}
        for name, value in features[0].padding.items():
            ids_BS = np.full((len(features), padded_length), value, dtype=np.int64)
            for row, feature in enumerate(features):
                ids_BS[row, : feature.length] = feature.inputs[name]
            inputs[name] = torch.from_numpy(ids_BS)
        return Batch(inputs, lengths, self.collate_labels(features))

    def file(self, folder: str, names: Mapping[str, str], split: str) -> Path:
        """Path of a split's file. Raises UsageError when there is no data directory to look in."""
        if split not in SPLITS:
            raise ValueError(f"no split {split!r}")
        if self.data_dir is None:
            raise UsageError(f"task {self.name} reads files: pass --data-dir")
        path = self.data_dir / folder / names[split]
        if not path.is_file():
            raise DataError(f"{path}: no such file; --data-dir must be the folder that holds {folder}/{names[split]}")
        return path


def padding_of(tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> Dict[str, int]:
    """What each input is padded with; any token will do if the tokenizer has none: padding never travels."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    types = getattr(tokenizer, "pad_token_type_id", 0)
    return {
        name: {"input_ids": pad, "token_type_ids": types}.get(name, 0) for name in names if name != "attention_mask"
    }


def sequence_limit(tokenizer: PreTrainedTokenizerBase, max_seq_length: int, room: int, pair: bool) -> int:
    """Tokens that a sequence may have: `max_seq_length`, or less if the model reads less.

    Raises UsageError if that leaves fewer than `room` tokens beside the special ones.
    """
    limit = min(max_seq_length, tokenizer.model_max_length)
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    if limit < special + room:
        raise UsageError(f"--max-seq-length {limit} is too short: this task needs {special + room} tokens or more")
    return limit


def check_finite(logits: Sequence[Tensor]) -> None:
    """Raises NonFiniteLossError if a logit is NaN or infinite: judging those would look like a bad model."""
    if not all(bool(torch.isfinite(one).all()) for one in logits):
        raise NonFiniteLossError("the model's outputs are NaN or infinite; train with a lower learning rate")


def batches_of(task: Task, features: Sequence[Feature], batch_size: int) -> Iterator[Batch]:
    """In order, the last one smaller."""
    for start in range(0, len(features), batch_size):
        yield task.collate(features[start : start + batch_size])
