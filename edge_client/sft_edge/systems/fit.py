"""Fits the tables of the codec `fitted` to activations: see `sft.wire.codec.fitted`, whose shape suffixes are used."""

from __future__ import annotations

import math
from typing import Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from sft.batch import Batch
from sft.errors import UsageError
from sft.models import Net1
from sft.models.seeding import derive_seed
from sft.wire.codec.fitted import LARGEST, NO_NUMBER, WORDS, Nearest
from sft.wire.codec.packing import pack

FIT_TOKENS = 10_000
"""Rows that are enough: with twice as many the last hidden state is 2% nearer, and fitting takes twice as long."""

_ROUNDS = 8
"""Of Lloyd's algorithm: after these, words hardly move."""

_MORE_ROUNDS = 2
"""For words that are moved to where components are weighted."""

_PULL = 10.0
"""A word of a whole row is the mean of a few rows, and is drawn to that of all, as if so many rows of it were there."""

_LIKE_ALL = 50.0
"""Likewise for the scale of what it leaves."""

_EMPHASIS = 0.15
"""Of the variance of a component, the power that its error is weighted with: what varies most matters most above."""


def row_bytes_of(width: int) -> int:
    """Of a row: 60 for MiniLM's 384 elements, 120 for BERT-base's 768."""
    return max(2, math.ceil(width * 5 / 32))


def activations_of(net_1: Net1, batches: Sequence[Batch]) -> Tensor:
    """Of all tokens, (T, W) float32 on the CPU; without dropout."""
    net_1.eval()
    with torch.no_grad():
        packed = [pack(net_1(batch.inputs, batch.lengths), batch.lengths).float().cpu() for batch in batches]
    return torch.cat(packed)


def fit_tables(x_TW: Tensor, seed: int) -> Dict[str, Tensor]:
    """Tables for rows that are like these: of the same rows and seed, the same on the same machine.

    Raises UsageError for rows that float16 does not hold, or that are no numbers.
    """
    if not bool((x_TW.abs() <= LARGEST).all()):  # nor NaN
        raise UsageError("activations here are no numbers, or too large, for --codec fitted: choose another")
    mean_W = _half(_middle(x_TW)).float()
    rest_TW = x_TW - mean_W
    whole_NW = _words(rest_TW, _drawn(rest_TW, NO_NUMBER, seed, "whole"), _ROUNDS, pull=_PULL)
    left_TW = whole_NW[Nearest(whole_NW)(rest_TW)].neg_().add_(rest_TW)  # in place: an edge has little memory
    variance_K, basis_WK = _components(left_TW)
    del left_TW
    basis_WK = basis_WK / (variance_K / variance_K.mean()).pow(_EMPHASIS)
    basis_steps_K = _steps(basis_WK)
    basis_WK = _in_steps(basis_WK, basis_steps_K)

    # The rest is fitted to the basis as it is written. Otherwise a channel that is thousands of times larger than the
    # others in some rows, as where GPT-2 and Llama rest their attention, has its error in all of them.
    inverse_WK = torch.linalg.pinv((basis_WK * basis_steps_K).double()).T.float()
    z_TK = rest_TW @ inverse_WK
    del rest_TW
    whole_NK = _words(z_TK, whole_NW @ inverse_WK, _MORE_ROUNDS, pull=_PULL)
    whole_T = Nearest(whole_NK)(z_TK)
    z_TK -= whole_NK[whole_T]
    scale_N = _scales(z_TK, whole_T)
    z_TK /= scale_N[whole_T][:, None]

    groups = _balanced(z_TK.square().mean(dim=0), row_bytes_of(x_TW.shape[1]) - 1)
    order = [component for group in groups for component in group]
    sizes = [len(group) for group in groups]
    mass_T = scale_N[whole_T].square()  # of an error there
    words = [
        _words(z_TE, _drawn(z_TE, WORDS, seed, group), _ROUNDS, mass_T)
        for group, z_TE in enumerate(torch.split(z_TK[:, order], sizes, dim=1))
    ]
    words_NK = torch.cat(words, dim=1)
    whole_NK = torch.nn.functional.pad(whole_NK[:, order], (0, 0, 0, WORDS - NO_NUMBER))
    steps_3K = torch.stack([basis_steps_K[order], _steps(whole_NK), _steps(words_NK)])
    return {
        "basis": basis_WK[:, order].contiguous(),
        "whole": _in_steps(whole_NK, steps_3K[1]),
        "words": _in_steps(words_NK, steps_3K[2]),
        "steps": steps_3K,
        "mean": _half(mean_W),
        "scale": _half(torch.nn.functional.pad(scale_N, (0, WORDS - NO_NUMBER), value=1.0)),
        "sizes": torch.tensor(sizes, dtype=torch.int32),
    }


