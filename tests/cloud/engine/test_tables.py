"""The tables of a codec: a blob that a session is refused without, and charged for."""

import gc
import hashlib
import math

import pytest
import torch
from support.tables import made_up_tables

from sft.errors import ProtocolError
from sft.models import Cut
from sft.tensors.stream import in_memory, safetensors_chunks, sha256_of
from sft.v1 import split_training_pb2 as pb
from sft.wire.codec.elements import codecs_named, decode_tensor
from sft.wire.codec.messages import encode_activation
from sft_cloud.engine.opener import TransformersOpener
from sft_cloud.engine.request import check_request
from sft_cloud.engine.weights import WeightsFinder
from sft_cloud.engine.worker import at_once
from sft_cloud.identity import ANONYMOUS
from sft_cloud.memory import MemoryBudget
from sft_cloud.storage import BlobStore, read_blob

CPU = torch.device("cpu")
FITTED = {"activation_codec": pb.DATA_TYPE_FITTED}


@pytest.fixture
def sl(make_edge):
    return make_edge(cut=Cut("sl", 2))


@pytest.fixture
def store(tmp_path, sl):
    store = BlobStore(tmp_path / "blobs")
    for sha256, content in sl.blobs().items():
        store.of(ANONYMOUS).add(sha256, len(content), [content])
    return store


def add(store, content):
    """A blob; the fields of a request that names it."""
    tables = list(in_memory(content)) if isinstance(content, dict) else content
    data = b"".join(safetensors_chunks(tables))
    store.of(ANONYMOUS).add(sha256_of(tables), len(data), [data])
    return {**FITTED, "codec_tables_sha256": sha256_of(tables)}


def open_with(store, edge, budget=None, **fields):
    opener = TransformersOpener(CPU, store, WeightsFinder(store._directory / "none"), budget=budget)
    return opener.open(edge.request(**fields), ANONYMOUS, at_once)


def test_what_is_written_with_them_is_read_with_them(store, sl):
    tables = made_up_tables(sl.width)
    session = open_with(store, sl, **add(store, tables))
    codecs = codecs_named("float32", "fitted").with_tables(tables, CPU)
    forward = sl.forward(0)
    a_TR = torch.randn(sum(sl.lengths), sl.width)
    written = encode_activation(a_TR, codecs.activation, sl.lengths, max(sl.lengths), codecs.codes)
    forward.forward.activation.CopyFrom(written)
    forward.forward.frozen_edge = True
    loss = session.handle(forward).result.loss
    assert math.isfinite(loss)
    read = decode_tensor(written.packed, CPU, codecs.codes)
    plain = sl.forward(0)
    plain.forward.activation.CopyFrom(encode_activation(read, pb.DATA_TYPE_FLOAT32, sl.lengths, max(sl.lengths)))
    plain.forward.frozen_edge = True
    assert open_with(store, sl).handle(plain).result.loss == loss


def test_a_session_without_tables_knows_no_such_tensor(store, sl):
    session, forward = open_with(store, sl), sl.forward(0)
    forward.forward.activation.packed.data_type = pb.DATA_TYPE_FITTED
    with pytest.raises(ProtocolError, match="tensor of unknown element type 6"):
        session.handle(forward)


@pytest.mark.parametrize("only_check", [False, True])
def test_missing_tables_are_asked_for(store, sl, only_check):
    assert open_with(store, sl, **FITTED, codec_tables_sha256="0" * 64, only_check=only_check) == ["0" * 64]


def wrong(**changes):
    return lambda width: {**made_up_tables(width), **{name: change(width) for name, change in changes.items()}}


BAD = {
    "of another width": (lambda width: made_up_tables(width - 1), r"rows of 32 elements came, .* are for 31"),
    "of other names": (wrong(more=torch.zeros), "are basis, whole, .*, frequencies, not"),
    "of another shape": (wrong(mean=lambda width: torch.zeros(3).half()), r"'mean' .* has shape \[3\], not \[32\]"),
    "of another type": (wrong(mean=torch.zeros), "'mean' .* is torch.float32"),
    "no numbers": (wrong(mean=lambda width: torch.full((width,), math.nan).half()), "'mean' .* no finite number"),
    "too large": (wrong(more=lambda width: torch.zeros(1 << 17)), "tables for rows of 32 elements take at most"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_tables(store, sl, kind):
    make, says = BAD[kind]
    budget = MemoryBudget(1 << 30)
    with pytest.raises(ProtocolError, match=says):
        open_with(store, sl, budget, **add(store, make(sl.width)))
    assert budget.held_bytes == 0


def test_what_is_no_file_of_tensors(store, sl):
    data = b"no tensors"
    sha256 = hashlib.sha256(data).hexdigest()
    store.of(ANONYMOUS).add(sha256, len(data), [data])
    with pytest.raises(ProtocolError, match="is not a safetensors file"):
        open_with(store, sl, **FITTED, codec_tables_sha256=sha256)


def test_they_are_charged_before_they_are_read_and_given_back(store, sl, monkeypatch):
    plain, budget = MemoryBudget(1 << 30), MemoryBudget(1 << 30)
    fields = add(store, made_up_tables(sl.width))
    size = store.of(ANONYMOUS).find(fields["codec_tables_sha256"]).stat().st_size
    held = []

    def read(path):
        held.append(budget.held_bytes)
        return read_blob(path)

    monkeypatch.setattr("sft_cloud.engine.tables.read_blob", read)
    without, session = open_with(store, sl, plain), open_with(store, sl, budget, **fields)
    assert budget.held_bytes - plain.held_bytes == 6 * size + (10 << 20)
    assert min(held) >= budget.held_bytes
    del session, without
    gc.collect()
    budget.settle_collected()
    assert budget.held_bytes == 0


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"activation_codec": pb.DATA_TYPE_FITTED}, "codec_tables_sha256 must name a blob for the codec fitted"),
        ({"codec_tables_sha256": "0" * 64}, "codec_tables_sha256 must name a blob for the codec fitted, and be empty"),
        ({**FITTED, "codec_tables_sha256": "../../etc/passwd"}, "is not a SHA-256"),
        ({"gradient_codec": pb.DATA_TYPE_FITTED}, "unknown gradient_codec 6"),
    ],
)
def test_requests_that_make_no_sense(sl, fields, says):
    with pytest.raises(ProtocolError, match=says):
        check_request(sl.request(**fields))


def test_it_is_for_the_whole_activation(edge):
    with pytest.raises(ProtocolError, match="the codec fitted is for mode sl"):
        check_request(edge.request(**FITTED, codec_tables_sha256="0" * 64))
