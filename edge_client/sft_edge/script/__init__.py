"""`SFTOptimizer` on the edge: a script's own model, cut in place, and its own optimizer, which steps both halves."""
