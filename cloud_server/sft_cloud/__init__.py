"""The cloud: a gRPC service that keeps one net_2 for every session and trains it."""
