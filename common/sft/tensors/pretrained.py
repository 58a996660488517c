"""Pretrained weights on disk: found by name, read one tensor at a time.

Only safetensors files are read: a pickled checkpoint can run code, and cannot be read in parts.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Optional, Tuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sft.errors import CheckpointError
from sft.files.names import is_utf8
from sft.files.pointer import is_lfs_pointer, lfs_advice
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


AS_SAFETENSORS = "open it with transformers' from_pretrained, save it with save_pretrained, and give that directory"
"""What to do with a model in files of another kind. All supported releases write safetensors unless told not to."""

MERGED = "merge them with peft's merge_and_unload, save the result with save_pretrained, and give its directory"
"""What to do with adapters."""


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
        self._wrapper = _wrapper_of(self._files)
        """What wrappers of training loops have put before every name."""

    def tensors(self, shapes: Mapping[str, Tuple[int, ...]], base_prefix: str) -> List[StoredTensor]:
        """The tensors of `shapes` (whole-model name -> shape) that are here with that shape, sorted by name.

        Names are matched as the library does: with or without the base model's prefix, and with LayerNorm's old `gamma`
        and `beta`. Raises CheckpointError when the base model, its pooler aside, is not whole: only a head may be new.
        """
        found = []
        for name, shape in sorted(shapes.items()):
            key = self._key(name, base_prefix)
            is_body = name.startswith(base_prefix + ".") and ".pooler." not in name
            if key is None:
                if is_body:
                    raise CheckpointError(f"{self.directory}: tensor '{name}' is missing; {self._what_is_here()}")
                continue
            dtype, stored_shape = self._describe(key)
            if stored_shape == tuple(shape):
                found.append(StoredTensor(name, dtype, stored_shape, lambda key=key: self._read(key)))  # type: ignore[misc]
            elif is_body:
                raise CheckpointError(
                    f"{self.directory}: tensor '{key}' has shape {list(stored_shape)}, config.json says {list(shape)}"
                )
        return found

    def shape_of(self, name: str, base_prefix: str) -> Optional[Tuple[int, ...]]:
        """The shape that a tensor has here; None where it is not here."""
        key = self._key(name, base_prefix)
        return None if key is None else self._describe(key)[1]

    def _key(self, name: str, base_prefix: str) -> Optional[str]:
        spellings = (self._wrapper + key for key in _spellings(name, base_prefix))
        return next((key for key in spellings if key in self._files), None)

    def _what_is_here(self) -> str:
        if not self._files:
            return "the checkpoint is empty"
        return f"the checkpoint is incomplete, or has other names: it holds '{min(self._files):.100}'"

    def _file_of_each_tensor(self) -> Dict[str, Path]:
        single, index = self.directory / single_file(self._stem), self.directory / index_file(self._stem)
        if single.is_file():
            with _open(single) as file:
                return dict.fromkeys(file.keys(), single)
        if index.is_file():
            if is_lfs_pointer(index):
                raise CheckpointError(lfs_advice(index))
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
        raise CheckpointError(self._without_weights())

    def _without_weights(self) -> str:
        files = f"neither {single_file(self._stem)} nor {index_file(self._stem)}"
        pickled = [path for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in sorted(self.directory.glob(kind))]
        if pickled:
            return f"{pickled[0]}: pickled checkpoints are not read, as they can run code; {AS_SAFETENSORS}"
        if (self.directory / "adapter_config.json").is_file():
            return f"{self.directory}: holds {files}, but adapters, which are not trained on; {MERGED}"
        if self.directory.parent.name == "snapshots":  # the hub's cache
            return (
                f"{self.directory}: holds {files}; if the hub has the model as pytorch_model.bin only, which is "
                f"not read as it can run code, {AS_SAFETENSORS}"
            )
        return f"{self.directory}: holds {files}"

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
        if not is_utf8(self._path):
            raise CheckpointError(
                f"{self._path}: its name is not UTF-8, or not in this locale, and safetensors opens no other; rename "
                "what is named so, or go into it and name the model from there"
            )
        try:
            self._file: Any = safe_open(str(self._path), framework="pt")
            return self._file.__enter__()  # type: ignore[no-untyped-call]
        except (SafetensorError, OSError) as error:
            if is_lfs_pointer(self._path):
                raise CheckpointError(lfs_advice(self._path)) from error
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


def _wrapper_of(names: Iterable[str]) -> str:
    """`module.` of DataParallel and `_orig_mod.` of torch.compile, where they are before every name; else nothing."""
    names, wrapper = list(names), ""
    while names:
        more = next(
            (each for each in ("module.", "_orig_mod.") if all(n.startswith(wrapper + each) for n in names)), ""
        )
        if not more:
            break
        wrapper += more
    return wrapper
