"""Fits the tables of the codec `fitted` to activations: see `sft.wire.codec.fitted`, whose shape suffixes are used."""

from __future__ import annotations

import math
from typing import Dict, List, NamedTuple, Sequence, Tuple

import torch
from torch import Tensor

from sft.batch import Batch
from sft.errors import UsageError
from sft.models import Net1
from sft.models.seeding import derive_seed
from sft.wire.codec.fitted import LARGEST, MOST_KINDS, MOST_SYMBOLS, MOST_WORDS, Nearest, rounded
from sft.wire.codec.packing import pack
from sft.wire.codec.rans import SLOTS

FIT_TOKENS = 20_000
"""That are enough: with twice as many, fitting takes twice as long."""

_ROWS_A_WORD = 16
"""On average, at least: a word of few says more of them than of others."""

_COMPONENTS = 128
"""By which words are found at first."""

_ROUNDS = 8
"""Of Lloyd's algorithm: after these, words hardly move."""

_PULL = 2.0
"""A word is the mean of a few rows, and is drawn to that of all, as if so many rows of it were there."""

_LIKE_ALL = 20.0
"""Likewise for what it leaves of them."""

_EMPHASIS = 0.15
"""Of the variance of a component, the power that its error is weighted with: what varies most matters most above."""

_CLASSES = 8
"""Of words, by what they leave: about as many rows are of each."""

_UNUSUAL = 4.0
"""What a word leaves, in medians, from which it has larger steps: so much for rows with a massive channel."""

_TRIES = 8
"""Of steps, until rows take the bytes they are to take."""

_PRIOR = 8.0
"""Symbols that a distribution is thought to have been seen in, beside those that were."""

_BESIDE_BITS = 24
"""That a row takes beside what its symbols tell: its length, a state to begin with, half a word on average."""


def mean_row_bytes(width: int) -> float:
    """Of a row, on average over rows like those that tables are fitted to: 57.6 for MiniLM's 384 elements, 115.2 for
    BERT-base's 768."""
    return max(6.0, width * 3 / 20)


def rows_to_fit(lengths: Sequence[int], seed: int) -> List[int]:
    """Of rows of so many tokens some with `FIT_TOKENS` together, or all: from all over the file, whose parts may be
    about different things."""
    generator = torch.Generator("cpu").manual_seed(derive_seed(seed, "codec", "rows"))
    drawn: List[int] = []
    tokens = 0
    for row in torch.randperm(len(lengths), generator=generator).tolist():
        if tokens >= FIT_TOKENS:
            break
        drawn.append(row)
        tokens += lengths[row]
    return drawn


def activations_of(net_1: Net1, batches: Sequence[Batch]) -> Tensor:
    """Of all tokens, (T, W) float32 on the CPU; without dropout."""
    net_1.eval()
    x_TW, end = torch.empty(0), 0
    for batch in batches:
        with torch.no_grad():
            a_TW = pack(net_1(batch.inputs, batch.lengths), batch.lengths)
        if not end:  # not joined in the end: an edge has little memory
            x_TW = torch.empty(sum(sum(every.lengths) for every in batches), a_TW.shape[1])
        x_TW[end : end + len(a_TW)] = a_TW
        end += len(a_TW)
    return x_TW


