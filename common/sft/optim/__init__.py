"""One optimizer over both halves: as it crosses the wire, its sums over gradients, its state, a script's own."""
