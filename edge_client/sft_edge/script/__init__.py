"""`SFTOptimizer` on the edge: a script's own model, cut in place, and its own optimizer, which steps both halves."""

from sft_edge.script.role import EdgeRole

__all__ = ["EdgeRole"]
