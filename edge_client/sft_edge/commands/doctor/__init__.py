"""`sft-edge doctor`: whether a run would work, found out before it begins."""
