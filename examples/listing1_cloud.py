"""The cloud's side of listing1.py: hosts the upper half of its model, and trains it with an optimizer of its own.

python examples/listing1_cloud.py
"""

import argparse

import torch
from plain import Classifier

from sft import SFTOptimizer


def main():
    """Serves one edge, and saves what it has trained here."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--listen", default="127.0.0.1:50051", help="HOST:PORT; port 0 takes a free one")
    parser.add_argument("--insecure", action="store_true", help="listen where other machines reach it, for everybody")
    parser.add_argument("--dropout", default=0.1, type=float)
    parser.add_argument("--save", help="file for the upper half of the trained model")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = Classifier(arguments.dropout)
    optim = torch.optim.Adam(model.parameters(), lr=1e-3)
    optim = SFTOptimizer(
        optim, role="cloud", model=model, split_at="blocks.2.fc2", split_rank=8, insecure=arguments.insecure
    )
    optim.serve(arguments.listen, lambda address: print(f"serving at {address}", flush=True))
    if arguments.save:
        torch.save(model.state_dict(), arguments.save)


if __name__ == "__main__":
    main()
