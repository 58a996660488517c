"""The model card of an export: what it is, and how it is opened."""

from __future__ import annotations

from sft_edge.commands.export.content import Export
from sft_edge.model_files import FACTORED, PIPELINES, RESIDUAL_IS, ModelingFile


def export_card(exported: Export) -> str:
    """Markdown with the metadata that model hubs read."""
    description = exported.description
    base_model, pipeline = description.base_model, PIPELINES[description.head]
    trust = ", trust_remote_code=True" if exported.has_code else ""
    opening = [f'model = {exported.auto_class}.from_pretrained("THIS_DIRECTORY"{trust})']
    opening.append(f'tokenizer = AutoTokenizer.from_pretrained("THIS_DIRECTORY"{trust})')
    imported = [exported.auto_class, "AutoTokenizer"]
    if description.head != "question-answering":  # newer releases have no pipeline for it
        opening.append(f'pipe = pipeline("{pipeline}", model=model, tokenizer=tokenizer)')
        imported.append("pipeline")
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {pipeline}",
        f"base_model: {base_model or 'none'}",
        "---",
        "",
        f"# {_title(exported)}",
        "",
        _architecture(exported),
        "",
        "```python",
        f"from transformers import {', '.join(imported)}",
        "",
        *opening,
        "```",
        "",
    ]
    if exported.has_code:
        code = ModelingFile.name
        lines += [
            f"`trust_remote_code=True` lets transformers run [{code}]({code}), which travels with the weights: the",
            "library has no such architecture. It is short and needs torch and transformers alone.",
            "",
        ]
    if description.label_names is not None:
        lines += [f"Labels: {', '.join(description.label_names)}.", ""]
    trained = "It was trained on" if description.mode else "It reads"
    lines += [f"{trained} at most {description.max_seq_length} tokens a text; `truncation=True` cuts there.", ""]
    return "\n".join(lines)


def _title(exported: Export) -> str:
    description = exported.description
    if not description.mode:  # nobody has said what it was made from
        return f"A {exported.architecture}"
    return f"{description.base_model or 'A model drawn from a seed'}, fine-tuned on {description.task}"


def _architecture(exported: Export) -> str:
    cut = exported.description.cut
    if cut is None:
        return f"A `{exported.architecture}` as the library has it."
    rank = f"a matrix of rank {cut.split_rank}"
    stands = f"{rank}, kept as its three factors" if exported.form == FACTORED else rank
    return (
        f"A `{exported.architecture}` whose feed-forward layer in block {cut.split_layer}, counted from 1, ends in "
        f"{stands}. The residual around that layer is {RESIDUAL_IS[cut.residual]}."
    )
