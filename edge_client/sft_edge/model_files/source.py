"""What a run starts from: configuration, tokenizer and, unless only a shape is given, pretrained weights."""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, Optional

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from sft.errors import CheckpointError, SFTError, UsageError
from sft.models import HEADS, build_whole, family_of, max_positions
from sft.tensors.pretrained import PretrainedWeights, find_model
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


def open_source(options: ModelOptions, config_overrides: Dict[str, Any]) -> Source:
    """Finds and opens what the options name.

    Raises CheckpointError, UnsupportedModelError for an architecture that cannot be cut, UsageError when sequences
    would be longer than the model takes.
    """
    source = open_model(options.model, options.from_config, config_overrides, options.model_name)
    if options.tokenizer_name or source.checkpoint is None:
        source.tokenizer = read_tokenizer(find_model(str(options.tokenizer_name)))
    else:
        source.tokenizer = read_tokenizer(source.checkpoint.directory)
    check_length(source.config, options.max_seq_length)
    if len(source.tokenizer) > source.config.vocab_size:
        raise UsageError(
            f"the tokenizer has {len(source.tokenizer)} tokens, the model knows {source.config.vocab_size}"
        )
    return source


def open_model(
    model: Optional[str],
    from_config: Optional[Path],
    config_overrides: Dict[str, Any],
    model_name: Optional[str] = None,
) -> Source:
    """As `open_source`, without a tokenizer: for who asks the model of no text."""
    if from_config is not None:
        return Source("", read_config(from_config, config_overrides), None, told_name=told_name("", model_name))
    directory = find_model(str(model))
    config = read_config(directory / "config.json", config_overrides)
    name = Path(str(model)).resolve().name if Path(str(model)).is_dir() else str(model)
    told = told_name(str(model), model_name)
    return Source(name if _is_name(name) else "", config, PretrainedWeights(directory), told_name=told)


def told_name(model: str, model_name: Optional[str] = None) -> str:
    """What the cloud is told to look for: `model_name` where somebody chose it, else a hub id; nothing of a directory.

    Raises UsageError for a choice that is none.
    """
    if model_name is not None and not _is_name(model_name):
        raise UsageError(f"model_name {model_name[:80]!r} is neither a hub id nor the name of a directory")
    if model_name is not None:
        return model_name
    return model if _is_name(model) and not Path(model).exists() else ""


def _is_name(text: str) -> bool:
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text, re.ASCII) is not None and ".." not in text


def read_config(path: Path, overrides: Dict[str, Any]) -> PretrainedConfig:
    """A transformers configuration from its file. Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    with _blames(path):
        config: PretrainedConfig = AutoConfig.from_pretrained(str(path), **overrides)  # nosec B615 # a file
        family_of(config)
        build_whole(config, HEADS[0])
    if hasattr(config, "auto_map"):
        del config.auto_map  # code that travels with a model is never run
    return config


@contextmanager
def _blames(path: Path) -> Iterator[None]:
    """What the library raises in the block, which can be almost anything, is the fault of the configuration."""
    try:
        yield
    except SFTError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path}: not a model's configuration ({first_line(error)})") from error


def read_tokenizer(directory: Path) -> Any:
    """A tokenizer from a directory. Raises CheckpointError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory))  # nosec B615 # a directory
    except Exception as error:  # of many kinds; the tokenizers package raises this very class
        raise CheckpointError(f"{directory}: no tokenizer can be read from here ({first_line(error)})") from error
    names = sorted(tokenizer.vocab_files_names.values())
    if not any((directory / name).is_file() for name in names):  # newer releases make an empty one up
        raise CheckpointError(f"{directory}: no tokenizer can be read from here (it holds no {' or '.join(names)})")
    return tokenizer


def check_length(config: PretrainedConfig, max_seq_length: int) -> None:
    """Raises UsageError when sequences of that many tokens are more than the model takes."""
    if max_seq_length > max_positions(config):
        raise UsageError(
            f"--max-seq-length {max_seq_length} is more than this model's {max_positions(config)} positions"
        )


def first_line(error: Exception) -> str:
    """The beginning of an error's message; libraries write paragraphs."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
