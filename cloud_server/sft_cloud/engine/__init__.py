"""Where a session comes to be and runs: from a checked request to net_2 on a device, and back from a checkpoint."""

from sft_cloud.engine.opener import Opener, TransformersOpener
from sft_cloud.engine.request import check_request, check_version
from sft_cloud.engine.saved_session import Checkpoints
from sft_cloud.engine.weights import WeightsFinder
from sft_cloud.engine.worker import DeviceWorker, Worker

__all__ = [
    "Checkpoints",
    "DeviceWorker",
    "Opener",
    "TransformersOpener",
    "WeightsFinder",
    "Worker",
    "check_request",
    "check_version",
]
