"""How the rows of a tensor are written: each in bytes of its own, whatever the others are, one row after the other.

So the bytes of a row can be kept, and sent with other rows another time. Floats are written as they are. In `int8` and
`int4` every 64 elements of a row are mixed, so that one that is much larger than the others makes no large steps for
all, and have a scale, a byte; what is mixed is a whole number of steps of it:

    y = H (s * x),   y ~ scale / L * q,   q in -L..L,   L = 127 or 7

H is Sylvester's matrix of 1 and -1, whose square is its size times the identity, and s are signs, which no regular
pattern of the elements is likely to meet; as in Ashkboos et al., "QuaRot" (2024). Scales are powers of 2^(1/4), from
2^-42.25 to 2^21: no more than 19% above the largest magnitude that they are for. What is larger than all scales,
infinite or no number comes out as no number, with the elements beside it, as float16 has infinity there: a loss that is
none is seen, one that is slightly wrong would not be.

Shape suffixes: T rows, W elements of a row, G groups of 64 elements, E elements of a group, X bytes of a row.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Callable, Dict, List, Mapping, Optional, Protocol, Sequence, Union

import torch
from torch import Tensor, nn

from sft.errors import ProtocolError
from sft.models.seeding import derive_seed
from sft.v1 import split_training_pb2 as pb

GROUP = 64
"""Elements that have a scale in common."""

_ZERO, _NO_NUMBER = 0, 255
_ONE = 170  # the scale that is 1
_STEPS_OF_TWO = 4


Data = Union[bytes, memoryview]
"""Rows, one after the other."""


class RowCode(Protocol):
    """One way of writing rows, of which there is at least one. It keeps nothing from one to the next."""

    def row_bytes(self, width: int) -> int:
        """X, of a row of so many elements; the least, where rows differ."""

    def ends(self, data: Data, rows: int, width: int) -> Sequence[int]:
        """Where each of so many rows ends in `data`. Raises ProtocolError where they are not all that is in it."""

    def encode(self, x_TW: Tensor, rounding: Optional[int] = None) -> bytes:
        """Of float32. `rounding`: a seed, to round up or down by chance, so that the mean is right, instead of to the
        nearest; of no account where nothing is rounded by us.
        """

    def decode(self, data: Data, rows: int, width: int, device: torch.device) -> Tensor:
        """(T, W) float32, on `device`. Raises ProtocolError as `ends` does, and where rows are none of the code's."""


class EvenRows(ABC):
    """All of as many bytes; any bytes are rows."""

    @abstractmethod
    def row_bytes(self, width: int) -> int:
        """See RowCode."""

    def ends(self, data: Data, rows: int, width: int) -> Sequence[int]:
        """See RowCode."""
        size = self.row_bytes(width)
        if rows * size != len(data):
            raise ProtocolError(f"{rows} rows of {width} elements: it needs {rows * size} bytes, {len(data)} came")
        return range(size, len(data) + 1, size) if size else ()  # of rows without elements nobody asks

    def encode(self, x_TW: Tensor, rounding: Optional[int] = None) -> bytes:
        """See RowCode."""
        return self.written(x_TW, rounding).cpu().numpy().tobytes()

    def decode(self, data: Data, rows: int, width: int, device: torch.device) -> Tensor:
        """See RowCode."""
        self.ends(data, rows, width)
        rows_TX = torch.frombuffer(bytearray(data), dtype=torch.uint8).reshape(rows, -1)
        return self.read(rows_TX.to(device), width)

    @abstractmethod
    def written(self, x_TW: Tensor, rounding: Optional[int] = None) -> Tensor:
        """(T, X) uint8, on the same device."""

    @abstractmethod
    def read(self, rows_TX: Tensor, width: int) -> Tensor:
        """The inverse of `written`."""


