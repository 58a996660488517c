"""Gemma: Llama's blocks, on embeddings that are scaled."""

from dataclasses import replace

from sft.models.families.llama import LLAMA

GEMMA = replace(LLAMA, model_types=("gemma",), scales_embeddings=True)
