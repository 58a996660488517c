"""Split fine-tuning: what the edge and the cloud share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sft.version import __version__ as __version__

if TYPE_CHECKING:
    from sft.optimizer import SFTOptimizer as SFTOptimizer


def __getattr__(name: str) -> Any:
    # Only when asked for: a command that prints its help does not wait for torch.
    if name == "SFTOptimizer":
        from sft.optimizer import SFTOptimizer

        return SFTOptimizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
