"""Messages and stubs of the wire, generated from proto/sft/v1/split_training.proto by `make proto`."""
