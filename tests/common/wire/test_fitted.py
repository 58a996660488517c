"""The code that is fitted to data: what its tables may be, and what they say."""

from __future__ import annotations

import math
from typing import Dict, List

import numpy as np
import pytest
import torch
from support.tables import REACH, made_up_tables, of_slots
from torch import Tensor

from sft.errors import ProtocolError, UsageError
from sft.tensors.stream import in_memory, safetensors_size
from sft.v1 import split_training_pb2 as pb
from sft.wire.codec.elements import IN_FULL, Codecs, codecs_named, codecs_of, decode_tensor, encode_tensor, encoded_size
from sft.wire.codec.fitted import BLOCK, Fitted, Nearest, most_bytes
from sft.wire.codec.rows import CODES
from sft.wire.protocol import MAX_PADDED_TOKENS

CPU = torch.device("cpu")
W = 10
CODE = Fitted(made_up_tables(W), CPU)
CODECS = codecs_named("float32", "fitted").with_tables(made_up_tables(W), CPU)
NO_NUMBER = bytes(5)


def rows_of(count: int, tables: Dict[str, Tensor]) -> Tensor:
    """That the tables have words and points for."""
    generator = torch.Generator().manual_seed(1)
    width, reach = tables["basis"].shape[1], tables["points"].shape[1] // 2 - 1
    word_T = torch.randint(len(tables["step"]), (count,), generator=generator)
    q_TK = torch.randint(-reach, reach + 1, (count, width), generator=generator)
    points_TK = q_TK + 0.125 * q_TK.sign()
    z_TK = tables["whole"][word_T] * tables["whole_steps"].float() + tables["step"].float()[word_T][:, None] * points_TK
    return tables["mean"].float() + z_TK @ (tables["basis"] * tables["basis_steps"].float()).T


def parts_of(data: bytes, code: Fitted, rows: int) -> List[bytes]:
    ends = [0, *code.ends(data, rows, code.width)]
    return [data[begin:end] for begin, end in zip(ends, ends[1:])]


def read(data: bytes, code: Fitted = CODE, rows: int = 1) -> Tensor:
    return code.decode(data, rows, code.width, CPU)


def by_the_book(row: bytes, tables: Dict[str, Tensor]) -> Tensor:
    """The sentences in the .proto, a row and a number at a time."""
    n, at = row[0], 1
    if n >= 128:
        n, at = (n - 128) * 256 + row[1], 2
    state = int.from_bytes(row[at : at + 4], "little")
    words = [int.from_bytes(row[i : i + 2], "little") for i in range(at + 4, at + 4 + 2 * n, 2)]
    assert len(row) == at + 4 + 2 * n

    def taken(frequencies: List[int]) -> int:
        nonlocal state
        slot = state % 4096
        symbol = next(s for s in range(len(frequencies)) if slot < sum(frequencies[: s + 1]))
        f, before = frequencies[symbol], sum(frequencies[:symbol])
        state = f * (state // 4096) + slot - before
        if state < 65536 and words:
            state = state * 65536 + words.pop(0)
        return symbol

    c = taken(tables["word_frequencies"].tolist())
    z = []
    for k in range(tables["basis"].shape[1]):
        kind = int(tables["kind"][int(tables["class"][c]), k])
        point = tables["points"][kind, taken(tables["frequencies"][kind].tolist())].double()
        z.append(
            tables["whole"][c, k].double() * tables["whole_steps"][k].double() + tables["step"][c].double() * point
        )
    assert (state, words) == (1, [])
    basis = tables["basis"].double() * tables["basis_steps"].double()
    return tables["mean"].double() + basis @ torch.stack(z)


@pytest.mark.parametrize(("width", "reach"), [(W, REACH), (500, 127)])
def test_what_is_read_is_what_the_wire_says(width: int, reach: int) -> None:
    """Rows of more than 127 words of two bytes among them."""
    tables = made_up_tables(width, reach=reach)
    code, x = Fitted(tables, CPU), rows_of(4, tables)
    data = code.encode(x)
    for row, back in zip(parts_of(data, code, 4), read(data, code, 4)):
        assert (len(row) > 5 + 2 * 127) is (width == 500)
        torch.testing.assert_close(back.double(), by_the_book(row, tables), rtol=1e-4, atol=1e-2)


def test_what_was_read_is_written_alike() -> None:
    x = rows_of(2 * BLOCK + 7, CODE.tables)
    data = CODE.encode(x)
    back = read(data, rows=len(x))
    torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-2)
    assert CODE.encode(back) == data
    assert CODE.encode(x + 1e-3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))) == data


