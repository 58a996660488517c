"""Entropy coding: what was written is read, in about as many bits as it tells."""

from __future__ import annotations

from typing import Tuple

import numpy as np
import pytest

from sft.wire.codec.rans import SLOTS, Distributions, Reader, Writer, Written

STEEP = np.array([4, 60, 968, 2000, 1000, 60, 4])
KINDS = np.stack([STEEP, [0, 0, 0, SLOTS, 0, 0, 0], [1, SLOTS - 6, 1, 1, 1, 1, 1], [585] * 6 + [586]])


def drawn(rows: int, symbols: int, seed: int = 0) -> Tuple[np.ndarray, np.ndarray]:
    """Symbols as often as they are to come, and of which kind each is."""
    draw = np.random.default_rng(seed)
    kinds = draw.integers(0, len(KINDS), (symbols, rows)).astype(np.int64)
    slots = draw.integers(0, SLOTS, (symbols, rows))
    return (slots[..., None] >= KINDS.cumsum(axis=1)[kinds]).sum(axis=-1).astype(np.int64), kinds


def written(symbols: np.ndarray, kinds: np.ndarray, frequencies: np.ndarray = KINDS) -> Written:
    writer = Writer(symbols.shape[1])
    writer.put(Distributions(frequencies), symbols, kinds)
    return writer.written()


def read(reader: Reader, kinds: np.ndarray, frequencies: np.ndarray = KINDS) -> np.ndarray:
    distributions = Distributions(frequencies)
    symbols: np.ndarray = distributions.symbol[reader.take(distributions, kinds)]
    return symbols


@pytest.mark.parametrize(("rows", "symbols"), [(1, 1), (1, 1000), (300, 1), (17, 400)])
def test_what_was_written_is_read(rows: int, symbols: int) -> None:
    wrote, kinds = drawn(rows, symbols)
    reader = Reader(written(wrote, kinds))
    assert symbols < 2 or not reader.at_end().any()
    assert np.array_equal(read(reader, kinds), wrote)
    assert reader.at_end().all()


def test_the_bits_of_a_row() -> None:
    """Those that its symbols tell, up to twelve that a state of 1 takes to begin with, and a word that is not full."""
    wrote, kinds = drawn(200, 300)
    tells = -np.log2(KINDS[kinds, wrote] / SLOTS).sum(axis=0)
    takes = 32 + 16 * written(wrote, kinds).count_T
    assert (tells <= takes).all()
    assert (takes - tells).mean() < 18
    assert (takes - tells).max() < 12 + 16


def test_a_row_does_not_depend_on_the_others() -> None:
    wrote, kinds = drawn(30, 100)
    together = written(wrote, kinds)
    words = np.split(together.words_L, np.cumsum(together.count_T)[:-1])
    for row in range(30):
        alone = written(wrote[:, row : row + 1], kinds[:, row : row + 1])
        assert (alone.state_T[0], alone.words_L.tolist()) == (together.state_T[row], words[row].tolist())


def test_two_alphabets_in_one_row() -> None:
    """What is put last is taken first."""
    wrote, kinds = drawn(40, 50)
    first, none = np.arange(40, dtype=np.int64)[None] % 3, np.zeros((1, 40), dtype=np.int64)
    others = np.array([[1, 2, SLOTS - 3]])
    writer = Writer(40)
    writer.put(Distributions(KINDS), wrote, kinds)
    writer.put(Distributions(others), first, none)
    reader = Reader(writer.written())
    assert np.array_equal(read(reader, none, others), first)
    assert np.array_equal(read(reader, kinds), wrote)
    assert reader.at_end().all()


def test_a_symbol_that_always_comes_takes_nothing() -> None:
    kinds = np.ones((1000, 2), dtype=np.int64)
    nothing = written(np.full_like(kinds, 3), kinds)
    assert (nothing.state_T.tolist(), nothing.words_L.tolist(), nothing.count_T.tolist()) == ([1, 1], [], [0, 0])


def test_a_symbol_beyond_those_that_have_some_is_written_as_the_nearest() -> None:
    narrow = np.array([[0, 0, 96, 4000, 0, 0], [1000, 3096, 0, 0, 0, 0]])
    symbols, kinds = np.tile(np.arange(6), (2, 1)).T.copy(), np.tile([0, 1], (6, 1))
    made = written(symbols, kinds, narrow)
    assert read(Reader(made), kinds, narrow).T.tolist() == [[2, 2, 2, 3, 3, 3], [0, 1, 1, 1, 1, 1]]


def test_what_was_not_written_is_seen() -> None:
    """Every bit of it that is another, a word too few, a word too many."""
    wrote, kinds = drawn(1, 60)
    made = written(wrote, kinds)
    assert made.count_T[0] >= 2
    for bit in range(32):
        check(made._replace(state_T=made.state_T ^ np.uint32(1 << bit)), kinds, wrote)
    for place in range(16 * len(made.words_L)):
        words_L = made.words_L.copy()
        words_L[place // 16] ^= np.uint16(1 << place % 16)
        check(made._replace(words_L=words_L), kinds, wrote)
    check(made._replace(words_L=made.words_L[:-1], count_T=made.count_T - 1), kinds, wrote)
    check(made._replace(words_L=np.append(made.words_L, np.uint16(7)), count_T=made.count_T + 1), kinds, wrote)


def check(other: Written, kinds: np.ndarray, wrote: np.ndarray) -> None:
    """Some symbols come out, and it is not the end, or they are other symbols."""
    reader = Reader(other)
    symbols = read(reader, kinds)
    assert ((symbols >= 0) & (symbols < KINDS.shape[1])).all()
    assert not reader.at_end().all() or not np.array_equal(symbols, wrote)


def test_any_numbers_have_a_meaning() -> None:
    draw = np.random.default_rng(3)
    kinds = draw.integers(0, len(KINDS), (60, 500)).astype(np.int64)
    words = draw.integers(0, 1 << 16, 4 * 500).astype(np.uint16)
    state = draw.integers(0, 1 << 32, 500).astype(np.uint32)
    reader = Reader(Written(state, words, np.full(500, 4)))
    assert (KINDS[kinds, read(reader, kinds)] > 0).all()
    assert reader.at_end().sum() < 5
