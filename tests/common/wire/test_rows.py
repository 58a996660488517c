"""Rows as bytes: how near what comes back is, and what may come at all."""

from __future__ import annotations

import math

import pytest
import torch

from sft.errors import ProtocolError, UsageError
from sft.v1 import split_training_pb2 as pb
from sft.wire.codec.elements import FLOATS, Codecs, codecs_named, codecs_of, decode_tensor, encode_tensor, encoded_size
from sft.wire.codec.rows import CODES, GROUP, NAMES, _mixed, _unmixed, name_of, rounding_of

CPU = torch.device("cpu")
PLAIN = [name_of(data_type) for data_type in CODES]
"""Those without tables; for `fitted` there is test_fitted.py."""
STEPS = {"int8": 127, "int4": 7}
WIDTHS = [1, 3, 8, 64, 65, 384]


def there_and_back(x: torch.Tensor, name: str, rounding: int | None = None) -> torch.Tensor:
    return decode_tensor(encode_tensor(x, NAMES[name], rounding), CPU)


def peaks(x_TW: torch.Tensor) -> torch.Tensor:
    """For each element, the largest magnitude of its group."""
    return torch.cat([g.abs().amax(1, keepdim=True).expand_as(g) for g in x_TW.split(GROUP, dim=1)], dim=1)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", STEPS)
def test_half_a_step_at_most(name: str, width: int) -> None:
    """Of what is mixed. A scale is at most the fourth root of two above the largest of these, of whatever size."""
    x = torch.randn(50, width) * torch.logspace(-9, 4, 50)[:, None]
    y = _mixed(x)
    step = peaks(y) * 2**0.25 / STEPS[name]
    assert ((_mixed(there_and_back(x, name)) - y).abs() <= step * 0.501).all()
    assert ((_mixed(there_and_back(x, name, 3)) - y).abs() <= step * 1.001).all()


@pytest.mark.parametrize("width", [*WIDTHS, 12, 100])
def test_mixing_is_undone(width: int) -> None:
    x = torch.randn(5, width)
    torch.testing.assert_close(_unmixed(_mixed(x)), x)
    assert _mixed(x).shape == x.shape


@pytest.mark.parametrize("name", STEPS)
def test_one_large_element_takes_little_from_the_others(name: str) -> None:
    """As some channels of a transformer are: alone, its scale would leave the others a step or two."""
    x = torch.randn(200, GROUP)
    x[:, 5] *= 30
    others = [place for place in range(GROUP) if place != 5]
    rough = (x[:, 5].abs() / STEPS[name]).square().mean() / 12  # rounded to steps of the largest
    assert (there_and_back(x, name) - x)[:, others].square().mean() < rough / 4


@pytest.mark.parametrize(
    ("name", "width", "size"), [("int8", 8, 9), ("int4", 8, 5), ("int4", 3, 3), ("int8", 130, 133)]
)
def test_bytes_of_a_row(name: str, width: int, size: int) -> None:
    message = encode_tensor(torch.randn(2, 3, width), NAMES[name])
    assert len(message.data) == 6 * size == encoded_size((2, 3, width), NAMES[name])


@pytest.mark.parametrize("name", PLAIN)
def test_a_row_does_not_depend_on_the_others(name: str) -> None:
    x = torch.randn(7, 70) * torch.logspace(-3, 3, 7)[:, None]
    apart = b"".join(encode_tensor(row[None], NAMES[name]).data for row in x)
    assert encode_tensor(x, NAMES[name]).data == apart


@pytest.mark.parametrize("name", FLOATS)
def test_what_was_read_is_written_alike(name: str) -> None:
    once = there_and_back(torch.randn(20, 65), name)
    assert torch.equal(there_and_back(once, name), once)


@pytest.mark.parametrize("name", STEPS)
def test_zeros_and_signs(name: str) -> None:
    x = torch.tensor([[0.0, 0.0, 0.0], [-1.0, 0.0, 1.0], [1e-30, -1e-30, 0.0]])
    back = there_and_back(x, name)
    assert torch.equal(back[0], x[0])
    assert torch.equal(back[1], x[1])
    assert not back[2].any(), "nothing at all, rather than something else"
    assert not there_and_back(x, name, 1)[0].any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e7, 3e38])
@pytest.mark.parametrize("name", STEPS)
def test_what_has_no_scale_is_no_number(name: str, value: float) -> None:
    """A loss that is none ends a run; one that is a little wrong would not."""
    x = torch.randn(3, 2 * GROUP)
    x[1, 5] = value
    back = there_and_back(x, name, 0)
    assert back[1, :GROUP].isnan().all()
    assert back[0].isfinite().all()
    assert back[2].isfinite().all()
    assert back[1, GROUP:].isfinite().all()


