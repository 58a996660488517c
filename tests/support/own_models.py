"""Models in the shapes of people's own: a loss among what they return, tied weights, values from below the cut."""

from __future__ import annotations

from typing import Any, Dict, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from sft.models.decompose import decompose

B, S, D, V = 4, 6, 8, 20


class Feed(nn.Module):
    """A feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.gelu(self.up(x)))


class Layer(nn.Module):
    """A pre-norm block, with or without the residual around its feed-forward layer."""

    residual = True

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.mix, self.norm_2, self.feed = nn.LayerNorm(D), nn.Linear(D, D), nn.LayerNorm(D), Feed()

    def forward(self, x: Tensor) -> Tensor:
        h = self.mix(self.norm_1(x))
        x = x + h.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
        return x + self.feed(self.norm_2(x)) if self.residual else self.feed(self.norm_2(x))


class Gpt(nn.Module):
    """Tokens to logits and loss. With targets of all positions, without of the last alone if `shortens`."""

    def __init__(self, shortens: bool = True, is_tied: bool = True, returns: str = "tuple") -> None:
        super().__init__()
        self.body = nn.ModuleDict({"tokens": nn.Embedding(V, D), "places": nn.Embedding(S, D)})
        self.body["layers"] = nn.ModuleList([Layer() for _ in range(2)])
        self.head = nn.Linear(D, V, bias=False)
        self.norm = nn.LayerNorm(D)
        self.limit, self.shortens, self.returns = S, shortens, returns
        if is_tied:
            self.body["tokens"].weight = self.head.weight

    def forward(self, ids: Tensor, targets: Optional[Tensor] = None) -> Any:
        b, t = ids.size()
        assert t <= self.limit, f"{t} are too many"
        x = self.body["tokens"](ids) + self.body["places"](torch.arange(0, t, dtype=torch.long, device=ids.device))
        for layer in self.body["layers"]:
            x = layer(x)
        x = self.norm(x)
        loss = None
        if targets is not None:
            logits = self.head(x)
            loss = functional.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(b * t), ignore_index=-1)
        else:
            logits = self.head(x[:, [-1], :] if self.shortens else x)
        if self.returns == "dict":
            return {"logits": logits, "loss": loss, "most": [self.limit]}
        return logits, loss


class Vae(nn.Module):
    """An image, what it is made of again, and two values from below the cut at `out`."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.mean, self.spread = nn.Linear(12, D), nn.Linear(D, 3), nn.Linear(D, 3)
        self.back, self.out = nn.Linear(3, D), nn.Linear(D, 12)

    def forward(self, x: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        h = functional.relu(self.into(x.view(-1, 12)))
        mu, logvar = self.mean(h), self.spread(h)
        z = mu + torch.exp(0.5 * logvar) * 0.3  # no draw: both runs are to be alike
        return torch.sigmoid(self.out(functional.relu(self.back(z)))), mu, logvar


def whole_model(model: nn.Module, at: str, rank: int) -> nn.Module:
    """In place: the decomposed model on one machine. A tied head is a parameter of its own."""
    layer = model.get_submodule(at)
    assert isinstance(layer, nn.Linear)
    factors = decompose(layer.weight.T, rank)
    made = nn.Sequential()
    for name, matrix in zip(("ffn1", "ffn2", "ffn3"), factors):
        linear = nn.Linear(*matrix.shape, bias=name == "ffn3")
        linear.weight.data = matrix.T.contiguous()
        made.add_module(name, linear)
    made.ffn3.bias = layer.bias
    parent, _, own = at.rpartition(".")
    setattr(model.get_submodule(parent), own, made)
    if isinstance(model, Gpt):
        model.get_submodule(at.rpartition(".feed")[0]).residual = False
        model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    return model


def tokens(steps: int) -> Dict[str, Tensor]:
    """(steps, B, S) of them, and the targets, some of which are not to be learned."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(0, V, (steps, B, S), generator=draw)
    targets = (ids * 3 + 1) % V
    targets[:, 0, 0] = -1
    return {"ids": ids, "targets": targets}
