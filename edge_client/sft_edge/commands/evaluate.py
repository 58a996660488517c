"""`sft-edge evaluate`: the metrics of a trained model, without a cloud."""

from __future__ import annotations

import json
import sys

from sft.errors import UsageError
from sft_edge.files import write_json
from sft_edge.model_files import load_model, task_of
from sft_edge.options import EvaluateOptions
from sft_edge.training import EvaluationSet, evaluate_with


def evaluate_saved(options: EvaluateOptions) -> None:
    """Prints the metrics as JSON. Raises CheckpointError, DataError, UsageError."""
    model = load_model(options.model)
    if options.task not in (None, model.description.task):
        trained_for = model.description.task if model.description.mode else "nobody has said what; leave --task out"
        raise UsageError(f"--task {options.task}: this model was trained for {trained_for}")
    task = task_of(model.description, options.data_dir)
    rows = task.read("validation", options.max_eval_samples)
    data = EvaluationSet(rows, task.encode(rows, model.tokenizer, model.description.max_seq_length))
    batch_size = options.per_device_eval_batch_size
    results = evaluate_with(lambda features: model.logits(task, features, batch_size), task, data, batch_size)
    sys.stdout.write(json.dumps(results, indent=2) + "\n")
    if options.output_file is not None:
        write_json(options.output_file, results)
