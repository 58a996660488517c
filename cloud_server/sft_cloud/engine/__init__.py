"""Where a session comes to be and runs: from a checked request to net_2 on a device, and back from a checkpoint."""
