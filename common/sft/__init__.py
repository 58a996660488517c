"""Split fine-tuning: what the edge and the cloud share."""

__version__ = "0.1.0"
