"""Exports a trained SST-2 model, dense and factored, and asks both in another Python about every row of dev.

    python3 -m venv elsewhere && elsewhere/bin/pip install torch transformers
    python bench/export.py --model OUT --data-dir DATA --python elsewhere/bin/python

`--model` is a directory that `sft-edge train --task sst2` wrote; DATA holds SST-2/dev.tsv.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from sft_edge.commands.export.exported import logits as program
from sft_edge.model_files.saved import load_model, task_of


def main() -> None:
    """Prints a line for each form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--python", required=True, help="an interpreter with torch and transformers")
    arguments = parser.parse_args()
    found = subprocess.run([arguments.python, "-c", "import sft"], capture_output=True, cwd="/").returncode == 0
    if found:
        sys.exit(f"{arguments.python} can import this package: make an environment without it")

    saved = load_model(arguments.model)
    task = task_of(saved.description, arguments.data_dir)
    texts = [row.texts[0] for row in task.read("validation")]
    features = task.encode(task.read("validation"), saved.tokenizer, saved.description.max_seq_length)
    batch = task.collate(features)
    with torch.no_grad():
        expected = saved.net(batch.inputs, batch.lengths, {}).logits

    for form in ("dense", "factored"):
        with tempfile.TemporaryDirectory() as place:
            exported, answers = Path(place) / "exported", Path(place) / "answers.safetensors"
            command = [sys.executable, "-m", "sft_edge", "export", f"--{form}"]
            subprocess.run([*command, "--model", str(arguments.model), "--to", str(exported)], check=True)
            question = {
                "model": str(exported),
                "auto_class": "AutoModelForSequenceClassification",
                "trust_remote_code": True,
                "texts": [texts],
                "answers": str(answers),
            }
            subprocess.run(
                [arguments.python, program.__file__], input=json.dumps([question]), text=True, check=True, cwd="/"
            )
            logits = load_file(answers)["logits"]
        same = int((logits.argmax(-1) == expected.argmax(-1)).sum())
        difference = float((logits - expected).abs().max())
        print(f"{form}: {same} of {len(texts)} labels the same, largest difference of a logit {difference:.1e}")


if __name__ == "__main__":
    main()
