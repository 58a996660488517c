"""A file that comes from the cloud, checked against what it has to be while it arrives: nothing else is kept."""

from __future__ import annotations

import json
import math
from typing import Callable, Dict, Iterable, Iterator, List, Mapping, NamedTuple, NoReturn, Tuple

from sft.errors import ProtocolError
from sft.optim.state import MAX_SCALARS_BYTES, SCALARS
from sft.printable import said

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
NUMBERS = tuple(_BYTES)
"""Types of a script's tensors: what its norms count is in integers."""

_HEADER_BYTES_BESIDE, _HEADER_BYTES_A_TENSOR = 4096, 512
_MOST_STATES = 8
"""Tensors that an optimizer keeps of a parameter; torch's keep five at most."""

_OF_EIGHT_BITS = frozenset((256, 2048))
"""Numbers in a table of bitsandbytes, and in a block, of which each release has one of these."""

_EMPTY_CHUNKS_BESIDE = 1000

Shapes = Mapping[str, Tuple[int, ...]]


class _Tensor(NamedTuple):
    dtype: str
    shape: List[int]


def checked_weights(chunks: Iterable[bytes], shapes: Shapes, dtypes: Tuple[str, ...] = ("F32",)) -> Iterator[bytes]:
    """Passes on the bytes of a safetensors file that holds tensors of exactly these names and shapes.

    Raises ProtocolError as soon as it cannot be one: with its header, or with the first byte too many.
    """

    def check(tensors: Dict[str, _Tensor]) -> None:
        odd = sorted(tensors.keys() ^ shapes.keys())
        if odd:
            _refuse(f"{'lacks' if odd[0] in shapes else 'holds'} '{said(odd[0])}'")
        for name, tensor in tensors.items():
            if tensor.shape != list(shapes[name]) or tensor.dtype not in dtypes:
                _refuse(f"holds '{name}' as {tensor.dtype} {tensor.shape[:16]}, not {list(shapes[name])}")

    return _checked(chunks, check, len(shapes) + 1, sum(map(len, shapes)))


def checked_state(chunks: Iterable[bytes], shapes: Shapes) -> Iterator[bytes]:
    """As `checked_weights`, of the state of an optimizer over parameters of these shapes; see `sft.optim.state`."""

    def check(tensors: Dict[str, _Tensor]) -> None:
        counts: Dict[str, int] = {}
        for key, tensor in tensors.items():
            if key == SCALARS:
                if tensor.dtype != "U8" or math.prod(tensor.shape) > MAX_SCALARS_BYTES:
                    _refuse(f"holds '{SCALARS}' as {tensor.dtype} {tensor.shape[:16]}")
                continue
            owner = key.rpartition("/")[0]
            counts[owner] = counts.get(owner, 0) + 1
            if owner not in shapes or counts[owner] > _MOST_STATES:
                _refuse(f"holds '{said(key)}'")
            if not could_be_state(tensor.shape, shapes[owner]):
                _refuse(f"holds '{said(key)}' of shape {tensor.shape[:16]}, its parameter has {list(shapes[owner])}")
        if SCALARS not in tensors:
            _refuse(f"lacks '{SCALARS}'")

    return _checked(chunks, check, _MOST_STATES * len(shapes) + 2, _MOST_STATES * sum(map(len, shapes)))


def could_be_state(shape: Iterable[int], of_parameter: Tuple[int, ...]) -> bool:
    """Whether an optimizer could keep a tensor of this shape of a parameter: as much as it has, a row or a column of
    it, or one number; or what those of eight bits do, a table and a scale for each block."""
    sizes = list(shape)
    if len(sizes) == 1 and sizes[0] in _OF_EIGHT_BITS.union(-(-math.prod(of_parameter) // n) for n in _OF_EIGHT_BITS):
        return True
    rows, columns = of_parameter[:-1], (*of_parameter[:-2], *of_parameter[-1:])
    if len(of_parameter) > 1 and tuple(sizes) in (rows, columns):  # as transformers' Adafactor has them
        return True
    own = [1] * (len(of_parameter) - len(sizes)) + sizes
    return len(own) == len(of_parameter) and all(size in (1, there) for size, there in zip(own, of_parameter))


def _checked(
    chunks: Iterable[bytes], check: Callable[[Dict[str, _Tensor]], None], most_tensors: int, name_characters: int
) -> Iterator[bytes]:
    most_header = _HEADER_BYTES_BESIDE + _HEADER_BYTES_A_TENSOR * most_tensors + 6 * name_characters
    begun, total, came, empty = bytearray(), 0, 0, 0
    for chunk in chunks:
        empty += not chunk
        if empty > most_tensors + _EMPTY_CHUNKS_BESIDE:
            _refuse("does not come")
        came += len(chunk)
        if total:
            if came > total:
                _refuse(f"is longer than the {total} bytes that its tensors take")
            yield chunk
            continue
        begun += chunk
        if len(begun) < 8:
            continue
        header_bytes = int.from_bytes(begun[:8], "little")
        if header_bytes > most_header:
            _refuse(f"begins with a header of {header_bytes} bytes, where {most_header} are the most")
        if len(begun) < 8 + header_bytes:
            continue
        tensors, size = _parse(bytes(begun[8 : 8 + header_bytes]))
        check(tensors)
        total = 8 + header_bytes + size
        if came > total:
            _refuse(f"is longer than the {total} bytes that its tensors take")
        yield bytes(begun)
    if not total or came < total:
        _refuse(f"ended after {came} bytes")


def _parse(header: bytes) -> Tuple[Dict[str, _Tensor], int]:
    """The tensors, and the bytes that they take together."""
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        tensors: Dict[str, _Tensor] = {}
        end = 0
        for name, entry in sorted(entries.items(), key=lambda one: one[1]["data_offsets"][0]):
            shape = [size for size in entry["shape"] if type(size) is int and 0 <= size < 1 << 40]
            dtype, (first, last) = entry["dtype"], entry["data_offsets"]
            size = math.prod(shape[:64]) * _BYTES[dtype]
            if len(shape) != len(entry["shape"]) or len(shape) > 64 or (first, last) != (end, end + size):
                raise ValueError(name)
            tensors[name], end = _Tensor(dtype, shape), last
    except (ValueError, KeyError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise ProtocolError("the file that the cloud sends is not a safetensors file") from error
    return tensors, end


def _refuse(what: str) -> NoReturn:
    raise ProtocolError(f"the file that the cloud sends {what}: it is not this run's, and was not kept")
