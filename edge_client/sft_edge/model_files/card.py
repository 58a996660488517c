"""The model card of a trained model: task, cut, rank, metric and bytes."""

from __future__ import annotations

from typing import Any, List, Mapping

from sft.printable import format_bytes
from sft_edge.model_files.description import Description

_SYSTEMS = {
    "sft": "split fine-tuning: embeddings, lower blocks and FFN-1 on the edge, the rest on a cloud",
    "sl": "plain split learning: embeddings and lower blocks on the edge, the rest on a cloud",
    "frozen": "embeddings and lower blocks on the edge, as they were; what they make of a text sent once, in a code; "
    "the rest trained on a cloud",
    "local": "one process",
}

RESIDUAL_IS = {"none": "removed", "low-rank": "kept as far as the split rank holds it", "full": "kept"}
"""What has become of the residual around the layer that is cut, in words for cards."""

PIPELINES = {
    "sequence-classification": "text-classification",
    "question-answering": "question-answering",
    "causal-lm": "text-generation",
    "token-classification": "token-classification",
    "multiple-choice": "multiple-choice",
    "masked-lm": "fill-mask",
}
"""What model hubs call the use of a head."""


def model_card(description: Description, results: Mapping[str, Any]) -> str:
    """Markdown with the metadata that model hubs read. `results` as in `all_results.json`."""
    metrics = {name: value for name, value in results.items() if _is_metric(name, value)}
    return "\n".join(
        [
            "---",
            "library_name: split-fine-tuning",
            f"pipeline_tag: {PIPELINES[description.head]}",
            f"base_model: {description.base_model or 'none'}",
            "---",
            "",
            f"# {description.base_model or 'A model drawn from a seed'}, fine-tuned on {description.task}",
            "",
            *_table("Trained", _training(description, results)),
            *_table("Validation", {name[len("eval_") :]: f"{value:.2f}" for name, value in metrics.items()}),
            *_table("On the wire", _wire(results)),
            'Use it with `sft-edge predict --model THIS_DIRECTORY --text "..."`.',
            "",
        ]
    )


def _training(description: Description, results: Mapping[str, Any]) -> Mapping[str, str]:
    rows = {"system": f"{description.mode} ({_SYSTEMS[description.mode]})"}
    if description.split_layer is not None:
        rows["split layer"] = f"block {description.split_layer}, counted from 1"
    if description.split_rank is not None:
        rows["split rank"] = str(description.split_rank)
        rows["residual at the split layer"] = RESIDUAL_IS[description.residual]
    rows["steps"] = str(results["train_steps"])
    rows["training loss"] = f"{results['train_loss']:.4f}"
    return rows


def _wire(results: Mapping[str, Any]) -> Mapping[str, str]:
    if not results["wire_bytes_sent"]:
        return {}
    rows = {}
    for way in ("sent", "received"):
        payload, total = results[f"wire_payload_bytes_{way}"], results[f"wire_bytes_{way}"]
        rows[f"{way} by the edge in training"] = f"{format_bytes(total)}, of which {format_bytes(payload)} are payload"
    if results["wire_reduction"] is not None:  # without payload: all of it was kept on the cloud
        rows["less payload than plain split learning, padded, float32"] = f"{results['wire_reduction']:.1f} times"
    if results["mode"] != "sft":
        rows["the text, from what was sent"] = (
            "more readily than from a rank-R activation; the lower the cut, the more so"
        )
    return rows


def _is_metric(name: str, value: Any) -> bool:
    beside = ("eval_samples", "eval_runtime", "eval_wire")
    return name.startswith("eval_") and not name.startswith(beside) and isinstance(value, (int, float))


def _table(title: str, rows: Mapping[str, str]) -> List[str]:
    if not rows:
        return []
    return [f"| {title} | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""]
