"""The code that is fitted to data: of a row, a word that both sides have in a table, and what it leaves, in few bits.

    x ~ mean + basis z,     z_k = whole[c, k] + step[c] points[d, q_k]     with d = kind[class[c], k]

A row is near one of up to 1024 words of its whole width, as rows of the same piece of text are; of what that leaves,
most principal components are less than a step, and their whole numbers q are 0. So c and q are written in as many bits
as they tell (`sft.wire.codec.rans`), with frequencies by component and by the class of the word: entropy-coded scalar
quantisation behind a first stage, as in Gray and Neuhoff, "Quantization" (1998). In bytes, with numbers little-endian
but for the length:

    length, state, words        length: n, or 128 + n / 256 and n % 256 where there are 128 words or more
                                state: four bytes, 0 for a row that is no number; words: n of two bytes

A row is no number where an element of it is none, or larger than float16 holds.

Where a row is as near to one word as to another, which of them is found may depend on the rows beside it, as the last
bits of the distances do: either is as good. What has been written is read in one way.

Shape suffixes: T rows, W elements of a row, K components, N words, C classes of words, D kinds of distributions, S
symbols (q from -(S - 1) / 2 on), Q of them from 0 on, B rows of a block, X bytes of all.
"""

from __future__ import annotations

import math
from typing import Dict, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor

from sft.errors import ProtocolError
from sft.wire.codec.rans import SLOTS, Distributions, Reader, Writer, Written
from sft.wire.codec.rows import Data
from sft.wire.protocol import MAX_PADDED_TOKENS

MOST_WORDS, MOST_CLASSES, MOST_KINDS, MOST_SYMBOLS = 1024, 16, 64, 255

ROUNDS_UP_FROM = 0.65
"""Of a step: so more of the q are 0, which saves more than it costs."""

LARGEST = 65504.0
"""Of float16."""

BLOCK = 1024
"""Rows that are written or read at once: enough that numpy is not called for few, not so many that they fill memory."""

_SEARCHED = 128
"""Components, those in which words differ most, by which the nearest word is found."""

_LEAST_BYTES = 5
"""Of a row: length and state."""

_LONG = 128

_MOST_COMPONENTS = 128 * 256 - 2
"""So that a row has a length."""

_DTYPES = {
    **dict.fromkeys(("basis", "whole"), torch.int8),
    **dict.fromkeys(("basis_steps", "whole_steps", "mean", "step", "points"), torch.float16),
    **dict.fromkeys(("class", "kind"), torch.uint8),
    **dict.fromkeys(("word_frequencies", "frequencies"), torch.int32),
}

_HEADER_BYTES = 4096
"""Of a file with tables, at most."""


