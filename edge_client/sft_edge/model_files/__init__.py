"""A model on disk: what a run starts from, and what it leaves."""
