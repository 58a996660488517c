"""A script's opener takes an edge in until one has begun."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.hosting_script import AT, RANK, make_model
from support.script import adamw

from sft.errors import ServerFullError
from sft.tensors.stream import in_memory, safetensors_chunks
from sft.v1 import split_training_pb2 as pb
from sft.wire.protocol import PROTOCOL_VERSION
from sft_cloud.engine.worker import at_once
from sft_cloud.identity import ANONYMOUS
from sft_cloud.script.graph_host import GraphHost
from sft_cloud.script.opener import ScriptOpener
from sft_cloud.session.session import Session
from sft_cloud.storage.blobs import BlobStore


class OneModel:
    """An opener with what it stands on, and edges that have uploaded what they begin with."""

    def __init__(self, place: Path, is_over: Callable[[], bool] = lambda: False) -> None:
        self.model = make_model()
        self.hosted = GraphHost(self.model, AT, RANK, "none")
        self.names = [*self.hosted.parameters]
        self.store = BlobStore(place)
        self.opener = ScriptOpener(self.hosted, adamw(self.model), [self.names], self.store, is_over)

    def request(self, value: float) -> pb.OpenSessionRequest:
        """Of an edge all of whose numbers are `value`."""
        hashes = []
        for tensors in (self.hosted.tensors, self.hosted.factors):
            stored = in_memory({name: torch.full_like(tensor, value) for name, tensor in tensors.items()})
            data = b"".join(safetensors_chunks(stored))
            hashes.append(hashlib.sha256(data).hexdigest())
            self.store.of(ANONYMOUS).add(hashes[-1], len(data), [data])
        return pb.OpenSessionRequest(
            protocol_version=PROTOCOL_VERSION,
            cut=pb.Cut(mode=pb.MODE_SFT, layer_name=AT, split_rank=RANK, residual=pb.RESIDUAL_NONE),
            wire_data_type=pb.DATA_TYPE_FLOAT32,
            optimizer=pb.Optimizer(name="AdamW", groups=[pb.ParameterGroup(parameter_names=self.names)]),
            weights_sha256=hashes[0],
            factors_sha256=hashes[1],
        )

    @property
    def value(self) -> float:
        return float(self.model.get_submodule("6").weight.detach()[0, 0])


def test_only_a_session_that_has_had_no_message_makes_room(tmp_path: Path) -> None:
    one = OneModel(tmp_path)
    assert isinstance(one.opener.open(one.request(1.0), ANONYMOUS, at_once), Session)
    second = one.opener.open(one.request(2.0), ANONYMOUS, at_once)
    assert isinstance(second, Session)
    assert one.value == 2.0
    second.has_begun = True
    with pytest.raises(ServerFullError, match="trains with one edge"):
        one.opener.open(one.request(3.0), ANONYMOUS, at_once)
    assert one.value == 2.0


def test_an_edge_that_comes_while_another_is_looked_at(tmp_path: Path) -> None:
    """What an opener has found on the way in may no longer hold when it loads."""
    one = OneModel(tmp_path, is_over=iter([False, False, False, True]).__next__)
    one.opener.open(one.request(1.0), ANONYMOUS, at_once)
    with pytest.raises(ServerFullError, match="trains with one edge"):
        one.opener.open(one.request(2.0), ANONYMOUS, at_once)
    assert one.value == 1.0