class Floats(EvenRows):
    """Elements of a type of torch's, little-endian."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._element_bytes = torch.empty(0, dtype=dtype).element_size()

    def row_bytes(self, width: int) -> int:
        """See RowCode."""
        return self._element_bytes * width

    def written(self, x_TW: Tensor, rounding: Optional[int] = None) -> Tensor:
        """See EvenRows. Always to the nearest."""
        return x_TW.to(self._dtype).contiguous().view(torch.uint8)

    def read(self, rows_TX: Tensor, width: int) -> Tensor:
        """See EvenRows."""
        return rows_TX.view(self._dtype).to(torch.float32)


class Quantised(EvenRows):
    """Whole numbers of 8 or 4 bits, behind the scales of their groups; of two numbers in a byte the first is low."""

    def __init__(self, bits: int) -> None:
        self._bits = bits
        self._most = 2 ** (bits - 1) - 1

    def row_bytes(self, width: int) -> int:
        """See RowCode."""
        return math.ceil(width / GROUP) + math.ceil(width * self._bits / 8)

    def written(self, x_TW: Tensor, rounding: Optional[int] = None) -> Tensor:
        """See EvenRows."""
        q_TW = _mixed(x_TW)
        scales_TG = _scale_of(torch.cat([y_TGE.abs().amax(dim=-1) for y_TGE in _groups(q_TW)], dim=1))
        _multiply(q_TW, self._most / _values(x_TW.device)[scales_TG.to(torch.int64)])
        if rounding is None:
            q_TW = q_TW.round()
        else:
            # On the CPU wherever x is, and whatever a script has made the default: everywhere the same numbers.
            generator = torch.Generator("cpu").manual_seed(rounding)
            q_TW = (q_TW + torch.rand(q_TW.shape, generator=generator, device="cpu").to(q_TW.device)).floor()
        q_TW = q_TW.nan_to_num(0.0, 0.0, 0.0).clamp(-self._most, self._most).to(torch.int8)
        return torch.cat([scales_TG, self._packed(q_TW)], dim=1)

    def read(self, rows_TX: Tensor, width: int) -> Tensor:
        """See EvenRows."""
        G = math.ceil(width / GROUP)
        y_TW = self._unpacked(rows_TX[:, G:])[:, :width].float()
        _multiply(y_TW, _values(rows_TX.device)[rows_TX[:, :G].to(torch.int64)] / self._most)
        return _unmixed(y_TW)

    def _packed(self, q_TW: Tensor) -> Tensor:
        if self._bits == 8:
            return q_TW.view(torch.uint8)
        nibbles = nn.functional.pad(q_TW + 8, (0, q_TW.shape[1] % 2)).to(torch.uint8)
        return nibbles[:, ::2] | (nibbles[:, 1::2] << 4)

    def _unpacked(self, rows_TX: Tensor) -> Tensor:
        if self._bits == 8:
            return rows_TX.contiguous().view(torch.int8)
        both = torch.stack([rows_TX & 15, rows_TX >> 4], dim=-1)
        return both.reshape(rows_TX.shape[0], -1).to(torch.int8).sub_(8)


Codes = Mapping["pb.DataType", RowCode]  # quoted: it is a type to type checkers alone
"""By how they are named on the wire."""

CODES: Codes = {
    pb.DATA_TYPE_FLOAT32: Floats(torch.float32),
    pb.DATA_TYPE_BFLOAT16: Floats(torch.bfloat16),
    pb.DATA_TYPE_FLOAT16: Floats(torch.float16),
    pb.DATA_TYPE_INT8: Quantised(8),
    pb.DATA_TYPE_INT4: Quantised(4),
}
"""Those that need nothing but the row: all but `fitted`, which has tables of a session's own."""

NAMES: Dict[str, pb.DataType] = {
    pb.DataType.Name(data_type)[len("DATA_TYPE_") :].lower(): data_type for data_type in (*CODES, pb.DATA_TYPE_FITTED)
}
"""All of them, as options spell them."""


def name_of(data_type: pb.DataType) -> str:
    """As options spell it; a number for one that is not ours."""
    return next((name for name, known in NAMES.items() if known == data_type), str(int(data_type)))


