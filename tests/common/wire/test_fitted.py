"""The code that is fitted to data: what its tables may be, and what they say."""

from __future__ import annotations

import math

import pytest
import torch
from support.tables import made_up_tables

from sft.errors import ProtocolError, UsageError
from sft.tensors.stream import in_memory, safetensors_size
from sft.v1 import split_training_pb2 as pb
from sft.wire.codec.elements import IN_FULL, Codecs, codecs_named, codecs_of, decode_tensor, encode_tensor, encoded_size
from sft.wire.codec.fitted import BLOCK, NO_NUMBER, Fitted, most_bytes
from sft.wire.codec.rows import CODES

CPU = torch.device("cpu")
W, G = 10, 3
CODE = Fitted(made_up_tables(W, G), CPU)
CODECS = codecs_named("float32", "fitted").with_tables(made_up_tables(W, G), CPU)


def rows_of(count: int) -> torch.Tensor:
    """Bytes that say a number each."""
    return torch.randint(NO_NUMBER, (count, G + 1), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def test_what_is_read_is_what_the_wire_says() -> None:
    """The sentence in the .proto, element by element."""
    tables = {name: x.double() for name, x in made_up_tables(W, G).items()}
    for name, steps in zip(("basis", "whole", "words"), tables["steps"]):
        tables[name] = tables[name] * steps
    rows = rows_of(4)
    group_of = [group for group, size in enumerate(tables["sizes"].tolist()) for _ in range(int(size))]
    for row, read in zip(rows.tolist(), CODE.decode(rows, W)):
        c, *others = row
        z = torch.stack(
            [
                tables["whole"][c][k] + tables["scale"][c] * tables["words"][others[group_of[k]]][k]
                for k in range(len(group_of))
            ]
        )
        torch.testing.assert_close(read.double(), tables["mean"] + tables["basis"] @ z, rtol=1e-5, atol=1e-3)


def test_what_was_read_is_written_alike() -> None:
    rows = rows_of(2 * BLOCK + 7)
    assert torch.equal(CODE.encode(CODE.decode(rows, W)), rows)


def test_the_nearest_word() -> None:
    rows = rows_of(50)
    x = CODE.decode(rows, W)
    near = x + 1e-3 * torch.randn(x.shape)
    assert torch.equal(CODE.encode(near), rows)


def test_a_row_does_not_depend_on_the_others() -> None:
    """But where it is as near to one word as to another: here it is near to one."""
    x = CODE.decode(rows_of(BLOCK + 20), W)
    apart = torch.cat([CODE.encode(row[None]) for row in x])
    assert torch.equal(CODE.encode(x), apart)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 7e4, -3e38])
def test_what_float16_does_not_hold_is_no_number(value: float) -> None:
    """A loss that is none ends a run; one that is a little wrong would not."""
    rows = rows_of(3)
    x = CODE.decode(rows, W)
    x[1, 4] = value
    back = CODE.decode(CODE.encode(x), W)
    assert back[1].isnan().all()
    assert torch.equal(CODE.encode(x)[[0, 2]], rows[[0, 2]])
    x[1, 4] = 65504.0
    assert CODE.decode(CODE.encode(x), W).isfinite().all()


def test_any_bytes_are_some_numbers() -> None:
    """Who forges a code sends another activation, and nothing else."""
    rows = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, G + 1)
    back = CODE.decode(rows, W)
    assert back[:NO_NUMBER].isfinite().all()
    assert back[NO_NUMBER].isnan().all()


def test_a_tensor_of_any_shape() -> None:
    for shape in ((2, 3, W), (0, W), (W,)):
        message = encode_tensor(torch.ones(shape), pb.DATA_TYPE_FITTED, codes=CODECS.codes)
        assert len(message.data) == encoded_size(shape, pb.DATA_TYPE_FITTED, CODECS.codes)
        assert decode_tensor(message, CPU, CODECS.codes).shape == shape
    message = encode_tensor(torch.ones(2, W), pb.DATA_TYPE_FITTED, codes=CODECS.codes)
    message.data += b"x"
    with pytest.raises(ProtocolError, match=r"tensor of shape \[2, 10\] needs 8 bytes, 9 came"):
        decode_tensor(message, CPU, CODECS.codes)


