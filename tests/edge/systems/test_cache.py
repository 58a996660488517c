"""What is kept of a frozen edge's activations: found again, whole, or not at all."""

from __future__ import annotations

import errno
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Callable, Iterator, List

import pytest
import torch

from sft.batch import Batch
from sft.errors import StorageError
from sft_edge.systems.cache import ActivationCache, is_ours, keys_of

Open = Callable[..., ActivationCache]
KEYS = [bytes([number]) * 16 for number in range(4)]
ROWS = [bytes([number]) * (10 * number) for number in range(4)]


def batch(*rows: List[int], types: bool = False) -> Batch:
    width = max(map(len, rows))
    ids_BS = torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int32)
    inputs = {"input_ids": ids_BS, **({"token_type_ids": ids_BS * 0} if types else {})}
    return Batch(inputs, [len(row) for row in rows], {})


@pytest.fixture
def opened() -> Iterator[Open]:
    """As ActivationCache; closed when the test is over."""
    with ExitStack() as stack:

        def make(*arguments: Any) -> ActivationCache:
            cache = ActivationCache(*arguments)
            stack.callback(cache.close)
            return cache

        yield make


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out" / "activations.bin"


def filled(path: Path) -> None:
    cache = ActivationCache(path, "model 1")
    cache.add(KEYS, ROWS)
    cache.close()


def test_what_was_added_is_found(path: Path, opened: Open) -> None:
    cache = opened(path, "model 1")
    assert cache.find(KEYS[:1]) is None
    cache.add(KEYS[:3], ROWS[:3])
    assert cache.find([KEYS[2], KEYS[0]]) == [ROWS[2], ROWS[0]]
    assert cache.find(KEYS) is None, "not all of them"
    cache.add(KEYS, [b"another"] * 4)
    assert cache.find(KEYS) == [*ROWS[:3], b"another"], "the first counts"
    cache.close()


def test_another_process_finds_it(path: Path, opened: Open) -> None:
    filled(path)
    said: List[str] = []
    again = opened(path, "model 1", said.append)
    assert (again.find(KEYS), len(again), said) == (ROWS, 4, [])


@pytest.mark.parametrize("cut", [1, 20, 31])
def test_what_was_not_written_to_its_end(path: Path, opened: Open, cut: int) -> None:
    filled(path)
    path.write_bytes(path.read_bytes()[:-cut])
    again = opened(path, "model 1")
    assert again.find(KEYS[:3]) == ROWS[:3]
    assert again.find(KEYS[3:]) is None
    again.add(KEYS, ROWS)
    again.close()
    assert opened(path, "model 1").find(KEYS) == ROWS


def test_zeros_where_nothing_was_written(path: Path, opened: Open) -> None:
    """As some file systems have it after the machine lost its power."""
    filled(path)
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(100))
    again = opened(path, "model 1")
    assert (len(again), path.read_bytes()) == (4, whole)


def test_a_key_that_changed(path: Path, opened: Open) -> None:
    filled(path)
    path.write_bytes(path.read_bytes().replace(KEYS[2], KEYS[3], 1))
    assert opened(path, "model 1").find(KEYS[:2]) == ROWS[:2]
    assert opened(path, "model 1").find(KEYS[3:]) is None


@pytest.mark.parametrize(
    ("content", "ours"),
    [
        (None, True),
        (b"", True),
        (b"sft act", True),
        (b"sft activations 1 model 2\n" + bytes(100), True),
        (bytes(100), True),
        (b"something else", False),
        (b"sft activity", False),
    ],
)
def test_what_is_ours(path: Path, content: Any, ours: bool) -> None:
    path.parent.mkdir()
    if content is not None:
        path.write_bytes(content)
    assert is_ours(path) is ours


@pytest.mark.parametrize("content", [b"", bytes(40), b"sft activations 1 model 2\n" + bytes(100)])
def test_a_file_of_another_model_is_begun_anew(path: Path, opened: Open, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    said: List[str] = []
    cache = opened(path, "model 1", said.append)
    assert len(cache) == 0
    assert bool(said) is bool(content)
    cache.add(KEYS, ROWS)
    assert cache.find(KEYS) == ROWS


def test_bytes_that_changed_meanwhile(path: Path, opened: Open) -> None:
    cache = opened(path, "model 1")
    cache.add(KEYS, ROWS)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert cache.find(KEYS[:3]) == ROWS[:3]
    with pytest.raises(StorageError, match="is damaged: delete it, and go on with --resume-from-checkpoint"):
        cache.find(KEYS)


@pytest.mark.parametrize("written", [None, 5])
def test_a_full_disk(path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch, written: int) -> None:
    """Nothing that was kept is lost, and it is said once."""
    said: List[str] = []
    cache = opened(path, "model 1", said.append)
    cache.add(KEYS[:2], ROWS[:2])
    file = cache._file

    class Full:
        def write(self, data: bytes) -> int:
            if written is None:
                raise OSError(errno.ENOSPC, "No space left on device")
            return file.write(data[:written])

        def __getattr__(self, name: str) -> object:
            return getattr(file, name)

    monkeypatch.setattr(cache, "_file", Full())
    cache.add(KEYS, ROWS)
    assert said == [
        f"{path} takes no more activations (No space left on device): those of other rows are computed again in every "
        "epoch"
    ]
    assert cache.find(KEYS[:2]) == ROWS[:2]
    assert cache.find(KEYS) is None
    again = opened(path, "model 1")
    assert (len(again), again.find(KEYS[:2])) == (2, ROWS[:2])


def test_what_is_left_of_the_disk_is_for_the_model(path: Path, opened: Open) -> None:
    said: List[str] = []
    cache = opened(path, "model 1", said.append, 1 << 60)
    cache.add(KEYS[:2], ROWS[:2])
    cache.add(KEYS, ROWS)
    assert cache.find(KEYS[:1]) is None
    assert said == [
        f"{path} takes no more activations (what the disk has left is for the model and its checkpoints): those of "
        "other rows are computed again in every epoch"
    ]


def test_no_place_for_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write"):
        ActivationCache(tmp_path / "file" / "activations.bin", "model 1")


def test_a_key_is_of_the_tokens_alone() -> None:
    alone, beside = keys_of(batch([5, 6, 7])), keys_of(batch([1], [5, 6, 7], [1, 2, 3, 4, 5, 6]))
    assert alone[0] == beside[1]
    assert len(set(beside)) == 3
    assert keys_of(batch([5, 6, 8])) != alone
    assert keys_of(batch([5, 6])) != alone
    assert keys_of(batch([5, 6, 7, 0])) != alone
    assert keys_of(batch([5, 6, 7], types=True)) != alone