def fit_tables(x_TW: Tensor, seed: int) -> Dict[str, Tensor]:
    """Tables for rows that are like these: of the same rows and seed, the same on the same machine.

    Words and components are fitted to seven eighths of the rows, steps and frequencies to the last eighth: to how
    others differ from the words, not those that the words are made of.

    Raises UsageError for rows that float16 does not hold, or that are no numbers.
    """
    if not bool((x_TW.abs() <= LARGEST).all()):  # nor NaN
        raise UsageError("activations here are no numbers, or too large, for --codec fitted: choose another")
    mean_W, last = _half(_middle(x_TW)).float(), len(x_TW) // 8
    x_TW = x_TW - mean_W  # likewise: what was given goes, if nobody else has it
    rest_TW, others_TW = x_TW[: len(x_TW) - last], x_TW[-last:]  # of few, all of them
    whole_NW = _words(rest_TW, seed)
    left_TW = whole_NW[Nearest(whole_NW)(rest_TW)].neg_().add_(rest_TW)
    variance_K, basis_WK = _components(left_TW)
    basis_WK = basis_WK / (variance_K / variance_K.mean()).pow(_EMPHASIS)
    basis_steps_K = _steps(basis_WK)
    basis_WK = _in_steps(basis_WK, basis_steps_K)

    # The rest is fitted to the basis as it is written. Otherwise a channel that is thousands of times larger than the
    # others in some rows, as where GPT-2 and Llama rest their attention, has its error in all of them.
    inverse_WK = torch.linalg.pinv((basis_WK * basis_steps_K).double()).T.float()
    whole_NK = whole_NW @ inverse_WK
    whole_steps_K = _steps(whole_NK)
    whole_NK = _in_steps(whole_NK, whole_steps_K)
    z_NK = whole_NK * whole_steps_K.float()
    nearest = Nearest(z_NK)
    z_TK = torch.matmul(rest_TW, inverse_WK, out=left_TW)
    left_N, seen_N = _left(z_TK, z_NK, nearest)
    scale_N = (left_N / left_N.median().clamp(min=1e-30)).sqrt().div(_UNUSUAL).clamp(min=1.0)
    class_N = _classes(left_N, seen_N)

    z_TK = others_TW @ inverse_WK
    word_T = nearest(z_TK)
    z_TK = (z_TK - z_NK[word_T]) / scale_N[word_T][:, None]
    frequencies_N = _of_slots((seen_N + torch.bincount(word_T, minlength=len(seen_N)) + 0.5)[None])[0]
    word_bits = float(-(frequencies_N[word_T] / SLOTS).log2().mean())
    symbols = _symbols(z_TK, class_N[word_T], 8 * mean_row_bytes(x_TW.shape[1]) - word_bits - _BESIDE_BITS)
    return {
        "basis": basis_WK,
        "basis_steps": basis_steps_K,
        "whole": whole_NK,
        "whole_steps": whole_steps_K,
        "mean": _half(mean_W),
        "step": _half(symbols.step * scale_N),
        "points": _half(symbols.points_DS),
        "class": class_N.to(torch.uint8),
        "kind": symbols.kind_CK.to(torch.uint8),
        "word_frequencies": frequencies_N,
        "frequencies": symbols.frequencies_DS,
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


def _words(x_TW: Tensor, seed: int) -> Tensor:
    """Lloyd's algorithm, by the components in which rows differ most: each word becomes the mean of the rows that it is
    nearest to."""
    _, basis_WK = _components(x_TW)
    some_TE = x_TW @ basis_WK[:, :_COMPONENTS]
    generator = torch.Generator("cpu").manual_seed(derive_seed(seed, "codec", "words"))
    count = min(MOST_WORDS, max(1, len(x_TW) // _ROWS_A_WORD))
    words_NE = some_TE[torch.randperm(len(x_TW), generator=generator)[:count]]
    for _ in range(_ROUNDS):
        words_NE = _means(some_TE, Nearest(words_NE)(some_TE))
    return _means(x_TW, Nearest(words_NE)(some_TE))


def _means(x_TE: Tensor, word_T: Tensor) -> Tensor:
    """Of the rows of each word; those of none go."""
    seen_N = torch.bincount(word_T)
    sum_NE = torch.zeros(len(seen_N), x_TE.shape[1]).index_add_(0, word_T, x_TE)
    return (sum_NE / (seen_N[:, None] + _PULL))[seen_N > 0]


def _components(x_TW: Tensor) -> Tuple[Tensor, Tensor]:
    """Variances, the largest first, and the principal components that have them, (W, W)."""
    variance_K, basis_WK = torch.linalg.eigh((x_TW.T @ x_TW / len(x_TW)).double())
    return variance_K.flip(0).clamp(min=max(1e-6 * float(variance_K[-1]), 1e-12)).float(), basis_WK.flip(1).float()


def _left(z_TK: Tensor, z_NK: Tensor, nearest: Nearest) -> Tuple[Tensor, Tensor]:
    """What each word leaves of the square of a row, and of how many rows it is the nearest."""
    word_T = nearest(z_TK)
    square_T = (z_TK - z_NK[word_T]).square().sum(dim=1)
    seen_N = torch.bincount(word_T, minlength=len(z_NK))
    sum_N = torch.zeros(len(z_NK)).index_add_(0, word_T, square_T) + _LIKE_ALL * square_T.median()
    return sum_N / (seen_N + _LIKE_ALL), seen_N


def _classes(left_N: Tensor, seen_N: Tensor) -> Tensor:
    """By what words leave, about as many rows in each."""
    order_N = left_N.argsort()
    below_N = seen_N[order_N].cumsum(0) - seen_N[order_N]
    class_N = torch.empty_like(order_N)
    class_N[order_N] = below_N * _CLASSES // max(1, int(seen_N.sum()))
    return class_N.clamp(max=_CLASSES - 1)  # of those that no row is nearest to, as they are written


class _Symbols(NamedTuple):
    """How what words leave is written."""

    step: float
    kind_CK: Tensor
    points_DS: Tensor
    frequencies_DS: Tensor
    bits: float
    """Of a row, on average."""


def _symbols(z_TK: Tensor, class_T: Tensor, bits: float) -> _Symbols:
    """With steps so large that rows take about as many bits."""
    step = float(z_TK.square().mean().sqrt().clamp(min=1e-4))
    tried = _with_step(z_TK, class_T, step)
    low, high = 0.0, math.inf
    for _ in range(_TRIES):
        low, high = (step, high) if tried.bits > bits else (low, step)
        # A step that is twice as large saves every component that has not yet none to save a bit.
        step = math.sqrt(low * high) if low and high < math.inf else step * (2.0 if tried.bits > bits else 0.5)
        tried = _with_step(z_TK, class_T, step)
    return tried


def _with_step(z_TK: Tensor, class_T: Tensor, step: float) -> _Symbols:
    most = MOST_SYMBOLS // 2
    z_TK = z_TK.abs() / step
    q_TK = rounded(z_TK).clamp(max=most).to(torch.int64)
    rows_C = torch.bincount(class_T, minlength=_CLASSES)
    sum_CK = torch.zeros(_CLASSES, z_TK.shape[1]).index_add_(0, class_T, q_TK.float())
    mean_CK = sum_CK / rows_C.clamp(min=1)[:, None]
    order = mean_CK.flatten().argsort()
    kind_CK = torch.empty_like(order)
    D = min(MOST_KINDS, len(order))
    kind_CK[order] = torch.arange(len(order)) * D // len(order)
    kind_CK = kind_CK.reshape(mean_CK.shape)

    at_TK = kind_CK[class_T] * (most + 1) + q_TK
    seen_DQ = torch.bincount(at_TK.flatten(), minlength=D * (most + 1)).reshape(D, -1).float()
    sum_DQ = torch.zeros(D * (most + 1)).index_add_(0, at_TK.flatten(), z_TK.flatten()).reshape(D, -1)
    Q = torch.arange(most + 1.0)
    points_DQ = torch.where(seen_DQ > 0, sum_DQ / seen_DQ.clamp(min=1), Q)
    points_DQ[:, 0] = 0.0
    # Beside what was seen, what falls off evenly with the same mean; and no further than either goes.
    mean_D1 = (seen_DQ @ Q)[:, None] / seen_DQ.sum(dim=1, keepdim=True).clamp(min=1)
    prior_DQ = (mean_D1 / (1 + mean_D1)).clamp(min=1e-3) ** Q
    reaches = (seen_DQ > 0) | (prior_DQ * SLOTS > 1.0)
    reach_D1 = (reaches * Q).amax(dim=1, keepdim=True)
    likely_DQ = (seen_DQ + _PRIOR * prior_DQ / prior_DQ.sum(dim=1, keepdim=True)).clamp(min=1e-6) * (reach_D1 >= Q)
    likely_DQ[:, 1:] /= 2
    frequencies_DS = _of_slots(torch.cat([likely_DQ[:, 1:].flip(1), likely_DQ], dim=1))
    points_DS = torch.cat([-points_DQ[:, 1:].flip(1), points_DQ], dim=1)
    bits = float(-(frequencies_DS[kind_CK[class_T], most + q_TK] / SLOTS).log2().sum() / len(z_TK))
    used = int(reach_D1.max())
    middle = slice(most - used, most + used + 1)
    return _Symbols(step, kind_CK, points_DS[:, middle], frequencies_DS[:, middle].contiguous(), bits)


def _of_slots(likely_DS: Tensor) -> Tensor:
    """Whole numbers of 4096, int32: none for what is not likely at all, and at least one for all else."""
    can_DS = likely_DS > 0
    spare_D1 = SLOTS - can_DS.sum(dim=1, keepdim=True)
    of_DS = can_DS + (likely_DS / likely_DS.sum(dim=1, keepdim=True) * spare_D1).floor().to(torch.int64)
    of_DS[torch.arange(len(of_DS)), likely_DS.argmax(dim=1)] += SLOTS - of_DS.sum(dim=1)
    return of_DS.to(torch.int32)
