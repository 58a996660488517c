"""The codes that `low_cut.py` tries at a low cut, beside those of `--codec`; what won would become one of these.

fitted:BYTES    as `--codec fitted`, with so many bytes a row on average
weighted:BYTES  likewise, where what the upper half answers to counts for more, by the gradients at the cut
rank:R          R principal components in float32
branch:R        the same up, and on the cloud a small network that says from them what the others are like
none            nothing crosses: zeros arrive
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional

from sft.models.seeding import derive_seed
from sft.wire.codec.elements import FITTED, codecs_named, decode_tensor, encode_tensor
from sft.wire.codec.rows import CODES, NAMES
from sft_edge.systems import fit

CPU = torch.device("cpu")
HIDDEN, ROUNDS, ROWS_A_ROUND = 512, 800, 512
"""Of the network of `branch`, and of how it is fitted."""

_LEAST_WEIGHT = 0.1
"""Of a direction without any gradient, in the mean of all: the gradients of a few steps are not all there will be."""

Code = Callable[[Tensor, int], "tuple[Tensor, int]"]
"""Of (T, W) and a seed: what arrives, and its bytes."""


def code_named(name: str, like_TW: Tensor | None, gradient_TW: Tensor | None, seed: int) -> Code:
    """Fitted to rows like `like_TW`, and to the gradients of such; without what it is fitted to, it lets all through.

    Raises UsageError as `fit.fit_tables` does, and KeyError for a name that is none.
    """
    kind, _, number = name.partition(":")
    if kind == "none":
        return lambda x_TW, _: (torch.zeros_like(x_TW), 0)
    if kind not in (FITTED, "weighted", "rank", "branch"):
        return _written(NAMES[kind], CODES)
    if like_TW is None or (kind == "weighted" and gradient_TW is None):
        return lambda x_TW, _: (x_TW, 4 * x_TW.numel())
    if kind == FITTED:
        return _fitted(like_TW, float(number), seed)
    if kind == "weighted":
        return _weighted(like_TW, gradient_TW, float(number), seed)
    return _components(like_TW, int(number), seed if kind == "branch" else None)


def _written(data_type: int, codes: object) -> Code:
    def across(x_TW: Tensor, rounding: int) -> tuple[Tensor, int]:
        written = encode_tensor(x_TW, data_type, rounding, codes)
        return decode_tensor(written, CPU, codes), len(written.data)

    return across


def _fitted(like_TW: Tensor, row_bytes: float, seed: int) -> Code:
    with mock.patch.object(fit, "mean_row_bytes", return_value=row_bytes):
        tables = fit.fit_tables(like_TW, seed)
    return _written(NAMES[FITTED], codecs_named(None, FITTED).with_tables(tables, CPU).codes)


def _weighted(like_TW: Tensor, gradient_TW: Tensor, row_bytes: float, seed: int) -> Code:
    """By the root of the gradients' second moment: an error e of a row changes the loss by about e g, the mean square
    of which is e E[g g^T] e^T."""
    moment_WW = (gradient_TW.T @ gradient_TW / len(gradient_TW)).double()
    value_K, vector_WK = torch.linalg.eigh(moment_WW / moment_WW.diagonal().mean())
    root_K = value_K.clamp(min=0.0).add(_LEAST_WEIGHT).sqrt()
    there_WW = (vector_WK * root_K @ vector_WK.T).float()
    back_WW = (vector_WK / root_K @ vector_WK.T).float()
    code = _fitted(like_TW @ there_WW, row_bytes, seed)

    def across(x_TW: Tensor, rounding: int) -> tuple[Tensor, int]:
        y_TW, size = code(x_TW @ there_WW, rounding)
        return y_TW @ back_WW, size

    return across


def _components(like_TW: Tensor, rank: int, seed: int | None) -> Code:
    """With a seed: and the network."""
    mean_W = like_TW.mean(dim=0)
    _, _, v_WW = torch.linalg.svd(like_TW - mean_W, full_matrices=False)
    v_RW = v_WW[:rank]
    rest = None if seed is None else _network((like_TW - mean_W) @ v_RW.T, like_TW - mean_W, v_RW, seed)

    def across(x_TW: Tensor, _: int) -> tuple[Tensor, int]:
        z_TR = (x_TW - mean_W) @ v_RW.T
        y_TW = mean_W + z_TR @ v_RW
        return (y_TW if rest is None else y_TW + rest(z_TR)), 4 * rank * len(x_TW)

    return across


def _network(z_TR: Tensor, x_TW: Tensor, v_RW: Tensor, seed: int) -> Callable[[Tensor], Tensor]:
    """From components what they leave of a row: least squares, by AdamW at a rate that rises and falls."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(derive_seed(seed, "branch"))
        sizes = (z_TR.shape[1], HIDDEN, HIDDEN, x_TW.shape[1])
        layers = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.GELU())][:-1]
        network, spread_R = nn.Sequential(*layers), z_TR.std(dim=0)
        optimizer = torch.optim.AdamW(network.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, ROUNDS)
        for _ in range(ROUNDS):
            row = torch.randint(len(z_TR), (ROWS_A_ROUND,))
            left_TW = x_TW[row] - z_TR[row] @ v_RW
            functional.mse_loss(network(z_TR[row] / spread_R), left_TW).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return torch.no_grad()(lambda some_TR: network(some_TR / spread_R))
