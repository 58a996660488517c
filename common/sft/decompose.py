"""Equations 2 and 3 of the paper: one feed-forward layer becomes three.

    a W  =  a u S v  =  ((a u) S) v          w_FD ~ u_FR @ s_RR @ v_RD

FFN-1 multiplies by u on the edge, FFN-2 by S and FFN-3 by v on the cloud; only a u, of width R, crosses the wire.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sft.errors import CutError


class Factors(NamedTuple):
    """The three matrices, all float32 and all trained."""

    u_FR: Tensor
    s_RR: Tensor
    """Diagonal at first, holding the largest R singular values; trained as a full matrix."""
    v_RD: Tensor


def decompose(w_FD: Tensor, split_rank: int) -> Factors:
    """The best rank-R approximation of a weight matrix, by singular value decomposition.

    `w_FD` maps rows of width F (the FFN's inner width) to rows of width D (the model's width). Whatever its dtype, the
    decomposition runs in float32 on the CPU: half-precision SVD does not exist, and on a GPU signs could differ.

    Raises CutError when `split_rank` is outside 1..min(F, D).
    """
    largest = min(w_FD.shape)
    if not 1 <= split_rank <= largest:
        raise CutError(f"split_rank is {split_rank}, but this layer has ranks 1 to {largest}; choose one")
    u, s, v = torch.linalg.svd(w_FD.detach().to("cpu", torch.float32), full_matrices=False)
    R = split_rank
    return Factors(u[:, :R].contiguous(), torch.diag(s[:R]), v[:R].contiguous())
