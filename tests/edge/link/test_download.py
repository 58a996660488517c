"""A file that comes from the cloud is checked while it arrives: names, shapes, types, sizes."""

from __future__ import annotations

import json
from typing import Any, Dict, Iterator, List

import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from sft.errors import ProtocolError
from sft.tensors.stream import in_memory, safetensors_chunks
from sft_edge.link.download import NUMBERS, checked_state, checked_weights

TENSORS = {"a.weight": torch.ones(3, 2), "a.bias": torch.arange(3.0)}
SHAPES = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
SCALARS = torch.tensor(list(b"{}"), dtype=torch.uint8)
STATE = {"a.weight/step": torch.ones(()), "a.weight/exp_avg": torch.ones(3, 2), "scalars": SCALARS}


def file_of(tensors: Dict[str, Tensor]) -> bytes:
    return b"".join(safetensors_chunks(in_memory(tensors)))


def with_header(change: Any) -> bytes:
    """The file with another header, whatever it says of the bytes that follow."""
    good = file_of(TENSORS)
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])
    text = change if isinstance(change, bytes) else json.dumps({**header, **change}).encode()
    return len(text).to_bytes(8, "little") + text + good[8 + length :]


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_what_is_right_passes_byte_by_byte(size: int) -> None:
    for check, tensors in ((checked_weights, TENSORS), (checked_state, STATE)):
        data = file_of(tensors)
        chunks = [data[start : start + size] for start in range(0, len(data), size)]
        passed = load(b"".join(check([b"", *chunks, b""], SHAPES)))
        assert passed.keys() == tensors.keys()
        assert all(passed[name].equal(tensor) for name, tensor in tensors.items())
    halves = {name: tensor.half() for name, tensor in TENSORS.items()}
    assert b"".join(checked_weights([file_of(halves)], SHAPES, NUMBERS)) == file_of(halves)


BAD: List[Any] = [
    (b"nine byte", "a header of"),
    (b"", "ended after 0 bytes"),
    (file_of(TENSORS)[:-1], "ended after"),
    (file_of(TENSORS) + b"x", "longer than the"),
    (file_of({"a.weight": TENSORS["a.weight"]}), "lacks 'a.bias'"),
    (file_of({**TENSORS, "b\x1b[2J": torch.ones(1)}), r"holds 'b\?\[2J'"),
    (file_of({**TENSORS, "a.bias": torch.ones(4)}), r"'a.bias' as F32 \[4\], not \[3\]"),
    (file_of({**TENSORS, "a.bias": torch.ones(3).double()}), "'a.bias' as F64"),
    (with_header(b"[]"), "not a safetensors file"),
    (with_header(b"{" * 5000), "a header of|not a safetensors file"),
    (with_header({"a.bias": {"dtype": "F32", "shape": [3], "data_offsets": [0, 1 << 62]}}), "not a safetensors file"),
    (with_header({"a.bias": {"dtype": "F32", "shape": [-3], "data_offsets": [0, 12]}}), "not a safetensors file"),
    (with_header({"a.bias": {"dtype": "X", "shape": [3], "data_offsets": [0, 12]}}), "not a safetensors file"),
    (with_header({"a.bias": 7}), "not a safetensors file"),
    ((1 << 63).to_bytes(8, "little"), "a header of"),
]


@pytest.mark.parametrize(("data", "says"), BAD, ids=range(len(BAD)))
def test_what_is_not_the_run_s_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(ProtocolError, match=says) as caught:
        list(checked_weights([data[:5], data[5:]], SHAPES))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    "odd",
    [
        {"b/exp_avg": torch.ones(2)},
        {"exp_avg": torch.ones(2)},
        {"a.weight/exp_avg": torch.ones(2, 3)},
        {"a.bias/exp_avg": torch.ones(3, 3)},
        {"scalars": torch.ones(2)},
        {f"a.bias/{index}": torch.ones(3) for index in range(9)},
    ],
)
def test_a_state_of_something_else_is_refused(odd: Dict[str, Tensor]) -> None:
    with pytest.raises(ProtocolError, match="the file that the cloud sends"):
        list(checked_state([file_of({**STATE, **odd})], SHAPES))
    with pytest.raises(ProtocolError, match="lacks 'scalars'"):
        list(checked_state([file_of({"a.bias/exp_avg": torch.ones(3)})], SHAPES))


def test_of_what_has_no_end_little_is_taken() -> None:
    taken = 0

    def endless(first: bytes, more: bytes) -> Iterator[bytes]:
        nonlocal taken
        yield first
        while True:
            taken += 1
            yield more

    with pytest.raises(ProtocolError, match="longer than"):
        list(checked_weights(endless(file_of(TENSORS), b"x" * 1000), SHAPES))
    assert taken == 1
    with pytest.raises(ProtocolError, match="does not come"):
        list(checked_weights(endless(b"", b""), SHAPES))
