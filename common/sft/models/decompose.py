"""Equations 2 and 3 of the paper: one feed-forward layer becomes three.

    a W  =  a u S v  =  ((a u) S) v          w_FD ~ u_FR @ s_RR @ v_RD

FFN-1 multiplies by u on the edge, FFN-2 by S and FFN-3 by v on the cloud; only a u, of width R, crosses the wire.

Shape suffixes: F the FFN's inner width, D model width, R split rank.
"""

from __future__ import annotations

from typing import NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from sft.errors import CutError, UsageError

_SMALLEST_SPREAD = 1e-4
"""Components that hardly vary are not scaled up to the others by more than this."""


class Factors(NamedTuple):
    """The three matrices, all float32 and all trained."""

    u_FR: Tensor
    """(F, R), or (F + D, R) where the residual stream is below the FFN's inner state."""

    s_RR: Tensor
    """Diagonal at first; trained as a full matrix."""

    v_RD: Tensor


def decompose(w_FD: Tensor, split_rank: int) -> Factors:
    """The best rank-R approximation of a weight matrix, by singular value decomposition.

    `w_FD` maps rows of width F (the FFN's inner width) to rows of width D (the model's width). Whatever its dtype, the
    decomposition runs in float32 on the CPU: half-precision SVD does not exist, and on a GPU signs could differ. S
    holds the largest R singular values.

    Raises CutError when `split_rank` is outside 1..min(F, D).
    """
    _check_rank(split_rank, min(w_FD.shape))
    u, s, v = torch.linalg.svd(w_FD.detach().to("cpu", torch.float32), full_matrices=False)
    R = split_rank
    return Factors(u[:, :R].contiguous(), torch.diag(s[:R]), v[:R].contiguous())


def decompose_with_residual(
    w_FD: Tensor, bias_D: Optional[Tensor], mean_D: Tensor, covariance_DD: Tensor, split_rank: int
) -> Tuple[Factors, Tensor]:
    """The best rank-R approximation of a layer's output together with the residual that is added to it.

    For the sum y = x W + b + r, with its moments over some data, the R principal components V (columns, of spread
    sigma) reach the cloud as ((x, r) u) with u = [W V; V] / sigma, and y comes back as

        ((x, r) u) diag(sigma) V^T + mean + (b - mean) V V^T  =  mean + (y - mean) V V^T

    which is the least squared error over the data that any R numbers a token allow. Returns the factors and the bias
    that follows v. Raises CutError when `split_rank` is outside 1..D, and UsageError when the moments are not finite.
    """
    _check_rank(split_rank, len(mean_D))
    w_FD, mean_D = w_FD.detach().to("cpu", torch.float64), mean_D.double()
    b_D = torch.zeros_like(mean_D) if bias_D is None else bias_D.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(covariance_DD).all()):
        raise UsageError("the model's hidden states on the calibration data are NaN or infinite")
    variances, components = torch.linalg.eigh(covariance_DD.double())  # in ascending order
    v_DR = components.flip(1)[:, :split_rank]
    sigma_R = variances.flip(0)[:split_rank].clamp_min(0).sqrt()
    largest = float(sigma_R[0])
    sigma_R = sigma_R.clamp_min(largest * _SMALLEST_SPREAD) if largest > 0 else torch.ones_like(sigma_R)
    u = torch.cat([w_FD @ v_DR, v_DR]) / sigma_R
    c_D = mean_D + (b_D - mean_D) @ v_DR @ v_DR.T
    factors = Factors(u.float().contiguous(), torch.diag(sigma_R).float(), v_DR.T.float().contiguous())
    return factors, c_D.float().contiguous()


def _check_rank(split_rank: int, largest: int) -> None:
    if not 1 <= split_rank <= largest:
        raise CutError(f"split_rank is {split_rank}, but this layer has ranks 1 to {largest}; choose one")
