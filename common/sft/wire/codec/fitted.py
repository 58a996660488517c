"""The code of a fixed length that is fitted to data: of a row, the numbers of words that both sides have in tables.

A row is about one of 256 words of its whole width and, for what that leaves, a word for each group of components:

    x ~ mean + basis z,     z = whole[c_0] + scale[c_0] (words_1[c_1], ..., words_G[c_G])     with a byte c for each

a product code behind a first stage, as in Gray and Neuhoff, "Quantization" (1998), sections V.D and V.E, with a scale
for each word of the first. Where c_0 is 255 the row is no number: so one is written with an element that is none, or is
larger than float16 holds.

Where a row is as near to one word as to another, which of them is found may depend on the rows beside it, as the last
bits of the distances do: either is as good. What has been written is read in one way.

Shape suffixes: T rows, W elements of a row, K components, G groups, E components of a group, X = G + 1 bytes of a row,
N = 256 words.
"""

from __future__ import annotations

import math
from typing import Dict, List, Mapping, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from sft.errors import ProtocolError

WORDS = 256
"""That a byte chooses from."""

STEPPED = ("basis", "whole", "words")
"""Of the tables those that are whole numbers, of steps that each of their columns has."""

NO_NUMBER = 255
"""Not a word of a whole row, but the sign that there is none."""

LARGEST = 65504.0
"""Of float16."""

BLOCK = 512
"""Rows that are written at once, so that what is computed of them stays in the processor's cache."""

_DTYPES = {
    **dict.fromkeys(STEPPED, torch.int8),
    **dict.fromkeys(("steps", "mean", "scale"), torch.float16),
    "sizes": torch.int32,
}

_HEADER_BYTES = 4096
"""Of a file with tables, at most."""


class Fitted:
    """See `sft.wire.codec.rows.RowCode`; for rows of one width, on one device."""

    def __init__(self, tables: Mapping[str, Tensor], device: torch.device) -> None:
        """Of `tables`, whose columns are of the groups one after the other: int8 basis (W, K), whole (256, K) and words
        (256, K), in steps of float16, steps (3, K), in this order; float16 mean (W,) and scale (256,); and int32 sizes
        (G,), the components of each group.

        Raises ProtocolError for others.
        """
        self.tables: Dict[str, Tensor] = dict(tables)
        self.width, self._sizes = _checked(tables)
        self._mean_W, self._scale_N, steps_3K = (
            tables[name].to(device, torch.float32) for name in ("mean", "scale", "steps")
        )
        self._basis_WK, self._whole_NK, self._words_NK = (
            tables[name].to(device, torch.float32) * steps_K for name, steps_K in zip(STEPPED, steps_3K)
        )
        groups_G = torch.arange(len(self._sizes), device=device)
        self._group_K = groups_G.repeat_interleave(torch.tensor(self._sizes, device=device))
        self._writer: Optional[_Writer] = None

    def row_bytes(self, width: int) -> int:
        """See RowCode. Raises ProtocolError for rows that the tables are not for."""
        if width != self.width:
            raise ProtocolError(f"rows of {width} elements came, and the codec's tables are for {self.width}")
        return 1 + len(self._sizes)

    def encode(self, x_TW: Tensor, rounding: Optional[int] = None) -> Tensor:
        """See RowCode. Always the nearest words: of the whole row first, then for what that leaves."""
        if self._writer is None:  # who only reads needs none
            parts = torch.split(self._words_NK, self._sizes, dim=1)
            inverse_WK = torch.linalg.pinv(self._basis_WK.double()).T.float()
            self._writer = _Writer(inverse_WK, Nearest(self._whole_NK[:NO_NUMBER]), [Nearest(part) for part in parts])
        rows_TX = torch.empty(len(x_TW), self.row_bytes(x_TW.shape[1]), dtype=torch.uint8, device=x_TW.device)
        for x_BW, rows_BX in zip(torch.split(x_TW, BLOCK), torch.split(rows_TX, BLOCK)):
            rows_BX.copy_(self._written(x_BW, self._writer))
        rows_TX[~(x_TW.abs().amax(dim=1) <= LARGEST)] = NO_NUMBER  # NaN compares false
        return rows_TX

    def _written(self, x_TW: Tensor, writer: _Writer) -> Tensor:
        most_XT = x_TW.new_empty(1 + len(self._sizes), len(x_TW))
        z_TK = (x_TW - self._mean_W) @ writer.inverse_WK
        writer.whole.find(z_TK, most_XT[0])
        whole_T = _numbers_in(most_XT[0]).to(torch.int64)
        z_TK = (z_TK - self._whole_NK[whole_T]) / self._scale_N[whole_T][:, None]
        for nearest, z_TE, most_T in zip(writer.groups, torch.split(z_TK, self._sizes, dim=1), most_XT[1:]):
            nearest.find(z_TE, most_T)
        return _numbers_in(most_XT).T

    def decode(self, rows_TX: Tensor, width: int) -> Tensor:
        """See RowCode. Raises ProtocolError as `row_bytes` does."""
        self.row_bytes(width)
        whole_T = rows_TX[:, 0].to(torch.int64)
        z_TK = self._words_NK.gather(0, rows_TX[:, 1:].to(torch.int64)[:, self._group_K])
        z_TK *= self._scale_N[whole_T][:, None]
        z_TK += self._whole_NK[whole_T]
        x_TW = torch.addmm(self._mean_W, z_TK, self._basis_WK.T)
        x_TW[whole_T == NO_NUMBER] = math.nan
        return x_TW


