"""Bytes on disks: uploads by hash, halves of checkpoints, there or in an object store, activations that are kept."""

from sft_cloud.storage.blobs import BlobStore, check_sha256, read_blob
from sft_cloud.storage.checkpoints import CheckpointStore, Part, Saved
from sft_cloud.storage.files import check_writable
from sft_cloud.storage.kept_rows import KEY_BYTES, KeptRows, KeptStore

__all__ = [
    "KEY_BYTES",
    "BlobStore",
    "CheckpointStore",
    "KeptRows",
    "KeptStore",
    "Part",
    "Saved",
    "check_sha256",
    "check_writable",
    "read_blob",
]
