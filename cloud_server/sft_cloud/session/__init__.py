"""Algorithm 1, lines 6 to 11 and 14, without a word about the network."""
