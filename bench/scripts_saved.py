"""Trains MiniLM in five kinds of scripts, saves it as each does, and asks another Python about the rows of SST-2's dev.

    python3 -m venv elsewhere && elsewhere/bin/pip install torch transformers
    pip install pytorch-lightning datasets sentence-transformers peft
    python bench/scripts_saved.py --data-dir DATA --python elsewhere/bin/python

A plain loop, the same over a model with peft's LoRA, transformers' Trainer, Lightning's, and a cross-encoder of
sentence-transformers with its own trainer: each cut, with a server on loopback. DATA holds SST-2/train.tsv and dev.tsv.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as lightning
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import CrossEntropyLoss
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from sft import SFTOptimizer
from sft.tensors.hub import find_model
from sft_edge.commands.export.exported import logits as program
from sft_edge.systems.cloud_process import CloudProcess
from sft_edge.tasks import make_task

STEPS, BATCH, RATE = 60, 16, 1e-4
SECOND = "Is this praise?"
"""What a cross-encoder compares each text with."""

Rows = list[tuple[str, int]]


class Script:
    """What the scripts have in common: the model, its rows, and the two lines."""

    rate = RATE

    def __init__(self, server: str, train: Rows) -> None:
        self.server, self.train, self.place = server, train, str(find_model("minilm"))
        self.tokenizer = AutoTokenizer.from_pretrained(self.place, trust_remote_code=False, local_files_only=True)

    def model(self) -> Any:
        set_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(
            self.place, num_labels=2, trust_remote_code=False, local_files_only=True
        )

    def cut(self, model: Any, optimizer: Any = None) -> Any:
        optimizer = optimizer or torch.optim.AdamW(
            [parameter for parameter in model.parameters() if parameter.requires_grad], lr=self.rate
        )
        return SFTOptimizer(optimizer, role="edge", model=model, server=self.server, split_layer=5, split_rank=8)

    def rows(self) -> list[dict[str, Any]]:
        texts, labels = zip(*self.train, strict=True)
        encoded = self.tokenizer(list(texts), truncation=True)
        return [{**{name: x[i] for name, x in encoded.items()}, "labels": labels[i]} for i in range(len(labels))]

    def batches(self) -> DataLoader[Any]:
        return DataLoader(self.rows(), BATCH, collate_fn=DataCollatorWithPadding(self.tokenizer))

    def settings(self, **more: Any) -> dict[str, Any]:
        """Of a Trainer that only trains."""
        return {
            "max_steps": STEPS,
            "per_device_train_batch_size": BATCH,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            **more,
        }


def plain(script: Script, directory: str, model: Any = None) -> Any:
    """A loop as in examples/plain.py."""
    model = model or script.model()
    optimizer = script.cut(model)
    model.train()
    for batch in script.batches():
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)
    return model


def lora(script: Script, directory: str) -> Any:
    """The same, of a PeftModel, which wants a higher rate."""
    script.rate = 10 * RATE
    config = LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"])
    return plain(script, directory, get_peft_model(script.model(), config))


def trainer(script: Script, directory: str) -> Any:
    """Wrapped after `Trainer(...)`: its own optimizer and decay groups."""
    model = script.model()
    collate = DataCollatorWithPadding(script.tokenizer)
    with tempfile.TemporaryDirectory() as place:
        settings = TrainingArguments(place, **script.settings(learning_rate=RATE))
        own = Trainer(model, settings, collate, script.rows())
        own.create_optimizer()
        own.optimizer = script.cut(model, own.optimizer)
        own.train()
        own.save_model(directory)
    return model


def of_lightning(script: Script, directory: str) -> Any:
    """A LightningModule around the model."""

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = script.model()

        def training_step(self, batch: Any, _: int) -> Tensor:
            loss: Tensor = self.model(**batch).loss
            return loss

        def configure_optimizers(self) -> Any:
            return script.cut(self.model)

    module = Module()
    with tempfile.TemporaryDirectory() as place:
        own = lightning.Trainer(
            max_steps=STEPS, logger=False, enable_checkpointing=False, enable_progress_bar=False, default_root_dir=place
        )
        own.fit(module.train(), script.batches())
    module.model.save_pretrained(directory)
    return module.model


def cross_encoder(script: Script, directory: str) -> Any:
    """sentence-transformers' own trainer and `save_pretrained`."""
    script.rate = 5 * RATE
    set_seed(0)
    encoder = CrossEncoder(script.place, num_labels=2, device="cpu")
    texts, labels = zip(*script.train, strict=True)
    rows = Dataset.from_dict({"one": list(texts), "other": [SECOND] * len(texts), "label": list(labels)})
    with tempfile.TemporaryDirectory() as place:
        settings = CrossEncoderTrainingArguments(place, **script.settings(learning_rate=script.rate))
        own = CrossEncoderTrainer(encoder, settings, rows, loss=CrossEntropyLoss(encoder))
        own.create_optimizer()
        own.optimizer = script.cut(encoder.model, own.optimizer)
        own.train()
    encoder.save_pretrained(directory)
    return encoder.model


