"""`SFTOptimizer` on the cloud: a script's own model, cut in place to net_2, and served to one edge."""

from sft_cloud.script.role import CloudRole

__all__ = ["CloudRole"]