def _middle(x_TW: Tensor) -> Tensor:
    """Medians, not means: what is far from the others is in few rows, and the others should be near."""
    return torch.stack([x_T.median() for x_T in x_TW.unbind(dim=1)])


def _steps(x_NK: Tensor) -> Tensor:
    return _half(x_NK.abs().amax(dim=0) / 127)


def _half(x: Tensor) -> Tensor:
    return x.clamp(-LARGEST, LARGEST).to(torch.float16)


def _in_steps(x_NK: Tensor, steps_K: Tensor) -> Tensor:
    """To the nearest; zeros where a column has none."""
    whole = (x_NK / steps_K.float()).nan_to_num(0.0, 0.0, 0.0).round()
    return whole.clamp(-127, 127).to(torch.int8).contiguous()


def _drawn(x_TE: Tensor, count: int, seed: int, what: object) -> Tensor:
    """Some of the rows; where there are fewer, zeros beside them."""
    generator = torch.Generator("cpu").manual_seed(derive_seed(seed, "codec", what))
    drawn = x_TE[torch.randperm(len(x_TE), generator=generator)[:count]]
    return torch.nn.functional.pad(drawn, (0, 0, 0, count - len(drawn)))


def _words(x_TE: Tensor, words_NE: Tensor, rounds: int, mass_T: Optional[Tensor] = None, pull: float = 0.0) -> Tensor:
    """Lloyd's algorithm: each word becomes the mean of the rows that it is nearest to."""
    x_TE = x_TE.contiguous()
    weighed_TE = x_TE if mass_T is None else x_TE * mass_T[:, None]
    mass_T = x_TE.new_ones(len(x_TE)) if mass_T is None else mass_T
    for _ in range(rounds):
        number_T = Nearest(words_NE)(x_TE)
        mass_N = torch.zeros(len(words_NE)).index_add_(0, number_T, mass_T)
        sum_NE = torch.zeros_like(words_NE).index_add_(0, number_T, weighed_TE)
        words_NE = torch.where(mass_N[:, None] > 0, sum_NE / (mass_N + pull).clamp(min=1e-12)[:, None], words_NE)
    return words_NE


def _components(x_TW: Tensor) -> Tuple[Tensor, Tensor]:
    """Variances, the largest first, and the principal components that have them, (W, W)."""
    variance_K, basis_WK = torch.linalg.eigh((x_TW.T @ x_TW / len(x_TW)).double())
    return variance_K.flip(0).clamp(min=max(1e-6 * float(variance_K[-1]), 1e-12)).float(), basis_WK.flip(1).float()


def _scales(z_TK: Tensor, whole_T: Tensor) -> Tensor:
    """For each word of whole rows, the root of what it leaves of a row's square."""
    square_T = z_TK.square().sum(dim=1)
    sum_N = torch.zeros(NO_NUMBER).index_add_(0, whole_T, square_T) + _LIKE_ALL * square_T.median()
    count_N = torch.bincount(whole_T, minlength=NO_NUMBER) + _LIKE_ALL
    return (sum_N / count_N).sqrt().clamp(min=1e-3)


def _balanced(variance_K: Tensor, groups: int) -> List[List[int]]:
    """Components in as many groups, about equally large, with about equal products of variances: the best for Gaussian
    rows, Ge et al., "Optimized Product Quantization" (2013), section 3.2.2."""
    logs = (variance_K.clamp(min=1e-30).log() - variance_K.clamp(min=1e-30).log().min()).tolist()
    members: List[List[int]] = [[] for _ in range(groups)]
    sums = [0.0] * groups
    most = math.ceil(len(logs) / groups)
    for component in sorted(range(len(logs)), key=lambda k: -logs[k]):
        free = [group for group in range(groups) if len(members[group]) < most]
        group = min(free, key=lambda group: (sums[group], len(members[group])))
        members[group].append(component)
        sums[group] += logs[component]
    return members
