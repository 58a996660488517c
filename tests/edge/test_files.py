"""Files that are written whole or not at all."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Iterator

import numpy as np
import pytest
import torch
from support.jobs import read_json

from sft.errors import DataError, StorageError
from sft_edge.files import storage_errors, write_file, write_json
from sft_edge.training.report import TrainerState


def test_chunks_become_a_file_with_its_directories(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.bin"
    assert write_file(path, [b"one ", b"", b"two"]) == 7
    assert path.read_bytes() == b"one two"
    assert write_file(path, iter([b"three"])) == 5
    assert path.read_bytes() == b"three"
    assert os.listdir(str(path.parent)) == ["file.bin"]


def test_what_breaks_off_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    for error in (DataError("no more"), KeyboardInterrupt()):

        def chunks(error: BaseException = error) -> Iterator[bytes]:
            yield b"new"
            raise error

        with pytest.raises(type(error)):
            write_file(path, chunks())
        assert path.read_bytes() == b"old"
        assert os.listdir(str(tmp_path)) == ["file.bin"]


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=re.escape(f"cannot write {tmp_path / 'file' / 'x'}: ")) as caught:
        write_file(tmp_path / "file" / "x", [b""])
    assert str(caught.value).endswith("free some space or choose another --output-dir")
    with pytest.raises(StorageError, match=r"cannot write .*: Is a directory"):
        write_file(tmp_path, [b""])
    assert os.listdir(str(tmp_path)) == ["file"]


def test_an_error_without_words_has_its_name(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot write x: OSError"), storage_errors(Path("x")):
        raise OSError


def test_json_holds_what_json_can(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    numbers = {"nan": math.nan, "inf": [math.inf, -math.inf, 1.5], "np": np.float32(0.5), "int": np.int64(3)}
    write_json(path, {**numbers, "torch": torch.tensor(2.0), "flag": True, "none": None, "path": Path("a/b"), 7: "key"})
    assert read_json(path) == {
        "nan": None,
        "inf": [None, None, 1.5],
        "np": 0.5,
        "int": 3,
        "torch": 2.0,
        "flag": True,
        "none": None,
        "path": "a/b",
        "7": "key",
    }
    write_json(path, TrainerState(max_steps=3, num_train_epochs=1.0, train_batch_size=2, logging_steps=1))
    assert read_json(path)["max_steps"] == 3
