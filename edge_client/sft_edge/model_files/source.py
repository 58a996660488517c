"""What a run starts from: configuration, tokenizer and, unless only a shape is given, pretrained weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Optional

from transformers import PretrainedConfig

from sft.errors import CheckpointError, UsageError
from sft.models import Cut, max_positions
from sft.tensors.hub import find_model, is_hub_id
from sft.tensors.pretrained import PretrainedWeights
from sft_edge.model_files.config_file import check_plain_weights, config_from, read_values
from sft_edge.model_files.kept import kept_of
from sft_edge.model_files.tokenizer_file import check_vocabulary, read_tokenizer
from sft_edge.options import ModelOptions


@dataclass
class Source:
    """A model before it is cut."""

    name: str
    """Hub id, or the directory's name, for people here. Empty when it is odd, or weights come from the seed."""

    config: PretrainedConfig
    checkpoint: Optional[PretrainedWeights]
    """None when weights are drawn from the seed."""
    tokenizer: Any = None
    told_name: str = ""
    """What the cloud is told to look for, see `told_name`."""
    cut: Optional[Cut] = None
    """The decomposition that the checkpoint holds, of a run before; None where it has the library's layers."""
    values: Dict[str, Any] = field(default_factory=dict)
    """What config.json says, as the library would read it."""
    overrides: Dict[str, Any] = field(default_factory=dict)
    """What of that is set otherwise in `config`."""


def open_source(options: ModelOptions, config_overrides: Dict[str, Any]) -> Source:
    """Finds and opens what the options name.

    Raises CheckpointError, UnsupportedModelError for an architecture that cannot be cut, UsageError when sequences
    would be longer than the model takes.
    """
    source = open_model(options.model, options.from_config, config_overrides, options.model_name)
    if options.tokenizer_name or source.checkpoint is None:
        source.tokenizer = read_tokenizer(find_model(str(options.tokenizer_name), weights=False))
    else:
        source.tokenizer = read_tokenizer(source.checkpoint.directory)
    check_length(source.config, options.max_seq_length)
    check_vocabulary(source.tokenizer, source.config)
    return source


def open_model(
    model: Optional[str],
    from_config: Optional[Path],
    config_overrides: Dict[str, Any],
    model_name: Optional[str] = None,
) -> Source:
    """As `open_source`, without a tokenizer: for who asks the model of no text."""
    if from_config is not None:
        values, told = read_values(from_config), told_name("", model_name)
        config = config_from(from_config, values, config_overrides)
        return Source("", config, None, told_name=told, values=values, overrides=config_overrides)
    path = _find_config(str(model))
    directory = path.parent
    kept = kept_of(path, read_values(path))
    check_plain_weights(path, kept.values)
    config = config_from(path, kept.values, config_overrides)
    name = Path(str(model)).resolve().name if Path(str(model)).is_dir() else str(model)
    told = told_name(str(model), model_name)
    return Source(
        name if is_hub_id(name) else "",
        config,
        PretrainedWeights(directory, kept.stem),
        told_name=told,
        cut=kept.cut,
        values=kept.values,
        overrides=config_overrides,
    )


def values_of(options: ModelOptions) -> Dict[str, Any]:
    """The content of the config.json that the options name; nothing for a shape, whose weights are drawn."""
    return {} if options.from_config is not None else read_values(_find_config(str(options.model)))


def _find_config(model: str) -> Path:
    path = find_model(model) / "config.json"
    is_none = not any((path.parent / name).is_file() for name in ("config.json", "adapter_config.json"))
    if is_none and is_hub_id(model) and Path(model) == path.parent:
        raise CheckpointError(
            f"{path}: no such file; the folder {model} is taken for the model and hides what the hub has under this "
            "name: rename it, or run elsewhere"
        )
    return path


def told_name(model: str, model_name: Optional[str] = None) -> str:
    """What the cloud is told to look for: `model_name` where somebody chose it, else a hub id; nothing of a directory.

    Raises UsageError for a choice that is none.
    """
    if model_name is not None and not is_hub_id(model_name):
        raise UsageError(f"model_name {model_name[:80]!r} is neither a hub id nor the name of a directory")
    if model_name is not None:
        return model_name
    return model if is_hub_id(model) and not Path(model).exists() else ""


def check_length(config: PretrainedConfig, max_seq_length: int) -> None:
    """Raises UsageError when sequences of that many tokens are more than the model takes."""
    if max_seq_length > max_positions(config):
        raise UsageError(
            f"--max-seq-length {max_seq_length} is more than this model's {max_positions(config)} positions"
        )