def test_rows_of_another_width() -> None:
    message = pb.Tensor(data_type=pb.DATA_TYPE_FITTED, shape=[1, W + 1], data=bytes(G + 1))
    with pytest.raises(ProtocolError, match="rows of 11 elements came, and the codec's tables are for 10"):
        decode_tensor(message, CPU, CODECS.codes)


def test_without_tables_it_is_unknown() -> None:
    with pytest.raises(ProtocolError, match="tensor of unknown element type 6"):
        decode_tensor(pb.Tensor(data_type=pb.DATA_TYPE_FITTED, shape=[1, W], data=bytes(G + 1)), CPU)


BAD = {
    "none": (lambda t: t.clear(), "are basis, whole, words, steps, mean, scale, sizes, not "),
    "one too few": (lambda t: t.pop("mean"), "are basis, .* not basis, whole, words, scale, steps, sizes$"),
    "one too many": (lambda t: t.update(more=torch.zeros(1)), "are basis, .*more"),
    "of another type": (lambda t: t.update(mean=t["mean"].float()), "'mean' .* is torch.float32, not torch.float16"),
    "words of another type": (
        lambda t: t.update(words=t["words"].half()),
        "'words' .* is torch.float16, not torch.int8",
    ),
    "sizes of another type": (lambda t: t.update(sizes=t["sizes"].long()), "'sizes' .* is torch.int64"),
    "a flat basis": (lambda t: t.update(basis=t["basis"][0]), r"'basis' .* has shape \[10\]"),
    "no components": (lambda t: t.update(basis=t["basis"][:, :0]), r"'basis' .* has shape \[10, 0\]"),
    "more components than elements": (lambda t: t.update(basis=t["basis"][:9]), r"'basis' .* has shape \[9, 10\]"),
    "another mean": (lambda t: t.update(mean=t["mean"][:-1]), r"'mean' .* has shape \[9\], not \[10\]"),
    "fewer words": (lambda t: t.update(words=t["words"][:255]), r"'words' .* has shape \[255, 10\], not \[256, 10\]"),
    "narrow words": (lambda t: t.update(whole=t["whole"][:, 1:]), r"'whole' .* has shape \[256, 9\]"),
    "fewer scales": (lambda t: t.update(scale=t["scale"][:1]), r"'scale' .* has shape \[1\], not \[256\]"),
    "fewer steps": (lambda t: t.update(steps=t["steps"][:2]), r"'steps' .* has shape \[2, 10\], not \[3, 10\]"),
    "no groups": (lambda t: t.update(sizes=t["sizes"][:0]), "the groups .* do not have 10 components"),
    "an empty group": (lambda t: t.update(sizes=torch.tensor([10, 0]).int()), "the groups .* do not have 10"),
    "a negative group": (lambda t: t.update(sizes=torch.tensor([11, -1]).int()), "the groups .* do not have 10"),
    "groups of more": (lambda t: t.update(sizes=torch.tensor([9, 2]).int()), "the groups .* do not have 10"),
    "square sizes": (lambda t: t.update(sizes=t["sizes"][:, None]), "the groups .* do not have 10"),
    "NaN": (lambda t: t["steps"].fill_(math.nan), "'steps' .* no finite number"),
    "infinity": (lambda t: t["scale"][3:].fill_(math.inf), "'scale' .* no finite number"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_tables(kind: str) -> None:
    tables = made_up_tables(W, G)
    change, says = BAD[kind]
    change(tables)
    with pytest.raises(ProtocolError, match=says):
        Fitted(tables, CPU)


@pytest.mark.parametrize("width", [1, 10, 384])
def test_how_large_a_file_of_tables_is(width: int) -> None:
    tables = made_up_tables(width, max(1, width // 7))
    assert safetensors_size(in_memory(tables)) <= most_bytes(width)


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