def test_the_nearest_word() -> None:
    """Of as many as there may be, but for those that are about as near."""
    generator = torch.Generator().manual_seed(4)
    words_NK = torch.randn(1024, 300, generator=generator) * torch.logspace(1, -3, 300)
    x_TK = torch.randn(2 * BLOCK + 3, 300, generator=generator) * torch.logspace(1, -3, 300)
    apart_TN = torch.cdist(x_TK, words_NK)
    found_T = Nearest(words_NK)(x_TK)
    torch.testing.assert_close(apart_TN.gather(1, found_T[:, None])[:, 0], apart_TN.amin(dim=1), rtol=1e-3, atol=0.0)
    assert (found_T == apart_TN.argmin(dim=1)).float().mean() > 0.98


def test_a_row_does_not_depend_on_the_others() -> None:
    """But where it is as near to one word as to another: here it is near to one."""
    x = rows_of(BLOCK + 20, CODE.tables)
    assert CODE.encode(x) == b"".join(CODE.encode(row[None]) for row in x)


def test_what_comes_often_takes_fewer_bytes() -> None:
    tables = made_up_tables(200)
    tables["kind"].fill_(1)
    code = Fitted(tables, CPU)
    z_TK = (tables["whole"][0] * tables["whole_steps"].float()).repeat(2, 1)
    z_TK[1] += 3.125 * tables["step"][0].float()
    x = tables["mean"].float() + z_TK @ (tables["basis"] * tables["basis_steps"].float()).T
    often, seldom = (len(part) for part in parts_of(code.encode(x), code, 2))
    assert often < 200 * 2 / 8 < 200 * 4 / 8 < seldom


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 7e4, -3e38])
def test_what_float16_does_not_hold_is_no_number(value: float) -> None:
    """A loss that is none ends a run; one that is a little wrong would not."""
    x = rows_of(3, CODE.tables)
    first, _, last = parts_of(CODE.encode(x), CODE, 3)
    x[1, 4] = value
    assert parts_of(CODE.encode(x), CODE, 3) == [first, NO_NUMBER, last]
    back = read(CODE.encode(x), rows=3)
    assert back[1].isnan().all()
    assert back[[0, 2]].isfinite().all()


def test_what_is_farther_than_numbers_reach() -> None:
    """It comes out as far as they do, in the same direction."""
    x = rows_of(1, CODE.tables)
    x[0, 4] = 65504.0
    back = read(CODE.encode(x))
    assert back.isfinite().all()
    assert back[0, 4] > 0


