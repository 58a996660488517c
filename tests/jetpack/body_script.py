"""One script for both sides: `python body_script.py cloud`, which prints its address, and `... edge ADDRESS`.

The edge prints how far its losses, and then its weights, are from those of one machine on its own stack.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, List

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from support.bodies import CUT, Mean, adamw, batches, made, one_machine

from sft import SFTOptimizer


def train(model: Any, optimizer: Any) -> List[float]:
    losses = []
    for ids, mask, y, _ in batches(3):
        optimizer.zero_grad()
        loss, _ = model(ids, mask, labels=y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


def tell(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    torch.set_num_threads(1)
    model = made(Mean)
    if sys.argv[1] == "cloud":
        optimizer = SFTOptimizer(adamw(model), role="cloud", model=model, **CUT)
        optimizer.serve("127.0.0.1:0", tell)
        return
    whole = one_machine(model)
    expected = train(whole, adamw(whole))
    with SFTOptimizer(adamw(model), role="edge", model=model, server=sys.argv[2], **CUT) as optimizer:
        losses = train(model, optimizer)
        saved = model.state_dict()
    differences = [abs(a - b) for a, b in zip(losses, expected)]
    of_weights = [float((x - saved[name]).abs().max()) for name, x in whole.state_dict().items()]
    tell(f"{max(differences)} {max(of_weights)}")


if __name__ == "__main__":
    main()
