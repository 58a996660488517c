"""Where a session comes to be and runs: from a checked request to net_2 on a device, and back from a checkpoint."""

from sft_cloud.engine.engine import PIECE_BYTES, Contents, Engine, Handled
from sft_cloud.engine.in_process import InProcessEngine
from sft_cloud.engine.opener import Opener, TransformersOpener
from sft_cloud.engine.request import check_request, check_version, missing_features
from sft_cloud.engine.saved_session import Checkpoints
from sft_cloud.engine.start import make_budget, make_opener, start_engine, uploads
from sft_cloud.engine.turns import Gone
from sft_cloud.engine.weights import WeightsFinder
from sft_cloud.engine.worker import Run

__all__ = [
    "PIECE_BYTES",
    "Checkpoints",
    "Contents",
    "Engine",
    "Gone",
    "Handled",
    "InProcessEngine",
    "Opener",
    "Run",
    "TransformersOpener",
    "WeightsFinder",
    "check_request",
    "check_version",
    "make_budget",
    "make_opener",
    "missing_features",
    "start_engine",
    "uploads",
]
