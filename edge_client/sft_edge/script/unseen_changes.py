"""Weights of the edge that a script changes past the optimizer: of the cloud's it does not reach any."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from sft.errors import UsageError

_ROUNDING = 1e-5
"""Of the largest weight: a schedule-free optimizer that was switched there and back leaves as much."""


class UnseenChanges:
    """Looks at FFN-1, the edge's share of the layer that is cut.

    Whoever writes all parameters that there are, as an average (EMA) over them does, writes it, too. No script means it
    alone, as its factors are none of its layers; what lies wholly below the cut is a script's to change: it may perturb
    embeddings, or bound a norm.
    """

    def __init__(self, model: nn.Module, ffn_1: nn.Parameter) -> None:
        """`ffn_1`: weight (R, F) of the cut `model`."""
        self._parameter = ffn_1
        self._name = next(name for name, parameter in model.named_parameters() if parameter is ffn_1)
        self.accept()
        holder = model.get_submodule(self._name.rpartition(".")[0])
        self._holder = weakref.ref(holder)
        holder.register_load_state_dict_post_hook(self._loaded)  # type: ignore[no-untyped-call]

    def accept(self) -> None:
        """What it is now, it is rightly."""
        self._seen_F = self._parameter.detach()[0].clone()  # one row: an average changes them all

    def check(self) -> None:
        """Raises UsageError where it was changed since `accept`, but for type and device, or is another parameter."""
        holder = self._holder()
        if holder is not None and holder.weight is not self._parameter:
            raise UsageError(
                f"'{self._name}' was exchanged for another tensor, as torch.func.functional_call does, which reaches "
                "none of the cloud's weights: bring others in by load_state_dict(), without assign=True"
            )
        now_F, seen_F = self._parameter.detach()[0], self._seen_F
        if (now_F.dtype, now_F.device) != (seen_F.dtype, seen_F.device):
            self.accept()
            return
        allowed = seen_F.float().abs().max() * _ROUNDING
        if bool(((now_F.float() - seen_F.float()).abs() > allowed).any()):  # no NaN is
            raise UsageError(
                f"'{self._name}' was changed past the optimizer, which does not reach the cloud's weights: take an "
                "average (EMA) over state_dict(), and bring weights back by load_state_dict()"
            )

    def _loaded(self, *_: Any) -> None:
        self.accept()
