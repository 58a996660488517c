"""A program: opens exported models with transformers alone, asks them, and writes what they say.

Its standard input is a JSON list of objects: `model` (a directory), `auto_class`, `trust_remote_code`, `texts` (a list
of columns, one text each or the two of a pair) and `answers` (the safetensors file to write: input_ids,
attention_mask, logits and base_difference, see `_base_difference`).
"""

from __future__ import annotations

import json
import sys
from typing import Any, Dict

HIDDEN = ("sft", "sft_edge", "sft_cloud")


def main() -> None:
    """Answers the questions of standard input."""
    modules: Dict[str, Any] = sys.modules
    for name in HIDDEN:
        modules[name] = None  # which makes importing it an error: most machines do not have it
    import torch
    import transformers
    from safetensors.torch import save_file

    for question in json.load(sys.stdin):
        where = {"trust_remote_code": question["trust_remote_code"], "local_files_only": True}
        tokenizer = transformers.AutoTokenizer.from_pretrained(question["model"], **where)  # nosec B615 # a directory
        model = getattr(transformers, question["auto_class"]).from_pretrained(question["model"], **where).eval()  # nosec B615
        encoding = tokenizer(*question["texts"], truncation=True, padding=True, return_tensors="pt")
        asked = dict(encoding)
        if question["auto_class"] == "AutoModelForMultipleChoice":  # each text a question of one choice
            asked = {name: x.unsqueeze(1) for name, x in asked.items()}
        with torch.no_grad():
            output = model(**asked)
        if hasattr(output, "start_logits"):
            logits = torch.stack([output.start_logits, output.end_logits], dim=-1)
        else:
            logits = output.logits
        answers = {"input_ids": encoding["input_ids"], "attention_mask": encoding["attention_mask"], "logits": logits}
        # Code that travels has a base model of its own.
        is_own = question["trust_remote_code"]
        answers["base_difference"] = _base_difference(model, question["model"], encoding) if is_own else torch.zeros(())
        save_file({name: x.contiguous() for name, x in answers.items()}, question["answers"])


def _base_difference(model: Any, directory: str, encoding: Any) -> Any:
    """The largest of a last hidden state of what `AutoModel` opens from that of the base model inside `model`."""
    import torch
    import transformers

    base = transformers.AutoModel.from_pretrained(directory, trust_remote_code=True, local_files_only=True).eval()  # nosec B615 # a directory
    with torch.no_grad():
        inside, alone = (one(**encoding).last_hidden_state for one in (model.base_model, base))
    return (inside - alone)[encoding["attention_mask"].bool()].abs().max()


if __name__ == "__main__":
    main()
