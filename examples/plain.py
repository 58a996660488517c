"""A training script for one machine: a small transformer learns which of two tokens is the more frequent.

python examples/plain.py
"""

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

VOCABULARY, LENGTH, WIDTH = 8, 16, 32


class Block(nn.Module):
    """One block of a post-norm transformer."""

    def __init__(self, dropout):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout, batch_first=True)
        self.norm_1 = nn.LayerNorm(WIDTH)
        self.fc1 = nn.Linear(WIDTH, 4 * WIDTH)
        self.fc2 = nn.Linear(4 * WIDTH, WIDTH)
        self.norm_2 = nn.LayerNorm(WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        """Hidden states to hidden states, (B, LENGTH, WIDTH) each."""
        x = self.norm_1(x + self.dropout(self.attention(x, x, x, need_weights=False)[0]))
        return self.norm_2(x + self.dropout(self.fc2(nn.functional.gelu(self.fc1(x)))))


class Classifier(nn.Module):
    """Token ids to two logits."""

    def __init__(self, dropout=0.1, blocks=3):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList([Block(dropout) for _ in range(blocks)])
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, ids):
        """(B, LENGTH) to (B, 2)."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=1))


def make_loader(rows, seed, shuffle=False):
    """Random sequences, and whether token 1 is more frequent in them than token 2."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (rows, LENGTH), generator=draw)
    target = ((ids == 1).sum(dim=1) > (ids == 2).sum(dim=1)).long()
    return DataLoader(TensorDataset(ids, target), batch_size=32, shuffle=shuffle, generator=draw)


def main():
    """Trains, evaluates, saves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", default=5, type=int)
    parser.add_argument("--rows", default=2048, type=int)
    parser.add_argument("--dropout", default=0.1, type=float)
    parser.add_argument("--save", help="file for the trained model")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = Classifier(arguments.dropout)
    train_loader, test_loader = make_loader(arguments.rows, seed=1, shuffle=True), make_loader(512, seed=2)
    criterion = nn.CrossEntropyLoss()
    optim = torch.optim.Adam(model.parameters(), lr=1e-3)
    for epoch in range(arguments.epochs):
        model.train()
        for data, target in train_loader:
            optim.zero_grad()
            output = model(data)
            loss = criterion(output, target)
            loss.backward()
            optim.step()
        model.eval()
        with torch.no_grad():
            correct = sum(int((model(data).argmax(dim=1) == target).sum()) for data, target in test_loader)
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, {100 * correct / 512:.1f}% correct")
    if arguments.save:
        torch.save(model.state_dict(), arguments.save)


if __name__ == "__main__":
    main()