SCRIPTS = {
    "a plain loop": plain,
    "peft's LoRA": lora,
    "transformers' Trainer": trainer,
    "Lightning's Trainer": of_lightning,
    "sentence-transformers' cross-encoder": cross_encoder,
}


def asked(model: Any, tokenizer: Any, columns: list[list[str]]) -> Iterator[Tensor]:
    """The logits of the cut model, in the script."""
    model.eval()
    for first in range(0, len(columns[0]), BATCH):
        texts = [column[first : first + BATCH] for column in columns]
        with torch.no_grad():
            yield model(**tokenizer(*texts, truncation=True, padding=True, return_tensors="pt")).logits


def main() -> None:
    """Prints a line for each script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--python", required=True, help="an interpreter with torch and transformers")
    arguments = parser.parse_args()
    if elsewhere([arguments.python, "-c", "import sft"], capture_output=True).returncode == 0:
        sys.exit(f"{arguments.python} can import this package: make an environment without it")
    task = make_task("sst2", arguments.data_dir)
    train, dev = ([(row.texts[0], row.label) for row in task.read(split)] for split in ("train", "validation"))
    with CloudProcess() as cloud:
        for name, script in SCRIPTS.items():
            compare(name, script, Script(cloud.address, train[: STEPS * BATCH]), dev, arguments.python)


def elsewhere(command: list[str], **more: Any) -> Any:
    """A process that finds nothing of where this one is."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd="/", env=environment, **more)


def compare(name: str, script: Any, common: Script, dev: Rows, python: str) -> None:
    """Trains, saves, opens elsewhere."""
    columns = [[text for text, _ in dev]]
    if script is cross_encoder:
        columns.append([SECOND] * len(dev))
    with tempfile.TemporaryDirectory() as place:
        directory, answers = str(Path(place) / "saved"), Path(place) / "answers.safetensors"
        model = script(common, directory)
        common.tokenizer.save_pretrained(directory)
        expected = torch.cat(list(asked(model, common.tokenizer, columns)))
        question = {
            "model": directory,
            "auto_class": "AutoModelForSequenceClassification",
            "trust_remote_code": True,
            "texts": columns,
            "answers": str(answers),
        }
        elsewhere([python, program.__file__], input=json.dumps([question]), text=True, check=True)
        logits = load_file(answers)["logits"]
    labels = torch.tensor([label for _, label in dev])
    right = 100 * float((expected.argmax(-1) == labels).float().mean())
    same = int((logits.argmax(-1) == expected.argmax(-1)).sum())
    difference = float((logits - expected).abs().max())
    print(f"{name}: {right:.1f} in the script; {same} of {len(dev)} labels the same, logits within {difference:.1e}")


if __name__ == "__main__":
    main()
