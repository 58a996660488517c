"""What of a run is in the edge's half of a checkpoint, and a run put back to where it was saved."""

from __future__ import annotations

import json
from array import array
from typing import Any, Dict, Iterable, List, Mapping, Optional

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sft.errors import CheckpointError, ProtocolError
from sft.models.weights import load_parameters
from sft.optim.state import checked_state, copied_state, group_settings, set_group_settings, stored_state
from sft.tensors.stream import StoredTensor, in_memory, safetensors_chunks
from sft.wire.ledger import PHASES, Ledger, Traffic
from sft_edge.checkpoints.directory import KEPT, EdgeCheckpoint
from sft_edge.checkpoints.random_states import generator_states, set_generator_states
from sft_edge.systems import System, key_of
from sft_edge.training import TrainingLoop

NET_1, OPTIMIZER, RANDOM, LEDGER = (f"{name}.safetensors" for name in ("net_1", "optimizer", "random", "ledger"))
CODEC = "codec.safetensors"
"""Where a codec was fitted: its tables."""
STATE = "state.json"


def parts_of(system: System, loop: TrainingLoop, beside: Mapping[str, Any]) -> Dict[str, Iterable[bytes]]:
    """The files of a checkpoint; `beside` goes into `state.json`."""
    parameters = system.own_parameters()
    ledger = system.ledger
    state = {
        **beside,
        "loop": loop.saved_state(),
        "groups": group_settings(system.optimizer),
        "evaluation": ledger.evaluation.__dict__,
        "evaluation_samples": ledger.evaluation_samples,
    }
    tables = {CODEC: _chunks(list(in_memory(dict(system.codec_tables))))} if system.codec_tables else {}
    columns = {name: torch.from_numpy(np.array(column)) for name, column in ledger.columns().items()}
    kept = system.kept_state()
    return {
        **({KEPT: _chunks(list(in_memory(kept)))} if kept else {}),
        NET_1: _chunks(list(in_memory(dict(parameters)))),
        OPTIMIZER: _chunks(stored_state(system.optimizer, parameters)),
        RANDOM: _chunks(list(in_memory(generator_states()))),
        LEDGER: _chunks(list(in_memory(columns))),
        **tables,
        # Not write_json's form, which has no NaN: what is read back must be what was written.
        STATE: [(json.dumps(state, indent=1) + "\n").encode()],
    }


def restore(checkpoint: EdgeCheckpoint, system: System, loop: TrainingLoop) -> None:
    """Puts back what `parts_of` gave. Raises CheckpointError where it is of another model or another release."""
    try:
        parameters = system.own_parameters()
        load_parameters(parameters, _tensors(checkpoint, NET_1))
        state = read_state(checkpoint)
        loop.load_state(state["loop"])
        optimizer_state = checked_state(system.optimizer, parameters, _tensors(checkpoint, OPTIMIZER))
        system.optimizer.load_state_dict(copied_state(optimizer_state))
        set_group_settings(system.optimizer, state["groups"])
        evaluation = Traffic(**state["evaluation"])
        _load_ledger(system.ledger, _tensors(checkpoint, LEDGER), evaluation, state["evaluation_samples"])
        set_generator_states(_tensors(checkpoint, RANDOM))
        if KEPT in checkpoint.manifest.files:
            system.load_kept_state(_tensors(checkpoint, KEPT))
    except (CheckpointError, ProtocolError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{checkpoint.directory} does not fit this run: {error}") from error


def keep_key_of(checkpoint: EdgeCheckpoint) -> Optional[bytes]:
    """With which the cloud keeps activations of the run; None where it does not. Raises CheckpointError."""
    if KEPT not in checkpoint.manifest.files:
        return None
    try:
        return key_of(_tensors(checkpoint, KEPT))
    except (KeyError, OSError, SafetensorError) as error:
        raise CheckpointError(f"{checkpoint.directory / KEPT}: not readable ({error})") from error


def read_codec_tables(checkpoint: EdgeCheckpoint) -> Dict[str, Tensor]:
    """Of the codec that was fitted to the run's activations; nothing where none was. Raises CheckpointError."""
    if CODEC not in checkpoint.manifest.files:
        return {}
    try:
        return _tensors(checkpoint, CODEC)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{checkpoint.directory / CODEC}: not readable ({error})") from error


def read_state(checkpoint: EdgeCheckpoint) -> Dict[str, Any]:
    """The content of `state.json`. Raises CheckpointError."""
    path = checkpoint.directory / STATE
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable ({error})") from error


def _tensors(checkpoint: EdgeCheckpoint, name: str) -> Dict[str, Tensor]:
    return dict(load_file(str(checkpoint.directory / name)))


def _load_ledger(ledger: Ledger, tensors: Mapping[str, Tensor], evaluation: Traffic, evaluation_samples: int) -> None:
    columns = {
        name: array("d" if name in PHASES else "q", column.numpy().tobytes()) for name, column in tensors.items()
    }
    ledger.load(columns, evaluation, evaluation_samples)


def _chunks(tensors: List[StoredTensor]) -> Iterable[bytes]:
    return safetensors_chunks(tensors)
