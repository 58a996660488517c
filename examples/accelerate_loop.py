"""A loop of one's own in the style of transformers' `run_glue_no_trainer.py`, with accelerate, across edge and cloud.

sft-cloud serve --port 50051
python examples/accelerate_loop.py --model MODEL --data-dir SST-2 --server localhost:50051 --split-layer 5
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sst2 import encode, read_rows
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, get_scheduler

from sft import SFTOptimizer


def parse_arguments() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", required=True, type=Path)
    parser.add_argument("--server", required=True, help="HOST:PORT of a running `sft-cloud serve`")
    parser.add_argument("--split-layer", required=True, type=int)
    parser.add_argument("--split-rank", default=8, type=int)
    parser.add_argument("--max-train-samples", type=int)
    parser.add_argument("--gradient-accumulation-steps", default=2, type=int)
    parser.add_argument("--mixed-precision", default="no", choices=("no", "bf16"))
    parser.add_argument("--learning-rate", default=5e-5, type=float)
    parser.add_argument("--epochs", default=1, type=int)
    return parser.parse_args()


def main() -> None:
    """Trains, evaluates, prints."""
    arguments = parse_arguments()
    accelerator = Accelerator(
        gradient_accumulation_steps=arguments.gradient_accumulation_steps, mixed_precision=arguments.mixed_precision
    )
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=False)
    model = AutoModelForSequenceClassification.from_pretrained(arguments.model, num_labels=2, trust_remote_code=False)
    train = encode(read_rows(arguments.data_dir / "train.tsv", arguments.max_train_samples), tokenizer)
    dev = encode(read_rows(arguments.data_dir / "dev.tsv"), tokenizer)
    collate = DataCollatorWithPadding(tokenizer)
    train_loader = DataLoader(train, batch_size=16, shuffle=True, collate_fn=collate)
    dev_loader = DataLoader(dev, batch_size=32, collate_fn=collate)

    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate)
    sft_optimizer = SFTOptimizer(
        optimizer,
        role="edge",
        model=model,
        server=arguments.server,
        split_layer=arguments.split_layer,
        split_rank=arguments.split_rank,
    )
    steps = arguments.epochs * len(train_loader) // arguments.gradient_accumulation_steps
    scheduler = get_scheduler("linear", sft_optimizer, num_warmup_steps=steps // 10, num_training_steps=steps)
    model, optimizer, train_loader, dev_loader, scheduler = accelerator.prepare(
        model, sft_optimizer, train_loader, dev_loader, scheduler
    )

    for epoch in range(arguments.epochs):
        model.train()
        for batch in train_loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        model.eval()
        correct = 0
        for batch in dev_loader:
            with torch.no_grad():
                logits = model(**batch).logits
            predictions, labels = accelerator.gather_for_metrics((logits.argmax(-1), batch["labels"]))
            correct += int((predictions == labels).sum())
        accelerator.print(f"epoch {epoch + 1}: accuracy on dev {100 * correct / len(dev):.1f}")
    sft_optimizer.close()


if __name__ == "__main__":
    main()
