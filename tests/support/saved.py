"""Models as `sft-edge train` leaves them, without training: random weights, a tokenizer and a description."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

from support.tiny import tiny_config, tiny_tokenizer

from sft.models import Cut, build_whole
from sft.models.weights import fill
from sft.tensors.stream import Shard, in_memory, safetensors_chunks
from sft_edge.model_files.description import Description
from sft_edge.model_files.saved import save_model


def save_tiny(
    directory: Path,
    family: str = "bert",
    head: str = "sequence-classification",
    cut: Optional[Cut] = None,
    tokenizer: Any = None,
    description: Optional[dict] = None,
    **overrides: object,
) -> Path:
    """Three blocks; `description` and `overrides` go to the description and to the configuration."""
    # More tokens than the tokenizer has: some classes of the library add those of their own to it.
    config = tiny_config(family, **{"layers": 3, "num_labels": 2, "vocab_size": 200, **overrides})
    net = build_whole(config, head, cut)
    fill(net, [], seed=0)
    values = {"task": "sst2", "head": head, "problem_type": None, "label_names": None, "max_seq_length": 64}
    if head == "sequence-classification":
        values.update(problem_type="single_label_classification", label_names=["negative", "positive"])
    values.update(base_model="tiny", mode="sft" if cut else "local")
    if cut is not None:
        values.update(split_layer=cut.split_layer, split_rank=cut.split_rank, residual=cut.residual)
    tensors = in_memory(dict(net.whole_parameters()))
    shard = Shard([tensor.name for tensor in tensors], safetensors_chunks(tensors))
    known = Description(**{**values, **(description or {})})  # type: ignore[arg-type]
    save_model(directory, [shard], config, tokenizer or tiny_tokenizer(family), known)
    return directory
