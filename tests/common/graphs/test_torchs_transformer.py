"""Torch's own encoder and decoder in one, in a model that keeps its mask for the next call, as examples of it do."""

from __future__ import annotations

import copy
from typing import Any, Callable, Optional

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sft.errors import CutError
from sft.graphs.cut import cut
from sft.models.decompose import decompose

B, S, D, F, V = 4, 5, 8, 16, 12


class LanguageModel(nn.Module):
    """Tokens of two texts to the log-probabilities of a third."""

    def __init__(self, kept: Callable[[Any, Tensor], Any] = lambda m, x: m.causal(x.shape[1])) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.transformer = nn.Transformer(D, 2, 2, 2, F, 0.0, batch_first=True)
        self.decoder = nn.Linear(D, V)
        self.mask: Optional[Tensor] = None
        self.make = kept

    def causal(self, size: int) -> Tensor:
        mask = torch.triu(torch.ones(size, size), diagonal=1)
        return mask.masked_fill(mask == 1, float("-inf"))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        _, size = target.shape
        if self.mask is None or self.mask.size(0) != size:
            self.mask = self.make(self, target)
        hidden = self.transformer(self.embed(source), self.embed(target), tgt_mask=self.mask)
        return functional.log_softmax(self.decoder(hidden), dim=-1).view(-1, V)


def without_residual(whole: Any) -> None:
    layer = whole.transformer.decoder.layers[1]

    def forward(tgt: Tensor, memory: Tensor, tgt_mask: Tensor, *_: Any, **__: Any) -> Any:
        tgt = layer.norm1(tgt + layer._sa_block(tgt, tgt_mask, None))
        return layer.norm3(layer._ff_block(layer.norm2(tgt + layer._mha_block(tgt, memory, None, None))))

    layer.forward = forward


@pytest.mark.parametrize(
    ("at", "change"), [("decoder", lambda whole: None), ("transformer.decoder.layers.1.linear2", without_residual)]
)
def test_at_full_rank_both_halves_are_the_model(at: str, change: Callable[[Any], None]) -> None:
    torch.manual_seed(0)
    model = LanguageModel()
    whole = copy.deepcopy(model)
    change(whole)
    lower, upper = (cut(copy.deepcopy(model), at, D) for _ in range(2))
    assert lower.model.mask is None  # as it was
    factors, bias = decompose(lower.layer.weight.T, D), lower.layer.bias.detach().clone()
    lower.keep_net_1().weight.data.copy_(factors.u_FR.T)
    ffn_2, ffn_3 = upper.keep_net_2()
    ffn_2.weight.data.copy_(factors.s_RR.T)
    ffn_3.weight.data.copy_(factors.v_RD.T)
    ffn_3.bias.data.copy_(bias)
    for size in (S, S - 2):
        ids = torch.randint(0, V, (2, B, size))
        got = lower.run(upper.run_net_2, tuple(ids), {})
        torch.testing.assert_close(got, whole(*ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kept",
    [
        lambda m, x: m.causal(x.shape[1]) * x.amax(),
        lambda m, x: torch.rand(x.shape[1], x.shape[1]),
        lambda m, x: m.decoder.weight[: x.shape[1], : x.shape[1]],
    ],
)
def test_what_the_next_call_would_not_compute_is_not_kept(kept: Callable[[Any, Tensor], Any]) -> None:
    model = LanguageModel(kept)
    with pytest.raises(CutError, match=r"of LanguageModel keeps what it computes in its attribute 'mask', which"):
        cut(model, "decoder", D)
    assert model.mask is None
