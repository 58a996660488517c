"""Activations by number: what a message is made whole with, what of it is kept, and numbers that make no sense."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.kept_rows import damage

import sft_cloud.session.kept
from sft.errors import ProtocolError
from sft.v1 import split_training_pb2 as pb
from sft.wire.codec.elements import encode_tensor
from sft.wire.protocol import MAX_PADDED_TOKENS
from sft_cloud.errors import PreconditionError
from sft_cloud.identity import ANONYMOUS
from sft_cloud.memory import Kind, MemoryBudget
from sft_cloud.session import check_keeps, keep, made_whole
from sft_cloud.storage import KeptRows, KeptStore

LENGTHS = (7, 3, 5)
a_TR = torch.arange(15.0 * 4).reshape(15, 4)
PARTS = dict(zip((1, 2, 3), a_TR.split(LENGTHS)))
"""Rows by number, once all are kept."""


@pytest.fixture
def kept(tmp_path: Path) -> KeptRows:
    """Of nothing yet."""
    rows = KeptStore(tmp_path, 1 << 30).open(ANONYMOUS, b"k" * 32)
    assert rows is not None
    return rows


def message(
    rows: torch.Tensor = a_TR, keep: tuple[int, ...] = (), kept: tuple[int, ...] = (), lengths=LENGTHS, **fields: object
) -> pb.EdgeMessage:
    activation = pb.Activation(packed=encode_tensor(rows), lengths=lengths, padded_length=8, keep=keep, kept=kept)
    for name, value in fields.items():
        setattr(activation, name, value)
    return pb.EdgeMessage(step=3, micro_batch=1, forward=pb.Forward(activation=activation, loss_scale=0.5))


def applied(kept: KeptRows, given: pb.EdgeMessage, budget: MemoryBudget | None = None) -> tuple[pb.EdgeMessage, str]:
    """As an engine does."""
    assert check_keeps(given, kept)
    with made_whole(given, kept, budget or MemoryBudget(), ANONYMOUS) as result:
        pass
    keep(given, kept)
    return result


NOTHING = a_TR[:0]


def test_more_than_a_message_may_have(kept: KeptRows, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not read: each sequence was small enough."""
    applied(kept, message(keep=(1, 2, 3)))
    monkeypatch.setattr(sft_cloud.session.kept, "MAX_MESSAGE_BYTES", 15 * 4 * 4)
    applied(kept, message(NOTHING, kept=(1, 2, 3)))
    monkeypatch.setattr(KeptRows, "read", None)
    for some in (
        message(NOTHING, kept=(1, 1, 2), lengths=(7, 7, 3)),
        message(a_TR[:8], kept=(1, 1, 0), lengths=(7, 7, 8)),
    ):
        with pytest.raises(ProtocolError, match=r"the activation would have \d+ bytes, where 240 are the most"):
            applied(kept, some)


def test_what_is_kept_makes_others_whole(kept: KeptRows) -> None:
    given = message(keep=(1, 2, 3))
    assert applied(kept, given) == (given, "")
    assert kept.count == 3
    for numbers in ((3, 1, 2), (2, 2, 2)):
        lengths = [LENGTHS[number - 1] for number in numbers]
        whole, lacks = applied(kept, message(NOTHING, kept=numbers, lengths=lengths))
        assert not lacks
        expected = message(torch.cat([PARTS[number] for number in numbers]), kept=numbers, lengths=lengths)
        assert whole == expected


def test_some_of_a_batch(kept: KeptRows) -> None:
    """Rows of those that are not kept stand where they belong, and only those with a number are kept."""
    whole, _ = applied(kept, message(keep=(1, 0, 2)))
    assert whole == message(keep=(1, 0, 2))
    assert [kept.rows_bytes(number) for number in (1, 2)] == [16 * 7, 16 * 5]
    mixed = message(torch.cat([PARTS[2], -PARTS[2]]), kept=(0, 2, 0), keep=(3, 0, 0), lengths=(3, 5, 3))
    whole, _ = applied(kept, mixed)
    assert whole.forward.activation.packed == encode_tensor(torch.cat([PARTS[2], PARTS[3], -PARTS[2]]))
    assert kept.read(3) == encode_tensor(PARTS[2]).data
    assert mixed.forward.activation.packed.shape == [6, 4]  # what came is as it was


def test_an_evaluation_likewise(kept: KeptRows) -> None:
    applied(kept, message(keep=(1, 2, 3)))
    given = pb.EdgeMessage(evaluate=pb.Evaluate(activation=message(NOTHING, kept=(1, 2, 3)).forward.activation))
    whole, _ = applied(kept, given)
    assert whole.evaluate.activation.packed == encode_tensor(a_TR)


