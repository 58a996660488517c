import hashlib

import pytest
import torch
from safetensors.torch import load

from sft.tensors.stream import CHUNK_BYTES, in_memory, safetensors_chunks, safetensors_size, sha256_of

TENSORS = {
    "b.weight": torch.arange(12.0).reshape(3, 4),
    "a.half": torch.ones(3, dtype=torch.float16),
    "c.brain": torch.full((2, 1), 0.5, dtype=torch.bfloat16),
    "d.scalar": torch.tensor(3.0),
    "e.empty": torch.zeros(0, 5),
    "f.ids": torch.tensor([1, -2]),
}


def test_the_library_reads_what_we_write():
    back = load(b"".join(safetensors_chunks(in_memory(TENSORS))))
    assert back.keys() == TENSORS.keys()
    for name, x in TENSORS.items():
        assert back[name].dtype == x.dtype
        assert torch.equal(back[name], x)


def test_size_and_hash_are_those_of_the_bytes():
    data = b"".join(safetensors_chunks(in_memory(TENSORS)))
    assert safetensors_size(in_memory(TENSORS)) == len(data)
    assert sha256_of(in_memory(TENSORS)) == hashlib.sha256(data).hexdigest()


def test_chunks_are_bounded_and_tensors_read_one_by_one():
    large = {str(i): torch.randn(300_000) for i in range(3)}
    alive = []
    stored = [
        tensor._replace(read=lambda tensor=tensor: alive.append(tensor.name) or tensor.read())
        for tensor in in_memory(large)
    ]
    chunks = safetensors_chunks(stored)
    next(chunks)
    assert len(next(chunks)) == CHUNK_BYTES
    assert alive == ["0"]
    assert max(len(chunk) for chunk in chunks) <= CHUNK_BYTES
    assert alive == ["0", "1", "2"]


def test_views_and_transposes_are_written_as_they_look():
    x = torch.arange(6.0).reshape(2, 3)
    back = load(b"".join(safetensors_chunks(in_memory({"t": x.T, "v": x[:, 1:]}))))
    assert torch.equal(back["t"], x.T)
    assert torch.equal(back["v"], x[:, 1:])


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.bool]
)
def test_every_type(dtype):
    x = torch.tensor([0, 1, 1]).to(dtype)
    assert torch.equal(load(b"".join(safetensors_chunks(in_memory({"x": x}))))["x"], x)
