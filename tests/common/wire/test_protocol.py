"""Names that are written down are those of the .proto, and gRPC's own."""

from pathlib import Path

from grpc._cython import cygrpc

from sft.v1 import split_training_pb2 as pb
from sft.wire.protocol import CLIENT_OPTIONS, SERVER_OPTIONS, SERVICE, TRAIN


def test_the_service_and_its_stream() -> None:
    service = pb.DESCRIPTOR.services_by_name["SplitTraining"]
    assert service.full_name == SERVICE
    assert f"/{service.full_name}/{service.methods_by_name['Train'].name}" == TRAIN


def test_grpc_knows_all_options() -> None:
    """One that it does not know is ignored without a word; of one that is given twice the first holds."""
    library = Path(cygrpc.__file__).read_bytes()
    for options in (CLIENT_OPTIONS, SERVER_OPTIONS):
        names = [name for name, _ in options]
        assert [name for name in names if name.encode() not in library] == []
        assert len(set(names)) == len(names)
