"""Whether an exported model says what the trained one says: asked in a process that has transformers alone.

Shape suffixes: B texts, S tokens of the longest.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence

import torch
from safetensors.torch import load_file
from torch import Tensor

from sft.errors import VerificationError
from sft_edge.commands.export.exported import logits as program
from sft_edge.model_files import Description, SavedModel
from sft_edge.tasks import examples

TEXTS = 16


class Question(NamedTuple):
    """What an exported model is asked."""

    model: Path
    auto_class: str
    trust_remote_code: bool
    texts: List[List[str]]
    """One column, or the two of pairs."""


class Answer(NamedTuple):
    """Tokens and logits of each text, padding left out."""

    tokens: List[List[int]]
    logits: List[Tensor]
    """Each (C,); or (length, 2) for question answering and (length, V) for a language model."""
    base_difference: float = 0.0
    """Where code travels: the largest of a last hidden state of what `AutoModel` opens from that inside the model."""


def texts_for(description: Description) -> List[List[str]]:
    """Generated texts in as many columns as the model's task has."""
    fields = description.text_fields or ["text"]
    pairs = len(fields) == 2 or description.head == "question-answering"
    sentences = [example.sentence for example in examples(2 * TEXTS, seed=0)]
    return [sentences[:TEXTS], sentences[TEXTS:]] if pairs else [sentences[:TEXTS]]


def ask_here(saved: SavedModel, texts: Sequence[Sequence[str]]) -> Answer:
    """The trained model's answer, all texts in one batch."""
    tokenizer = saved.tokenizer
    limit = min(saved.description.max_seq_length, tokenizer.model_max_length)
    encoding = tokenizer(*[list(column) for column in texts], truncation=True, max_length=limit)
    tokens = encoding["input_ids"]
    lengths = [len(row) for row in tokens]
    inputs: Dict[str, Tensor] = {}
    for name in ("input_ids", "token_type_ids"):
        if name in encoding:
            pad = tokenizer.pad_token_id or 0 if name == "input_ids" else 0
            rows = [row + [pad] * (max(lengths) - len(row)) for row in encoding[name]]
            inputs[name] = torch.tensor(rows)
    with torch.no_grad():
        logits = saved.net(inputs, lengths, {}).logits
    return Answer(tokens, _without_padding(logits, lengths))


def ask_elsewhere(questions: Sequence[Question]) -> List[Answer]:
    """The answers of exported models, in a new process in which this package cannot be imported.

    Raises VerificationError when one of them cannot be opened or asked.
    """
    with tempfile.TemporaryDirectory() as place:
        files = [Path(place) / f"{index}.safetensors" for index in range(len(questions))]
        asked: List[Dict[str, Any]] = [
            {**question._asdict(), "model": str(question.model.resolve()), "answers": str(file)}
            for question, file in zip(questions, files)
        ]
        # The library copies code that travels to this directory before it runs it.
        environment = {**os.environ, "HF_MODULES_CACHE": str(Path(place) / "modules"), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, "-c", inspect.getsource(program)],
            input=json.dumps(asked),
            cwd=place,
            env=environment,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
        if done.returncode != 0:
            reason = _reason(done.stderr) or f"its process ended with {done.returncode}"
            raise VerificationError(f"transformers cannot open the exported model: {reason}")
        return [_answer(load_file(str(file))) for file in files]


def largest_difference(one: Answer, other: Answer) -> float:
    """Of two logits; NaN where one is. Raises VerificationError when the tokens differ."""
    if one.tokens != other.tokens:
        raise VerificationError("the exported tokenizer makes other tokens than the trained model's")
    return float(torch.cat([(x - y).abs().flatten() for x, y in zip(one.logits, other.logits)]).max())


def _answer(tensors: Dict[str, Tensor]) -> Answer:
    mask_BS = tensors["attention_mask"].bool()
    tokens = [ids_S[mask_S].tolist() for ids_S, mask_S in zip(tensors["input_ids"], mask_BS)]
    logits = _without_padding(tensors["logits"], [len(row) for row in tokens])
    return Answer(tokens, logits, float(tensors["base_difference"]))


def _reason(stderr: str) -> str:
    """The first line of the exception that a traceback ends with; its other lines can be many, and long."""
    said = [line for line in stderr.splitlines() if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
    return said[-1][:300] if said else ""


def _without_padding(logits: Tensor, lengths: Sequence[int]) -> List[Tensor]:
    return [row if row.dim() == 1 else row[:length] for row, length in zip(logits, lengths)]
