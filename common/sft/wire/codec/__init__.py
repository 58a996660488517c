"""Tensors and labels as bytes."""
