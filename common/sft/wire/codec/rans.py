"""Whole numbers in as many bits as they tell: range asymmetric numeral systems, of many rows side by side.

Duda, "Asymmetric numeral systems: entropy coding combining speed of Huffman coding with compression rate of arithmetic
coding" (2013), section 3.3. A row is one number, its state, into which its symbols go one after the other, the last
first; a symbol that comes f times in 4096 makes it 4096/f times as large. What a state of 32 bits has no room for
leaves it in words of 16. Rows have nothing to do with one another, so numpy takes a step of all at once.

    symbol in:    state >= f 2^20:  the low word leaves.    state <- 4096 (state / f) + state % f + before
    symbol out:   slot = state % 4096 is in before .. before + f - 1 of one symbol.
                  state <- f (state / 4096) + slot - before.    state < 2^16: a word comes back, if any is left

with `before` the frequencies of all lesser symbols together. A state begins as 1: until it is 2^16 no word can be left.

Shape suffixes: T rows, D distributions, S symbols, K symbols of a row, L words of all rows.
"""

from __future__ import annotations

from typing import List, NamedTuple

import numpy as np

PRECISION = 12
SLOTS = 1 << PRECISION

_START = 1
_WORD = np.uint32(16)
_LOW = np.uint32(1 << 16)
_PRECISION, _SLOTS, _LAST_SLOT = np.uint32(PRECISION), np.uint32(SLOTS), np.uint32(SLOTS - 1)
_MOST = np.uint32(32 - PRECISION)


class Distributions:
    """How often symbols come, of several kinds."""

    def __init__(self, frequencies_DS: np.ndarray) -> None:
        """Whole numbers, 4096 together in each distribution; what has none cannot be written."""
        D, self._symbols = frequencies_DS.shape
        of_DS = np.ascontiguousarray(frequencies_DS, dtype=np.int64)
        self._frequency = of_DS.ravel().astype(np.uint32)
        self._before = (np.cumsum(of_DS, axis=1) - of_DS).ravel().astype(np.uint32)
        self._own = np.repeat(np.arange(D * self._symbols, dtype=np.int32), of_DS.ravel())  # at 4096 d + slot


class Written(NamedTuple):
    """What `Writer` has made."""

    state_T: np.ndarray
    words_L: np.ndarray
    """Uint16, row after row, as they are read."""
    count_T: np.ndarray
    """Of the words of each row."""


class Writer:
    """Of rows that are written from their last symbol to their first."""

    def __init__(self, rows: int) -> None:
        self._state_T = np.full(rows, _START, dtype=np.uint32)
        self._full: List[np.ndarray] = []
        self._left: List[np.ndarray] = []

    def put(self, distributions: Distributions, symbols_KT: np.ndarray, kinds_KT: np.ndarray) -> None:
        """Before what was put before: `symbols_KT` of distributions `kinds_KT`, int32 from 0."""
        at_KT = kinds_KT * np.int32(distributions._symbols) + symbols_KT
        frequency_KT, before_KT = distributions._frequency[at_KT], distributions._before[at_KT]
        state_T = self._state_T
        for frequency_T, before_T in zip(frequency_KT[::-1], before_KT[::-1]):
            full_T = state_T >> _MOST >= frequency_T
            self._full.append(full_T)
            self._left.append(state_T.astype(np.uint16))
            state_T = np.where(full_T, state_T >> _WORD, state_T)
            state_T += state_T // frequency_T * (_SLOTS - frequency_T) + before_T
        self._state_T = state_T

    def written(self) -> Written:
        """All of it."""
        full_TK = np.stack(self._full[::-1], axis=1)
        return Written(self._state_T, np.stack(self._left[::-1], axis=1)[full_TK], full_TK.sum(axis=1))


class Reader:
    """The other way. Any numbers have a meaning; only what was written is `at_end` after its last symbol."""

    def __init__(self, written: Written) -> None:
        self._state_T = written.state_T.astype(np.uint32)
        self._words_L = written.words_L.astype(np.uint32)
        self._end_T = np.cumsum(written.count_T)
        self._next_T = self._end_T - written.count_T

    def take(self, distributions: Distributions, kinds_KT: np.ndarray) -> np.ndarray:
        """The next symbols, int32 (K, T), of distributions `kinds_KT`."""
        state_T = self._state_T
        at_KT = np.empty(kinds_KT.shape, dtype=np.int32)
        for slots_T, at_T in zip(kinds_KT << PRECISION, at_KT):
            slot_T = state_T & _LAST_SLOT
            distributions._own.take(slots_T | slot_T.view(np.int32), out=at_T)
            state_T >>= _PRECISION
            state_T *= distributions._frequency.take(at_T)
            state_T += slot_T - distributions._before.take(at_T)
            low = np.flatnonzero(state_T < _LOW)
            low = low[self._next_T[low] < self._end_T[low]]
            if len(low):
                state_T[low] = state_T[low] << _WORD | self._words_L[self._next_T[low]]
                self._next_T[low] += 1
        at_KT -= kinds_KT * np.int32(distributions._symbols)
        return at_KT

    def at_end(self) -> np.ndarray:
        """Of which rows nothing is left, (T,) bool."""
        is_at_end_T: np.ndarray = (self._state_T == _START) & (self._next_T == self._end_T)
        return is_at_end_T
