"""The edge: net_1, the data, the training loop and the command line of the side that is in charge."""
