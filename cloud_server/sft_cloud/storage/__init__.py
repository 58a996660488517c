"""Bytes that outlive a process: uploads by hash, halves of checkpoints, a directory or an object store below."""

from sft_cloud.storage.blobs import BlobStore, check_sha256, read_blob
from sft_cloud.storage.checkpoints import CheckpointStore, Part
from sft_cloud.storage.files import check_writable

__all__ = [
    "BlobStore",
    "CheckpointStore",
    "Part",
    "check_sha256",
    "check_writable",
    "read_blob",
]
