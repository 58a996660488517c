"""Tensors as files: safetensors in chunks, pretrained weights, manifests."""
