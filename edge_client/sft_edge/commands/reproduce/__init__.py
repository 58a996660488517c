"""`sft-edge reproduce`: the paper's experiments, done again."""
