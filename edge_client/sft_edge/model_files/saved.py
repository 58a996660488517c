"""The directory a run leaves: weights of both halves, configuration, tokenizer, and what was trained how.

A model that was trained undecomposed (`local`, `sl`) is a plain transformers checkpoint. A decomposed one has an
architecture of its own, so its files are named differently: `from_pretrained` then says that it finds no weights, where
it would otherwise fill in random ones.
"""

from __future__ import annotations

import copy
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, List, NamedTuple, Optional, Sequence

import torch
from torch import Tensor
from transformers import PretrainedConfig

from sft.errors import CheckpointError, StorageError, UsageError
from sft.files.temporary import TemporaryDirectory
from sft.models import HEADS, Whole, build_whole
from sft.models.weights import fill, kept_factors, shapes
from sft.printable import told_by
from sft.tensors.pretrained import PretrainedWeights, index_file, single_file
from sft.tensors.stream import Shard, StoredTensor
from sft_edge.files import storage_errors, write_file, write_json
from sft_edge.model_files.config_file import config_from, read_values
from sft_edge.model_files.description import DECOMPOSED, DESCRIPTION_FILE, Description, read_description
from sft_edge.model_files.kept import description_of, kept_of
from sft_edge.model_files.tokenizer_file import check_vocabulary, read_tokenizer
from sft_edge.tasks import Feature, Task, batches_of, make_task


class SavedModel(NamedTuple):
    """A trained model, ready to be asked."""

    description: Description
    net: Whole
    tokenizer: Any

    def logits(self, task: Task, features: Sequence[Feature], batch_size: int) -> List[Tensor]:
        """One entry a feature: (C,), or (S, 2) of its batch for question answering."""
        logits: List[Tensor] = []
        for batch in batches_of(task, features, batch_size):
            with torch.no_grad():
                logits.extend(self.net(batch.inputs, batch.lengths, {}).logits.cpu())
        return logits


def save_model(
    directory: Path, shards: List[Shard], config: PretrainedConfig, tokenizer: Any, description: Description
) -> None:
    """Writes the model in place of the one that is there, whole or not at all. Raises StorageError.

    It is written aside first: what the directory held before stays until then.
    """
    with storage_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        aside = TemporaryDirectory(".sft-aside-", directory)
    with aside:
        try:
            _write_model(Path(aside.name), shards, config, tokenizer, description)
        except StorageError as error:
            raise StorageError(str(error).replace(aside.name, str(directory))) from error
        with storage_errors(directory):
            remove_model(directory)
            for path in sorted(Path(aside.name).iterdir()):
                os.replace(str(path), str(directory / path.name))


def try_saving(directory: Path, config: PretrainedConfig, tokenizer: Any, description: Description) -> None:
    """Writes what `save_model` would, but the weights, and deletes it. Raises StorageError."""
    with storage_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        aside = TemporaryDirectory(".sft-aside-", directory)
    with aside:
        try:
            _write_beside(Path(aside.name), copy.deepcopy(config), tokenizer, description)
        except StorageError as error:
            raise StorageError(str(error).replace(aside.name, str(directory))) from error
        except Exception as error:  # of many kinds: what is saved is the library's, and what travels with a model
            raise StorageError(
                f"the model could not be saved in {directory}: {type(error).__name__}: {told_by(error)}"
            ) from error


def remove_model(directory: Path) -> None:
    """Deletes what makes a directory a model, of whatever kind: old files beside new ones could be taken for them.

    Raises OSError.
    """
    for stem, suffix in (("model", ".safetensors"), (DECOMPOSED, ".safetensors"), ("pytorch_model", ".bin")):
        for path in directory.glob(f"{stem}-?????-of-?????{suffix}"):
            path.unlink()
        for name in (f"{stem}{suffix}", f"{stem}{suffix}.index.json"):
            (directory / name).unlink(missing_ok=True)
    for name in (DESCRIPTION_FILE, "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"):
        (directory / name).unlink(missing_ok=True)


def _write_model(
    directory: Path, shards: List[Shard], config: PretrainedConfig, tokenizer: Any, description: Description
) -> None:
    stem = description.stem
    names = [f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [single_file(stem)]
    sizes = [write_file(directory / name, shard.chunks) for name, shard in zip(names, shards)]
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards) for tensor in shard.names}
        write_json(directory / index_file(stem), {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map})
    config = copy.deepcopy(config)
    if any("lm_head.weight" in shard.names for shard in shards):
        config.tie_word_embeddings = False  # the cut untied it
    _write_beside(directory, config, tokenizer, description)


def _write_beside(directory: Path, config: PretrainedConfig, tokenizer: Any, description: Description) -> None:
    """What a model's directory holds but the weights."""
    config.architectures = [type(build_whole(config, description.head).model).__name__]
    with storage_errors(directory.parent):
        config.save_pretrained(str(directory))
        try:
            tokenizer.save_pretrained(str(directory))
        except Exception as error:
            if type(error) is not Exception:
                raise
            raise OSError(0, told_by(error)) from error  # how the tokenizers package tells of a full disk
    write_json(directory / DESCRIPTION_FILE, asdict(description))


def load_model(directory: Path) -> SavedModel:
    """Reads what `save_model` wrote, what was exported of it, or what a script has saved of a cut model.

    Raises CheckpointError.
    """
    path = directory / "config.json"
    described = None if (directory / DESCRIPTION_FILE).is_file() else description_of(path)
    description = described or read_description(directory)
    kept = kept_of(path, read_values(path))
    config = config_from(path, kept.values, {})
    net = build_whole(config, description.head, description.cut)
    checkpoint = PretrainedWeights(directory, kept.stem)
    tensors: List[StoredTensor] = []
    if description.cut is not None:  # of a dense export, whose matrix is decomposed again
        for factors in kept_factors(config, description.head, description.cut, checkpoint) or ():
            tensors += factors
    own = {tensor.name for tensor in tensors}
    others = {name: shape for name, shape in shapes(net).items() if name not in own}
    tensors += checkpoint.tensors(others, net.model.base_model_prefix)
    held = {tensor.name for tensor in tensors}
    missing = sorted(set(net.whole_names.values()) - held)
    if missing:
        raise CheckpointError(f"{directory}: tensor '{missing[0]}' is missing; the saved model is incomplete")
    fill(net, tensors, seed=0)
    tokenizer = read_tokenizer(directory)
    check_vocabulary(tokenizer, config)
    if described is not None:
        description = replace(description, max_seq_length=min(description.max_seq_length, tokenizer.model_max_length))
    return SavedModel(description, net.eval(), tokenizer)


def task_of(description: Description, data_dir: Optional[Path] = None) -> Task:
    """The task that a saved model was trained for. Raises UsageError and DataError."""
    if not description.task:
        opens = HEADS[description.head].auto_class.__name__
        raise UsageError(f"a model for {description.head} is asked with transformers: {opens}.from_pretrained opens it")
    task = make_task(description.task, data_dir, description.problem_type, description.label_names)
    if description.text_fields is not None:
        task.expect(description.text_fields)
    return task
