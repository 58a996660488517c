"""`sft-edge train`: a run from options to a directory with a model, and its attempts."""
