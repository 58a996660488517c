"""Where a session's weights come from: blobs that an edge uploaded, or a model that the cloud has itself."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from sft.errors import CheckpointError, ProtocolError
from sft.models import Net2
from sft.models.lora import adapter_shapes
from sft.models.weights import pretrained_tensors, shapes
from sft.tensors.hub import find_model
from sft.tensors.pretrained import PretrainedWeights
from sft.tensors.stream import StoredTensor, in_memory, sha256_of
from sft_cloud.engine.request import SessionSpec
from sft_cloud.storage import BlobStore, read_blob

MAX_HASHES = 256
"""Of the cloud's own models, each for one cut; more would be of somebody who tries them all."""

MAX_LOOKED_AT, MAX_LIKE_IT = 256, 4
"""Of the directories in --model-dir, for an edge that does not name its model; and of those that fit its shapes."""

_log = logging.getLogger(__name__)


class WeightsFinder:
    """Finds net_2's tensors by the hashes that a request names. Safe to use from several threads."""

    def __init__(self, model_dir: Path, download: bool = False) -> None:
        """`model_dir` holds models by name, and nothing outside it is read by name; it need not exist.

        `download`: whether a model that is neither there nor in the hub's cache is fetched from the hub.
        """
        self._model_dir = model_dir
        self._download = download
        self._hashes: dict[tuple[object, ...], str] = {}
        self._lock = threading.Lock()

    def find(self, spec: SessionSpec, net_2: Net2, store: BlobStore) -> tuple[list[StoredTensor], list[str]]:
        """Net_2's stored tensors, and the hashes of the blobs that are missing in `store`.

        A model of the cloud's own counts only if its tensors have the very hash that the request names: then it is the
        edge's. Without a name it is looked for among those of its shapes: what an edge calls its directories is not
        for others. Raises ProtocolError when a blob holds something else than tensors of this net_2.
        """
        wanted = shapes(net_2)
        factor_names = {name for name in wanted if ".ffn2." in name or ".ffn3." in name}
        adapters = adapter_shapes(net_2, spec.lora) if spec.lora is not None else {}
        tensors: list[StoredTensor] = []
        factors: list[StoredTensor] = []
        missing: list[str] = []
        if spec.factors_sha256:
            path = store.find(spec.factors_sha256)
            if path is None:
                missing.append(spec.factors_sha256)
            else:
                factors = _read_blob(path, {**wanted, **adapters})  # a script's own head may be among them
                held = {tensor.name for tensor in factors}
                if not factor_names <= held or held & adapters.keys() not in (set(), adapters.keys()):
                    raise ProtocolError(
                        "the blob of factors_sha256 must hold all of FFN-2 and FFN-3, and all adapters or none"
                    )
        if spec.weights_sha256:
            path = store.find(spec.weights_sha256)
            if path is not None:
                tensors += _read_blob(path, {name: wanted[name] for name in wanted.keys() - factor_names})
            else:
                own = self._own_model(spec, net_2)
                if own is None:
                    missing.append(spec.weights_sha256)
                else:
                    tensors += own
        return tensors + factors, missing  # of two of one name the last counts

    def _own_model(self, spec: SessionSpec, net_2: Net2) -> list[StoredTensor] | None:
        if not spec.model_name:
            return self._like_it(spec, net_2)
        try:
            directory = find_model(spec.model_name, self._model_dir, self._download)
            tensors = pretrained_tensors(net_2, PretrainedWeights(directory))
            found = self._hash(directory, tensors)
        except (CheckpointError, OSError) as error:
            _log.info("model not found here", extra={"fields": {"model": spec.model_name, "reason": str(error)}})
            return None
        if found != spec.weights_sha256:
            _log.info("model differs from the edge's", extra={"fields": {"model": spec.model_name}})
            return None
        return tensors

    def _like_it(self, spec: SessionSpec, net_2: Net2) -> list[StoredTensor] | None:
        """Of the models in --model-dir, each in a directory or in one for its author, the one with the hash."""
        files = sorted((*self._model_dir.glob("*/config.json"), *self._model_dir.glob("*/*/config.json")))
        directories = [file.parent for file in files[:MAX_LOOKED_AT]]
        with suppress(CheckpointError):
            directories.append(find_model("minilm"))
        fitting = 0
        for directory in directories:
            try:
                tensors = pretrained_tensors(net_2, PretrainedWeights(directory))
                fitting += 1
                if tensors and self._hash(directory, tensors) == spec.weights_sha256:
                    return tensors
            except (CheckpointError, OSError):
                continue  # of another shape, as a rule
            if fitting >= MAX_LIKE_IT:
                break
        _log.info("none of the models here is the edge's")
        return None

    def _hash(self, directory: Path, tensors: Sequence[StoredTensor]) -> str:
        files = [(path.name, path.stat()) for path in sorted(directory.glob("*.safetensors*"))]
        stamps = tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in files)
        key = (directory.resolve(), stamps, tuple((tensor.name, tensor.shape) for tensor in tensors))
        known = self._hashes.get(key)
        if known is not None:
            return known
        with self._lock:  # one at a time, so that callers who ask for it together have it read once, by one core
            if key not in self._hashes:
                if len(self._hashes) >= MAX_HASHES:
                    self._hashes.clear()
                self._hashes[key] = sha256_of(tensors)
            return self._hashes[key]


def _read_blob(path: Path, wanted: dict[str, tuple[int, ...]]) -> list[StoredTensor]:
    tensors = in_memory(read_blob(path))
    for tensor in tensors:
        if tensor.name not in wanted:
            raise ProtocolError(f"blob {path.stem} holds '{tensor.name}', which does not belong there")
        if tensor.shape != wanted[tensor.name]:
            raise ProtocolError(
                f"blob {path.stem}: '{tensor.name}' has shape {list(tensor.shape)}, not {list(wanted[tensor.name])}"
            )
    return list(tensors)
