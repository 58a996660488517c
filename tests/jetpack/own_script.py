"""One script for both sides: `python own_script.py KIND cloud`, which prints its address, and `... KIND edge ADDRESS`.

The edge prints how far its losses, and then its weights, are from those of one machine on its own stack.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Iterator, List, Tuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from support import bodies, own_models
from torch import Tensor

from sft import SFTOptimizer

AT = {"split_at": "body.layers.1.feed.down", "split_rank": 3}


def gpt() -> own_models.Gpt:
    torch.manual_seed(0)
    return own_models.Gpt()


def mean() -> bodies.Mean:
    model: bodies.Mean = bodies.made(bodies.Mean)
    return model


def calls(kind: str) -> Iterator[Tuple[Tensor, ...]]:
    """What the model is called with in each step, labels last."""
    if kind == "layer":
        data = own_models.tokens(3)
        yield from zip(data["ids"], data["targets"])
    else:
        yield from ((ids, mask, y) for ids, mask, y, _ in bodies.batches(3))


def train(kind: str, model: Any, optimizer: Any) -> List[float]:
    losses = []
    for inputs in calls(kind):
        optimizer.zero_grad()
        loss = next(one for one in model(*inputs) if one.dim() == 0)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


def tell(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    torch.set_num_threads(1)
    kind, role = sys.argv[1:3]
    model, cut = (gpt(), AT) if kind == "layer" else (mean(), bodies.CUT)
    if role == "cloud":
        optimizer = SFTOptimizer(bodies.adamw(model), role="cloud", model=model, **cut)
        optimizer.serve("127.0.0.1:0", tell)
        return
    whole = own_models.whole_model(gpt(), AT["split_at"], 3) if kind == "layer" else bodies.one_machine(model)
    expected = train(kind, whole, bodies.adamw(whole))
    with SFTOptimizer(bodies.adamw(model), role="edge", model=model, server=sys.argv[3], **cut) as optimizer:
        losses = train(kind, model, optimizer)
        saved = model.state_dict()
    of_losses = [abs(a - b) for a, b in zip(losses, expected)]
    of_weights = [float((x - saved[name]).abs().max()) for name, x in whole.state_dict().items()]
    tell(f"{max(of_losses)} {max(of_weights)}")


if __name__ == "__main__":
    main()
