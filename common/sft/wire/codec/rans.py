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

# Arrays, because numpy makes one of any other number each time, which takes as long as a step of few rows.
_WORD, _SLOTS, _MOST = (np.array(value, dtype=np.uint32) for value in (16, SLOTS, 32 - PRECISION))
_SLOT, _BITS, _ONE = (np.array(value) for value in (SLOTS - 1, PRECISION, 1))
_HALF, _IN_HALF, _LEAST = (np.array(value) for value in (16, 0xFFFF, 1 << 16))


class Distributions:
    """How often symbols come, of several kinds."""

    def __init__(self, frequencies_DS: np.ndarray) -> None:
        """Whole numbers, 4096 together in each distribution. A symbol below all that have some, or above all, is
        written as the nearest that has; others without cannot be written."""
        D, self.symbols = frequencies_DS.shape
        before_DS = np.cumsum(frequencies_DS, axis=1) - frequencies_DS
        own = np.repeat(np.arange(frequencies_DS.size), frequencies_DS.ravel())
        self.symbol = own % self.symbols
        """Of a slot of distribution d, at 4096 d + slot."""
        slot = np.tile(np.arange(SLOTS), D) - before_DS.ravel()[own]
        self.step = frequencies_DS.ravel()[own].astype(np.int64) << 16 | slot
        """Likewise, its frequency and, in the lower half, how far into it the slot is."""
        first_D1, last_D1 = (self.symbol.reshape(D, SLOTS)[:, [end]] for end in (0, -1))
        nearest_DS = np.clip(np.arange(self.symbols), first_D1, last_D1)
        self.frequency, self.before = (
            np.take_along_axis(of_DS, nearest_DS, axis=1).ravel().astype(np.uint32)
            for of_DS in (frequencies_DS, before_DS)
        )
        """Of symbol s of distribution d, at d S + s; and of all lesser ones together."""


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
        self._is_full: List[np.ndarray] = []
        self._left: List[np.ndarray] = []

    def put(self, distributions: Distributions, symbols_KT: np.ndarray, kinds_KT: np.ndarray) -> None:
        """Before what was put before: `symbols_KT` of distributions `kinds_KT`, from 0, these in int64."""
        at_KT = np.ascontiguousarray(kinds_KT * distributions.symbols + symbols_KT)
        frequency_KT, before_KT = distributions.frequency[at_KT], distributions.before[at_KT]
        most_KT = (frequency_KT << _MOST) - np.uint32(1)  # where the frequency is 4096 that is all there is
        more_KT = _SLOTS - frequency_KT
        left_KT, is_full_KT = np.empty(at_KT.shape, dtype=np.uint16), np.empty(at_KT.shape, dtype=bool)
        state_T, times_T = self._state_T, np.empty_like(self._state_T)
        for k in reversed(range(len(at_KT))):
            np.greater(state_T, most_KT[k], out=is_full_KT[k])
            left_KT[k] = state_T
            np.putmask(state_T, is_full_KT[k], state_T >> _WORD)  # with `where`, the shift would take twice as long
            np.floor_divide(state_T, frequency_KT[k], out=times_T)
            times_T *= more_KT[k]
            state_T += times_T
            state_T += before_KT[k]
        self._left.append(left_KT)
        self._is_full.append(is_full_KT)

    def written(self) -> Written:
        """All of it."""
        left_TK, is_full_TK = (np.concatenate(of[::-1]).T for of in (self._left, self._is_full))
        return Written(self._state_T, left_TK[is_full_TK], is_full_TK.sum(axis=1))


class Reader:
    """The other way. Any numbers have a meaning; only what was written is `at_end` after its last symbol."""

    def __init__(self, written: Written) -> None:
        self._state_T = written.state_T.astype(np.int64)  # as what it is an index of: numpy would make it so each time
        self._words_L = written.words_L.astype(np.int64)
        self._end_T = np.cumsum(written.count_T)
        self._next_T = self._end_T - written.count_T

    def take(self, distributions: Distributions, kinds_KT: np.ndarray) -> np.ndarray:
        """The next symbols, of distributions `kinds_KT`, int64: where `distributions.symbol` has each, int64 (K, T)."""
        state_T, next_T, end_T, words_L = self._state_T, self._next_T, self._end_T, self._words_L
        at_KT = np.ascontiguousarray(kinds_KT << PRECISION)
        for at_T in at_KT:
            at_T |= state_T & _SLOT
            step_T = distributions.step[at_T]
            state_T >>= _BITS
            state_T *= step_T >> _HALF
            state_T += step_T & _IN_HALF
            (low,) = (state_T < _LEAST).nonzero()
            low = low[next_T[low] < end_T[low]]
            read = next_T[low]
            state_T[low] = state_T[low] << _HALF | words_L[read]
            next_T[low] = read + _ONE
        return at_KT

    def at_end(self) -> np.ndarray:
        """Of which rows nothing is left, (T,) bool."""
        is_at_end_T: np.ndarray = (self._state_T == _START) & (self._next_T == self._end_T)
        return is_at_end_T
