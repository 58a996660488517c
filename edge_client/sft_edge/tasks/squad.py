"""Extractive question answering: SQuAD v1.1, DIR/SQuAD/train-v1.1.json and dev-v1.1.json."""

from __future__ import annotations

import logging
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor

from sft.errors import DataError, UnsupportedModelError
from sft_edge.tasks import spans
from sft_edge.tasks.base import Answer, Feature, Row, Task, check_finite, padding_of, sequence_limit
from sft_edge.tasks.files import as_object, clean_text, read_json, read_table, shown
from sft_edge.tasks.sequence import ROWS_AT_ONCE, choose_fields, texts_of

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

FILES = {"train": "train-v1.1.json", "validation": "dev-v1.1.json"}

MAX_QUESTION_LENGTH = 64
"""Tokens of a question; the rest of it is cut off."""

DOC_STRIDE = 128
"""Tokens that two neighbouring windows of a context share; fewer where windows are short."""


class SquadTask(Task):
    """Where in the context is the answer? Contexts longer than a sequence are read in overlapping windows."""

    name = "squad"
    head = "question-answering"
    num_labels = 2  # start and end
    main_metric = "f1"
    text_fields = ("question", "context")

    def read(self, split: str, limit: Optional[int] = None) -> List[Row]:
        path = self.file("SQuAD", FILES, split)
        questions = list(islice(_rows(read_json(path), path, labelled=True), limit))
        wrong = [question.wrong for question in questions if question.wrong]
        rows = [question.row for question in questions if question.row.answers]
        if not rows:
            raise DataError(wrong[0] if wrong else f"{path}: holds no questions")
        if wrong:
            lost, first = len(questions) - len(rows), wrong[0].replace(f"{path}: ", "")
            beside = f", and one answer or more of {len(wrong) - lost} others" if len(wrong) > lost else ""
            logger.warning("%s: passed over %d of %d questions%s: %s", path, lost, len(questions), beside, first)
        return rows

    def read_inputs(self, path: Path) -> List[Row]:
        """As in the base class; a .json file is read as SQuAD's."""
        if path.suffix == ".json":
            rows = [question.row for question in _rows(read_json(path), path, labelled=False)]
        else:
            records = list(read_table(path))
            fields = choose_fields(records[0], [self.text_fields]) if records else ()
            rows = [Row(texts_of(record, fields)) for record in records]
        if not rows:
            raise DataError(f"{path}: holds no questions")
        return rows

    def config_overrides(self) -> Dict[str, object]:
        return {"num_labels": self.num_labels}

    def encode(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_seq_length: int) -> List[Feature]:
        """See the base class. Raises UnsupportedModelError for a tokenizer that cannot tell where tokens come from."""
        if not tokenizer.is_fast:
            raise UnsupportedModelError(
                f"{type(tokenizer).__name__} has no fast version, and no other tells where tokens come from"
            )
        limit = sequence_limit(tokenizer, max_seq_length, room=4, pair=True)
        room = limit - tokenizer.num_special_tokens_to_add(pair=True)
        question_limit = min(MAX_QUESTION_LENGTH, room // 2)
        features: List[Feature] = []
        for begin in range(0, len(rows), ROWS_AT_ONCE):
            some = rows[begin : begin + ROWS_AT_ONCE]
            encoding = tokenizer(
                _cut_questions([row.texts[0] for row in some], tokenizer, question_limit),
                [row.texts[1] for row in some],
                truncation="only_second",
                max_length=limit,
                stride=min(DOC_STRIDE, (room - question_limit) // 2),
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
                return_attention_mask=False,
            )
            row_of_window = encoding.pop("overflow_to_sample_mapping")
            offsets = encoding.pop("offset_mapping")
            padding = padding_of(tokenizer, list(encoding.keys()))
            for index, row in enumerate(row_of_window):
                feature = _window(encoding, index, offsets[index], padding)
                features.append(_with_answer(feature, begin + row, rows[begin + row], tokenizer.cls_token_id))
        return features

    def collate_labels(self, features: Sequence[Feature]) -> Dict[str, Tensor]:
        found = [feature.span for feature in features if feature.span is not None]
        if len(found) < len(features):
            return {}
        starts, ends = zip(*found)
        return {"start_positions": torch.tensor(starts), "end_positions": torch.tensor(ends)}

    def metrics(self, logits: Sequence[Tensor], features: Sequence[Feature], rows: Sequence[Row]) -> Dict[str, float]:
        texts = [str(prediction["answer"]) for prediction in self.predictions(logits, features, rows)]
        answers = [[answer.text for answer in row.answers] for row in rows]
        if not rows or not all(answers):
            raise ValueError("questions without answers cannot be scored")
        return spans.scores(texts, answers)

    def predictions(
        self, logits: Sequence[Tensor], features: Sequence[Feature], rows: Sequence[Row]
    ) -> List[Dict[str, object]]:
        """One object a question: `answer`, its `start` and `end` in the context in characters, and its probability
        `score` among the best spans; with the `id` where the file gives one."""
        check_finite(logits)
        windows: List[List[List[spans.Span]]] = [[] for _ in rows]
        for feature, logits_S2 in zip(features, logits):
            windows[feature.row].append(spans.best_spans(feature, logits_S2))
        return [_prediction(row, spans.merge(found)) for row, found in zip(rows, windows)]


def _prediction(row: Row, found: Sequence[spans.Span]) -> Dict[str, object]:
    prediction: Dict[str, object] = {"id": row.id} if row.id else {}
    # A context of which the tokenizer makes no token at all has no spans.
    best = found[0] if found else spans.Span(0, 0, 0.0)
    prediction["answer"] = row.texts[1][best.start : best.end]
    prediction.update(start=best.start, end=best.end, score=spans.probability(found) if found else 0.0)
    return prediction


def _cut_questions(questions: List[str], tokenizer: PreTrainedTokenizerBase, limit: int) -> List[str]:
    """Each question up to its `limit`th token: only the context can be cut into windows."""
    encoding = tokenizer(
        questions, add_special_tokens=False, truncation=True, max_length=limit, return_offsets_mapping=True
    )
    return [text[: pairs[-1][1]] if pairs else text for text, pairs in zip(questions, encoding["offset_mapping"])]


def _window(encoding: BatchEncoding, index: int, pairs: Sequence[Tuple[int, int]], padding: Dict[str, int]) -> Feature:
    """One window without its labels; row 0 stands for a row not known yet."""
    of_context = [position for position, text in enumerate(encoding.sequence_ids(index)) if text == 1]
    begin = of_context[0] if of_context else 0
    return Feature(
        row=0,
        inputs={name: np.asarray(encoding[name][index], dtype=np.int32) for name in padding},
        padding=padding,
        context_start=begin,
        offsets=np.asarray(pairs[begin : begin + len(of_context)], dtype=np.int32).reshape(-1, 2),
    )


def _with_answer(feature: Feature, index: int, row: Row, cls_token_id: Optional[int]) -> Feature:
    """The feature of row `index`, with the tokens of the row's first answer where this window holds all of it."""
    if not row.answers or feature.offsets is None:
        return feature._replace(row=index)
    start = row.answers[0].start
    end = start + len(row.answers[0].text)
    begins, ends = feature.offsets[:, 0], feature.offsets[:, 1]
    if len(begins) == 0 or start < begins[0] or end > ends[-1]:
        ids = feature.inputs["input_ids"].tolist()
        nowhere = ids.index(cls_token_id) if cls_token_id in ids else 0
        return feature._replace(row=index, span=(nowhere, nowhere))
    first = int(np.searchsorted(ends, start, side="right"))  # the first token that ends behind the start
    last = max(first, int(np.searchsorted(begins, end, side="left")) - 1)  # the last that begins before the end
    return feature._replace(row=index, span=(feature.context_start + first, feature.context_start + last))


class _Question(NamedTuple):
    """One of a file: a row with the answers that are where they say, and what is wrong with the first other one."""

    row: Row
    wrong: str = ""


def _rows(data: object, path: Path, labelled: bool) -> Iterator[_Question]:
    """The questions of a SQuAD file, checked. What is not needed may be missing, and anything may be there besides."""
    number = 0
    for article in _list(as_object(data, str(path)), "data", str(path)):
        for paragraph in _list(as_object(article, str(path)), "paragraphs", str(path)):
            content = as_object(paragraph, str(path))
            for question in _list(content, "qas", str(path)):
                number += 1
                yield _row(as_object(question, str(path)), content.get("context"), path, labelled, number)


def _row(question: Dict[str, object], context: object, path: Path, labelled: bool, number: int) -> _Question:
    given = question.get("id")
    name = str(number if given is None or isinstance(given, (dict, list)) else given)
    place = f"{path}: question {shown(name)}"
    texts = (clean_text(question.get("question"), "the question", place), clean_text(context, "its context", place))
    answers, wrong = [], ""
    for answer in _answers(question, place) if labelled else []:
        fields = as_object(answer, place)
        text = clean_text(fields.get("text"), "an answer", place)
        start = _position(fields.get("answer_start"))
        if start is None or not 0 <= start <= len(texts[1]) - len(text):
            wrong = wrong or f"{place}: answer_start {shown(fields.get('answer_start'))} is outside the context"
        elif not texts[1].startswith(text, start):
            wrong = wrong or f"{place}: the context at {start} does not read {shown(text)}"
        else:
            answers.append(Answer(start, text))
    if labelled and not answers and not wrong:
        raise DataError(f"{place}: no answers; questions without one (SQuAD v2) are not supported")
    return _Question(Row(texts, answers=tuple(answers), id=name), wrong)


def _answers(question: Dict[str, object], place: str) -> List[object]:
    """A list of objects; the datasets library makes an object of lists of it."""
    value = question.get("answers")
    if isinstance(value, dict) and isinstance(value.get("text"), list) and isinstance(value.get("answer_start"), list):
        return [{"text": text, "answer_start": start} for text, start in zip(value["text"], value["answer_start"])]
    return _list(question, "answers", place)


def _position(value: object) -> Optional[int]:
    """A whole number, however it is spelled; None for what is none."""
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value[:18])
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _list(parent: Dict[str, object], name: str, place: str) -> List[object]:
    value = parent.get(name)
    if not isinstance(value, list):
        raise DataError(f"{place}: {name} must be a list, not {shown(value)}")
    return value
