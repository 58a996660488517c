"""Activations by number: a message's made whole with the rows that the session keeps, and the message's own kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from sft.errors import ProtocolError, StorageError
from sft.v1 import split_training_pb2 as pb
from sft.wire.codec.elements import check_tensor, row_ends, shown
from sft.wire.codec.rows import CODES, Codes
from sft.wire.protocol import MAX_KEPT_SEQUENCES, MAX_MESSAGE_BYTES, MAX_PADDED_TOKENS
from sft_cloud.errors import NoMemoryError, PreconditionError
from sft_cloud.identity import Identity
from sft_cloud.memory import Kind, MemoryBudget
from sft_cloud.storage import KeptRows

_COPIES = 2
"""Of the rows that are looked up: by themselves, and joined; then joined, and in the message."""

_WAIT_SECONDS = 10.0
"""How long one waits for the memory, before the step is begun anew."""


def activation_of(message: pb.EdgeMessage) -> pb.Activation | None:
    """Of a message that has one."""
    body = message.WhichOneof("body")
    if body == "forward":
        return message.forward.activation
    return message.evaluate.activation if body == "evaluate" else None


def check_keeps(message: pb.EdgeMessage, kept: KeptRows | None, codes: Codes = CODES) -> bool:
    """Whether a message has anything to do with rows that are kept, which are written in the session's `codes`.

    Raises PreconditionError where the session keeps none, ProtocolError for numbers that make no sense.
    """
    activation = activation_of(message)
    if activation is None or not (activation.keep or activation.kept):
        return False
    if kept is None:
        raise PreconditionError("this session keeps no activations: nothing has a number in it")
    _check(activation, kept, codes)
    return True


@contextmanager
def made_whole(
    message: pb.EdgeMessage, kept: KeptRows, budget: MemoryBudget, owner: Identity, codes: Codes = CODES
) -> Iterator[tuple[pb.EdgeMessage, str]]:
    """For the block: a message that was checked, with all rows of its activation; or what it lacks, in a sentence.

    What is looked up is charged as if it had come with the message. Raises ProtocolError for more than a message may
    have, and for sequences that were kept with other lengths than the message says.
    """
    activation = activation_of(message)
    assert activation is not None
    with ExitStack() as held:
        try:
            held.enter_context(budget.charge(Kind.MESSAGES, _looked_up(activation, kept), owner, _WAIT_SECONDS))
            whole, lacks = _whole(message, activation, kept, codes), ""
        except (NoMemoryError, StorageError) as error:
            whole, lacks = message, str(error)
        yield whole, lacks


def keep(message: pb.EdgeMessage, kept: KeptRows, codes: Codes = CODES) -> None:
    """Keeps what a message that was checked, and applied, says."""
    activation = activation_of(message)
    assert activation is not None
    try:
        rows = dict(_rows_that_came(activation, codes)) if activation.keep else {}
        kept.add([rows[index] for index, number in enumerate(activation.keep) if number])
    except MemoryError as error:  # the message was applied
        kept.stop(error)


def _check(activation: pb.Activation, kept: KeptRows, codes: Codes) -> None:
    B = len(activation.lengths)
    for numbers in (activation.keep, activation.kept):
        if len(numbers) not in (0, B):
            raise ProtocolError(f"{len(numbers)} numbers of kept sequences came, for {B} sequences")
    if B > MAX_KEPT_SEQUENCES:
        raise ProtocolError(f"{B} numbers of kept sequences came; at most {MAX_KEPT_SEQUENCES} go at once")
    if B * max(1, activation.padded_length) > MAX_PADDED_TOKENS:
        raise ProtocolError(f"a batch of {B} sequences is too large; at most {MAX_PADDED_TOKENS} padded tokens go")
    lengths = activation.lengths
    if not B or min(lengths) < 1 or max(lengths) > activation.padded_length:
        raise ProtocolError(f"lengths must be from 1 to the padded length {activation.padded_length}, and at least one")
    check_tensor(activation.packed, codes)
    came = sum(
        length for length, known in zip(activation.lengths, _numbers(activation.kept, B), strict=True) if not known
    )
    shape = activation.packed.shape
    if len(shape) != 2 or shape[0] != came or not shape[1]:
        raise ProtocolError(f"the activation has shape {shown(shape)}, and {came} rows should be in it")
    following = kept.count + 1
    for number, known in zip(_numbers(activation.keep, B), _numbers(activation.kept, B), strict=True):
        if number and known:
            raise ProtocolError(f"sequence {known} is kept, and cannot be kept again as {number}")
        if number and number != following and not kept.is_full:  # then the edge has not heard of it yet
            raise ProtocolError(f"a sequence came to be kept as {number}, but {following} is next")
        following += bool(number)
        if known > kept.count and not kept.is_full:
            raise ProtocolError(f"sequence {known} is not kept; {kept.count} are")


def _looked_up(activation: pb.Activation, kept: KeptRows) -> int:
    """Bytes. Raises StorageError for what is not held, ProtocolError for more than a message may have."""
    whole = len(activation.packed.data)
    for known in sorted(activation.kept):  # the first to be damaged first
        if known > kept.count:
            raise StorageError(f"the cloud has no room for more activations: sequence {known} was not kept")
        whole += kept.rows_bytes(known) if known else 0
    if whole > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"the activation would have {whole} bytes, where {MAX_MESSAGE_BYTES} are the most")
    return _COPIES * whole if any(activation.kept) else 0


def _whole(message: pb.EdgeMessage, activation: pb.Activation, kept: KeptRows, codes: Codes) -> pb.EdgeMessage:
    """Raises StorageError, ProtocolError for sequences of other lengths than they were kept with."""
    if not any(activation.kept):
        return message
    came = dict(_rows_that_came(activation, codes))
    # In this order, what is held after damage is before all of it that the message has: it need not find the next.
    read = {number: kept.read(number) for number in sorted(set(activation.kept)) if number}
    for number, length in set(zip(activation.kept, activation.lengths, strict=True)):
        if number:
            _check_length(activation, number, read[number], length, codes)
    rows = b"".join(came[i] if i in came else read[number] for i, number in enumerate(activation.kept))
    whole = pb.EdgeMessage()
    whole.CopyFrom(message)
    packed = activation_of(whole).packed  # type: ignore[union-attr]  # as that of the message
    packed.data = rows
    packed.shape[0] = sum(activation.lengths)
    return whole


def _rows_that_came(activation: pb.Activation, codes: Codes) -> Iterator[tuple[int, memoryview]]:
    """With the number of each sequence in its batch."""
    packed, data, row, begin = activation.packed, memoryview(activation.packed.data), 0, 0
    ends = row_ends(packed, packed.data, packed.shape[0], codes)
    for index, known in enumerate(_numbers(activation.kept, len(activation.lengths))):
        if not known:
            row += activation.lengths[index]
            yield index, data[begin : ends[row - 1]]
            begin = ends[row - 1]


def _check_length(activation: pb.Activation, number: int, rows: bytes, length: int, codes: Codes) -> None:
    try:
        row_ends(activation.packed, rows, length, codes)
    except ProtocolError as error:
        raise ProtocolError(f"sequence {number} was kept with other rows than those of {length} tokens") from error


def _numbers(field: object, count: int) -> list[int]:
    return list(field) or [0] * count  # type: ignore[call-overload]  # a list of numbers, or none