def rounding_of(seed: int, step: int, micro_batch: int) -> int:
    """The `rounding` of a gradient on its way down: of a session's seed, as its dropout is."""
    return derive_seed(seed, "gradient", step, micro_batch)


def _groups(x_TW: Tensor) -> List[Tensor]:
    """Views: (T, G, GROUP) of the groups that are whole, (T, 1, E) of what is left. Nothing is padded: rows may be as
    narrow as a rank, and so many that a message of them is as large as one may be.
    """
    whole = x_TW.shape[1] // GROUP * GROUP
    parts = [x_TW[:, :whole].view(x_TW.shape[0], -1, GROUP)] if whole else []
    return parts if whole == x_TW.shape[1] else [*parts, x_TW[:, None, whole:]]


def _multiply(x_TW: Tensor, by_TG: Tensor) -> None:
    """Each group by its own, in place."""
    first = 0
    for x_TGE in _groups(x_TW):
        x_TGE *= by_TG[:, first : first + x_TGE.shape[1], None]
        first += x_TGE.shape[1]


def _mixed(x_TW: Tensor) -> Tensor:
    """H (s * x) of each group; the last, which may be shorter, in as large parts as a power of two divides."""
    return _by_parts(x_TW, lambda x_TPN: _sylvester(x_TPN * _signs(x_TPN)))


def _unmixed(y_TW: Tensor) -> Tensor:
    return _by_parts(y_TW, lambda y_TPN: _sylvester(y_TPN).div_(y_TPN.shape[-1]).mul_(_signs(y_TPN)))


def _by_parts(x_TW: Tensor, work: Callable[[Tensor], Tensor]) -> Tensor:
    T, W = x_TW.shape
    whole = W - W % GROUP
    parts = [(x_TW[:, :whole], GROUP), (x_TW[:, whole:], W % GROUP & -(W % GROUP))]
    done = [work(part.reshape(T, -1, size)).reshape(T, -1) for part, size in parts if part.shape[1]]
    return done[0] if len(done) == 1 else torch.cat(done, dim=1)


def _sylvester(x_TPN: Tensor) -> Tensor:
    """H x, in place, by sums of two: in this order on every machine, however many rows there are."""
    half = 1
    while half < x_TPN.shape[-1]:
        low, high = x_TPN.view(*x_TPN.shape[:-1], -1, 2, half).unbind(dim=-2)
        less = low - high
        low += high
        high.copy_(less)
        half *= 2
    return x_TPN


def _signs(x_TPN: Tensor) -> Tensor:
    return _all_signs(x_TPN.device)[: x_TPN.shape[-1]]


@lru_cache(maxsize=None)
def _all_signs(device: torch.device) -> Tensor:
    bits = 0x9E3779B97F4A7C15  # of the golden ratio, which has no pattern
    return torch.tensor([1.0 - 2.0 * (bits >> place & 1) for place in range(GROUP)]).to(device)


def _scale_of(peaks_TG: Tensor) -> Tensor:
    """The number of the smallest scale that holds the largest of a group: uint8."""
    scales = torch.searchsorted(_values(peaks_TG.device)[1:_NO_NUMBER], peaks_TG) + 1
    scales[peaks_TG == 0] = _ZERO
    scales[~torch.isfinite(peaks_TG)] = _NO_NUMBER
    return scales.to(torch.uint8)


@lru_cache(maxsize=None)
def _values(device: torch.device) -> Tensor:
    """What the numbers of scales stand for, (256,) float32."""
    # Of whole powers of two and four constants, so that they are the same wherever they are computed.
    quarters = (1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429)
    values = []
    for number in range(256):
        twos, quarter = divmod(number - _ONE, _STEPS_OF_TWO)
        values.append(math.ldexp(quarters[quarter], twos))
    values[_ZERO], values[_NO_NUMBER] = 0.0, math.nan
    return torch.tensor(values, dtype=torch.float32, device=device)
