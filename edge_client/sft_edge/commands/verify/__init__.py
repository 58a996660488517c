"""`sft-edge verify`: the halves over a wire beside the model in one process."""