def test_rows_that_the_tables_did_not_write() -> None:
    """Refused, or numbers all the same: who forges a code sends another activation, and nothing else."""
    data, refused = bytearray(CODE.encode(rows_of(1, CODE.tables))), 0
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        try:
            assert read(bytes(data)).isfinite().all()
        except ProtocolError:
            refused += 1
        data[bit // 8] ^= 1 << bit % 8
    assert refused > 7 * len(data)
    assert read(NO_NUMBER).isnan().all()
    for row in (b"\x01" + bytes([255] * 6), b"\x01" + bytes(6), b"\x80\x01" + bytes(6)):
        with pytest.raises(ProtocolError, match="a row came that was not written with the codec's tables"):
            read(row)


def test_rows_of_any_bytes() -> None:
    draw = np.random.default_rng(1)
    for _ in range(100):
        count = int(draw.integers(1, W + 2))
        row = bytes([count]) + draw.bytes(4 + 2 * count)
        assert len(CODE.ends(row, 1, W)) == 1
        with pytest.raises(ProtocolError, match="was not written with the codec's tables"):
            read(row)


def test_a_block_without_numbers() -> None:
    assert CODE.encode(torch.full((3, W), math.nan)) == NO_NUMBER * 3
    assert read(NO_NUMBER * 3, rows=3).isnan().all()


def test_fewer_components_than_elements() -> None:
    tables = made_up_tables(W)
    cut_down(K=4)(tables)
    code, x = Fitted(tables, CPU), rows_of(20, tables)
    torch.testing.assert_close(read(code.encode(x), code, 20), x, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    ("data", "rows"),
    [(b"", 1), (b"\0", 1), (b"\0" * 4, 1), (b"\0" * 6, 1), (b"\0" * 10, 1), (b"\0" * 5, 2), (b"\x80", 1)]
    + [(b"\x01" + b"\0" * 5, 1), (b"\x80\x01" + b"\0" * 5, 1), (b"\xff\xff" + b"\0" * 100, 1), (b"\0" * 5, 0)]
    + [(bytes([W + 2]) + bytes(4 + 2 * (W + 2)), 1), (bytes([255, 255]) + bytes(4 + 2 * 32767), 1)],
)
def test_rows_that_are_cut_off_or_too_many(data: bytes, rows: int) -> None:
    with pytest.raises(ProtocolError, match=rf"{len(data)} bytes came, which are not {rows} rows in the codec fitted"):
        CODE.ends(data, rows, W)


def test_more_rows_than_a_message_may_have_are_not_looked_at() -> None:
    class Seen(bytes):
        def __getitem__(self, index):
            raise AssertionError("it is looked at")

    for rows in (MAX_PADDED_TOKENS + 1, 1 << 60):
        with pytest.raises(ProtocolError, match=f"which are not {rows} rows"):
            CODE.ends(Seen(5 * (MAX_PADDED_TOKENS + 1)), rows, W)


def test_a_tensor_of_any_shape() -> None:
    for shape in ((2, 3, W), (0, W), (W,)):
        message = encode_tensor(torch.ones(shape), pb.DATA_TYPE_FITTED, codes=CODECS.codes)
        assert len(message.data) >= encoded_size(shape, pb.DATA_TYPE_FITTED, CODECS.codes)
        assert decode_tensor(message, CPU, CODECS.codes).shape == shape
    message = encode_tensor(torch.ones(2, W), pb.DATA_TYPE_FITTED, codes=CODECS.codes)
    message.data += b"x"
    with pytest.raises(ProtocolError, match="which are not 2 rows in the codec fitted"):
        decode_tensor(message, CPU, CODECS.codes)


def test_rows_of_another_width() -> None:
    message = pb.Tensor(data_type=pb.DATA_TYPE_FITTED, shape=[1, W + 1], data=bytes(5))
    with pytest.raises(ProtocolError, match="rows of 11 elements came, and the codec's tables are for 10"):
        decode_tensor(message, CPU, CODECS.codes)
    with pytest.raises(ProtocolError, match="rows of 11 elements came"):
        encode_tensor(torch.ones(1, W + 1), pb.DATA_TYPE_FITTED, codes=CODECS.codes)


def test_without_tables_it_is_unknown() -> None:
    with pytest.raises(ProtocolError, match="tensor of unknown element type 6"):
        decode_tensor(pb.Tensor(data_type=pb.DATA_TYPE_FITTED, shape=[1, W], data=bytes(5)), CPU)


def cut_down(**to: int):
    """So many of what a letter stands for: all that have it along a side."""
    sides = {"basis": "WK", "whole": "NK", "basis_steps": "K", "whole_steps": "K", "mean": "W", "step": "N"}
    sides.update({"points": "DS", "class": "N", "kind": "CK", "word_frequencies": "N", "frequencies": "DS"})

    def change(tables: Dict[str, Tensor]) -> None:
        for name, letters in sides.items():
            for side, letter in enumerate(letters):
                if letter in to:
                    repeated = torch.arange(to[letter]) % tables[name].shape[side]
                    tables[name] = tables[name].index_select(side, repeated).contiguous()

    return change


BAD = {
    "none": (lambda t: t.clear(), "are basis, whole, .*, frequencies, not "),
    "one too few": (lambda t: t.pop("mean"), "are basis, .* not basis, whole, basis_steps, whole_steps, step, points"),
    "one too many": (lambda t: t.update(more=torch.zeros(1)), "are basis, .*more"),
    "of another type": (lambda t: t.update(mean=t["mean"].float()), "'mean' .* is torch.float32, not torch.float16"),
    "words of another type": (lambda t: t.update(whole=t["whole"].half()), "'whole' .*float16, not torch.int8"),
    "frequencies of another type": (lambda t: t.update(frequencies=t["frequencies"].long()), "'frequencies' .*int64"),
    "a flat basis": (lambda t: t.update(basis=t["basis"][0]), r"'basis' .* has shape \[10\]"),
    "a flat kind": (lambda t: t.update(kind=t["kind"][0]), r"'kind' .* has shape \[10\]"),
    "no components": (cut_down(K=0), "have 0 components; from 1 to 10 are"),
    "more components than elements": (lambda t: t.update(basis=t["basis"][:9]), "have 10 components; from 1 to 9 are"),
    "no words": (cut_down(N=0), "have 0 words; from 1 to 1024 are"),
    "too many words": (cut_down(N=1025), "have 1025 words"),
    "no classes": (cut_down(C=0), "have 0 classes"),
    "too many classes": (cut_down(C=17), "have 17 classes; from 1 to 16 are"),
    "no kinds": (cut_down(D=0), "have 0 kinds"),
    "too many kinds": (cut_down(D=65), "have 65 kinds; from 1 to 64 are"),
    "too many symbols": (cut_down(S=257), "have 257 symbols; an odd number up to 255 is"),
    "an even number of symbols": (cut_down(S=8), "have 8 symbols; an odd number"),
    "another mean": (lambda t: t.update(mean=t["mean"][:-1]), r"'mean' .* has shape \[9\], not \[10\]"),
    "narrow words": (lambda t: t.update(whole=t["whole"][:, 1:]), r"'whole' .* has shape \[40, 9\]"),
    "fewer steps": (lambda t: t.update(step=t["step"][:1]), r"'step' .* has shape \[1\], not \[40\]"),
    "NaN": (lambda t: t["basis_steps"].fill_(math.nan), "'basis_steps' .* no finite number"),
    "infinity": (lambda t: t["points"][2:].fill_(math.inf), "'points' .* no finite number"),
    "no step": (lambda t: t["step"][3:].fill_(0.0), "'step' .* has to be above zero"),
    "a class that is none": (lambda t: t["class"][-1:].fill_(2), "'class' .* must be below 2"),
    "a kind that is none": (lambda t: t["kind"][1, 3:].fill_(3), "'kind' .* must be below 3"),
    "too often": (lambda t: t["frequencies"][1, 4].add_(1), "'frequencies' .* 4096 together"),
    "a negative frequency": (
        lambda t: t["frequencies"][1].copy_(of_slots(torch.ones(9)) * -1),
        "'frequencies' .* from 0",
    ),
    "a sum that overflows": (lambda t: t["frequencies"][0].fill_(2**31 - 1), "'frequencies' .* 4096 together"),
    "a word that never comes": (lambda t: t["word_frequencies"][:1].fill_(0), "'word_frequencies' .* from 1 on"),
    "a gap": (
        lambda t: t["frequencies"][0].copy_(torch.tensor([1, 0, 1, 1, 4090, 1, 1, 0, 1])),
        "'frequencies' .* gap",
    ),
    "never 0": (lambda t: t["frequencies"][0].copy_(torch.tensor([4096, *[0] * 8])), "'frequencies' .* gap"),
    "farther up than down": (
        lambda t: t["frequencies"][0].copy_(torch.tensor([0, 1, 1, 1, 4089, 1, 1, 1, 1])),
        "'frequencies' .* gap",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_tables(kind: str) -> None:
    tables = made_up_tables(W)
    change, says = BAD[kind]
    change(tables)
    with pytest.raises(ProtocolError, match=says):
        Fitted(tables, CPU)


@pytest.mark.parametrize("width", [1, 10, 384])
def test_how_large_a_file_of_tables_is(width: int) -> None:
    tables = made_up_tables(width)
    assert safetensors_size(in_memory(tables)) <= most_bytes(width)
    cut_down(N=1024, C=16, D=64, S=255)(tables)
    assert 0.8 * most_bytes(width) - 4096 < safetensors_size(in_memory(tables)) <= most_bytes(width)


def test_codecs_of_a_session() -> None:
    f32, fitted = pb.DATA_TYPE_FLOAT32, pb.DATA_TYPE_FITTED
    named = codecs_named("float32", "fitted")
    assert named == Codecs(fitted, f32, f32, CODES)
    assert named.needs_tables
    assert not named.tables
    assert not CODECS.needs_tables
    assert CODECS.tables.keys() == made_up_tables(W).keys()
    assert not IN_FULL.needs_tables
    request = pb.OpenSessionRequest(wire_data_type=f32, activation_codec=fitted, codec_tables_sha256="0" * 64)
    assert codecs_of(request) == named
    for wrong in (
        pb.OpenSessionRequest(wire_data_type=f32, activation_codec=fitted),
        pb.OpenSessionRequest(wire_data_type=f32, codec_tables_sha256="0" * 64),
    ):
        with pytest.raises(ProtocolError, match="codec_tables_sha256 must name a blob for the codec fitted, and be"):
            codecs_of(wrong)
    with pytest.raises(ProtocolError, match="unknown gradient_codec 6"):
        codecs_of(pb.OpenSessionRequest(wire_data_type=f32, gradient_codec=fitted))
    with pytest.raises(UsageError, match=r"gradient_codec must be one of float32, .*int4, not 'fitted'"):
        codecs_named("float32", "int8", "fitted")
