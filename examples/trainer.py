"""transformers' own Trainer, with its evaluation, checkpoints and callbacks, across edge and cloud.

    sft-cloud serve --port 50051
    python examples/trainer.py --model_name_or_path MODEL --data_dir SST-2 --server localhost:50051 --split_layer 5 \
        --output_dir out --num_train_epochs 1 --eval_strategy epoch --save_strategy epoch

Every option of `TrainingArguments` is one here. `--resume_from_checkpoint out/checkpoint-200` goes on from there:
a checkpoint holds both halves and the state of both optimizers.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import torch
from sst2 import encode, read_rows
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from sft import SFTOptimizer


@dataclass
class Arguments:
    """What `TrainingArguments` has not."""

    model_name_or_path: str
    data_dir: Path
    server: str = field(metadata={"help": "HOST:PORT of a running `sft-cloud serve`"})
    split_layer: int
    split_rank: int = 8
    max_train_samples: Optional[int] = None


def accuracy(prediction):
    """Percent."""
    return {"accuracy": 100 * float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main() -> None:
    """Trains, evaluates, prints."""
    arguments, training = HfArgumentParser((Arguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(training.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path, trust_remote_code=False)
    model = AutoModelForSequenceClassification.from_pretrained(
        arguments.model_name_or_path, num_labels=2, trust_remote_code=False
    )
    train = encode(read_rows(arguments.data_dir / "train.tsv", arguments.max_train_samples), tokenizer)
    dev = encode(read_rows(arguments.data_dir / "dev.tsv"), tokenizer)

    optimizer = torch.optim.AdamW(model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay)
    optimizer = SFTOptimizer(
        optimizer,
        role="edge",
        model=model,
        server=arguments.server,
        split_layer=arguments.split_layer,
        split_rank=arguments.split_rank,
    )
    trainer = Trainer(
        model=model,
        args=training,
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=train,
        eval_dataset=dev,
        compute_metrics=accuracy,
        optimizers=(optimizer, None),
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    print(f"accuracy on dev: {trainer.evaluate()['eval_accuracy']:.1f}")
    optimizer.close()


if __name__ == "__main__":
    main()