class Fitted:
    """See `sft.wire.codec.rows.RowCode`; for rows of one width, on one device."""

    def __init__(self, tables: Mapping[str, Tensor], device: torch.device) -> None:
        """Of `tables`: int8 basis (W, K) and whole (N, K), in float16 basis_steps (K,) and whole_steps (K,); float16
        mean (W,), step (N,) and points (D, S), which are in steps; uint8 class (N,) and kind (C, K); and of 4096 int32
        word_frequencies (N,) and frequencies (D, S).

        Raises ProtocolError for others.
        """
        self.tables: Dict[str, Tensor] = dict(tables)
        self.width = _checked(tables)
        self._device = device
        self._mean_W, self._step_N = (tables[name].to(device, torch.float32) for name in ("mean", "step"))
        self._basis_WK, self._whole_NK = (
            tables[name].to(device, torch.float32) * tables[f"{name}_steps"].to(device, torch.float32)
            for name in ("basis", "whole")
        )
        self._class_N, self._kind_CK = tables["class"].numpy(), tables["kind"].numpy()
        self._words = Distributions(tables["word_frequencies"].numpy()[None])
        self._symbols = Distributions(tables["frequencies"].numpy())
        self._half = self._symbols.symbols // 2
        kind = np.arange(len(self._symbols.symbol)) // SLOTS
        self._point = tables["points"].float().numpy()[kind, self._symbols.symbol]
        """Of a slot, as `Distributions.symbol` has them."""
        self._writing: Optional[_Writing] = None

    def row_bytes(self, width: int) -> int:
        """See RowCode. Raises ProtocolError for rows that the tables are not for."""
        if width != self.width:
            raise ProtocolError(f"rows of {width} elements came, and the codec's tables are for {self.width}")
        return _LEAST_BYTES

    def ends(self, data: Data, rows: int, width: int) -> Sequence[int]:
        """See RowCode."""
        self.row_bytes(width)
        ends, at = [], 0
        most = self.tables["basis"].shape[1] + 1  # a symbol leaves no more than a word
        # Before anything else is known of them: a message may have fifty million rows.
        for _ in range(rows if rows <= min(MAX_PADDED_TOKENS, len(data) // _LEAST_BYTES) else 0):
            count = data[at] if at < len(data) else most + 1
            if count >= _LONG and at + 1 < len(data):
                at += 1
                count = (count - _LONG) * 256 + data[at]
            if count > most:
                break
            at += _LEAST_BYTES + 2 * count
            ends.append(at)
        if at != len(data) or len(ends) != rows:
            raise ProtocolError(f"{len(data)} bytes came, which are not {rows} rows in the codec fitted")
        return ends

    def encode(self, x_TW: Tensor, rounding: Optional[int] = None) -> bytes:
        """See RowCode. Always the nearest word, and rounded as `ROUNDS_UP_FROM` says."""
        self.row_bytes(x_TW.shape[1])
        if self._writing is None:  # who only reads needs none
            inverse_WK = torch.linalg.pinv(self._basis_WK.double()).T.float()
            self._writing = _Writing(inverse_WK, Nearest(self._whole_NK))
        return b"".join(self._written(x_BW, self._writing) for x_BW in torch.split(x_TW, BLOCK))

    def _written(self, x_BW: Tensor, writing: _Writing) -> bytes:
        is_number_B = x_BW.abs().amax(dim=1) <= LARGEST  # NaN compares false
        z_BK = torch.where(is_number_B[:, None], x_BW - self._mean_W, 0.0) @ writing.inverse_WK
        word_B = writing.nearest(z_BK)
        q_BK = rounded((z_BK - self._whole_NK[word_B]) / self._step_N[word_B][:, None])
        symbols_BK = q_BK.clamp_(-self._half, self._half).add_(self._half)
        symbols_KB = symbols_BK.T.to(torch.int32).contiguous().cpu().numpy()
        word_1B = word_B.cpu().numpy()[None]
        writer = Writer(len(x_BW))
        writer.put(self._symbols, symbols_KB, self._kinds(word_1B[0]))
        writer.put(self._words, word_1B, np.zeros_like(word_1B))
        return _joined(writer.written(), is_number_B.cpu().numpy())

    def decode(self, data: Data, rows: int, width: int, device: torch.device) -> Tensor:
        """See RowCode. Raises ProtocolError also for rows that were not written with these tables."""
        begins, data = np.array([0, *self.ends(data, rows, width)]), memoryview(data)
        blocks = [begins[first : first + BLOCK + 1] for first in range(0, rows, BLOCK)]
        read = [self._read(data[begin_B[0] : begin_B[-1]], begin_B[:-1] - begin_B[0]) for begin_B in blocks]
        return torch.cat(read).to(device)

    def _read(self, data: memoryview, begin_B: np.ndarray) -> Tensor:
        written, is_number_B = _parted(data, begin_B)
        reader = Reader(written)
        word_B = self._words.symbol[reader.take(self._words, np.zeros((1, len(is_number_B)), dtype=np.int64))[0]]
        point_KB = self._point[reader.take(self._symbols, self._kinds(word_B))]
        if not np.where(is_number_B, reader.at_end(), written.count_T == 0).all():
            raise ProtocolError("a row came that was not written with the codec's tables")
        words_B = torch.from_numpy(word_B).to(self._device)
        z_KB = torch.from_numpy(point_KB).to(self._device)
        z_BK = z_KB.T * self._step_N[words_B][:, None] + self._whole_NK[words_B]
        x_BW = torch.addmm(self._mean_W, z_BK, self._basis_WK.T)
        x_BW[torch.from_numpy(~is_number_B).to(self._device)] = math.nan
        return x_BW

    def _kinds(self, word_B: np.ndarray) -> np.ndarray:
        """Of distributions, by component and row: int64 (K, B)."""
        return np.ascontiguousarray(self._kind_CK[self._class_N[word_B]].T).astype(np.int64)


class Nearest:
    """Finds the nearest of at most 1024 words for each row, by the components in which words differ most."""

    def __init__(self, words_NK: Tensor) -> None:
        spread_K = words_NK.square().sum(dim=0)
        self._columns = spread_K.topk(min(_SEARCHED, len(spread_K))).indices
        some_NE = words_NK[:, self._columns]
        # |x - w|^2 is least where x w - |w|^2 / 2 is largest.
        self._words_EN = some_NE.T.contiguous()
        self._bias_N = some_NE.square().sum(dim=1) / -2
        self._number_N = torch.arange(len(words_NK), dtype=torch.int32, device=words_NK.device)

    def __call__(self, x_TK: Tensor) -> Tensor:
        """Their numbers, (T,) int64."""
        numbers = [self._found(x_BK[:, self._columns]) for x_BK in torch.split(x_TK, BLOCK)]
        return torch.cat(numbers).to(torch.int64)

    def _found(self, x_BE: Tensor) -> Tensor:
        # With its number in the last bits of how near each is, which say least, one maximum finds both: to have torch
        # find where it is takes several times as long.
        likeness_BN = torch.addmm(self._bias_N, x_BE, self._words_EN)
        likeness_BN.view(torch.int32).bitwise_and_(-MOST_WORDS).bitwise_or_(self._number_N)
        return likeness_BN.amax(dim=1).view(torch.int32) & (MOST_WORDS - 1)


class _Writing(NamedTuple):
    """What only who writes needs."""

    inverse_WK: Tensor
    nearest: Nearest


def rounded(z: Tensor) -> Tensor:
    """In steps, to whole numbers as the code has them."""
    return (z.abs() + (1.0 - ROUNDS_UP_FROM)).floor_().copysign_(z)


def _joined(written: Written, is_number_T: np.ndarray) -> bytes:
    """Of the rows, one after the other."""
    count_T = np.where(is_number_T, written.count_T, 0)
    words_L = written.words_L[np.repeat(is_number_T, written.count_T)]
    is_long_T = count_T >= _LONG
    end_T = np.cumsum(_LEAST_BYTES + is_long_T + 2 * count_T)
    begin_T = np.concatenate([[0], end_T[:-1]])
    data_X = np.empty(int(end_T[-1]), dtype=np.uint8)
    data_X[begin_T] = np.where(is_long_T, _LONG + count_T // 256, count_T)
    data_X[begin_T[is_long_T] + 1] = count_T[is_long_T] % 256
    state_T4 = np.where(is_number_T, written.state_T, 0).astype("<u4").view(np.uint8).reshape(-1, 4)
    data_X[_state_places(begin_T + is_long_T)] = state_T4
    data_X[_word_places(begin_T, is_long_T, len(data_X))] = words_L.astype("<u2").view(np.uint8)
    return data_X.tobytes()


def _parted(data: memoryview, begin_T: np.ndarray) -> Tuple[Written, np.ndarray]:
    """The inverse: of rows that begin there, and which are numbers."""
    data_X = np.frombuffer(data, dtype=np.uint8)
    first_T = data_X[begin_T].astype(np.int64)
    is_long_T = first_T >= _LONG
    count_T = np.where(is_long_T, (first_T - _LONG) * 256 + data_X[begin_T + is_long_T], first_T)
    state_T = data_X[_state_places(begin_T + is_long_T)].view("<u4")[:, 0].astype(np.uint32)
    words_L = data_X[_word_places(begin_T, is_long_T, len(data_X))].view("<u2").astype(np.uint16)
    return Written(state_T, words_L, count_T), state_T != 0


def _state_places(length_T: np.ndarray) -> np.ndarray:
    return length_T[:, None] + np.arange(1, 5)


def _word_places(begin_T: np.ndarray, is_long_T: np.ndarray, size: int) -> np.ndarray:
    """All but lengths and states."""
    is_word_X = np.ones(size, dtype=bool)
    is_word_X[begin_T] = False
    is_word_X[_state_places(begin_T + is_long_T)] = False
    is_word_X[begin_T + is_long_T] = False
    return is_word_X


def most_bytes(width: int) -> int:
    """Of a file with the tables for rows of so many elements."""
    of_components = width * (width + MOST_WORDS + 2 * 2 + MOST_CLASSES) + 2 * width
    return of_components + 7 * MOST_WORDS + 6 * MOST_KINDS * MOST_SYMBOLS + _HEADER_BYTES


def _checked(tables: Mapping[str, Tensor]) -> int:
    """W."""
    if tables.keys() != _DTYPES.keys():
        raise ProtocolError(f"a codec's tables are {', '.join(_DTYPES)}, not {', '.join(tables)[:200]}")
    for name, dtype in _DTYPES.items():
        if tables[name].dtype != dtype:
            raise ProtocolError(f"'{name}' of a codec's tables is {tables[name].dtype}, not {dtype}")
    for name in ("basis", "whole", "kind", "frequencies"):
        if tables[name].dim() != 2:
            raise ProtocolError(f"'{name}' of a codec's tables has shape {list(tables[name].shape)}")
    (W, K), N, C, (D, S) = tables["basis"].shape, len(tables["whole"]), len(tables["kind"]), tables["frequencies"].shape
    for what, count, most in (
        ("components", K, min(W, _MOST_COMPONENTS)),
        ("words", N, MOST_WORDS),
        ("classes", C, MOST_CLASSES),
        ("kinds", D, MOST_KINDS),
    ):
        if not 1 <= count <= most:
            raise ProtocolError(f"a codec's tables have {count} {what}; from 1 to {most} are accepted")
    if S % 2 == 0 or S > MOST_SYMBOLS:
        raise ProtocolError(f"a codec's tables have {S} symbols; an odd number up to {MOST_SYMBOLS} is accepted")
    wanted = {
        **{"whole": (N, K), "basis_steps": (K,), "whole_steps": (K,), "mean": (W,), "step": (N,), "points": (D, S)},
        **{"class": (N,), "kind": (C, K), "word_frequencies": (N,)},
    }
    for name, shape in wanted.items():
        if tables[name].shape != shape:
            raise ProtocolError(f"'{name}' of a codec's tables has shape {list(tables[name].shape)}, not {list(shape)}")
    for name, dtype in _DTYPES.items():
        if dtype == torch.float16 and not bool(torch.isfinite(tables[name]).all()):
            raise ProtocolError(f"'{name}' of a codec's tables holds what is no finite number")
    if not bool((tables["step"] > 0).all()):
        raise ProtocolError("'step' of a codec's tables has to be above zero")
    for name, below in (("class", C), ("kind", D)):
        if int(tables[name].max()) >= below:
            raise ProtocolError(f"'{name}' of a codec's tables must be below {below}")
    _check_frequencies("word_frequencies", tables["word_frequencies"][None], 1)
    _check_frequencies("frequencies", tables["frequencies"], 0)
    can_DQ = tables["frequencies"][:, S // 2 :] > 0
    is_even = bool((can_DQ == (tables["frequencies"][:, : S // 2 + 1] > 0).flip(1)).all())
    if not is_even or not bool(can_DQ[:, 0].all()) or bool((can_DQ[:, 1:] & ~can_DQ[:, :-1]).any()):
        raise ProtocolError("'frequencies' of a codec's tables have a gap: a number comes where a smaller one does not")
    return int(W)


def _check_frequencies(name: str, of_DS: Tensor, least: int) -> None:
    if int(of_DS.min()) < least or not bool((of_DS.to(torch.int64).sum(dim=1) == SLOTS).all()):
        raise ProtocolError(f"'{name}' of a codec's tables must be from {least} on, and {SLOTS} together")