def test_messages_that_have_nothing_to_do_with_it(kept: KeptRows) -> None:
    for given in (message(), pb.EdgeMessage(), pb.EdgeMessage(backward=pb.Backward())):
        assert not check_keeps(given, kept)
        assert not check_keeps(given, None)
    with pytest.raises(PreconditionError, match="keeps no activations"):
        check_keeps(message(keep=(1, 2, 3)), None)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (message(keep=(4, 5)), "2 numbers of kept sequences came, for 3"),
        (message(NOTHING, kept=(1, 2, 3, 1)), "4 numbers of kept sequences came, for 3"),
        (message(keep=(1,), lengths=()), "1 numbers of kept sequences came, for 0"),
        (message(keep=(5, 6, 7)), "came to be kept as 5, but 4 is next"),
        (message(keep=(4, 6, 7)), "came to be kept as 6, but 5 is next"),
        (message(keep=(3, 4, 5)), "came to be kept as 3, but 4 is next"),
        (message(keep=(4, 4, 5)), "came to be kept as 4, but 5 is next"),
        (message(NOTHING, kept=(1, 2, 4)), "sequence 4 is not kept; 3 are"),
        (message(NOTHING, kept=(1, 2, 2**32 - 1)), "sequence 4294967295 is not kept"),
        (message(a_TR[:5], kept=(1, 2, 0), keep=(0, 4, 5)), "sequence 2 is kept, and cannot be kept again"),
        (message(kept=(1, 2, 3)), r"has shape \[15, 4\], and 0 rows should be in it"),
        (message(a_TR[:3], kept=(1, 0, 0)), r"has shape \[3, 4\], and 8 rows"),
        (message(a_TR.reshape(-1), keep=(4, 5, 6)), r"has shape \[60\], and 15 rows"),
        (message(NOTHING, kept=(1, 2, 3), lengths=(7, 3, 6)), "sequence 3 was kept with other rows than those of 6"),
        (message(torch.zeros(0, 8), kept=(1, 2, 3)), r"sequence \d was kept with other rows than those of \d tokens"),
        (message(torch.zeros(0, 0), kept=(1, 2, 3)), r"has shape \[0, 0\], and 0 rows should be in it"),
        (message(torch.zeros(5, 0), kept=(1, 2, 0)), r"has shape \[5, 0\], and 5 rows should be in it"),
        (message(NOTHING, kept=(1, 2, 3), lengths=(7, 3, 9)), "lengths must be from 1 to the padded length 8"),
        (message(NOTHING, kept=(1, 2, 0), lengths=(7, 3, 0)), "lengths must be from 1"),
        (message(NOTHING, kept=(1,), lengths=()), "1 numbers of kept sequences came, for 0 sequences"),
        (message(NOTHING, kept=(1, 2, 3), padded_length=MAX_PADDED_TOKENS), "a batch of 3 sequences is too large"),
        (message(NOTHING, kept=(1,) * 4096, lengths=(7,) * 4096, padded_length=65), "a batch of 4096 sequences is too"),
        (message(NOTHING, kept=(1,) * 4097, lengths=(7,) * 4097), "4097 numbers of kept sequences came; at most 4096"),
        (message(keep=(4, 5, 6), lengths=(8, 7, 0)), "lengths must be from 1"),
        (message(torch.zeros(15, 0), keep=(4, 5, 6)), r"has shape \[15, 0\], and 15 rows should be in it"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_numbers_that_make_no_sense(kept: KeptRows, given: pb.EdgeMessage, told: str) -> None:
    applied(kept, message(keep=(1, 2, 3)))
    with pytest.raises(ProtocolError, match=told):
        applied(kept, given)
    assert kept.count == 3
    assert applied(kept, message(NOTHING, kept=(1, 2, 3)))[0].forward.activation.packed == encode_tensor(a_TR)


def test_a_tensor_that_is_none(kept: KeptRows) -> None:
    given = message(keep=(1, 2, 3))
    given.forward.activation.packed.data += b"x"
    with pytest.raises(ProtocolError, match="needs 240 bytes, 241 came"):
        check_keeps(given, kept)


def test_when_it_is_full_nothing_of_what_is_on_its_way_counts(tmp_path: Path) -> None:
    """The edge may have sent ahead, with numbers that it takes for kept."""
    rows = KeptStore(tmp_path, 400).open(ANONYMOUS, b"k" * 32)
    assert rows is not None
    applied(rows, message(keep=(1, 2, 3)))
    assert (rows.count, rows.is_full) == (3, False)
    applied(rows, message(keep=(4, 5, 6)))
    assert (rows.count, rows.is_full) == (3, True)
    applied(rows, message(keep=(7, 0, 8)))
    ahead = message(a_TR[:3], keep=(0, 9, 0), kept=(4, 0, 6))
    whole, lacks = applied(rows, ahead)
    assert lacks == "the cloud has no room for more activations: sequence 4 was not kept"
    assert whole == ahead
    assert rows.count == 3
    assert applied(rows, message(NOTHING, kept=(1, 2, 3)))[1] == ""


def test_what_is_looked_up_is_charged_as_if_it_had_come(kept: KeptRows, monkeypatch: pytest.MonkeyPatch) -> None:
    applied(kept, message(keep=(1, 2, 3)))
    budget = MemoryBudget(10_000)
    lookup = message(NOTHING, kept=(1, 2, 3))
    with made_whole(lookup, kept, budget, ANONYMOUS):
        assert budget.held()[Kind.MESSAGES] == 2 * 240
    with made_whole(message(keep=(4, 5, 6)), kept, budget, ANONYMOUS):
        assert budget.held_bytes == 0
    assert budget.held_bytes == 0
    monkeypatch.setattr("sft_cloud.session.kept._WAIT_SECONDS", 0.0)
    _, lacks = applied(kept, lookup, MemoryBudget(100))
    assert lacks.startswith("this message would take 480 B")


def test_after_damage_a_message_finds_no_more(kept: KeptRows) -> None:
    """What is held then is before all of it that is damaged, in whatever order its numbers are."""
    applied(kept, message(torch.cat([a_TR, a_TR]), keep=(1, 2, 3, 4, 5, 6), lengths=LENGTHS * 2))
    for number in (3, 5):
        damage(kept, number)
    lookup = message(NOTHING, kept=(5, 3, 1), lengths=(3, 5, 7))
    assert applied(kept, lookup)[1] == "the cloud's disk does not give back the activations that were kept"
    assert kept.count == 2
    assert applied(kept, message(NOTHING, kept=(1, 2), lengths=LENGTHS[:2]))[1] == ""
