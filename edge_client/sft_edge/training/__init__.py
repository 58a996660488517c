"""An ordinary PyTorch loop, its judging and its telling."""