@pytest.mark.parametrize("name", STEPS)
def test_rounding_by_chance_is_right_in_the_mean(name: str) -> None:
    x = torch.linspace(-1, 1, 33).repeat(4000, 1)
    step = 1 / STEPS[name]
    mean = there_and_back(x, name, 5).mean(0)
    assert (mean - x[0]).abs().max() < 5 * step / math.sqrt(12 * 4000) * 2
    nearest = there_and_back(x, name).mean(0)
    assert (nearest - x[0]).abs().max() > step / 5, "which rounding to the nearest is not"


def test_chance_is_the_sessions() -> None:
    x = torch.randn(10, 64)
    first, again, other = (encode_tensor(x, pb.DATA_TYPE_INT8, rounding_of(7, 3, batch)).data for batch in (0, 0, 1))
    assert first == again != other


def test_chance_does_not_depend_on_what_a_script_has_made_the_default_device() -> None:
    x = torch.randn(10, 64)
    expected = encode_tensor(x, pb.DATA_TYPE_INT8, 3).data
    with torch.device("meta"):
        assert encode_tensor(x, pb.DATA_TYPE_INT8, 3).data == expected


@pytest.mark.parametrize("name", STEPS)
def test_any_bytes_are_some_numbers(name: str) -> None:
    """Who forges a code sends another activation, and nothing else."""
    code = CODES[NAMES[name]]
    rows = b"".join(bytes([byte]) * code.row_bytes(70) for byte in range(256))
    back = code.decode(rows, 256, 70, CPU)
    assert back.shape == (256, 70)
    assert back[:255].isfinite().all()
    assert back[255].isnan().all()
    assert not back[0].any()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PLAIN)
def test_a_narrow_row_takes_no_more_memory_than_its_elements(name: str, width: int) -> None:
    """Of width 1 there are 128 million int4 rows in a message: padded to a group each they would take 32 GB."""
    back = there_and_back(torch.randn(6, width), name)
    assert back.untyped_storage().nbytes() == 6 * width * 4


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("wrong", [-1, 1])
def test_bytes_too_few_or_too_many(name: str, wrong: int) -> None:
    message = encode_tensor(torch.randn(4, 8), NAMES[name])
    message.data = message.data[:wrong] if wrong < 0 else message.data + b"x"
    with pytest.raises(ProtocolError, match=r"4 rows of 8 elements: it needs \d+ bytes, \d+ came"):
        decode_tensor(message, CPU)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (1,), (2, 0)])
def test_small_shapes(name: str, shape: tuple[int, ...]) -> None:
    assert there_and_back(torch.ones(shape), name).shape == shape


def test_names() -> None:
    assert list(NAMES) == ["float32", "bfloat16", "float16", "int8", "int4", "fitted"]
    assert name_of(pb.DATA_TYPE_INT4) == "int4"
    assert name_of(99) == "99"  # type: ignore[arg-type]  # as the wire may have it


def test_codecs_of_a_session() -> None:
    f32, f16, int8, int4 = (NAMES[name] for name in ("float32", "float16", "int8", "int4"))
    assert codecs_of(pb.OpenSessionRequest(wire_data_type=f16)) == Codecs(f16, f16, f16)
    both = pb.OpenSessionRequest(wire_data_type=f32, activation_codec=int4, gradient_codec=int8)
    assert codecs_of(both) == Codecs(int4, int8, f32)
    assert codecs_named("float32", "int4", "int8") == Codecs(int4, int8, f32)
    assert codecs_named("float16", "int8") == Codecs(int8, int8, f16)
    assert codecs_named("float16") == Codecs(f16, f16, f16)
    for request, says in (
        (pb.OpenSessionRequest(wire_data_type=int8), "unknown wire_data_type 4"),
        (pb.OpenSessionRequest(wire_data_type=f32, activation_codec=99), "unknown activation_codec 99"),
        (pb.OpenSessionRequest(wire_data_type=f32, gradient_codec=99), "unknown gradient_codec 99"),
    ):
        with pytest.raises(ProtocolError, match=says):
            codecs_of(request)
    with pytest.raises(UsageError, match="wire_dtype must be one of float32, bfloat16, float16, not 'int8'"):
        codecs_named("int8")
    with pytest.raises(UsageError, match=r"gradient_codec must be one of float32, .*int4, not 'int2'"):
        codecs_named("float32", "int8", "int2")
