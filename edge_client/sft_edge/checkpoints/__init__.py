"""How a run survives: when it is saved, what is in it, whether two attempts are one run."""
