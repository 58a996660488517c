"""Names that are written down are those of the .proto."""

from sft.v1 import split_training_pb2 as pb
from sft.wire.protocol import SERVICE, TRAIN


def test_the_service_and_its_stream() -> None:
    service = pb.DESCRIPTOR.services_by_name["SplitTraining"]
    assert service.full_name == SERVICE
    assert f"/{service.full_name}/{service.methods_by_name['Train'].name}" == TRAIN
