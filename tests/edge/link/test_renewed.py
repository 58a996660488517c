"""Files that let an edge in are renewed while a run is on: it goes on with what they say now."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Dict, Iterator

import grpc
import pytest
from support.scripted_cloud import ScriptedCloud, serving
from support.waits import Waits, losses

from sft.client.credentials import ClientOptions, read_credentials
from sft.errors import AccessError, StaleAccessError
from sft.v1 import split_training_pb2 as pb
from sft_edge.link.grpc_transport import GrpcTransport
from sft_edge.link.link import Blob, Link

OLD, NEW = "sft_the_old_one", "sft_the_new_one"


class Guarded(ScriptedCloud):
    """Lets in whoever has the token that is valid now."""

    def __init__(self) -> None:
        super().__init__()
        self.valid = OLD

    def check(self, context: grpc.ServicerContext) -> None:
        if dict(context.invocation_metadata()).get("authorization") != f"Bearer {self.valid}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "the token was revoked")

    def OpenSession(self, request: pb.OpenSessionRequest, context: grpc.ServicerContext) -> pb.OpenSessionResponse:
        self.check(context)
        return super().OpenSession(request, context)

    def UploadBlob(
        self, request_iterator: Iterator[pb.UploadBlobRequest], context: grpc.ServicerContext
    ) -> pb.UploadBlobResponse:
        self.check(context)
        return super().UploadBlob(request_iterator, context)


@pytest.fixture
def cloud() -> Guarded:
    guarded = Guarded()
    guarded.before_answer = lambda message, context: guarded.check(context)
    guarded.before_chunk = guarded.check
    return guarded


@pytest.fixture
def waits() -> Waits:
    return Waits()


@pytest.fixture
def token(tmp_path: Path) -> Path:
    file = tmp_path / "token"
    file.write_text(OLD)
    file.chmod(0o600)
    return file


def opened(address: str, token: Path, waits: Waits, blobs: Dict[str, Blob]) -> Link:
    options = ClientOptions(server=address, token_file=token)
    transport = GrpcTransport(address, credentials=read_credentials(options, environment={}))
    link = Link(transport, pb.OpenSessionRequest(), blobs, waits.policy(), waits.said.append)
    link.open()
    return link


def test_a_run_goes_on_with_the_token_that_the_file_has_now(cloud: Guarded, waits: Waits, token: Path) -> None:
    with serving(cloud) as address, opened(address, token, waits, {}) as link:
        assert losses(link, range(2)) == [0, 0, 1, 1]
        cloud.valid = NEW  # revoked first: the file is written while the edge tries
        waits.meanwhile = lambda: len(waits.delays) == 2 and token.write_text(NEW)
        assert losses(link, range(2, 4)) == [2, 2, 3, 3]
        assert len(waits.delays) == 2
        cloud.valid = OLD
        waits.meanwhile = lambda: token.write_text(OLD)
        assert b"".join(link.weights()) == b"net_2, as it is"
    assert waits.said[0].endswith("does not let us in: the token was revoked; try 1 in 500ms")


def test_a_token_may_be_renewed_during_a_first_upload(cloud: Guarded, waits: Waits, token: Path) -> None:
    content = b"the weights"
    sha256 = hashlib.sha256(content).hexdigest()
    cloud.wanted = [sha256]

    def chunks() -> Iterator[bytes]:
        cloud.valid = NEW  # by when the cloud looks, having had all
        yield content

    waits.meanwhile = lambda: token.write_text(NEW)
    with serving(cloud) as address, opened(address, token, waits, {sha256: Blob(len(content), chunks)}) as link:
        assert losses(link, range(1)) == [0, 0]
    assert len(waits.delays) == 1


def test_a_file_that_is_not_renewed_is_tried_for_a_minute(cloud: Guarded, waits: Waits, token: Path) -> None:
    with serving(cloud) as address, opened(address, token, waits, {}) as link:
        losses(link, range(1))
        cloud.valid = NEW
        with pytest.raises(AccessError, match=r"the token was revoked; 7 tries in 1m did not help$"):
            losses(link, range(1, 2))
    assert sum(waits.delays) == 60


def test_a_token_that_was_never_good_is_not_tried_for(cloud: Guarded, waits: Waits, token: Path) -> None:
    cloud.valid = NEW
    with serving(cloud) as address, pytest.raises(StaleAccessError, match="does not let us in"):
        opened(address, token, waits, {})
    assert not waits.delays
