"""Everything that the server holds in memory: charged before it is allocated, given back when it is let go."""

from sft_cloud.memory.books import Kind
from sft_cloud.memory.budget import Charge, MemoryBudget
from sft_cloud.memory.process import machine_bytes, process_bytes
from sft_cloud.memory.share import MemoryShare

__all__ = [
    "Charge",
    "Kind",
    "MemoryBudget",
    "MemoryShare",
    "machine_bytes",
    "process_bytes",
]
