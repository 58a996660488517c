"""A loop with Lightning Fabric, across edge and cloud; labels stay on the edge.

sft-cloud serve --port 50051
python examples/fabric_loop.py --model MODEL --data-dir SST-2 --server localhost:50051 --split-layer 5
"""

import argparse
from pathlib import Path

import torch
from lightning_fabric import Fabric, seed_everything
from sst2 import encode, read_rows
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

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
    parser.add_argument("--precision", default="32-true", choices=("32-true", "bf16-mixed"))
    parser.add_argument("--learning-rate", default=5e-5, type=float)
    parser.add_argument("--epochs", default=1, type=int)
    return parser.parse_args()


def main() -> None:
    """Trains, evaluates, prints."""
    arguments = parse_arguments()
    fabric = Fabric(accelerator="auto", devices=1, precision=arguments.precision)
    seed_everything(0, verbose=False)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=False)
    model = AutoModelForSequenceClassification.from_pretrained(arguments.model, num_labels=2, trust_remote_code=False)
    train = encode(read_rows(arguments.data_dir / "train.tsv", arguments.max_train_samples), tokenizer)
    dev = encode(read_rows(arguments.data_dir / "dev.tsv"), tokenizer)
    collate = DataCollatorWithPadding(tokenizer)
    train_loader, dev_loader = fabric.setup_dataloaders(
        DataLoader(train, batch_size=32, shuffle=True, collate_fn=collate),
        DataLoader(dev, batch_size=32, collate_fn=collate),
    )

    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate)
    sft_optimizer = SFTOptimizer(
        optimizer,
        role="edge",
        model=model,
        server=arguments.server,
        split_layer=arguments.split_layer,
        split_rank=arguments.split_rank,
    )
    model, optimizer = fabric.setup(model, sft_optimizer)

    for epoch in range(arguments.epochs):
        model.train()
        for batch in train_loader:
            labels = batch.pop("labels")
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(**batch).logits, labels)
            fabric.backward(loss)
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
        model.eval()
        correct = 0
        for batch in dev_loader:
            labels = batch.pop("labels")
            with torch.no_grad():
                correct += int((model(**batch).logits.argmax(-1) == labels).sum())
        fabric.print(f"epoch {epoch + 1}: accuracy on dev {100 * correct / len(dev):.1f}")
    sft_optimizer.close()


if __name__ == "__main__":
    main()
