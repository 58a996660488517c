"""`sft-edge predict`: ask a trained model, without a cloud."""

from __future__ import annotations

import json
import sys
from typing import Dict, List

from sft_edge.model_files import load_model, task_of
from sft_edge.options import PredictOptions
from sft_edge.tasks import Row


def predict(options: PredictOptions) -> None:
    """Prints one line a row. Raises CheckpointError, DataError, UsageError."""
    model = load_model(options.model)
    task = task_of(model.description)
    if options.file is not None:
        rows: List[Row] = task.read_inputs(options.file)
    else:
        rows = [task.row(*[text for text in (options.text, options.text_pair) if text is not None])]
    asked = [row for row in rows if not row.is_blank]
    features = task.encode(asked, model.tokenizer, model.description.max_seq_length)
    logits = model.logits(task, features, options.per_device_eval_batch_size)
    predictions = iter(task.predictions(logits, features, asked))
    for row in rows:  # a blank one has an empty line, so that answers stand beside their texts
        prediction = {} if row.is_blank else next(predictions)
        if options.json_lines:
            texts = dict(zip(task.text_fields, row.texts))
            sys.stdout.write(json.dumps({**texts, **prediction}, ensure_ascii=not _shows_all()) + "\n")
        else:
            sys.stdout.write(_line(prediction) + "\n")


def _shows_all() -> bool:
    return (sys.stdout.encoding or "utf-8").lower().startswith("utf")


def _line(prediction: Dict[str, object]) -> str:
    shown = [value for value in prediction.values() if not isinstance(value, dict)]  # scores of all labels are for JSON
    return "\t".join(f"{value:.4f}" if isinstance(value, float) else str(value) for value in shown)