class Nearest:
    """Finds the nearest of at most 256 words for each row."""

    def __init__(self, words_NE: Tensor) -> None:
        # |x - w|^2 is least where x w - |w|^2 / 2 is largest.
        self._words_EN = words_NE.T.contiguous()
        self._bias_N = words_NE.square().sum(dim=1) / -2
        self._number_N = torch.arange(len(words_NE), dtype=torch.int32, device=words_NE.device)

    def __call__(self, x_TE: Tensor) -> Tensor:
        """Their numbers, (T,) int64."""
        most_T = x_TE.new_empty(len(x_TE))
        for x_BE, most_B in zip(torch.split(x_TE, BLOCK), torch.split(most_T, BLOCK)):
            self.find(x_BE, most_B)
        return _numbers_in(most_T).to(torch.int64)

    def find(self, x_TE: Tensor, most_T: Tensor) -> None:
        """As how near they are, with their numbers in its last eight bits, which say least.

        So one maximum finds both: to have torch find where it is takes several times as long.
        """
        likeness_TN = torch.addmm(self._bias_N, x_TE, self._words_EN)
        likeness_TN.view(torch.int32).bitwise_and_(-WORDS).bitwise_or_(self._number_N)
        torch.amax(likeness_TN, dim=1, out=most_T)


def _numbers_in(most: Tensor) -> Tensor:
    """Of what `Nearest.find` has given: the last dimension is as it was."""
    return most.view(torch.uint8)[..., ::4]


class _Writer(NamedTuple):
    """What only who writes needs."""

    inverse_WK: Tensor
    whole: Nearest
    groups: List[Nearest]


def most_bytes(width: int) -> int:
    """Of a file with the tables for rows of so many elements."""
    return width * (width + 2 * WORDS) + 2 * (width + WORDS + 3 * width) + 4 * width + _HEADER_BYTES


def _checked(tables: Mapping[str, Tensor]) -> Tuple[int, List[int]]:
    """W, and the components of each group."""
    if tables.keys() != _DTYPES.keys():
        raise ProtocolError(f"a codec's tables are {', '.join(_DTYPES)}, not {', '.join(tables)[:200]}")
    for name, dtype in _DTYPES.items():
        if tables[name].dtype != dtype:
            raise ProtocolError(f"'{name}' of a codec's tables is {tables[name].dtype}, not {dtype}")
    basis, sizes = tables["basis"], tables["sizes"]
    if basis.dim() != 2 or not 1 <= basis.shape[1] <= basis.shape[0]:
        raise ProtocolError(f"'basis' of a codec's tables has shape {list(basis.shape)}")
    W, K = basis.shape
    wanted = {"mean": (W,), "whole": (WORDS, K), "scale": (WORDS,), "words": (WORDS, K), "steps": (3, K)}
    for name, shape in wanted.items():
        if tables[name].shape != shape:
            raise ProtocolError(f"'{name}' of a codec's tables has shape {list(tables[name].shape)}, not {list(shape)}")
    if sizes.dim() != 1 or min(sizes.tolist(), default=0) < 1 or int(sizes.sum()) != K:
        raise ProtocolError(f"the groups of a codec's tables do not have {K} components together")
    for name in ("mean", "scale", "steps"):
        if not bool(torch.isfinite(tables[name]).all()):
            raise ProtocolError(f"'{name}' of a codec's tables holds what is no finite number")
    return W, [int(size) for size in sizes]
