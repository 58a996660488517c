"""A model's tokenizer: read from a directory alone, and compared with the model."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator

from transformers import AutoTokenizer, PretrainedConfig

from sft.errors import CheckpointError, UsageError
from sft.files.pointer import is_lfs_pointer, lfs_advice
from sft.printable import told_by
from sft_edge.model_files.config_file import NO_OWN_CODE


def read_tokenizer(directory: Path) -> Any:
    """A tokenizer from a directory. Raises CheckpointError."""
    for path in sorted(directory.glob("*")):
        if path.suffix in (".json", ".txt", ".model") and is_lfs_pointer(path):
            raise CheckpointError(lfs_advice(path))
    _check_no_own_code(directory)
    _check_sentencepiece(directory)
    try:
        with _of_any_model():
            tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)  # nosec B615 # a directory
    except Exception as error:  # of many kinds; the tokenizers package raises this very class
        raise CheckpointError(f"{directory}: no tokenizer can be read from here ({told_by(error)})") from error
    names = sorted(tokenizer.vocab_files_names.values())
    if not any((directory / name).is_file() for name in names):  # newer releases make an empty one up
        raise CheckpointError(f"{directory}: no tokenizer can be read from here (it holds no {' or '.join(names)})")
    longest = tokenizer.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, (int, float)) or not longest >= 1:
        raise CheckpointError(
            f"{directory / 'tokenizer_config.json'}: model_max_length must be a number of tokens, not {longest!r:.80}"
        )
    if isinstance(longest, float) and math.isfinite(longest):
        tokenizer.model_max_length = int(longest)
    return tokenizer


@contextmanager
def _of_any_model() -> Iterator[None]:
    """The library looks at the model's type, and warns of one of our own; a tokenizer does not depend on it."""
    logger = logging.getLogger("transformers.configuration_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def check_vocabulary(tokenizer: Any, config: PretrainedConfig) -> None:
    """Raises UsageError for a tokenizer with a token whose number the model has no row for."""
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if highest >= config.vocab_size:
        raise UsageError(
            f"the tokenizer has token {token[:40]!r} with number {highest}, the model knows numbers up to "
            f"{config.vocab_size - 1}: give the tokenizer that belongs to the model (--tokenizer-name)"
        )


def _check_no_own_code(directory: Path) -> None:
    """A tokenizer may be the library's class and still name a class beside it: then the library's is taken."""
    path = directory / "tokenizer_config.json"
    content: Dict[str, Any] = {}
    if path.is_file():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            own = content.get("auto_map", {}).get("AutoTokenizer")
            name = str(content.get("tokenizer_class"))
        except (OSError, ValueError, AttributeError):
            return  # the library says what is wrong with it
        if own and not _is_known(name):
            raise CheckpointError(f"{path}: '{name[:80]}' is no tokenizer of transformers: {NO_OWN_CODE}")


def _is_known(name: str) -> bool:
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    return tokenizer_class_from_name(name) is not None


def _check_sentencepiece(directory: Path) -> None:
    files = sorted(directory.glob("*.model"))
    if files and not (directory / "tokenizer.json").is_file() and importlib.util.find_spec("sentencepiece") is None:
        raise CheckpointError(
            f"{files[0]}: this tokenizer needs sentencepiece; install it with: pip install "
            "'split-fine-tuning[sentencepiece]'"
        )
