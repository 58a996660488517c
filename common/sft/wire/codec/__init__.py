"""Tensors, activations, logits and labels as messages and back: `messages` over `packing` and `elements`."""
