"""A safetensors file as a stream of chunks, so that neither side ever holds all of it.

Source of the format: https://huggingface.co/docs/safetensors (eight bytes header length, JSON header, tensors).
"""

from __future__ import annotations

import hashlib
import json
from typing import Callable, Dict, Iterable, Iterator, List, NamedTuple, Sequence, Tuple

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 20

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class StoredTensor(NamedTuple):
    """A tensor that is somewhere else until it is read."""

    name: str
    dtype: torch.dtype
    shape: Tuple[int, ...]
    read: Callable[[], Tensor]

    def size(self) -> int:
        """Bytes of its elements."""
        return int(torch.Size(self.shape).numel()) * torch.empty((), dtype=self.dtype).element_size()


def in_memory(tensors: Dict[str, Tensor]) -> Sequence[StoredTensor]:
    """Stored tensors of tensors that are already here, sorted by name."""
    return [
        StoredTensor(name, x.dtype, tuple(x.shape), lambda x=x: x.detach())  # type: ignore[misc]
        for name, x in sorted(tensors.items())
    ]


def copied(tensor: StoredTensor) -> StoredTensor:
    """The same, but reading it copies it to the CPU, as it is then."""
    return tensor._replace(read=lambda: tensor.read().detach().to("cpu", copy=True))


def safetensors_size(tensors: Sequence[StoredTensor]) -> int:
    """Bytes that `safetensors_chunks` yields in all."""
    return len(safetensors_header(tensors)) + sum(tensor.size() for tensor in tensors)


def safetensors_chunks(tensors: Sequence[StoredTensor]) -> Iterator[bytes]:
    """The bytes of a safetensors file with these tensors in this order, in chunks of at most CHUNK_BYTES.

    One tensor is in memory at a time, and of its bytes one chunk. The same tensors give the same bytes on every
    machine, so they have one hash.
    """
    yield from _cut(safetensors_header(tensors))
    for tensor in tensors:
        x = tensor.read().detach().contiguous()
        for start in range(0, tensor.size(), CHUNK_BYTES):
            yield tensor_part(x, start, CHUNK_BYTES)
        del x


def tensor_bytes(x: Tensor) -> bytes:
    """The elements of a tensor as a safetensors file has them."""
    flat = x.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def tensor_part(x: Tensor, start: int, size: int) -> bytes:
    """At most `size` of these bytes from `start` on, without a copy of the others; both are multiples of 8."""
    flat = x.detach().contiguous().reshape(-1)
    return tensor_bytes(flat[start // flat.element_size() : (start + size) // flat.element_size()])


def sha256_of(tensors: Sequence[StoredTensor]) -> str:
    """SHA-256, hexadecimal, of the bytes that `safetensors_chunks` yields."""
    digest = hashlib.sha256()
    for chunk in safetensors_chunks(tensors):
        digest.update(chunk)
    return digest.hexdigest()


def safetensors_header(tensors: Sequence[StoredTensor]) -> bytes:
    """What stands before the elements of the tensors in a safetensors file."""
    # Transformers 4.46 opens no file without this.
    entries: Dict[str, Dict[str, object]] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.size()
        entries[tensor.name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the format wants the data aligned
    return len(header).to_bytes(8, "little") + header


def _cut(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), CHUNK_BYTES):
        yield data[start : start + CHUNK_BYTES]


class Shard(NamedTuple):
    """Part of a model's parameters, as the bytes of a safetensors file."""

    names: List[str]
    """Of its tensors, in the whole model."""

    chunks: Iterable[bytes]
