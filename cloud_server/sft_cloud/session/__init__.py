"""Algorithm 1, lines 8 to 11 and 14, without a word about the network."""

from sft_cloud.memory import MemoryBudget, MemoryShare
from sft_cloud.session.kept import check_keeps, keep, made_whole
from sft_cloud.session.memory import (
    BatchMemory,
    default_budget,
    half_precision_bytes,
    measure,
    memory_bytes,
    session_bytes,
)
from sft_cloud.session.session import Session
from sft_cloud.session.upper_half import Given, TransformersUpperHalf, UpperHalf

__all__ = [
    "BatchMemory",
    "Given",
    "MemoryBudget",
    "MemoryShare",
    "Session",
    "TransformersUpperHalf",
    "UpperHalf",
    "check_keeps",
    "default_budget",
    "half_precision_bytes",
    "keep",
    "made_whole",
    "measure",
    "memory_bytes",
    "session_bytes",
]
